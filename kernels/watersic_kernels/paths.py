"""The trellis in the tiles of a layout: quantizers of all rows of a band at once.

Shapes: m = tokens, r = rows of a band; words hold 32 columns, a bit each.

With the state s(t) = (Q(t), Q(t - 1), Q(t - 2)) and its matrix M, where M^7 = 1, the sums
u(t) = M^-t s(t) have no feedback: u(t + 1) = u(t) + M^-(t + 1) e p(t).  So three prefix sums (of
bits: exclusive or) give the quantizers of all rows, Q(t) = e M^t u(t), with factors that repeat
every seven rows.
"""

import triton
import triton.language as tl


@triton.jit
def quantizers(parity, state, row, AXIS: tl.constexpr):
    """Return the quantizers of rows, as many bits in a word as their parities have.

    Args:
        parity: parities of the codes, int32; rows along `AXIS`.
        state: address of the three words of the state before the first row, whose bits are those
            of the parities; their shape must broadcast with `parity`.
        row: numbers of the rows, in a shape that broadcasts with `parity`.
        AXIS: axis of the rows.
    """
    # bit t of the first number is a component of M^-t e, bit t of the second of e M^t
    found = _component(parity, tl.load(state), row, 57, 29, AXIS)
    found ^= _component(parity, tl.load(state + 1), row, 92, 78, AXIS)
    return found ^ _component(parity, tl.load(state + 2), row, 46, 58, AXIS)


@triton.jit
def _component(parity, start, row, INPUT: tl.constexpr, OUTPUT: tl.constexpr, AXIS: tl.constexpr):
    # one component of u(t), times its factor in Q(t); -1 and 0 are all bits of a word and none
    term = parity & -((INPUT >> ((row + 1) % 7)) & 1)
    before = tl.associative_scan(term, AXIS, _exclusive_or) ^ term
    return (start ^ before) & -((OUTPUT >> (row % 7)) & 1)


@triton.jit
def _exclusive_or(a, b):
    return a ^ b


@triton.jit
def value_of(code, quantizer):
    """Return the values of codes, int32: ``2 k - Q sign(k)``."""
    return 2 * code - tl.minimum(tl.maximum(code, -quantizer), quantizer)


@triton.jit
def _add_path(
    sums,
    x,
    words,
    parity,
    quantizer,
    WIDTH: tl.constexpr,
    BAND: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # as the tiles of codes, for the values of a trellis: the first word has the lowest bits of the
    # codes, the others the codes without them
    REST: tl.constexpr = WIDTH - 1
    HALF: tl.constexpr = (1 << REST) // 2
    if REST == 0:
        for j in tl.static_range(32):
            code = -((parity >> j) & 1)
            sums = _add_value(sums, x, j, code, quantizer, TOKENS)
    before = tl.zeros((1, BAND), tl.uint32)
    for k in tl.static_range(REST):
        word = tl.load(words + (k + 1) * BAND).to(tl.uint32, bitcast=True)
        for j in tl.static_range(32):
            if j * REST + REST > 32 * k and j * REST + REST <= 32 * k + 32:
                if j * REST < 32 * k:
                    # the code begins in the previous word
                    rest = (before >> (32 + j * REST - 32 * k)) | (word << (32 * k - j * REST))
                else:
                    rest = word >> (j * REST - 32 * k)
                rest = (rest & ((1 << REST) - 1)).to(tl.int32)
                code = 2 * (rest - HALF) + ((parity >> j) & 1)
                sums = _add_value(sums, x, j, code, quantizer, TOKENS)
        before = word
    return sums


@triton.jit
def _add_value(sums, x, j: tl.constexpr, code, quantizer, TOKENS: tl.constexpr):
    value = value_of(code, (quantizer >> j) & 1).to(tl.float32)
    if TOKENS == 1:
        return sums + tl.load(x + j) * value
    else:
        return sums + tl.load(x + j * TOKENS + tl.arange(0, TOKENS)[:, None]) * value
