"""The names of the backends, where nobody needs torch to know them."""

from __future__ import annotations

SCAN_BACKENDS = ("auto", "reference", "cpu", "cuda", "mamba_ssm")  # under torch
BACKENDS = (*SCAN_BACKENDS, "onnxruntime")  # of a classifier
