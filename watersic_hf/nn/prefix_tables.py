"""The symbol tables of the prefix code: one library for all layers of all models.

Shapes: T = tables, V = values of a symbol and one more for all others, P = pairs.

A symbol is a pair of values from -LIMIT to LIMIT.  A table has the Huffman code of the pairs that
it holds, none longer than `WINDOW` bits, for values that are normal, or a mixture of normal ones,
and rounded.  What a table does not hold of a pair is coded as zero, and is an outlier.

The library is made when it is first needed and never saved, so that no other machine has to find
the same one.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.nn.tiles import as_int32

#: Bits of a window, in which every code word fits: a decoder's table has an entry for each window.
WINDOW = 11

#: Largest magnitude in a pair.
LIMIT = 15

#: Standard deviations of the tables: a sixth of an octave apart.
DEVIATIONS = tuple(2 ** (sixth / 6) for sixth in range(-15, 10))

#: Weights of normal values of 1, 2 and 4 times the standard deviation.
SHAPES = ((1.0, 0.0, 0.0), (16 / 17, 1 / 17, 0.0), (64 / 81, 16 / 81, 1 / 81))

#: Bits that an outlier takes: entries of 16 bits, of which a far gap needs more than one.  Found by
#: what real layers of a small model take least with.
OUTLIER_BITS = 40

#: Bytes that a decoder's tables begin at a multiple of: those of a table.
ALIGNMENT = 4 << WINDOW


@dataclass(frozen=True, kw_only=True)
class PrefixTables:
    """The library, on one device.  Table 0 holds no pair but zeros, and takes no bits for them."""

    entries_TW: Tensor
    """int32, T x 2^WINDOW.  What a decoder finds at the next `WINDOW` bits, the first one lowest:
    in the high half the first value of the pair as a bfloat16, in the low half the second, and in
    the lowest 4 bits, which are zero in all bfloat16 of such values, the code word's length."""

    words_TVV: Tensor
    """int16: the code word of a pair; index LIMIT + v, and 2 LIMIT + 1 for other values."""

    lengths_TVV: Tensor
    """uint8: its bits."""

    kept_TVV: Tensor
    """int8, T x V x V x 2: the pair that is coded."""

    price_VT: Tensor
    """float32: bits of a value, on average over the other value of its pair."""


@functools.cache
def prefix_tables(device: torch.device) -> PrefixTables:
    """The library on a device."""
    if device.type == "cpu":
        return _library()
    host = prefix_tables(torch.device("cpu"))
    moved = {name: tensor.to(device) for name, tensor in vars(host).items()}
    moved["entries_TW"] = _aligned(host.entries_TW, device)
    return PrefixTables(**moved)


def _library() -> PrefixTables:
    values = torch.arange(-LIMIT, LIMIT + 1, dtype=torch.float64)
    # table 0: the pair of zeros, and nothing else
    tables = [_table((values == 0).double().clamp(min=1e-9), pairs=1)]
    for deviation in DEVIATIONS:
        for shape in SHAPES:
            tables.append(_table(_chances(values, deviation, shape)))
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
    """Chances of the values of a rounded mixture of normal ones."""
    edges = torch.cat([values - 0.5, values[-1:] + 0.5]) / (deviation * 2**0.5)
    upto = sum(weight * torch.erf(edges / 2**i) for i, weight in enumerate(shape))
    return 0.5 * upto.diff()


def _table(chance_v: Tensor, pairs: int | None = None) -> tuple[Tensor, ...]:
    """Entries, code words, lengths, kept pairs and prices of one distribution.

    It holds the likeliest `pairs`, by default all that save more bits than they cost.
    """
    size = len(chance_v)
    chance_vv = chance_v[:, None] * chance_v
    # a rarer pair costs the others more bits than it saves where it occurs
    held_vv = chance_vv * OUTLIER_BITS * 2**WINDOW > 1 / math.log(2)
    if pairs is not None:
        held_vv = chance_vv >= chance_vv.flatten().topk(pairs).values[-1]
    first_P, second_P = held_vv.nonzero(as_tuple=True)
    length_P = limited_lengths(chance_vv[held_vv], WINDOW)
    word_P = prefix_words(length_P)

    pair_P = _bfloat16(first_P - LIMIT) << 16 | _bfloat16(second_P - LIMIT) | length_P
    entries_W = torch.zeros(1 << WINDOW, dtype=torch.int64)
    for word, length, entry in zip(*map(Tensor.tolist, (word_P, length_P, pair_P)), strict=True):
        entries_W[word :: 1 << length] = entry

    # the cheapest pair of the table that agrees with a pair, or else with one value of it
    length_VV = torch.full((size + 1, size + 1), 1e9, dtype=torch.float64)
    length_VV[first_P, second_P] = length_P.double()
    word_VV = torch.zeros(size + 1, size + 1, dtype=torch.int16)
    word_VV[first_P, second_P] = word_P.short()
    zero_VV = torch.full((size + 1, size + 1), LIMIT)
    a, b = torch.meshgrid(*[torch.arange(size + 1)] * 2, indexing="ij")
    kept = [(a, b), (a, zero_VV), (zero_VV, b), (zero_VV, zero_VV)]
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
    """Lengths, at most `limit`, of the prefix code of least mean length, by package-merge."""
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
    """Code words of these lengths, the first bit lowest."""
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
    return values.float().view(torch.int32).long() >> 16 & 0xFFFF


def _aligned(entries_TW: Tensor, device: torch.device) -> Tensor:
    """A copy on a device that begins at a multiple of `ALIGNMENT` bytes: the kernels need it."""
    memory = torch.empty(entries_TW.nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    aligned = memory[start : start + entries_TW.nbytes].view(torch.int32).view(entries_TW.shape)
    return aligned.copy_(entries_TW)
