"""Vector code that LLVM does not find by itself in loops, as functions for numba's compiled code.

A vector has a lane of 32 bits for each of `LANES` rows.  Most hold a *pair* in every lane: the
codes of two columns, 16 bits each, so that one instruction multiplies both with the columns of a
token and adds the products (``vpmaddwd`` on x86).  Pair i of a tile has column i in its low half
and column ``i + 16`` in its high half.

All functions are written for any CPU: LLVM cuts the vectors to the size of the machine's registers.
They read and write what they are told to: numba checks no bounds here.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: Rows of a vector.
LANES = 8
#: Pairs of columns of a tile.
PAIRS = 16
#: Largest number of rows of a tile: the distance of pairs in scratch memory.
ROWS = 128

_INT = ir.IntType(32)
_INTS = ir.VectorType(_INT, LANES)
_HALVES = ir.VectorType(ir.IntType(16), 2 * LANES)
_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_AT = ir.IntType(64)
#: Low halves of one vector and high halves of another.
_BLEND = ir.Constant(
    ir.VectorType(_INT, 2 * LANES), [i + 2 * LANES * (i % 2) for i in range(2 * LANES)]
)


class Code:
    """Writes vector instructions of `LANES` lanes into the code of a function."""

    def __init__(self, context, builder: ir.IRBuilder, kinds: Sequence, values: Sequence) -> None:
        self.builder = builder
        self.values = [
            context.make_array(kind)(context, builder, value).data
            if isinstance(kind, types.Array)
            else value
            for kind, value in zip(kinds, values, strict=True)
        ]

    def offset(self, at: ir.Value, step: ir.Value | int, times: int) -> ir.Value:
        """Return ``at + step * times``."""
        step = ir.Constant(_AT, step) if isinstance(step, int) else step
        return self.builder.add(at, self.builder.mul(step, ir.Constant(_AT, times)))

    def address(self, data: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
        """Return the address of a position of an array, as that of a value of another type."""
        return self.builder.bitcast(self.builder.gep(data, [at]), kind.as_pointer())

    def load(
        self, data: ir.Value, at: ir.Value, kind: ir.Type = _INTS, *, align: int = 4
    ) -> ir.Value:
        """Return the value at a position; `align` is what its address is a multiple of."""
        return self.builder.load(self.address(data, at, kind), align=align)

    def store(self, value: ir.Value, data: ir.Value, at: ir.Value, *, align: int = 4) -> None:
        """Store a value at a position; `align` is what its address is a multiple of."""
        self.builder.store(value, self.address(data, at, value.type), align=align)

    def constant(self, value: int) -> ir.Constant:
        """Return a vector with a number in all lanes."""
        return ir.Constant(_INTS, [value] * LANES)

    def spread(self, value: ir.Value) -> ir.Value:
        """Return a vector with a value in all lanes."""
        empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
        first = self.builder.insert_element(empty, value, ir.Constant(_INT, 0))
        return self.builder.shuffle_vector(first, empty, self.constant(0))

    def shift(self, value: ir.Value, right: int) -> ir.Value:
        """Return a vector shifted to the right, or to the left if `right` is negative."""
        if right == 0:
            return value
        shift = self.builder.lshr if right > 0 else self.builder.shl
        return shift(value, self.constant(abs(right)))

    def masked(self, value: ir.Value, right: int, mask: int) -> ir.Value:
        """Return some bits of a shifted vector; the mask has 8 bits, for every byte."""
        return self.builder.and_(self.shift(value, right), self.constant(mask * 0x01010101))

    def halves(self, value: ir.Value) -> ir.Value:
        """Return a vector with two lanes of 16 bits for each of 32."""
        return self.builder.bitcast(value, _HALVES)

    def call(self, name: str, *values: ir.Value, returns: ir.Type = _BYTES) -> ir.Value:
        """Call a function of LLVM."""
        kind = ir.FunctionType(returns, [value.type for value in values])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, values)

    def window(self, words: Sequence[ir.Value], bit: int, bits: int, place: int) -> ir.Value:
        """Return some bits of the words of every row, moved to bit 0 or 16 of the lane.

        The other half of the lane, and the bits above these, are undefined.
        """
        word, first = divmod(bit, 32)
        found = self.shift(words[word], first - place)
        if first + bits > 32:
            rest = self.shift(words[word + 1], first - place - 32)
            found = self.builder.or_(found, rest)
        return found

    def pairs(self, words: Sequence[ir.Value], width: int) -> list[ir.Value]:
        """Return the pairs of codes of a width from the words of the rows."""
        mask, at_once = self.constant(((1 << width) - 1) * 0x10001), 16 // width
        found = []
        for pair in range(PAIRS):
            if pair % at_once == 0:
                # of the next columns, as many as fit into 16 bits
                bits = min(at_once, PAIRS - pair) * width
                low = self.window(words, pair * width, bits, 0)
                high = self.window(words, (pair + PAIRS) * width, bits, 16)
                both = self.builder.shuffle_vector(self.halves(low), self.halves(high), _BLEND)
                both = self.builder.bitcast(both, _INTS)
            moved = self.shift(both, pair % at_once * width)
            found.append(self.builder.and_(moved, mask))
        return found

    def plane(self, words: Sequence[ir.Value], number: int) -> ir.Value:
        """Return a byte of each quarter of the words of the rows, quarter k as byte k of a lane."""
        found = self.builder.bitcast(words[0], _BYTES)
        for word, source in enumerate(words):
            taken = list(range(4 * LANES))
            for quarter in range(4):
                at, byte = divmod(len(words) * quarter + number, 4)
                if at == word:
                    for lane in range(0, 4 * LANES, 4):
                        taken[lane + quarter] = 4 * LANES + lane + byte
            choice = ir.Constant(ir.VectorType(_INT, 4 * LANES), taken)
            source = self.builder.bitcast(source, _BYTES)
            found = self.builder.shuffle_vector(found, source, choice)
        return self.builder.bitcast(found, _INTS)

    def path_pairs(
        self, words: Sequence[ir.Value], width: int, quantizer: ir.Value
    ) -> list[ir.Value]:
        """Return the pairs of values of a trellis, raised as `decode_path_rows` says.

        With the code k, the quantizer Q and ``h = 2 k`` the value is ``max(h - Q, min(h + Q, 0))``.
        It fits into a byte: four columns at a time have a byte of each lane.
        """
        parity, *rest = words
        # codes 0 and -1 of one bit are codes of two, the higher one the opposite of the lower
        rest = rest or [self.builder.not_(parity)]
        bits = len(rest)
        planes = [self.plane(rest, number) for number in range(bits)]
        half = ir.Constant(_BYTES, [2 << bits] * 4 * LANES)
        low, high = [], []
        for j in range(PAIRS // 2):
            number, first = divmod(bits * j, 8)
            mask = (1 << bits) - 1 << 2
            inside = mask & (1 << 10 - first) - 1
            h = self.masked(planes[number], first - 2, inside)
            if inside < mask:
                rest = self.masked(planes[number + 1], first - 10, mask - inside)
                h = self.builder.or_(h, rest)
            h = self.builder.or_(h, self.masked(parity, j - 1, 2))
            h, q = (
                self.builder.bitcast(part, _BYTES) for part in (h, self.masked(quantizer, j, 1))
            )
            most = self.call("llvm.umin.v32i8", self.builder.add(h, q), half)
            value = self.call("llvm.umax.v32i8", self.call("llvm.usub.sat.v32i8", h, q), most)
            value = self.builder.bitcast(value, _INTS)
            low.append(self.builder.and_(value, self.constant(0x00FF00FF)))
            high.append(self.builder.and_(self.shift(value, 8), self.constant(0x00FF00FF)))
        return low + high

    def products(self, pair: ir.Value, columns: ir.Value) -> ir.Value:
        """Return the sums of the products of both halves of two vectors."""
        wide = ir.VectorType(_INT, 2 * LANES)
        product = self.builder.mul(
            self.builder.sext(self.halves(pair), wide),
            self.builder.sext(self.halves(columns), wide),
        )
        low, high = (
            self.builder.shuffle_vector(
                product, product, ir.Constant(_INTS, [2 * lane + half for lane in range(LANES)])
            )
            for half in range(2)
        )
        return self.builder.add(low, high)


def _by_width(code: Code, width: ir.Value, widths: range, store: Callable[[int], None]) -> None:
    """Write ``store(width)`` for every width, and have one of them executed."""
    builder = code.builder
    end = builder.append_basic_block("end")
    choice = builder.switch(width, end)
    for number in widths:
        case = builder.append_basic_block(f"width_{number}")
        choice.add_case(ir.Constant(width.type, number), case)
        builder.position_at_end(case)
        store(number)
        builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def decode_rows(typing, words, at, band, width, pairs, to):
    """Decode `LANES` rows of a tile into pairs of codes, raised by half of their range.

    Args:
        words: the words of the layer, uint32.
        at: position of the first word of the rows.
        band: distance of the words of a row.
        width: bits of a code, 1 to 8; other widths do nothing.
        pairs: receives the pairs, int32, `ROWS` apart.
        to: position of the first pair of the rows.
    """
    kinds = words, types.int64, types.int64, types.int64, pairs, types.int64

    def write(context, builder, signature, values):
        code = Code(context, builder, signature.args, values)
        words, at, band, width, pairs, to = code.values

        def store(number: int) -> None:
            found = [code.load(words, code.offset(at, band, word)) for word in range(number)]
            for i, pair in enumerate(code.pairs(found, number)):
                code.store(pair, pairs, code.offset(to, ROWS, i))

        _by_width(code, width, range(1, 9), store)
        return context.get_dummy_value()

    return types.void(*kinds), write


@intrinsic
def decode_path_rows(typing, words, at, band, width, quantizers, r, pairs, to):
    """Decode `LANES` rows of a tile into pairs of values of a trellis.

    The values are raised by ``2 << max(1, width - 1)``.

    Args:
        words, at, band, pairs, to: as for `decode_rows`.
        width: bits of a code, 1 to 7; other widths do nothing.
        quantizers: quantizers of the rows of the tile, a bit per column, uint32.
        r: the first row.
    """
    kinds = words, types.int64, types.int64, types.int64, quantizers, types.int64, pairs
    kinds = *kinds, types.int64

    def write(context, builder, signature, values):
        code = Code(context, builder, signature.args, values)
        words, at, band, width, quantizers, r, pairs, to = code.values

        def store(number: int) -> None:
            found = [code.load(words, code.offset(at, band, word)) for word in range(number)]
            quantizer = code.load(quantizers, r)
            for i, pair in enumerate(code.path_pairs(found, number, quantizer)):
                code.store(pair, pairs, code.offset(to, ROWS, i))

        _by_width(code, width, range(1, 8), store)
        return context.get_dummy_value()

    return types.void(*kinds), write


@intrinsic
def add_rows(typing, pairs, r, columns, at, start, scale, sums, to):
    """Add the products of `LANES` rows of a tile with the columns of a token to sums.

    The sums of one tile are integers, and exact.

    Args:
        pairs: the pairs of the tile, int32, `ROWS` apart.
        r: the first row.
        columns: pairs of columns of tokens, int32.
        at: position of the first of the `PAIRS` pairs of this token and tile.
        start: what is added to the products, int32.
        scale: unit of the columns, float32.
        sums: the sums, float32.
        to: position of the first sum.
    """
    kinds = pairs, types.int64, columns, types.int64, types.int32, types.float32, sums, types.int64

    def write(context, builder, signature, values):
        code = Code(context, builder, signature.args, values)
        pairs, r, columns, at, start, scale, sums, to = code.values
        # two sums: the latency of a sum would be longer than the time that its terms take
        totals = [code.spread(start), code.constant(0)]
        for i in range(PAIRS):
            column = code.load(columns, code.offset(at, 1, i), _INT)
            pair = code.load(pairs, code.offset(r, ROWS, i))
            totals[i % 2] = builder.add(totals[i % 2], code.products(pair, code.spread(column)))
        total = builder.sitofp(builder.add(*totals), _FLOATS)
        scaled = builder.fmul(total, code.spread(scale), flags=("contract",))
        before = code.load(sums, to, _FLOATS)
        code.store(builder.fadd(before, scaled, flags=("contract",)), sums, to)
        return context.get_dummy_value()

    return types.void(*kinds), write


@intrinsic
def prefetch(typing, words, at):
    """Have a line of memory loaded into the caches; the position need not be in the array.

    Args:
        words: an array of 4-byte numbers.
        at: a position.
    """
    kinds = words, types.int64

    def write(context, builder, signature, values):
        code = Code(context, builder, signature.args, values)
        words, at = code.values
        # for reading, into all caches, data
        options = [ir.Constant(_INT, value) for value in (0, 3, 1)]
        address = code.address(words, at, ir.IntType(8))
        code.call("llvm.prefetch.p0", address, *options, returns=ir.VoidType())
        return context.get_dummy_value()

    return types.void(*kinds), write
