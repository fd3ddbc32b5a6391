"""The layouts that codes can have in device memory, by residency.

Shapes: A = out_features, N = in_features, M = tokens, r = rows of a band.

The kernels are an argument of `Layout.multiply`: only `watersic_hf.nn.ops` imports them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

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


def _multiply_packed(kernels: ModuleType, x_MN: Tensor, *layer: Sequence[Tensor] | Tensor):
    return kernels.packed.packed_linear(x_MN, *layer)


def _multiply_prefix(kernels: ModuleType, x_MN: Tensor, *layer: Sequence[Tensor] | Tensor):
    layout, *_ = layer
    codes = prefix.PrefixCodes.of(layout, rows=0, columns=0)
    tables_TW = prefix_tables(x_MN.device, codes.trellis).entries_TW
    return kernels.prefix.prefix_linear(x_MN, *layer, tables_TW=tables_TW)


#: Residencies that keep the codes in a layout of their own, and these layouts.
LAYOUTS = {
    "packed": Layout(
        codes=PackedCodes,
        encode=pack_codes,
        bands=unpack_bands,
        multiply=_multiply_packed,
    ),
    "entropy": Layout(
        codes=prefix.PrefixCodes,
        encode=prefix.encode_codes,
        bands=prefix.decode_bands,
        multiply=_multiply_prefix,
    ),
}
