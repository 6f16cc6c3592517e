"""The selective state-space layer over an image, common to both networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambamic.kernels import selective_scan_2d
from mambamic.models.layers import LayerNorm, channels_last, step_bias

N_DIRECTIONS = 4


class GatedScan(nn.Module):
    """Project, convolve, scan in four directions, normalise and gate.

    Parameter names are those of the published code. What follows the gate differs between the
    networks and lives in the subclasses.
    """

    def __init__(self, d_model: int, d_state: int = 16, expand: int = 2) -> None:
        super().__init__()
        self.d_model, self.d_state = d_model, d_state
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.scan_backend = "auto"

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv2d = nn.Conv2d(
            self.d_inner, self.d_inner, kernel_size=3, padding=1, groups=self.d_inner
        )
        self.x_proj_weight = nn.Parameter(
            torch.empty(N_DIRECTIONS, self.dt_rank + 2 * d_state, self.d_inner)
        )
        self.dt_projs_weight = nn.Parameter(torch.empty(N_DIRECTIONS, self.d_inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(N_DIRECTIONS, self.d_inner))
        self.A_logs = nn.Parameter(torch.empty(N_DIRECTIONS * self.d_inner, d_state))
        self.Ds = nn.Parameter(torch.empty(N_DIRECTIONS * self.d_inner))
        self.out_norm = LayerNorm(self.d_inner)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the state-space parameters as published."""
        bound = self.d_inner**-0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_projs_weight, -bound, bound)
        with torch.no_grad():
            self.dt_projs_bias.copy_(step_bias(*self.dt_projs_bias.shape))
            self.A_logs.copy_(torch.log(torch.arange(1.0, self.d_state + 1)))
        nn.init.ones_(self.Ds)

    def scan(self, x: Tensor) -> Tensor:
        """Run the 2-D selective scan: (B, H, W, d_inner) to the same shape and dtype."""
        projections = F.linear(x, self.x_proj_weight.flatten(0, 1))
        return selective_scan_2d(
            x,
            projections.unflatten(-1, (N_DIRECTIONS, -1)),  # [B, H, W, K, R + 2 N]
            self.dt_projs_weight,
            self.dt_projs_bias,
            -torch.exp(self.A_logs.float()).unflatten(0, (N_DIRECTIONS, -1)),
            self.Ds.unflatten(0, (N_DIRECTIONS, -1)),
            backend=self.scan_backend,
        )

    def gated_scan(self, x: Tensor) -> Tensor:
        """Map (B, H, W, d_model) to (B, H, W, d_inner)."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(channels_last(self.conv2d, x))
        gated: Tensor = self.out_norm(self.scan(x), gate)
        return gated
