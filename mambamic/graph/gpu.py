"""The inference graph on an NVIDIA GPU: matrix products, the scan and fused layers between them.

Images stay (B, H, W, C) throughout. Both branches of a block run at the same time where the
device has room. Nothing here waits for the device, so that a call can be captured (`replay`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambamic.graph import fold
from mambamic.kernels import cuda, cuda_layers
from mambamic.models.layers import check_image
from mambamic.models.mambamic import N_CHUNKS, MambaMIC
from mambamic.models.medmamba import MedMamba

_VECTOR = 8  # the kernels move eight channels at once


@contextmanager
def opening_libraries(device: torch.device) -> Iterator[None]:
    """Have another thread open the GPU, cuBLAS and cuDNN while the block runs.

    The first time in a process this takes half a second, in which the interpreter has nothing
    to do. What fails there is raised after the block, unless the block itself fails.
    """
    with ThreadPoolExecutor(1, "open-libraries") as pool:
        opened = pool.submit(_open_libraries, device)
        yield
        try:
            opened.result()
        finally:
            del opened  # it holds the exception, whose traceback holds the caller's frame


@torch.inference_mode()
def _open_libraries(device: torch.device) -> None:
    image = torch.zeros((1, _VECTOR, 3, 3), dtype=torch.float16, device=device)
    F.conv2d(image, image)
    rows = image.view(_VECTOR, 9)[:, :_VECTOR].contiguous()
    F.linear(rows, rows)
    F.linear(rows, rows, rows[0])  # with a bias it is cuBLASLt's


class _Place:
    """Where the weights go, and what both networks do with them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.side = torch.cuda.Stream(device)

    def matrix(self, weight: Tensor) -> Tensor:
        """Place the weight of a matrix product, in the graph's dtype."""
        return weight.to(self.device, self.dtype).contiguous()

    def vector(self, values: Tensor) -> Tensor:
        """Place parameters of a norm or of a depthwise convolution, in float32."""
        return values.to(self.device, torch.float32).contiguous()

    def pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Place two of them."""
        return self.vector(first), self.vector(second)

    def indices(self, values: list[int]) -> Tensor:
        """Place channel numbers."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def kernel(self, weight: Tensor) -> Tensor:
        """Place the weight of a dense convolution, in the graph's dtype and layout."""
        placed = weight.to(self.device, self.dtype)
        return placed.contiguous(memory_format=torch.channels_last)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run what is inside at the same time as what follows, until ``join``."""
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            yield

    def join(self) -> None:
        """Wait for what ran beside."""
        torch.cuda.current_stream(self.device).wait_stream(self.side)


class _Scan:
    """From the scanned half of the input projection to the gated, normalised output."""

    def __init__(self, weights: fold.StateSpaceWeights, chunks: int, place: _Place) -> None:
        self.chunks, self.inner = chunks, weights.in_proj.shape[0] // 2
        self.taps = place.vector(weights.conv.taps().repeat(1, chunks))
        self.bias = place.vector(weights.conv.bias.repeat(chunks))
        self.x_proj = place.matrix(cuda.pack_projection(weights.x_proj))
        self.scan = cuda.ScanWeights.of(
            *map(place.vector, (weights.dt_weight, weights.dt_bias, weights.A, weights.skip))
        )
        self.norm = place.pair(*weights.norm)

    def __call__(self, projected: Tensor) -> Tensor:
        """Map (B, H, W, 2 G D) to (B, H, W, G D)."""
        x = cuda_layers.depthwise(projected, self.chunks * self.inner, self.taps, self.bias, "silu")
        stacked = x.unflatten(-1, (self.chunks, self.inner)) if self.chunks > 1 else x
        y = cuda.scan_inference(stacked, F.linear(stacked, self.x_proj), self.scan)
        y = y.unflatten(-1, (1, -1)) if self.chunks == 1 else y
        return cuda_layers.gated_norm(y, projected, *self.norm)


class _MambaMICBlock:
    """One block.

    Args:
        weights: Folded.
        place: Where they go.
        offset: (C,), still to be added to the input, in the order in which it is stored.
    """

    def __init__(
        self, weights: fold.MambaMICBlockWeights, place: _Place, offset: Tensor | None
    ) -> None:
        self.place = place
        first, second, mix = weights.local.convs
        scale, shift = weights.local.scale, weights.local.shift
        self.offset = None
        if offset is not None:
            left, right = offset.chunk(2)
            shift = shift + scale * left
            self.offset = place.vector(right)
        self.affine = place.pair(scale, shift)
        self.first = place.pair(first.taps(), first.bias)
        self.second = place.pair(second.taps(), second.bias)
        self.mix = place.matrix(mix.matrix()), place.matrix(mix.bias)
        self.gather = place.indices(weights.gather)
        self.norm = place.pair(*weights.norm)
        scanned, gate = weights.state_space.in_proj.chunk(2)
        projection = torch.cat([_block_diagonal(scanned), _block_diagonal(gate)])
        self.in_proj = place.matrix(projection[:, weights.chunk])
        self.scan = _Scan(weights.state_space, N_CHUNKS, place)
        self._place_filter(weights, place)
        self.skip_scale = 1.0 + weights.skip_scale
        self.interaction = place.pair(weights.interaction.taps(), weights.interaction.bias)
        self.attention = place.vector(weights.attention)
        half = len(weights.out_a)
        first_half = list(range(half // 2))
        expected = first_half + [half + channel for channel in first_half]
        assert weights.out_a == expected  # what cuda_layers.interact writes
        assert weights.out_b == [half // 2 + channel for channel in expected]

    def _place_filter(self, weights: fold.MambaMICBlockWeights, place: _Place) -> None:
        # The channels that are filtered are computed a second time behind the others, where the
        # depthwise kernel finds them side by side; it writes its results over the first.
        d, natural = len(weights.feed.bias), fold.inverse(weights.chunk)
        filtered = [chunk * d + c for chunk in range(N_CHUNKS) for c in weights.filtered]
        missing = -len(filtered) % _VECTOR
        rows = _block_diagonal(weights.feed.weight.flatten(1))
        bias = weights.feed.bias.repeat(N_CHUNKS)
        order = [*weights.chunk, *filtered]
        self.feed = (
            place.matrix(F.pad(rows[order], (0, 0, 0, missing))),
            place.matrix(F.pad(bias[order], (0, missing))),
        )
        self.filtered = len(filtered) + missing
        self.filter = place.pair(
            F.pad(weights.filter.taps().repeat(1, N_CHUNKS), (0, missing)),
            F.pad(weights.filter.bias.repeat(N_CHUNKS), (0, missing)),
        )
        self.scatter = place.indices([natural[c] for c in filtered] + [-1] * missing)

    def __call__(
        self, x: Tensor, gate: Tensor | None, *, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, H, H, C) and its channels' gate to the next, and the means of the gated."""
        half = x.shape[-1] // 2
        with self.place.beside():
            local = cuda_layers.depthwise(x, half, *self.first, "relu", affine=(*self.affine, gate))
            local = cuda_layers.depthwise(local, half, *self.second, "relu")
            local = F.linear(local, *self.mix)
        n = cuda_layers.gather_norm(x, gate, self.offset, self.gather, *self.norm)
        f = F.linear(self.scan(F.linear(n, self.in_proj)), *self.feed)
        cuda_layers.depthwise(
            f, self.filtered, *self.filter, "none",
            offset=half, input_silu=True, scatter=self.scatter, out=f,
        )  # fmt: skip
        global_ = cuda_layers.transposed_residual_norm(n, f, self.skip_scale, *self.norm)
        self.place.join()
        return cuda_layers.interact(
            local, global_, *self.interaction, self.attention, keep=not last
        )


class _MedMambaBlock:
    def __init__(self, weights: fold.MedMambaBlockWeights, place: _Place) -> None:
        self.place = place
        self.affine = place.pair(weights.local.scale, weights.local.shift)
        self.norm = place.pair(*weights.norm)
        *dense, mix = weights.local.convs
        self.dense = [(place.kernel(conv.weight), place.matrix(conv.bias)) for conv in dense]
        self.mix = place.matrix(mix.matrix()), place.matrix(mix.bias)
        self.in_proj = place.matrix(weights.state_space.in_proj)
        self.scan = _Scan(weights.state_space, 1, place)
        self.out_proj = place.matrix(weights.out_proj)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same, in place."""
        # Held until both have joined: what is free, the stream that it came from uses again.
        left, right = cuda_layers.split_norm(x, *self.affine, *self.norm)
        with self.place.beside():
            local = left
            for weight, bias in self.dense:
                local = _conv_relu(local, weight, bias)
            local = F.linear(local, *self.mix)
        right = F.linear(self.scan(F.linear(right, self.in_proj)), self.out_proj)
        self.place.join()
        return cuda_layers.interleave_add_(x, local, right)


class _Merge:
    def __init__(self, weights: fold.MergeWeights, place: _Place) -> None:
        self.norm = place.pair(*weights.norm)
        self.weight = place.matrix(weights.weight)

    def __call__(self, x: Tensor, gate: Tensor | None) -> Tensor:
        return F.linear(cuda_layers.merge_norm(x, gate, *self.norm), self.weight)


class GpuGraph:
    """A trained network as a function of pixels on the GPU.

    Args:
        model: In evaluation mode; its weights are copied.
        device: Of the graph.
        dtype: float32, float16 or bfloat16, of feature maps and matrix products. Norms,
            depthwise kernels, states and the head are float32.
        scale: (3,), which multiplies pixels of 0 to 255.
        shift: (3,), added then.
    """

    def __init__(
        self,
        model: MambaMIC | MedMamba,
        device: torch.device,
        dtype: torch.dtype,
        scale: Tensor,
        shift: Tensor,
    ) -> None:
        place = _Place(device, dtype)
        self._minimum, self._square = model.minimum_size, isinstance(model, MambaMIC)
        self._pixels = place.pair(scale, shift)
        self._dtype = dtype
        self._network = (
            _MambaMIC(model, place) if isinstance(model, MambaMIC) else _MedMamba(model, place)
        )
        head = model.head.weight.detach()[:, list(self._network.out_order)]
        self._head = place.pair(head, model.head.bias.detach())
        self.out_order: Sequence[int] = self._network.out_order

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Classify.

        Args:
            pixels: (B, H, W, 3) uint8 on the device, of a size that the network takes.

        Returns:
            Logits (B, classes), float32.

        Raises:
            ShapeError: The images are too small, or not square where they must be.
        """
        return self.outputs(pixels)[0]

    @torch.inference_mode()
    def outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Classify, and return what the head saw as well.

        Args:
            pixels: As for a call.

        Returns:
            Logits (B, classes) and features (B, C), whose channel ``j`` is the network's
            ``out_order[j]``; float32.

        Raises:
            ShapeError: As a call does.
        """
        check_image(pixels.permute(0, 3, 1, 2), self._minimum, square=self._square)
        features = self._network(pixels, self._pixels, self._dtype)
        return F.linear(features, *self._head), features


class _MambaMIC:
    def __init__(self, model: MambaMIC, place: _Place) -> None:
        embed: Any = model.patch_embed
        first, second = (fold.fold_conv(layer.c, layer.bn) for layer in (embed[0], embed[2]))
        self.first = place.pair(first.matrix().t(), first.bias)
        self.second = place.kernel(second.weight)
        offset: Tensor | None = second.bias  # the first block adds it, for nothing
        self.stages: list[tuple[list[_MambaMICBlock], _Merge | None]] = []
        order: fold.Order = ()
        for stage in model.layers:
            modules: Any = stage
            order = range(2 * modules.blocks[0].pvm_layer.norm.weight.numel())
            right = fold.vector_order(len(order) // 2)
            blocks = []
            for block in modules.blocks:
                weights = fold.fold_mambamic_block(block, order, right)
                blocks.append(_MambaMICBlock(weights, place, offset))
                order, offset = weights.out_order, None
            merge = modules.downsample
            if merge is not None:
                merge = _Merge(fold.fold_merge(merge, order), place)
            self.stages.append((blocks, merge))
        self.out_order = order

    def __call__(
        self, pixels: Tensor, scaling: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> Tensor:
        x = cuda_layers.stem(pixels, *scaling, *self.first, dtype)
        x = _conv(x, self.second, stride=2)
        means = x
        for blocks, merge in self.stages:
            gate = None
            for i, block in enumerate(blocks):
                last = merge is None and i == len(blocks) - 1
                x, gate, means = block(x, gate, last=last)
            if merge is not None:
                x = merge(x, gate)
        return means


class _MedMamba:
    def __init__(self, model: MedMamba, place: _Place) -> None:
        embed = fold.fold_conv(model.patch_embed.proj)
        self.embed = place.matrix(embed.matrix()), place.matrix(embed.bias)
        self.norm = place.pair(
            model.patch_embed.norm.weight.detach(), model.patch_embed.norm.bias.detach()
        )
        self.stages: list[tuple[list[_MedMambaBlock], _Merge | None]] = []
        for stage in model.layers:
            modules: Any = stage
            blocks = [
                _MedMambaBlock(fold.fold_medmamba_block(block), place) for block in modules.blocks
            ]
            merge = modules.downsample
            if merge is not None:
                order = range(merge.norm.weight.numel() // 4)
                merge = _Merge(fold.fold_merge(merge, order), place)
            self.stages.append((blocks, merge))
        self.out_order: fold.Order = range(model.head.in_features)

    def __call__(
        self, pixels: Tensor, scaling: tuple[Tensor, Tensor], dtype: torch.dtype
    ) -> Tensor:
        patches = cuda_layers.patches(pixels, *scaling, dtype)
        x = cuda_layers.norm_(F.linear(patches, *self.embed), *self.norm)
        for blocks, merge in self.stages:
            for block in blocks:
                x = block(x)
            if merge is not None:
                x = merge(x, None)
        return torch.mean(x, dim=(1, 2), dtype=torch.float32)


def _block_diagonal(weight: Tensor) -> Tensor:
    blocks: Tensor = torch.block_diag(*[weight] * N_CHUNKS)
    return blocks


def _exact_convolutions() -> AbstractContextManager[None]:
    # Where float32 is asked for, TensorFloat-32 would leave three digits of it.
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


def _conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    with _exact_convolutions():
        convolved: Tensor = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding=1)
    return convolved.permute(0, 2, 3, 1)


def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    stride, padding, dilation, groups = (1, 1), (1, 1), (1, 1), 1
    with _exact_convolutions():
        convolved: Tensor = torch.cudnn_convolution_relu(
            x.permute(0, 3, 1, 2), weight, bias, stride, padding, dilation, groups
        )
    return convolved.permute(0, 2, 3, 1)
