"""Sums and counts over matrices of codes, which a payload's model is fitted to, compiled for CPUs.

Shapes: A x N codes, row by row in an array of one dimension; K = keys, S = 256 symbols.

All functions process some rows and add integers, so that the results do not depend on how the rows
are shared among threads.  They release the interpreter's lock.
"""

import numba
from numpy import int32, int64, uint64

from watersic_kernels.cpu.codes_vectors import add_magnitudes, count_codes, weighted_sum
from watersic_kernels.cpu.vectors import LANES

jit = numba.njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)


@jit
def add_columns(codes, bound_N, columns, first, stop, step, sum_N):
    """Add the bounded magnitudes of the rows first, first + step, ... below `stop` of each column.

    Args:
        codes: codes, int32 [A * N].
        bound_N: bounds of the magnitudes, uint32, up to the next multiple of eight columns.
        columns: N, the number of columns.
        sum_N: int64, as long as `bound_N`; the sums are added to it.
    """
    for row in range(first, stop, 4 * step):
        rows = (stop - row + step - 1) // step
        for n in range(0, columns, LANES):
            at = row * columns + n
            add_magnitudes(codes, at, columns - n, step * columns, rows, bound_N, n, sum_N)


@jit
def sum_rows(codes, bound_N, weight_N, columns, first, stop, sum_A):
    """Store the weighted sums of the bounded magnitudes of the rows first .. stop - 1.

    Args:
        codes, columns: as for `add_columns`.
        bound_N: bounds of the magnitudes, uint32, up to the next multiple of eight columns.
        weight_N: weights of the columns, uint32, as long; 0 after the last column.
        sum_A: int64; receives the sums.
    """
    for row in range(first, stop):
        total = 0
        for n in range(0, columns, LANES):
            at = row * columns + n
            total += weighted_sum(codes, at, columns - n, bound_N, weight_N, n)
        sum_A[row] = total


@jit
def count_symbols(
    codes,
    quantizers,
    trellis,
    shift_K,
    first_shifted,
    row_class_A,
    col_class_N,
    columns,
    first,
    stop,
    counts,
):
    """Count the codes of every key by symbol in the rows first .. stop - 1.

    Args:
        codes: codes, int32 [A * N].
        quantizers: with a trellis, what is added to the keys, uint8 [A * N]; otherwise not read.
        trellis: whether the codes are those of a trellis.
        shift_K: number of low bits of every key, uint8.
        first_shifted: the first key with low bits.
        row_class_A: classes of the rows, int32.
        col_class_N: classes of the columns, int32, up to the next multiple of eight columns.
        columns: N, the number of columns.
        counts: uint32, two tables [K * S]; a count is the sum of both.
    """
    highest = 0
    for n in range(columns):
        highest = max(highest, col_class_N[n] + trellis)
    for row in range(first, stop):
        base = row_class_A[row]
        shifted = int64(base + highest >= first_shifted)
        for n in range(0, columns, LANES):
            count_codes(
                codes,
                quantizers,
                row * columns + n,
                columns - n,
                int64(trellis),
                base,
                col_class_N,
                n,
                shift_K,
                shifted,
                counts,
            )


@jit
def find_path_codes(values, order_A, path_rows, columns, first, stop, codes, quantizers):
    """Find the codes of values of a trellis, and their quantizers, in columns first .. stop - 1.

    Args:
        values: values, int32 [A * N].
        order_A: the rows in the order of the path, int64.
        path_rows: rows of a path; the next one starts after them.
        columns: N, the number of columns.
        codes: receives the codes, int32 [A * N], rows in the order of the path.
        quantizers: receives their quantizers, uint8 [A * N], in the same order.

    Indices are unsigned: numba would otherwise add the length of an array to negative ones, and
    LLVM would find no vector code in a loop with such a choice.

    Returns:
        Whether all values are on a path.
    """
    columns, wrong = uint64(columns), int32(0)
    width, step = uint64(stop - first), 0
    for row in range(len(order_A)):
        at = uint64(row) * columns + uint64(first)
        given = uint64(order_A[row]) * columns + uint64(first)
        before, last = at - columns, at - uint64(2) * columns
        earlier = at - uint64(3) * columns
        for n in range(width):
            quantizers[at + n] = codes[before + n] & int32(1) if step > 0 else 0
        if step > 2:
            for n in range(width):
                quantizers[at + n] ^= quantizers[last + n] ^ quantizers[earlier + n]
        for n in range(width):
            value = values[given + n]
            sign = int32(value >> int32(31))
            size = int32(int32(value ^ sign) - sign)
            code = int32(int32(size >> int32(1)) + int32(size & int32(1)))
            codes[at + n] = int32(int32(code ^ sign) - sign)
            off = int32(int32(value & int32(1)) ^ int32(quantizers[at + n]))
            wrong |= off if value != 0 else int32(0)
        step = step + 1 if step + 1 < path_rows else 0
    return wrong == 0
