"""The 2-D selective scan: one reference, one file per backend, one dispatcher."""

from mambamic.kernels.scan import describe, resolve, selective_scan_2d, status

__all__ = ["describe", "resolve", "selective_scan_2d", "status"]
