"""Vector code of the rANS steps: eight lanes of a chunk at a time.

The lanes that read a word, or write one, are bits of a number.  For each of the 256 numbers, a
table says where the words of these lanes go, so that one shuffle of bytes moves all eight words.

All functions are written for any CPU.  They read and write what they are told to: numba checks no
bounds here.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from watersic_kernels.cpu.codes_vectors import Codes
from watersic_kernels.cpu.vectors import LANES

_BYTE, _INT, _AT = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_WORDS = ir.VectorType(ir.IntType(16), LANES)
_WORD_BYTES = ir.VectorType(_BYTE, 2 * LANES)
_INTS = ir.VectorType(_INT, LANES)
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)


def _places(writes: bool) -> list[int]:
    """Return the bytes that `_Lanes.moved` takes, for every set of lanes.

    The words of a set of lanes are consecutive.  If lanes read words, each lane takes its own;
    other lanes take any.  If lanes write, their words end with the last of eight.
    """
    taken = []
    for chosen in range(1 << LANES):
        lanes = [lane for lane in range(LANES) if chosen >> lane & 1]
        if writes:
            words = [0] * (LANES - len(lanes)) + lanes
        else:
            words = [sum(other < lane for other in lanes) % LANES for lane in range(LANES)]
        taken += [2 * word + byte for word in words for byte in range(2)]
    return taken


def _at(value: int) -> ir.Constant:
    return ir.Constant(_AT, value)


class _Lanes(Codes):
    """Writes the instructions of the steps."""

    def chosen(self, condition: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return lanes with a condition as bits, of those in a mask, and their number, 64 bits."""
        bits = self.builder.bitcast(condition, _BYTE)
        bits = self.builder.zext(self.builder.and_(bits, self.builder.trunc(mask, _BYTE)), _AT)
        return bits, self.call("llvm.ctpop.i64", bits, returns=_AT)

    def moved(self, words: ir.Value, bits: ir.Value, *, writes: bool) -> ir.Value:
        """Return eight words in the order that `_places` has for some lanes."""
        builder, size = self.builder, 2 * LANES
        places = ir.Constant(ir.ArrayType(_BYTE, size << LANES), bytearray(_places(writes)))
        name = "rans_written" if writes else "rans_read"
        table = cgutils.global_constant(builder, name, places)
        table = builder.bitcast(table, _BYTE.as_pointer())
        order = self.load(table, self.offset(ir.Constant(_AT, 0), bits, size), _WORD_BYTES, align=1)
        source = builder.bitcast(words, _WORD_BYTES)
        found = ir.Constant(_WORD_BYTES, ir.Undefined)
        # LLVM makes one instruction of it where the CPU has one (``pshufb`` on x86)
        for i in range(size):
            place = builder.extract_element(order, ir.Constant(_INT, i))
            byte = builder.extract_element(source, place)
            found = builder.insert_element(found, byte, ir.Constant(_INT, i))
        return builder.bitcast(found, _WORDS)

    def renewed(
        self,
        state: ir.Value,
        small: ir.Value,
        words: ir.Value,
        position: ir.Value,
        mask: ir.Value,
    ) -> tuple[ir.Value, ir.Value]:
        """Return states with a word added to the small ones, and the number of words."""
        bits, count = self.chosen(small, mask)
        found = self.moved(self.load(words, position, _WORDS, align=2), bits, writes=False)
        full = self.builder.or_(self.shift(state, -16), self.builder.zext(found, _INTS))
        return self.builder.select(small, full, state), count

    def relieved(
        self, state: ir.Value, full: ir.Value, out: ir.Value, end: ir.Value, mask: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Return states with a word taken from the full ones, and the number of words."""
        bits, count = self.chosen(full, mask)
        words = self.moved(self.builder.trunc(state, _WORDS), bits, writes=True)
        self.store(words, out, self.builder.sub(end, _at(LANES)), align=2)
        return self.builder.select(full, self.shift(state, 16), state), count

    def bits(self, value: ir.Value, right: int) -> ir.Value:
        """Return twelve bits of every lane."""
        return self.builder.and_(self.shift(value, right), self.constant(4095))


@intrinsic
def look_up(typing, states, keys, lane, page_K, col_class, pages, entries, to):
    """Look up the next symbols of eight lanes.

    Args:
        states: states of the lanes, uint32.
        keys: what the class of the column is added to for the keys of the lanes, int32.
        lane: the first of the eight lanes.
        page_K: first entry of the table of every key in `pages`, int64.
        col_class: class of the column.
        pages: entries of the tables, uint32.
        entries: receives the entries, int32.
        to: position of the first one.
    """
    kinds = states, keys, types.int64, page_K, types.int64, pages, entries, types.int64

    def write(context, builder, signature, values):
        code = _Lanes(context, builder, signature.args, values)
        states, keys, lane, page_K, col_class, pages, entries, to = code.values
        # a class of 64 bits would be added to each key
        page_K = builder.gep(page_K, [col_class])
        entry = ir.Constant(_INTS, ir.Undefined)
        for i in range(0, LANES, 2):
            pair = code.load(states, code.offset(lane, 1, i), _AT)
            key_pair = code.load(keys, code.offset(lane, 1, i), _AT)
            for half in range(2):
                slot = builder.and_(builder.lshr(pair, _at(32 * half)), _at(4095))
                key = builder.and_(builder.lshr(key_pair, _at(32 * half)), _at(0xFFFFFFFF))
                place = builder.add(code.load(page_K, key, _AT), slot)
                found = code.load(pages, place, _INT)
                entry = builder.insert_element(entry, found, ir.Constant(_INT, i + half))
        code.store(entry, entries, to)
        return context.get_dummy_value()

    return types.void(*kinds), write


@intrinsic
def decode_lanes(typing, states, lane, codes, at, words, position, mask):
    """Decode the symbols of eight lanes.

    Args:
        states: states of the lanes, uint32, which change.
        lane: the first of the eight lanes.
        codes: entries that `look_up` has found, which become symbols, int32.
        at: position of the first one.
        words: words of the chunk, uint16, eight of them from `position` on.
        position: position of the next word.
        mask: lanes that may read a word, as bits.

    Returns:
        The number of words that were read, plus 256 times the lanes of the mask with the escape as
        bits.
    """
    kinds = states, types.int64, codes, types.int64, words, types.int64, types.int64

    def write(context, builder, signature, values):
        code = _Lanes(context, builder, signature.args, values)
        states, lane, codes, at, words, position, mask = code.values
        state, entry = code.load(states, lane), code.load(codes, at)
        state = builder.mul(code.bits(entry, 0), code.shift(state, 12))
        state = builder.add(state, code.bits(entry, 12))
        small = builder.icmp_unsigned("<", state, code.constant(1 << 16))
        state, count = code.renewed(state, small, words, position, mask)
        code.store(state, states, lane)
        symbol = builder.ashr(entry, code.constant(24))
        code.store(symbol, codes, at)
        escaped = builder.icmp_signed("==", symbol, code.constant(-128))
        escaped, _ = code.chosen(escaped, mask)
        return builder.add(count, builder.shl(escaped, _at(8)))

    return types.int64(*kinds), write


@intrinsic
def decode_low_bits(
    typing, states, keys, lane, shift_K, col_class, codes, at, words, position, mask
):
    """Decode the low bits of eight lanes, and add them to the symbols except for escapes.

    Args:
        states, keys, lane, col_class, words, position, mask: as for `look_up` and `decode_lanes`.
        shift_K: number of low bits of every key, uint8.
        codes: symbols, which become codes, int32.
        at: position of the first one.

    Returns:
        The number of words that were read.
    """
    kinds = states, keys, types.int64, shift_K, types.int64, codes, types.int64, words
    kinds = *kinds, types.int64, types.int64

    def write(context, builder, signature, values):
        code = _Lanes(context, builder, signature.args, values)
        states, keys, lane, shift_K, col_class, codes, at, words, position, mask = code.values
        state, symbol = code.load(states, lane), code.load(codes, at)
        shift = code.shifts(code.keys(col_class, code.load(keys, lane), None), shift_K)
        some = builder.icmp_signed("!=", shift, code.constant(0))
        range_ = builder.shl(code.constant(1), shift)
        low = builder.and_(state, builder.sub(range_, code.constant(1)))
        state = builder.lshr(state, shift)
        small = builder.icmp_unsigned("<", state, code.constant(1 << 16))
        state, count = code.renewed(state, builder.and_(small, some), words, position, mask)
        code.store(state, states, lane)
        value = builder.add(builder.shl(symbol, shift), low)
        value = builder.sub(value, builder.lshr(range_, code.constant(1)))
        escaped = builder.icmp_signed("==", symbol, code.constant(-128))
        code.store(builder.select(escaped, symbol, value), codes, at)
        return count

    return types.int64(*kinds), write


@intrinsic
def walk_lanes(typing, path, keys, lane, codes, to):
    """Turn eight codes of a trellis into values, and take the step to the next quantizers.

    Args:
        path: the classes of 32 lanes, and the quantizers of this step and of the two before it, one
            after the other, int32.
        keys: receives the classes plus the next quantizers, int32.
        lane: the first of the eight lanes.
        codes: the codes, which become values, int32.
        to: position of the first code.
    """
    kinds = path, keys, types.int64, codes, types.int64

    def write(context, builder, signature, values):
        code = _Lanes(context, builder, signature.args, values)
        path, keys, lane, codes, to = code.values
        places = [code.offset(lane, 32, i) for i in range(4)]
        row_class, this, last, earlier = (code.load(path, place) for place in places)
        value, zero = code.load(codes, to), code.constant(0)
        parity = builder.and_(value, code.constant(1))
        after = builder.xor(builder.xor(last, earlier), parity)
        for i, quantizer in enumerate((after, this, last)):
            code.store(quantizer, path, places[i + 1])
        code.store(builder.add(row_class, after), keys, lane)
        up = builder.select(builder.icmp_signed("<", value, zero), this, zero)
        down = builder.select(builder.icmp_signed(">", value, zero), this, zero)
        value = builder.sub(builder.add(code.shift(value, -1), up), down)
        code.store(value, codes, to)
        return context.get_dummy_value()

    return types.void(*kinds), write


@intrinsic
def copy_lanes(typing, codes, at, out, to):
    """Copy eight codes, int32, from a position of an array to one of another array."""
    kinds = codes, types.int64, out, types.int64

    def write(context, builder, signature, values):
        code = _Lanes(context, builder, signature.args, values)
        codes, at, out, to = code.values
        code.store(code.load(codes, at), out, to)
        return context.get_dummy_value()

    return types.void(*kinds), write


@intrinsic
def write_square(typing, codes, at, out, to, width):
    """Write eight columns of eight lanes to an output in which columns are next to each other.

    Args:
        codes: codes, int32, 32 of each column.
        at: position of the first one.
        out: the output, int32.
        to: position of the first code in it.
        width: columns of the output.
    """
    kinds = codes, types.int64, out, types.int64, types.int64

    def write(context, builder, signature, values):
        code = _Lanes(context, builder, signature.args, values)
        codes, at, out, to, width = code.values
        rows = [code.load(codes, code.offset(at, 32, i)) for i in range(LANES)]
        # the blocks off the diagonal change places: those of one lane, of two, and of four
        for size in (1, 2, 4):
            for i in (i for i in range(LANES) if not i & size):
                pair = rows[i], rows[i + size]
                first = [lane + (LANES - size if lane & size else 0) for lane in range(LANES)]
                for half in range(2):
                    taken = ir.Constant(pair[0].type, [lane + half * size for lane in first])
                    rows[i + half * size] = builder.shuffle_vector(*pair, taken)
        for i, row in enumerate(rows):
            code.store(row, out, code.offset(to, width, i))
        return context.get_dummy_value()

    return types.void(*kinds), write


@intrinsic
def encode_lanes(typing, states, lane, entries, at, out, end, mask):
    """Encode the symbols of eight lanes.

    Args:
        states: states of the lanes, uint32, which change.
        lane: the first of the eight lanes.
        entries: entries of the symbols, uint32: their start and their frequency in the low 24 bits.
        at: position of the first entry.
        out: receives words, uint16; any of the eight before `end` may change.
        end: position after the words.
        mask: lanes that may write a word, as bits.

    Returns:
        The number of words that were written.
    """
    kinds = states, types.int64, entries, types.int64, out, types.int64, types.int64

    def write(context, builder, signature, values):
        code = _Lanes(context, builder, signature.args, values)
        states, lane, entries, at, out, end, mask = code.values
        state, entry = code.load(states, lane), code.load(entries, at)
        frequency = code.bits(entry, 0)
        full = builder.icmp_unsigned(">=", code.shift(state, 20), frequency)
        state, count = code.relieved(state, full, out, end, mask)
        # exact: a float64 quotient of integers below 2^32 never rounds up to the next integer
        quotient = builder.fdiv(
            builder.uitofp(state, _DOUBLES), builder.uitofp(frequency, _DOUBLES)
        )
        # a quotient has at most 20 bits, and CPUs convert signed numbers
        quotient = builder.fptosi(quotient, state.type)
        spread = builder.sub(code.constant(4096), frequency)
        state = builder.add(state, builder.mul(quotient, spread))
        code.store(builder.add(state, code.bits(entry, 12)), states, lane)
        return count

    return types.int64(*kinds), write


@intrinsic
def encode_low_bits(typing, states, lane, lows, at, out, end, mask):
    """Encode the low bits of eight lanes with equal probabilities.

    Args:
        states, lane, out, end, mask: as for `encode_lanes`.
        lows: low bits below their number times 2^16, uint32.
        at: position of the first ones.

    Returns:
        The number of words that were written.
    """
    kinds = states, types.int64, lows, types.int64, out, types.int64, types.int64

    def write(context, builder, signature, values):
        code = _Lanes(context, builder, signature.args, values)
        states, lane, lows, at, out, end, mask = code.values
        state, low = code.load(states, lane), code.load(lows, at)
        shift, low = code.shift(low, 16), builder.and_(low, code.constant(0xFFFF))
        some = builder.icmp_signed("!=", shift, code.constant(0))
        # no shift by 32, whose result is undefined
        room = builder.sub(code.constant(32), shift)
        room = builder.select(some, room, code.constant(31))
        full = builder.icmp_unsigned("!=", builder.lshr(state, room), code.constant(0))
        state, count = code.relieved(state, builder.and_(full, some), out, end, mask)
        code.store(builder.or_(builder.shl(state, shift), low), states, lane)
        return count

    return types.int64(*kinds), write
