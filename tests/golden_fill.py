"""Deterministic weights for the golden files: a pure function of (key, shape, seed).

Every tensor of a state dict is drawn from its own generator, seeded by the CRC-32 of
its key, so neither the order of the keys nor any other tensor matters.  Values are
chosen so that no layer is trivial: norms are not the identity, running statistics are
not 0 and 1, and the state-space parameters lie where training leaves them.
"""

import zlib

import numpy as np


def tensor_for(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return the float32 array (int64 zero for ``num_batches_tracked``) for one key."""
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    name = key.rsplit(".", 1)[-1]
    if name == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    if name == "running_var":
        value = rng.uniform(0.5, 1.5, shape)
    elif name == "running_mean":
        value = rng.normal(0.0, 0.1, shape)
    elif name == "A_logs":
        value = np.log(np.arange(1, shape[-1] + 1)) + rng.normal(0.0, 0.1, shape)
    elif name in ("Ds", "skip_scale"):
        value = 1.0 + rng.normal(0.0, 0.1, shape)
    elif name == "dt_projs_bias":
        value = rng.uniform(-5.0, -2.0, shape)
    elif name == "bias":
        value = rng.normal(0.0, 0.1, shape)
    elif len(shape) <= 1:  # the scale of a norm layer
        value = rng.uniform(0.5, 1.5, shape)
    else:  # linear and convolution weights; two of them are stacked per direction
        stacked = name in ("x_proj_weight", "dt_projs_weight")
        fan_in = int(np.prod(shape[2:] if stacked else shape[1:]))
        value = rng.normal(0.0, fan_in**-0.5, shape)
    return value.astype(np.float32)


def image_for(batch: int, size: int, seed: int) -> np.ndarray:
    """Return a normalised (batch, 3, size, size) float32 input with smooth and fine detail."""
    rng = np.random.default_rng([seed, batch, size])
    y, x = np.mgrid[0:size, 0:size] / size
    planes = [
        np.sin(2 * np.pi * (rng.uniform(1, 6) * x + rng.uniform(1, 6) * y) + rng.uniform(0, 6))
        for _ in range(batch * 3)
    ]
    smooth = np.stack(planes).reshape(batch, 3, size, size)
    return (smooth + 0.3 * rng.normal(size=smooth.shape)).astype(np.float32)
