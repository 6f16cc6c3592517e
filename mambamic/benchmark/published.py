"""What the published code reaches, the best of float32, TF32 and float16 autocast.

Measured on one NVIDIA H200 at 224 x 224 pixels (torch 2.11, CUDA 13, driver 580) with the
networks' research code and mamba_ssm's scan. Nothing is compared on any other kind of device.
"""

from __future__ import annotations

DEVICE = "H200"
# Images per second, at the best batch size.
THROUGHPUT = {"mambamic_t": 973.0, "mambamic_s": 747.0, "mambamic_b": 515.0, "medmamba_t": 1639.0}
# Milliseconds for one image.
LATENCY = {"mambamic_t": 54.0, "mambamic_s": 74.0, "mambamic_b": 96.0, "medmamba_t": 13.0}
# Images per second of one Adam step, at batch 256 (MambaMIC) and the largest that fits (MedMamba).
TRAINING = {"mambamic_t": 228.0, "medmamba_t": 457.0}
# Milliseconds of the float16 scan alone, without cross-scan and merge, by (B, K, D, L).
SCAN = {
    (128, 4, 96, 3136): 6.01,
    (512, 4, 24, 3136): 7.12,
    (128, 4, 192, 784): 2.67,
    (128, 4, 384, 196): 1.50,
    (128, 4, 768, 49): 1.71,
}


def compared(device_name: str) -> bool:
    """Return whether figures from this device may stand beside the published code's."""
    return DEVICE in device_name
