"""The symbol tables of the prefix code: one library for all layers of all models.

Shapes: T = tables, W = windows of bits, P = pairs of a table, v = values of a symbol, V = those
        and two indices more for all other values, even and odd ones.

A symbol is a pair of values from -LIMIT to LIMIT.  A table holds a length-limited Huffman code, of
at most `WINDOW` bits, of the pairs that are likely if the values are rounded samples of a normal
distribution or of a mixture of normal distributions.  A pair that a table does not hold is coded
with one or both values replaced by zero, and the difference is an outlier.  In the library for the
codes of a trellis, which must keep their parity, odd values are replaced by one.

The library is computed when it is first needed and never saved, so different machines need not
compute identical tables.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.nn.tiles import as_int32

#: Bits of a window; every code word fits into it, and a decoder's table has an entry per window.
WINDOW = 11

#: Largest magnitude of a value of a pair.
LIMIT = 15

#: Standard deviations of the tables, a sixth of an octave apart.
DEVIATIONS = tuple(2 ** (sixth / 6) for sixth in range(-15, 10))

#: Weights of the mixtures: of normal distributions with 1, 2 and 4 times the standard deviation.
SHAPES = ((1.0, 0.0, 0.0), (16 / 17, 1 / 17, 0.0), (64 / 81, 16 / 81, 1 / 81))

#: Bits that an outlier is assumed to take: entries have 16 bits, and a far gap needs several.  This
#: value gave the smallest real layers of a small model.
OUTLIER_BITS = 40

#: A decoder's tables begin at a multiple of this many bytes: the size of one table.
ALIGNMENT = 4 << WINDOW


@dataclass(frozen=True, kw_only=True)
class PrefixTables:
    """A library on one device.  Table 0 holds only the pair of zeros, which takes no bits."""

    entries_TW: Tensor
    """int32, T x 2^WINDOW.  The entry of a decoder for the next `WINDOW` bits, first bit lowest.
    The high half is the first value of the pair as a bfloat16, the low half the second.  The lowest
    4 bits, which are zero in the bfloat16 of every such value, are the length of the code word."""

    words_TVV: Tensor
    """int16.  Code word of a pair; the index of a value v is LIMIT + v, of others
    2 LIMIT + 1 if they are even, and 2 LIMIT + 2 if they are odd."""

    lengths_TVV: Tensor
    """uint8.  Length of the code word in bits."""

    kept_TVV: Tensor
    """int8, T x V x V x 2.  The pair that is coded in place of a pair."""

    price_VT: Tensor
    """float32.  Bits of a value, outliers included, averaged over the other value of its pair."""


@functools.cache
def prefix_tables(device: torch.device, trellis: bool = False) -> PrefixTables:
    """Return the library for codes on a device, or for the codes of a trellis; cached."""
    if device.type == "cpu":
        return _library(trellis)
    host = prefix_tables(torch.device("cpu"), trellis)
    moved = {name: tensor.to(device) for name, tensor in vars(host).items()}
    moved["entries_TW"] = _aligned(host.entries_TW, device)
    return PrefixTables(**moved)


def _library(trellis: bool) -> PrefixTables:
    """Compute the library on the CPU."""
    values = torch.arange(-LIMIT, LIMIT + 1, dtype=torch.float64)
    # table 0: only the pair of zeros
    tables = [_table((values == 0).double().clamp(min=1e-9), trellis, pairs=1)]
    for deviation in DEVIATIONS:
        for shape in SHAPES:
            tables.append(_table(_chances(values, deviation, shape), trellis))
    entries_TW, words_TVV, lengths_TVV, kept_TVV, price_TV = (
        torch.stack(parts) for parts in zip(*tables, strict=True)
    )
    return PrefixTables(
        entries_TW=_aligned(entries_TW, torch.device("cpu")),
        words_TVV=words_TVV,
        lengths_TVV=lengths_TVV,
        kept_TVV=kept_TVV,
        price_VT=price_TV.T.contiguous(),
    )


def _chances(values: Tensor, deviation: float, shape: tuple[float, ...]) -> Tensor:
    """Return the probabilities of the values of a rounded mixture of normal distributions.

    Args:
        values: consecutive integers, float64.
        deviation: standard deviation of the narrowest distribution.
        shape: weights of the distributions, each twice as wide as the one before.
    """
    edges = torch.cat([values - 0.5, values[-1:] + 0.5]) / (deviation * 2**0.5)
    upto = sum(weight * torch.erf(edges / 2**i) for i, weight in enumerate(shape))
    return 0.5 * upto.diff()


def _table(chance_v: Tensor, trellis: bool, pairs: int | None = None) -> tuple[Tensor, ...]:
    """Make the table of one distribution.

    Args:
        chance_v: probabilities of the values from -LIMIT to LIMIT.
        trellis: whether values must keep their parity.
        pairs: number of pairs that the table holds, the likeliest; default: all that save more
            bits than they cost.

    Returns:
        Its entries, code words, lengths, kept pairs and prices, as in `PrefixTables`.
    """
    size = len(chance_v)
    chance_vv = chance_v[:, None] * chance_v
    # a rarer pair costs the other pairs more bits than it saves where it occurs
    held_vv = chance_vv * OUTLIER_BITS * 2**WINDOW > 1 / math.log(2)
    # what values are replaced by
    parity_V = torch.cat([torch.arange(-LIMIT, LIMIT + 1) & 1, torch.tensor([0, 1])])
    instead_V = LIMIT + (parity_V if trellis else 0 * parity_V)
    held_vv[LIMIT : LIMIT + 1 + trellis, LIMIT : LIMIT + 1 + trellis] = True
    if pairs is not None:
        held_vv = chance_vv >= chance_vv.flatten().topk(pairs).values[-1]
    first_P, second_P = held_vv.nonzero(as_tuple=True)
    length_P = limited_lengths(chance_vv[held_vv], WINDOW)
    word_P = prefix_words(length_P)

    pair_P = _bfloat16(first_P - LIMIT) << 16 | _bfloat16(second_P - LIMIT) | length_P
    entries_W = torch.zeros(1 << WINDOW, dtype=torch.int64)
    for word, length, entry in zip(*map(Tensor.tolist, (word_P, length_P, pair_P)), strict=True):
        entries_W[word :: 1 << length] = entry

    # the cheapest way to code a pair: as it is, or with one or both values replaced
    length_VV = torch.full((size + 2, size + 2), 1e9, dtype=torch.float64)
    length_VV[first_P, second_P] = length_P.double()
    word_VV = torch.zeros(size + 2, size + 2, dtype=torch.int16)
    word_VV[first_P, second_P] = word_P.short()
    a, b = torch.meshgrid(*[torch.arange(size + 2)] * 2, indexing="ij")
    other_a, other_b = instead_V[a], instead_V[b]
    kept = [(a, b), (a, other_b), (other_a, b), (other_a, other_b)]
    bits = torch.stack(
        [length_VV[k] + OUTLIER_BITS * n for k, n in zip(kept, (0, 1, 1, 2), strict=True)]
    )
    cost_VV, best_VV = bits.min(0)
    kept_a, kept_b = (
        torch.stack(part).gather(0, best_VV[None])[0] for part in zip(*kept, strict=True)
    )
    mean = (cost_VV[:size, :size] * chance_vv).sum() / chance_v.sum()
    price_V = (cost_VV[:, :size] * chance_v).sum(1) / chance_v.sum() - mean / 2
    return (
        as_int32(entries_W),
        word_VV[kept_a, kept_b],
        length_VV[kept_a, kept_b].to(torch.uint8),
        torch.stack([kept_a - LIMIT, kept_b - LIMIT], -1).to(torch.int8),
        price_V.float(),
    )


def limited_lengths(weight_P: Tensor, limit: int) -> Tensor:
    """Return the code word lengths of the optimal length-limited prefix code, by package-merge.

    Args:
        weight_P: weights of the symbols, proportional to their probabilities.
        limit: largest length in bits.
    """
    sorted_P, order_P = weight_P.sort(stable=True)
    count = len(sorted_P)
    leaves, packages = [], sorted_P[:0]
    for _ in range(limit):
        merged, order = torch.cat([sorted_P, packages]).sort(stable=True)
        leaves.append(order < count)
        packages = merged[: len(merged) // 2 * 2].view(-1, 2).sum(1)
    length_P = torch.zeros(count, dtype=torch.int64)
    taken = 2 * count - 2
    for leaf in reversed(leaves):
        singles = int(leaf[:taken].sum())
        length_P[order_P[:singles]] += 1
        taken = 2 * (taken - singles)
    return length_P


def prefix_words(length_P: Tensor) -> Tensor:
    """Return code words of these lengths, of a canonical prefix code, first bit lowest."""
    word_P = torch.zeros_like(length_P)
    code = before = 0
    for index in length_P.argsort(stable=True).tolist():
        length = int(length_P[index])
        code <<= length - before
        before = length
        word_P[index] = int(format(code, f"0{length}b")[::-1], 2) if length else 0
        code += 1
    return word_P


def _bfloat16(values: Tensor) -> Tensor:
    """Return the bits of integers as bfloat16, which must hold them exactly."""
    return values.float().view(torch.int32).long() >> 16 & 0xFFFF


def _aligned(entries_TW: Tensor, device: torch.device) -> Tensor:
    """Copy entries to a device, at an address that is a multiple of `ALIGNMENT`.

    The kernels compute the address of an entry with one `or`, which needs this alignment.
    """
    memory = torch.empty(entries_TW.nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    aligned = memory[start : start + entries_TW.nbytes].view(torch.int32).view(entries_TW.shape)
    return aligned.copy_(entries_TW)
