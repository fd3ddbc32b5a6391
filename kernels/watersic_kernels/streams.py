"""Streams of prefix codes: where they begin, and how a lane decodes the next symbols of its own.

Shapes: G = words, B = bands, S = segments of a band, r = rows of a band, TW = the entries of the
        symbol tables.

A lane holds three words of its stream, w0 to w2, and `at`, the bit of its block that it has
reached.  The contract is that of `watersic_kernels.prefix`.
"""

import triton
import triton.language as tl

#: Upper bound on the bits of all streams of a block together.
BLOCK_BITS = tl.constexpr(1 << 30)


@triton.jit
def _streams(words_G, first_BS, shortest_BS, bits_BSr, b, segments, s, words, BAND: tl.constexpr):
    # the first word of a block, the bits in it at which the streams of its rows begin, two bits
    # early, and the last bit at which a tile may begin
    n = b * segments + s
    first = tl.minimum(tl.maximum(tl.load(first_BS + n), 0), words - 18)
    shortest = tl.load(shortest_BS + n)
    bits = tl.load(bits_BSr + n.to(tl.int64) * BAND + tl.arange(0, BAND)).to(tl.int32)
    bits = (shortest & 0xFFFF) + (bits << ((shortest >> 16) & 15))
    limit = tl.minimum(words - 18 - first, BLOCK_BITS // 32) * 32
    at = tl.minimum(tl.cumsum(bits) - bits, limit)
    return words_G + first.to(tl.int64), at[None, :], limit


@triton.jit
def _prefetch(block, limit, BAND: tl.constexpr):
    # request the words of a block ahead of all else, into the L2 cache: a line of 128 bytes for
    # every row, which is 4 bits for each of 256 columns.  Triton has no function for that
    word = tl.minimum(tl.arange(0, BAND) * 32, limit >> 5)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [(block + word).to(tl.uint64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _ahead(block, at):
    word = block + (at >> 5)
    w0 = tl.load(word).to(tl.uint32, bitcast=True)
    w1 = tl.load(word + 1).to(tl.uint32, bitcast=True)
    w2 = tl.load(word + 2).to(tl.uint32, bitcast=True)
    return w0, w1, w2


@triton.jit
def _table(tile, tables_TW, last_table, WINDOW: tl.constexpr):
    # a table's address as an integer; it is a multiple of the table's size, so that one `or` with
    # an offset gives the address of an entry
    tile = tl.load(tile).to(tl.int32)
    table = tables_TW + tl.minimum(tile & 255, last_table) * (1 << WINDOW)
    return table.to(tl.uint64, bitcast=True), tl.minimum((tile >> 8) & 255, 8)


@triton.jit
def _two(table, block, at, w0, w1, w2, WINDOW: tl.constexpr):
    # two look-ups, of at most WINDOW bits each, in one window of 32 bits
    bits = _window(w0, w1, at)
    e0 = _entry(table, bits, WINDOW)
    e1 = _entry(table, bits >> (e0 & 15), WINDOW)
    after = at + (e0 & 15).to(tl.int32) + (e1 & 15).to(tl.int32)
    w0, w1, w2 = _refill(block, at, after, w0, w1, w2)
    return e0, e1, after, w0, w1, w2


@triton.jit
def _pair(table, shift, block, at, w0, w1, w2, WINDOW: tl.constexpr):
    # one look-up, followed by the low bits of both codes
    bits = _window(w0, w1, at)
    e = _entry(table, bits, WINDOW)
    n = e & 15
    low = bits >> (n + 2)
    ones = ((1 << shift) - 1).to(tl.uint32)
    scale = (1 << shift).to(tl.float32)
    half = ((1 << shift) >> 1).to(tl.float32)
    a = _first(e) * scale + (low & ones).to(tl.float32) - half
    c = _second(e) * scale + ((low >> shift.to(tl.uint32)) & ones).to(tl.float32) - half
    after = at + n.to(tl.int32) + 2 * shift
    w0, w1, w2 = _refill(block, at, after, w0, w1, w2)
    return a, c, after, w0, w1, w2


@triton.jit
def _window(w0, w1, at):
    # the 32 bits from bit `at` on, the first two of which precede the code word; a funnel shift
    s = (at & 31).to(tl.uint32)
    return (w0 >> s) | ((w1 << 1) << (s ^ 31))


@triton.jit
def _entry(table, bits, WINDOW: tl.constexpr):
    MASK: tl.constexpr = ((1 << WINDOW) - 1) << 2
    address = table | (bits & MASK).to(tl.uint64)
    return tl.load(address.to(tl.pointer_type(tl.int32), bitcast=True)).to(tl.uint32, bitcast=True)


@triton.jit
def _refill(block, at, after, w0, w1, w2):
    # a lane that has advanced into the next word loads a new one, which it needs a word later
    word = after >> 5
    crossed = word != (at >> 5)
    w0 = tl.where(crossed, w1, w0)
    w1 = tl.where(crossed, w2, w1)
    found = tl.load(block + word + 2, crossed, other=w2.to(tl.int32, bitcast=True))
    return w0, w1, found.to(tl.uint32, bitcast=True)


@triton.jit
def _first(e):
    return (e & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _second(e):
    return ((e << 16) & 0xFFF00000).to(tl.float32, bitcast=True)
