"""Outliers of the layouts in products, and when codes are decoded.

Shapes: B = bands, K = groups of columns, r = rows of a band, O = outlier entries.

The entries are defined in `watersic_hf.nn.tiles`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


def decode_outliers(outliers: Sequence[Tensor], codes_RC: Tensor, start: int, band: int) -> None:
    """Add the outliers of some bands to their codes, in place.

    Args:
        outliers: the tensors `outliers_O`, `outlier_first_BK` and `outlier_count_BKr` of a layout.
        codes_RC: codes of the bands, any strides.
        start: first of these bands.
        band: rows of a band.
    """
    (rows, columns), groups = codes_RC.shape, outliers[1].shape[1]
    sizes = (start, columns, len(outliers[0]), *codes_RC.stride())
    _decode_outliers_kernel[(rows // band, groups)](
        *outliers, codes_RC, *sizes, BAND=band, num_warps=1
    )


@triton.jit(do_not_specialize=["start", "columns", "entries", "stride_r", "stride_c"])
def _decode_outliers_kernel(
    outliers_O,
    outlier_first_BK,
    outlier_count_BKr,
    codes_RC,
    start,
    columns,
    entries,
    stride_r,
    stride_c,
    BAND: tl.constexpr,
):
    # as `_add_outliers`, but adds to the decoded codes of the rows; a value of several entries is
    # added up before it is stored, so that nothing is read after it was written
    b = tl.program_id(0)
    k = tl.program_id(1)
    r = b * BAND + tl.arange(0, BAND)
    codes = codes_RC + r.to(tl.int64) * stride_r
    groups = tl.cdiv(columns, 256)
    n = (start + b) * groups + k
    entry, stop = _outliers_of(outlier_first_BK, outlier_count_BKr, n, entries, BAND)
    last = tl.full((BAND,), -1, tl.int32)
    total = tl.zeros((BAND,), tl.float32)
    for i in range(tl.max(stop - entry)):
        here = entry + i < stop
        c, code = _outlier(tl.load(outliers_O + entry + i, here, other=0), k)
        here &= c < columns
        address = codes + c.to(tl.int64) * stride_c
        known = tl.load(address, here & (c != last), other=0.0).to(tl.float32)
        total = tl.where(c == last, total, known) + code
        tl.store(address, total.to(codes_RC.dtype.element_ty), here)
        last = c


@triton.jit
def _add_outliers(
    sums,
    folded_CM,
    outliers_O,
    first_BK,
    count_BKr,
    b,
    first_tile,
    last_tile,
    m,
    tokens,
    columns,
    entries,
    BAND: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    # the outliers of the groups of columns that begin in some tiles, so many of a row at once;
    # whatever the entries contain, only x is read
    groups = tl.cdiv(columns, 256)
    for k in range(tl.cdiv(first_tile, 8), tl.cdiv(last_tile, 8)):
        entry, stop = _outliers_of(first_BK, count_BKr, b * groups + k, entries, BAND)
        for first in range(0, tl.max(stop - entry), AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                here = entry + first + i < stop
                c, code = _outlier(tl.load(outliers_O + entry + first + i, here, other=0), k)
                here &= c < columns
                x = tl.load(folded_CM + c[None, :] * tokens + m[:, None], here[None, :], other=0.0)
                sums += x.to(tl.float32) * code[None, :]
    return sums


@triton.jit
def _outliers_of(first_BK, count_BKr, n, entries, BAND: tl.constexpr):
    # where the entries of every row in group n of all bands' groups begin and end
    count = tl.load(count_BKr + n.to(tl.int64) * BAND + tl.arange(0, BAND)).to(tl.int32)
    stop = tl.load(first_BK + n) + tl.cumsum(count)
    return _within(stop - count, entries), _within(stop, entries)


@triton.jit
def _within(entry, entries):
    return tl.minimum(tl.maximum(entry, 0), entries)


@triton.jit
def _outlier(entry, k):
    # column and value of an entry in group k
    entry = entry.to(tl.int32)
    return k * 256 + (entry & 255), ((entry >> 10) << (((entry >> 8) & 3) * 5)).to(tl.float32)
