"""MambaMIC and MedMamba, each readable in one file against its paper."""

from mambamic.models.registry import (
    VARIANTS,
    create_model,
    from_upstream,
    load_exactly,
    set_scan_backend,
)

__all__ = ["VARIANTS", "create_model", "from_upstream", "load_exactly", "set_scan_backend"]
