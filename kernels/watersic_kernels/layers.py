"""Products of few tokens with several layers, in one launch.

Shapes: M = tokens, A = out_features (rows), N = in_features (columns), R, C = rows and columns of
        all tiles, S = splits of the columns, L = layers, B = bands of all layers.

Layers with the same input, such as the projections to queries, keys and values, are parts of the
same grid: their bands follow each other.  A kernel has a tuple with an entry per layer in place of
every tensor.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from watersic_kernels.product import GEMV_TOKENS, _finish, _of_layer, finish, fold


class Layer(NamedTuple):
    """A weight in a layout, and where its products go."""

    layout: Sequence[Tensor]
    """Tensors of the layout; the last are the states of a trellis, row order, column order, and
    three of the outliers."""
    row_scale_A: Tensor
    col_scale_N: Tensor
    y_MA: Tensor
    """Receives the products; contiguous in its rows."""

    @property
    def bands(self) -> int:
        """Bands of the layout."""
        return len(self.layout[-2])

    @property
    def rows(self) -> int:
        """Rows of all tiles."""
        return len(self.layout[-5])

    @property
    def band(self) -> int:
        """Rows of a band."""
        return self.rows // self.bands


def is_path(layout: Sequence[Tensor]) -> bool:
    """Return whether a layout holds codes of a trellis."""
    return layout[-6].shape[-1] > 0


def layers_of(
    x_MN: Tensor, weights: Sequence[tuple[Sequence[Tensor], Tensor, Tensor]], y_MA: Tensor
) -> list[list[Layer]]:
    """Return layers with the same input, in groups that one launch can multiply with.

    Args:
        x_MN: input.
        weights: the tensors of a layout, row scales and column scales of every layer.
        y_MA: receives the outputs of all layers side by side.
    """
    parts = y_MA.split([len(row_scale_A) for _, row_scale_A, _ in weights], 1)
    layers = [Layer(*weight, part) for weight, part in zip(weights, parts, strict=True)]
    if len(x_MN) > GEMV_TOKENS:
        return [[layer] for layer in layers]
    return [list(group) for _, group in groupby(layers, _kind)]


def _kind(layer: Layer) -> list[tuple]:
    tensors = (*layer.layout, layer.row_scale_A, layer.col_scale_N)
    return [(tensor.dtype, tensor.shape[1:]) for tensor in tensors]


def vector_product(
    kernel: Any,
    x_MN: Tensor,
    layers: Sequence[Layer],
    splits: int,
    tensors: Sequence[Sequence[Tensor]],
    sizes: Sequence[Sequence[int]],
    *arguments: Tensor | int,
    **constants: int,
) -> None:
    """Multiply at most `GEMV_TOKENS` tokens with some layers; one token takes two launches.

    Args:
        kernel: the product.  Its arguments are the folded x, L x C x tokens; a tuple, with an entry
            per layer, for each of `tensors`, the row orders, row scales and outputs; the sums and
            `arrived_B`; such tuples of the first bands, the outputs and `sizes`; and `arguments`.
        x_MN: input.
        layers: the layers, of the same kind.
        splits: parts into which the columns are split.
        tensors: for every layer, tensors for the kernel.
        sizes: for every layer, numbers for the kernel.
        arguments: further arguments, the same for all layers.
        constants: constants of the kernel.
    """
    tokens = triton.next_power_of_2(len(x_MN))
    rows, bands = sum(layer.rows for layer in layers), sum(layer.bands for layer in layers)
    orders, scales = [layer.layout[-4] for layer in layers], [layer.col_scale_N for layer in layers]
    arrived_B = x_MN.new_empty(bands, dtype=torch.int32)
    folded_LCM = fold(x_MN, orders, scales, tokens, dtype=torch.float32, cleared=arrived_B)
    sums_SMR = x_MN.new_empty(splits, tokens, rows, dtype=torch.float32)
    results = [(layer.layout[-5], layer.row_scale_A, layer.y_MA) for layer in layers]
    first_bands = [sum(layer.bands for layer in layers[:l]) for l in range(len(layers))]
    outputs = [len(layer.row_scale_A) for layer in layers]
    numbers = (first_bands, outputs, *zip(*sizes, strict=True))
    kernel[(bands, splits)](
        folded_LCM,
        *zip(*tensors, strict=True),
        *zip(*results, strict=True),
        sums_SMR,
        arrived_B,
        *(tuple(map(_unspecialized, values)) for values in numbers),
        *arguments,
        TOKENS=tokens,
        num_warps=1,
        enable_fp_fusion=True,
        **constants,
    )
    if tokens > 1:
        parts = sums_SMR.split([layer.rows for layer in layers], 2)
        for part_SMr, result in zip(parts, results, strict=True):
            finish(part_SMr, *result)


def _unspecialized(number: int) -> int:
    """Return an odd number from 3 on, which `_number` turns back.

    Triton compiles again for integers in tuples that are 1 or multiples of 16.
    """
    return 2 * number + 3


@triton.jit
def _number(values, l):
    return (_of_layer(values, l) >> 1) - 1


@triton.jit
def _layer(first_band, b):
    # the layer of a band of all layers
    l = 0
    for i in tl.static_range(1, len(first_band)):
        l += (b >= (first_band[i] >> 1) - 1).to(tl.int32)
    return l


@triton.jit
def _store_sums(
    sums,
    sums_SMR,
    arrived_B,
    order_R,
    scale_A,
    y_MA,
    A,
    b_of_layer,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
):
    # the sums of a program.  With one token, the last program of a band also writes the outputs of
    # its rows: always in the same order, whichever program that is
    b = tl.program_id(0)
    s = tl.program_id(1)
    r = tl.arange(0, BAND)
    m = tl.arange(0, TOKENS)
    rows = tl.num_programs(0) * BAND
    out = sums_SMR + (s * TOKENS + m)[:, None].to(tl.int64) * rows + b * BAND + r[None, :]
    tl.store(out, sums)
    if TOKENS == 1:
        # release: whoever sees this program arrive also sees its sums; acquire: the last one to
        # arrive sees the sums of all
        tl.debug_barrier()
        splits = tl.num_programs(1)
        before = tl.atomic_add(arrived_B + b, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if before == splits - 1:
            first = sums_SMR + b * BAND + r[None, :]
            order = order_R + b_of_layer * BAND + r
            _finish(first, order, scale_A, y_MA, A, splits, rows, r < BAND, 8, BAND)
