"""Rewrites a trained model's parameters into what an inference graph computes with.

Everything here is exact algebra on parameters, the same for every device: normalisations folded
into convolutions, and the channel shuffles turned into the order in which channels are stored.

An order is a list: which channel of the published network lies at each place in memory. As the
branches of a MambaMIC block mix channels only by matrix products, or not at all, the channels of
a block may lie in any order as long as the weights follow it; so no shuffle moves any data. The
one order that a graph chooses is that of the global branch; the others result from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mambamic.models.layers import PatchMerging
from mambamic.models.mambamic import N_CHUNKS, MambaMICBlock
from mambamic.models.medmamba import MedMambaBlock
from mambamic.models.ss2d import GatedScan

Order = Sequence[int]


@dataclass(frozen=True)
class ConvWeights:
    """A convolution with all that is folded into it; for a depthwise one I is 1.

    Args:
        weight: (O, I, kernel height, kernel width), float32.
        bias: (O,), float32.
    """

    weight: Tensor
    bias: Tensor

    def taps(self) -> Tensor:
        """Return a depthwise kernel as (9, O), one row per tap: contiguous over channels."""
        return self.weight.flatten(1).t().contiguous()

    def matrix(self) -> Tensor:
        """Return the kernel as (O, height * width * I): the columns of a patch in (H, W, C)."""
        return self.weight.permute(0, 2, 3, 1).flatten(1).contiguous()


@dataclass(frozen=True)
class LocalWeights:
    """The convolutional branch of either network.

    Args:
        scale: (C / 2,), of the first normalisation, which stands before a zero-padded
            convolution: it applies to the pixels inside the image only.
        shift: (C / 2,), likewise.
        convs: The three convolutions, each followed by ReLU, normalisations folded in.
    """

    scale: Tensor
    shift: Tensor
    convs: tuple[ConvWeights, ConvWeights, ConvWeights]


@dataclass(frozen=True)
class StateSpaceWeights:
    """The gated scan up to its gate; D channels.

    Args:
        in_proj: (2 D, d_model): first the scanned half, then the gate.
        conv: Depthwise, followed by SiLU.
        x_proj: (K, R + 2 N, D): dt, B and C per direction.
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        A: (K, D, N), negative.
        skip: (K, D).
        norm: Of the scan's output, (D,) weight and (D,) bias.
    """

    in_proj: Tensor
    conv: ConvWeights
    x_proj: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    skip: Tensor
    norm: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class MambaMICBlockWeights:
    """One block of MambaMIC, C channels, d = C / 8 per chunk, D = 2 d.

    The right half of the input is read in the order ``gather``. From there to the interaction
    both branches lie in one order, the graph's ``right``: place u of the global branch is its
    channel ``right[u]``, and place u of the local branch is the channel that it meets there.

    Args:
        local: The left half, its input in the order in which it is stored, output in ``right``.
        gather: (C / 2,), for each place u the stored place within the right half.
        norm: (C / 2,) weight and bias of both normalisations of the global branch, by place.
        chunk: (C / 2,), the channel of each place counted through the chunks: it is channel
            ``chunk[u] % d`` of chunk ``chunk[u] // d``. Equal to ``right``.
        state_space: One chunk's, in the network's own order.
        feed: The 1x1 convolution after the gate, followed by SiLU: its d outputs of a chunk
            already in the shuffled order, that is, as they are added to the chunk.
        filtered: (d // 4,), which of these d outputs the depthwise filter takes next.
        filter: Depthwise over those, in the order of ``filtered``; followed by SiLU.
        skip_scale: How much of a chunk is added to its result.
        interaction: Depthwise (C / 2), by place.
        attention: (C,), of the channel attention, in the order of ``out_order``.
        out_a: (C / 2,), where the masked global channel of place u is stored in the output.
        out_b: (C / 2,), the same for the masked local channel.
        out_order: (C,), the order in which the output is stored.
    """

    local: LocalWeights
    gather: list[int]
    norm: tuple[Tensor, Tensor]
    chunk: list[int]
    state_space: StateSpaceWeights
    feed: ConvWeights
    filtered: list[int]
    filter: ConvWeights
    skip_scale: float
    interaction: ConvWeights
    attention: Tensor
    out_a: list[int]
    out_b: list[int]
    out_order: list[int]


@dataclass(frozen=True)
class MedMambaBlockWeights:
    """One block of MedMamba, C channels, in the network's own order.

    Args:
        local: The left half.
        norm: (C / 2,) weight and bias, of the right half.
        state_space: Of the right half.
        out_proj: (C / 2, D).
    """

    local: LocalWeights
    norm: tuple[Tensor, Tensor]
    state_space: StateSpaceWeights
    out_proj: Tensor


@dataclass(frozen=True)
class MergeWeights:
    """The merge of 2x2 patches: phases concatenated in the order in which each is stored.

    Args:
        norm: (4 C,) weight and bias.
        weight: (2 C, 4 C).
    """

    norm: tuple[Tensor, Tensor]
    weight: Tensor


def shuffled(channels: int, groups: int) -> list[int]:
    """Return where a channel shuffle takes each of its outputs from."""
    return [group * (channels // groups) + i for i in range(channels // groups)
            for group in range(groups)]  # fmt: skip


def inverse(order: Order) -> list[int]:
    """Return at which place of an order each channel lies."""
    places = [0] * len(order)
    for place, channel in enumerate(order):
        places[channel] = place
    return places


def vector_order(channels: int) -> list[int]:
    """Return the order of the global branch that lets a block write whole vectors.

    Args:
        channels: C / 2, of the branch.

    Returns:
        The channels sorted by the quarter of the block's output to which the shuffles carry
        them, so that those of the next block's left half and right half are two runs.
    """
    mixed = shuffled(channels, channels // 2)  # of the global branch, before the interaction
    return [mixed[4 * i + quarter] for quarter in range(4) for i in range(channels // 4)]


def fold_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return a batch normalisation in evaluation mode as a scale and a shift per channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return scale.float(), shift.float()


def fold_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> ConvWeights:
    """Return a convolution with the normalisation after it folded in."""
    weight = conv.weight.detach().float()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().float()
    if norm is None:
        return ConvWeights(weight, bias)
    scale, shift = fold_norm(norm)
    return ConvWeights(weight * scale.view(-1, 1, 1, 1), bias * scale + shift)


def fold_state_space(layer: GatedScan) -> StateSpaceWeights:
    """Return the parameters of a gated scan as float32, A taken out of its logarithm."""
    directions = len(layer.x_proj_weight)
    return StateSpaceWeights(
        in_proj=layer.in_proj.weight.detach().float(),
        conv=fold_conv(layer.conv2d),
        x_proj=layer.x_proj_weight.detach().float(),
        dt_weight=layer.dt_projs_weight.detach().float(),
        dt_bias=layer.dt_projs_bias.detach().float(),
        A=-torch.exp(layer.A_logs.detach().float()).unflatten(0, (directions, -1)),
        skip=layer.Ds.detach().float().unflatten(0, (directions, -1)),
        norm=_norm(layer.out_norm),
    )


def fold_mambamic_block(
    block: MambaMICBlock, in_order: Order, right: Order
) -> MambaMICBlockWeights:
    """Fold one block of MambaMIC.

    Args:
        block: In evaluation mode.
        in_order: (C,), the order in which its input is stored: the left half in the first
            C / 2 places, the right half in the others.
        right: (C / 2,), the order of the global branch, such as ``vector_order`` gives.
    """
    half = len(right)
    d = half // N_CHUNKS
    branch, interaction = block.pvm_layer, block.MIFA
    stored = inverse([channel - half for channel in in_order[half:]])
    # After the shuffle of the global branch its channel `right[u]` is channel `meets[u]`.
    after = inverse(shuffled(half, half // 2))
    meets = [after[channel] for channel in right]
    # The interaction concatenates and shuffles: a, then b, to these channels of the output.
    output = inverse(shuffled(2 * half, half // 2))
    true_a, true_b = [output[c] for c in meets], [output[half + c] for c in meets]
    # Stored: the left half's a and b, then the right half's.
    out_order = [
        channel
        for side in (False, True)
        for channels in (true_a, true_b)
        for channel in channels
        if (channel >= half) == side
    ]
    places = inverse(out_order)
    laef = branch.mamba.PSFFN
    mixed = shuffled(d, d // 2)
    feed = fold_conv(laef.conv_0)
    return MambaMICBlockWeights(
        local=_fold_mambamic_local(block.Conv_branch, in_order[:half], meets),
        gather=[stored[channel] for channel in right],
        norm=_norm(branch.norm, right),
        chunk=list(right),
        state_space=fold_state_space(branch.mamba),
        feed=_select(feed, mixed),
        filtered=inverse(mixed)[: laef.filtered],
        filter=fold_conv(laef.conv_1),
        skip_scale=float(branch.skip_scale.detach()),
        interaction=_select(fold_conv(interaction.DWConv), meets),
        attention=interaction.attention.conv.weight.detach().float().flatten()[list(out_order)],
        out_a=[places[channel] for channel in true_a],
        out_b=[places[channel] for channel in true_b],
        out_order=out_order,
    )


def _fold_mambamic_local(layers: nn.Sequential, in_order: Order, out_order: Order) -> LocalWeights:
    parts: list[Any] = list(layers)
    first, conv_1, norm_1, _, conv_2, norm_2, _, mix, norm_3, _ = parts
    scale, shift = fold_norm(first)
    # Each input channel of the expanding convolution gives two neighbouring outputs.
    expanded = [2 * channel + i for channel in in_order for i in range(2)]
    mixing = _select(fold_conv(mix, norm_3), out_order)
    return LocalWeights(
        scale=scale[list(in_order)],
        shift=shift[list(in_order)],
        convs=(
            _select(fold_conv(conv_1, norm_1), in_order),
            _select(fold_conv(conv_2, norm_2), expanded),
            ConvWeights(mixing.weight[:, expanded], mixing.bias),
        ),
    )


def fold_medmamba_block(block: MedMambaBlock) -> MedMambaBlockWeights:
    """Fold one block of MedMamba, in evaluation mode."""
    parts: list[Any] = list(block.conv33conv33conv11)
    first, conv_1, norm_1, _, conv_2, norm_2, _, mix, _ = parts
    scale, shift = fold_norm(first)
    return MedMambaBlockWeights(
        local=LocalWeights(
            scale, shift, (fold_conv(conv_1, norm_1), fold_conv(conv_2, norm_2), fold_conv(mix))
        ),
        norm=_norm(block.ln_1),
        state_space=fold_state_space(block.self_attention),
        out_proj=block.self_attention.out_proj.weight.detach().float(),
    )


def fold_merge(merge: PatchMerging, in_order: Order) -> MergeWeights:
    """Fold a merge whose input is stored in ``in_order``; its output is in the network's own."""
    channels = len(in_order)
    order = [phase * channels + channel for phase in range(4) for channel in in_order]
    return MergeWeights(
        norm=_norm(merge.norm, order), weight=merge.reduction.weight.detach().float()[:, order]
    )


def _norm(norm: nn.LayerNorm, order: Order | None = None) -> tuple[Tensor, Tensor]:
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    return (weight, bias) if order is None else (weight[list(order)], bias[list(order)])


def _select(conv: ConvWeights, outputs: Order) -> ConvWeights:
    return ConvWeights(conv.weight[list(outputs)], conv.bias[list(outputs)])
