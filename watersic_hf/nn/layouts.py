"""The layouts that codes can have in device memory, by residency.

Shapes: A = out_features, N = in_features, M = tokens, r = rows of a band.

The kernels are arguments of these functions: only `watersic_hf.nn.backends` imports them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType

import torch
from torch import Tensor

from watersic_hf.codec import Path
from watersic_hf.nn import prefix
from watersic_hf.nn.packing import PackedCodes, pack_codes, unpack_bands
from watersic_hf.nn.prefix_tables import prefix_tables
from watersic_hf.nn.tiles import TiledCodes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of codes in memory: its tensors, and what encodes, decodes and multiplies them."""

    codes: type[TiledCodes]
    """Class of the encoded codes; its fields name the tensors."""

    encode: Callable[[Tensor, Path | None], TiledCodes]
    """Encode integer codes, or the values of a trellis with their path, A x N."""

    bands: Callable[[TiledCodes], Iterator[tuple[Tensor, Tensor]]]
    """Yield row indices and the codes of these rows, r x N, until all rows are decoded."""

    multiply: Callable[..., Tensor]
    """Multiply with the kernels: ``multiply(kernels, x_MN, tensors, row_scale_A, col_scale_N)``.
    The module of those for CPUs has the same functions as that of CUDA."""

    join: Callable[..., None]
    """Write the products with several weights side by side, with the kernels for CUDA:
    ``join(kernels, x_MN, weights, y_MA)``; a weight is its tensors and scales, as above."""

    gradient: Callable[..., Tensor]
    """Return ``grad @ W`` with the kernels for CUDA, with the arguments of `multiply`."""

    prepare: Callable[[torch.device, Sequence[Tensor]], None]
    """Upload to a device what its kernels need beside the tensors.  The capture of a CUDA graph
    allows no upload."""


#: A weight: the tensors of a layout, row scales and column scales.
Weight = tuple[Sequence[Tensor], Tensor, Tensor]


def _multiply_packed(kernels: ModuleType, x_MN: Tensor, *weight: Sequence[Tensor] | Tensor):
    return kernels.packed.packed_linear(x_MN, *weight)


def _join_packed(kernels: ModuleType, x_MN: Tensor, weights: Sequence[Weight], y_MA: Tensor):
    kernels.packed.packed_linears(x_MN, weights, y_MA)


def _packed_gradient(kernels: ModuleType, grad_MA: Tensor, *weight: Sequence[Tensor] | Tensor):
    return kernels.packed.packed_gradient(grad_MA, *weight)


def _prepare_packed(device: torch.device, layout: Sequence[Tensor]) -> None:
    pass


def _multiply_prefix(kernels: ModuleType, x_MN: Tensor, *weight: Sequence[Tensor] | Tensor):
    layout, *_ = weight
    tables_TW = _tables(x_MN.device, layout)
    return kernels.prefix.prefix_linear(x_MN, *weight, tables_TW=tables_TW)


def _join_prefix(kernels: ModuleType, x_MN: Tensor, weights: Sequence[Weight], y_MA: Tensor):
    first = 0
    # codes of a trellis have other tables
    for _, group in groupby(weights, lambda weight: _is_trellis(weight[0])):
        these = list(group)
        rows = sum(len(row_scale_A) for _, row_scale_A, _ in these)
        tables_TW = _tables(x_MN.device, these[0][0])
        part_MA = y_MA[:, first : first + rows]
        kernels.prefix.prefix_linears(x_MN, these, part_MA, tables_TW=tables_TW)
        first += rows


def _prefix_gradient(kernels: ModuleType, grad_MA: Tensor, *weight: Sequence[Tensor] | Tensor):
    layout, *_ = weight
    tables_TW = _tables(grad_MA.device, layout)
    return kernels.prefix.prefix_gradient(grad_MA, *weight, tables_TW=tables_TW)


def _prepare_prefix(device: torch.device, layout: Sequence[Tensor]) -> None:
    _tables(device, layout)


def _tables(device: torch.device, layout: Sequence[Tensor]) -> Tensor:
    return prefix_tables(device, _is_trellis(layout)).entries_TW


def _is_trellis(layout: Sequence[Tensor]) -> bool:
    return prefix.PrefixCodes.of(layout, rows=0, columns=0).trellis


#: Residencies that keep the codes in a layout of their own, and these layouts.
LAYOUTS = {
    "packed": Layout(
        codes=PackedCodes,
        encode=pack_codes,
        bands=unpack_bands,
        multiply=_multiply_packed,
        join=_join_packed,
        gradient=_packed_gradient,
        prepare=_prepare_packed,
    ),
    "entropy": Layout(
        codes=prefix.PrefixCodes,
        encode=prefix.encode_codes,
        bands=prefix.decode_bands,
        multiply=_multiply_prefix,
        join=_join_prefix,
        gradient=_prefix_gradient,
        prepare=_prepare_prefix,
    ),
}
