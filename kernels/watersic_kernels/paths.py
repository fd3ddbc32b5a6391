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
    """Return the values of codes, ``2 k - Q sign(k)``: integers, or floats that hold them."""
    return 2 * code - tl.minimum(tl.maximum(code, -quantizer), quantizer)


@triton.jit
def as_float(word, START: tl.constexpr, MASK: tl.constexpr, HALF: tl.constexpr):
    """Return ``u - HALF`` as float32, where u are the bits of a word from START on, up to bit 22.

    Neither a shift nor a conversion is needed: all exponent bits of the word are set, and those of
    2^(23 - START) are kept above u, which makes the float 2^(23 - START) + u.
    """
    bits = word & ((MASK << START) | ((150 - START) << 23))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - START)) + HALF)


@triton.jit
def _add_path(
    sums,
    x,
    words,
    parity,
    quantizer,
    exponents,
    WIDTH: tl.constexpr,
    BAND: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # as the tiles of codes, for the values of a trellis: the first word has the lowest bits of the
    # codes, the others the codes without them.  All floats are integers below 2^24, so exact
    REST: tl.constexpr = WIDTH - 1
    MASK: tl.constexpr = (1 << REST) - 1
    HALF: tl.constexpr = (1 << REST) // 2
    parity = parity.to(tl.uint32, bitcast=True)
    quantizer = quantizer.to(tl.uint32, bitcast=True)
    low_p = parity | exponents
    high_p = (parity >> 16) | exponents
    low_q = quantizer | exponents
    high_q = (quantizer >> 16) | exponents
    if REST == 0:
        for j in tl.static_range(32):
            p, q = _two_bits(low_p, high_p, low_q, high_q, j)
            sums = _add_value(sums, x, j, _raised(j) - p, q, TOKENS)
    before = tl.zeros((1, BAND), tl.uint32)
    for k in tl.static_range(REST):
        word = tl.load(words + (k + 1) * BAND).to(tl.uint32, bitcast=True)
        low = word | exponents
        high = (word >> 16) | exponents
        for j in tl.static_range(32):
            if j * REST + REST > 32 * k and j * REST + REST <= 32 * k + 32:
                p, q = _two_bits(low_p, high_p, low_q, high_q, j)
                if j * REST < 32 * k:
                    # the code begins in the previous word
                    both = (before >> (32 + j * REST - 32 * k)) | (word << (32 * k - j * REST))
                    rest = as_float(both | exponents, 0, MASK, HALF + _raised(j) // 2)
                elif j * REST - 32 * k + REST <= 23:
                    rest = as_float(low, j * REST - 32 * k, MASK, HALF + _raised(j) // 2)
                else:
                    rest = as_float(high, j * REST - 32 * k - 16, MASK, HALF + _raised(j) // 2)
                sums = _add_value(sums, x, j, 2 * rest + p, q, TOKENS)
        before = word
    return sums


@triton.constexpr_function
def _raised(j):
    """Return what `_two_bits` leaves in the float of bit j, so that one subtraction is saved."""
    return 1 << (23 - (j if j <= 22 else j - 16))


@triton.jit
def _two_bits(low_p, high_p, low_q, high_q, j: tl.constexpr):
    # bit j of two words as floats: of the first, raised by `_raised`; of the second, 0 or 1
    if j <= 22:
        p = as_float(low_p, j, 1, -_raised(j))
        q = as_float(low_q, j, 1, 0)
    else:
        p = as_float(high_p, j - 16, 1, -_raised(j))
        q = as_float(high_q, j - 16, 1, 0)
    return p, q


@triton.jit
def _add_value(sums, x, j: tl.constexpr, code, quantizer, TOKENS: tl.constexpr):
    value = value_of(code, quantizer)
    if TOKENS == 1:
        return sums + tl.load(x + j) * value
    else:
        return sums + tl.load(x + j * TOKENS + tl.arange(0, TOKENS)[:, None]) * value
