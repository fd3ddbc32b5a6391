"""The trellis inside the tiles of a layout: codes instead of values, and states to start from.

A layout of a trellis holds the codes k of its rows in the order of the path, with the parity of
every code intact, and for every tile the state of the trellis before its first row.  From these the
quantizers follow (`watersic_hf.core.trellis`), and with them the values ``2 k - Q sign(k)``.

Shapes: b = bands, T = tiles of a band, r = rows of a band, R, C = rows and columns of all tiles;
        3 = quantizers of a row and of the two rows before it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from watersic_hf.codec import Path
from watersic_hf.core.trellis import values_to_codes
from watersic_hf.nn.tiles import TILE, as_int32


class BandCodes(NamedTuple):
    """A band of values as codes, rows in the order of the path; or several bands, stacked."""

    codes_rC: Tensor
    """Codes, int32."""
    quantizer_rC: Tensor
    """Quantizers, int32, 0 or 1."""
    state_T3: Tensor
    """State before the first row: a bit per column of a tile, int32."""


def fits(path: Path | None, band: int, rows: int) -> bool:
    """Return whether bands hold whole paths, or parts of one, so that states can be stored."""
    return path is not None and (path.rows % band == 0 or path.rows >= rows)


def _band_codes(values_rC: Tensor, state_3C: Tensor) -> tuple[BandCodes, Tensor]:
    """Return a band as codes, and the state after it.

    Args:
        values_rC: values in the order of the path.
        state_3C: state before the first row, int32.
    """
    codes_rC = values_to_codes(values_rC)
    quantizer_rC, after_3C = quantizers(codes_rC & 1, state_3C)
    return BandCodes(codes_rC, quantizer_rC, state_words(state_3C)), after_3C


def bands_codes(
    values_brC: Tensor, path: Path, first: int, state_3C: Tensor | None
) -> tuple[BandCodes, Tensor]:
    """Return consecutive bands as codes, stacked, and the state after them.

    Args:
        values_brC: values in the order of the path.
        path: the path.
        first: number of the first band in the weight.
        state_3C: state after the band before it, or None at the start.
    """
    found, (_, band, columns) = [], values_brC.shape
    for number, values_rC in enumerate(values_brC, first):
        if number * band % path.rows == 0:
            state_3C = values_rC.new_zeros(3, columns)
        part, state_3C = _band_codes(values_rC, state_3C)
        found.append(part)
    return BandCodes(*map(torch.stack, zip(*found, strict=True))), state_3C


def quantizers(parity_rC: Tensor, state_3C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the quantizers of rows, and the state after the last.

    Args:
        parity_rC: parities of the codes, 0 or 1; the rows may have any further dimensions.
        state_3C: state before the first row.
    """
    this, last, earlier = state_3C
    quantizer_rC = torch.empty_like(parity_rC)
    for row, parity in enumerate(parity_rC):
        quantizer_rC[row] = this
        this, last, earlier = last ^ earlier ^ parity, this, last
    return quantizer_rC, torch.stack([this, last, earlier])


def value_of(codes: Tensor, quantizer: Tensor) -> Tensor:
    """Return the values of codes."""
    return 2 * codes - codes.sign() * quantizer


def state_words(state_3C: Tensor) -> Tensor:
    """Return the states of the columns of tiles as words, T x 3, int32: column j is bit j."""
    bits_3Tj = state_3C.view(3, -1, TILE).long() << torch.arange(TILE, device=state_3C.device)
    return as_int32(bits_3Tj.sum(-1)).T.contiguous()


def state_bits(state_bT3: Tensor) -> Tensor:
    """Return the states as bits, 3 x b x C: the inverse of `state_words`."""
    bits_bT3j = state_bT3[..., None] >> torch.arange(TILE, device=state_bT3.device) & 1
    return bits_bT3j.permute(2, 0, 1, 3).flatten(2).int()
