"""Vector code for eight codes that are next to each other: magnitudes, symbols, counts.

Where fewer than eight codes are left, the last one takes the place of the others, so that nothing
after it is read.  Arrays with a number for each code, such as classes, have a length that is a
multiple of eight.

All functions are written for any CPU.  They read and write what they are told to: numba checks no
bounds here.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from watersic_kernels.cpu.vectors import LANES, Code

_BYTE, _INT, _AT = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_INTS, _LONGS = ir.VectorType(_INT, LANES), ir.VectorType(_AT, LANES)


class Codes(Code):
    """Writes instructions for eight codes."""

    def lane(self, vector: ir.Value, number: int) -> ir.Value:
        """Return one lane of a vector."""
        return self.builder.extract_element(vector, ir.Constant(_INT, number))

    def indices(self, vector: ir.Value) -> list[ir.Value]:
        """Return the lanes as numbers of 64 bits; two at a time leave the vector."""
        builder, found = self.builder, []
        pairs = builder.bitcast(vector, ir.VectorType(_AT, LANES // 2))
        for i in range(LANES // 2):
            pair = self.lane(pairs, i)
            found.append(builder.and_(pair, ir.Constant(_AT, 0xFFFFFFFF)))
            found.append(builder.lshr(pair, ir.Constant(_AT, 32)))
        return found

    def eight(self, data: ir.Value, at: ir.Value, count: ir.Value, kind: ir.Type) -> ir.Value:
        """Return the numbers from a position on, of which there are at least `count`."""
        builder, vector = self.builder, ir.VectorType(kind, LANES)
        enough = builder.icmp_signed(">=", count, ir.Constant(_AT, LANES))
        with builder.if_else(enough) as (then, otherwise):
            with then:
                whole, whole_block = (
                    self.load(data, at, vector, align=kind.width // 8),
                    builder.block,
                )
            with otherwise:
                part = ir.Constant(vector, ir.Undefined)
                last = builder.sub(count, ir.Constant(_AT, 1))
                for i in range(LANES):
                    place = ir.Constant(_AT, i)
                    inside = builder.icmp_signed("<", place, last)
                    place = builder.add(at, builder.select(inside, place, last))
                    found = self.load(data, place, kind, align=kind.width // 8)
                    part = builder.insert_element(part, found, ir.Constant(_INT, i))
                part_block = builder.block
        found = builder.phi(vector)
        found.add_incoming(whole, whole_block)
        found.add_incoming(part, part_block)
        return found

    def magnitudes(self, codes: ir.Value, bounds: ir.Value) -> ir.Value:
        """Return the magnitudes of codes, at most the bounds, 64 bits."""
        builder = self.builder
        sign = builder.ashr(codes, self.constant(31))
        size = builder.sub(builder.xor(codes, sign), sign)
        less = builder.icmp_unsigned("<", size, bounds)
        return builder.zext(builder.select(less, size, bounds), _LONGS)

    def shifts(self, keys: ir.Value, shift_K: ir.Value) -> ir.Value:
        """Return the numbers of low bits of keys."""
        found = ir.Constant(_INTS, ir.Undefined)
        for i, place in enumerate(self.indices(keys)):
            shift = self.builder.zext(self.load(shift_K, place, _BYTE, align=1), _INT)
            found = self.builder.insert_element(found, shift, ir.Constant(_INT, i))
        return found

    def symbols(self, codes: ir.Value) -> ir.Value:
        """Return the bytes of codes without low bits; those beyond +-127 become the escape."""
        for sign, bound in (("<", -128), (">", 128)):
            inside = self.builder.icmp_signed(sign, self.constant(bound), codes)
            codes = self.builder.select(inside, codes, self.constant(bound))
        return self.builder.and_(codes, self.constant(255))

    def keys(self, base: ir.Value, classes: ir.Value, quantizers: ir.Value | None) -> ir.Value:
        """Return the sums of a class, classes, and quantizers if there are any."""
        keys = self.builder.add(self.spread(self.builder.trunc(base, _INT)), classes)
        if quantizers is None:
            return keys
        return self.builder.add(keys, self.builder.zext(quantizers, _INTS))

    def split(
        self, codes: ir.Value, keys: ir.Value, shift_K: ir.Value, shifted: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Split codes into what they have in a table of 256 numbers for every key, and low bits.

        Returns:
            The places in the table, and the low bits below their number times 2^16.  The latter are
            0 unless `shifted` says that keys may have low bits.
        """
        builder = self.builder
        before = builder.block
        with builder.if_then(builder.icmp_signed("!=", shifted, ir.Constant(_AT, 0))):
            shift = self.shifts(keys, shift_K)
            # rounded to the nearest multiple, without the overflow of an addition before the shift
            half = builder.ashr(self.shift(codes, -1), shift)
            half = builder.and_(half, self.constant(1))
            rounded = builder.add(builder.ashr(codes, shift), half)
            range_ = builder.shl(self.constant(1), shift)
            low = builder.add(codes, builder.lshr(range_, self.constant(1)))
            low = builder.and_(low, builder.sub(range_, self.constant(1)))
            low = builder.or_(low, self.shift(shift, -16))
            inside = builder.block
        values, lows = builder.phi(_INTS), builder.phi(_INTS)
        for phi, plain, found in ((values, codes, rounded), (lows, self.constant(0), low)):
            phi.add_incoming(plain, before)
            phi.add_incoming(found, inside)
        return builder.or_(self.shift(keys, -8), self.symbols(values)), lows


@intrinsic
def add_magnitudes(typing, codes, at, count, stride, rows, bounds, n, sums):
    """Add bounded magnitudes of codes of up to four rows to the sums of their columns.

    Args:
        codes: codes, int32.
        at: position of the first one of the first row.
        count: number of codes of a row from there on.
        stride: distance of the rows.
        rows: number of rows; more than four count as four.
        bounds: bounds of the magnitudes, uint32.
        n: position of the first bound and of the first sum.
        sums: the sums, int64.
    """
    kinds = codes, types.int64, types.int64, types.int64, types.int64, bounds, types.int64, sums

    def write(context, builder, signature, values):
        code = Codes(context, builder, signature.args, values)
        codes, at, count, stride, rows, bounds, n, sums = code.values
        bound, total = code.load(bounds, n), code.load(sums, n, _LONGS, align=8)
        # a sum is loaded and stored once for all rows
        for i in range(4):
            inside = builder.icmp_signed("<", ir.Constant(_AT, i), rows)
            place = builder.select(inside, code.offset(at, stride, i), at)
            found = code.magnitudes(code.eight(codes, place, count, _INT), bound)
            none = ir.Constant(_LONGS, [0] * LANES)
            total = builder.add(total, builder.select(inside, found, none))
        code.store(total, sums, n, align=8)
        return context.get_dummy_value()

    return types.void(*kinds), write


@intrinsic
def weighted_sum(typing, codes, at, count, bounds, weights, n):
    """Return the sum of the weighted and bounded magnitudes of codes.

    Args:
        codes, at, count, bounds: as for `add_magnitudes`.
        weights: weights of the codes, uint32; 0 where there is no code.
        n: position of the first bound and of the first weight.
    """
    kinds = codes, types.int64, types.int64, bounds, weights, types.int64

    def write(context, builder, signature, values):
        code = Codes(context, builder, signature.args, values)
        codes, at, count, bounds, weights, n = code.values
        found = code.magnitudes(code.eight(codes, at, count, _INT), code.load(bounds, n))
        weight = builder.zext(code.load(weights, n), _LONGS)
        product = builder.mul(found, weight)
        return code.call("llvm.vector.reduce.add.v8i64", product, returns=_AT)

    return types.int64(*kinds), write


@intrinsic
def count_codes(
    typing, codes, quantizers, at, count, trellis, base, classes, n, shift_K, shifted, counts
):
    """Count codes by key and symbol.

    Args:
        codes: codes, int32.
        quantizers: their quantizers, uint8; not read without a trellis.
        at: position of the first one.
        count: number of codes from there on.
        trellis: whether to add the quantizers to the keys.
        base: what is added to the classes for the keys.
        classes: classes of the codes, int32.
        n: position of the first class.
        shift_K: number of low bits of every key, uint8.
        shifted: whether keys may have low bits.
        counts: uint32, two tables with 256 counts of every key.  Neighbours are counted in
            different tables, as an addition to a count that was increased just before would wait.
    """
    kinds = codes, quantizers, types.int64, types.int64, types.int64, types.int64
    kinds = *kinds, classes, types.int64, shift_K, types.int64, counts

    def write(context, builder, signature, values):
        code = Codes(context, builder, signature.args, values)
        codes, quantizers, at, count, trellis, base, classes, n, shift_K, shifted, counts = (
            code.values
        )
        found = code.eight(codes, at, count, _INT)
        keys = _keys(code, quantizers, (at, count, trellis), base, code.load(classes, n))
        places, _ = code.split(found, keys, shift_K, shifted)
        table = context.make_array(signature.args[-1])(context, builder, values[-1])
        half = builder.lshr(table.nitems, ir.Constant(_AT, 1))
        halves = counts, builder.gep(counts, [half])

        def add(data: ir.Value, place: ir.Value) -> None:
            address = code.address(data, place, _INT)
            builder.store(builder.add(builder.load(address), ir.Constant(_INT, 1)), address)

        enough = builder.icmp_signed(">=", count, ir.Constant(_AT, LANES))
        with builder.if_else(enough) as (then, otherwise):
            with then:
                for i, place in enumerate(code.indices(places)):
                    add(halves[i % 2], place)
            with otherwise:
                for i, place in enumerate(code.indices(places)):
                    inside = builder.icmp_signed("<", ir.Constant(_AT, i), count)
                    with builder.if_then(inside):
                        add(halves[i % 2], place)
        return context.get_dummy_value()

    return types.void(*kinds), write


def _keys(
    code: Codes, quantizers: ir.Value, given: tuple, base: ir.Value, classes: ir.Value
) -> ir.Value:
    """Return the keys of codes; `given` is their position, their number, and `trellis`."""
    builder, (at, count, trellis) = code.builder, given
    plain, before = code.keys(base, classes, None), builder.block
    with builder.if_then(builder.icmp_signed("!=", trellis, ir.Constant(_AT, 0))):
        found = code.keys(base, classes, code.eight(quantizers, at, count, _BYTE))
        inside = builder.block
    keys = builder.phi(_INTS)
    keys.add_incoming(plain, before)
    keys.add_incoming(found, inside)
    return keys


@intrinsic
def find_entries(
    typing,
    codes,
    quantizers,
    at,
    count,
    trellis,
    base,
    classes,
    n,
    shift_K,
    shifted,
    entries,
    found,
    lows,
    to,
    step,
):
    """Find the entries of the symbols of codes, and the low bits.

    Args:
        codes, quantizers, at, count, trellis, base, classes, n, shift_K, shifted: as for
            `count_codes`.
        entries: 256 entries of every key, uint32.
        found: receives the entries, uint32.
        lows: receives the low bits below their number times 2^16, uint32, if `shifted`.
        to: position of the first entry in `found` and `lows`.
        step: distance of the entries there.

    Returns:
        Whether any of the symbols is escaped: more than 0, then.
    """
    kinds = codes, quantizers, types.int64, types.int64, types.int64, types.int64, classes
    kinds = *kinds, types.int64, shift_K, types.int64, entries, found, lows, types.int64
    kinds = *kinds, types.int64

    def write(context, builder, signature, values):
        code = Codes(context, builder, signature.args, values)
        codes, quantizers, at, count, trellis, base, classes, n, *rest = code.values
        shift_K, shifted, entries, found, lows, to, step = rest
        given = code.eight(codes, at, count, _INT)
        keys = _keys(code, quantizers, (at, count, trellis), base, code.load(classes, n))
        places, low = code.split(given, keys, shift_K, shifted)
        flags = ir.Constant(_INT, 0)
        for i, place in enumerate(code.indices(places)):
            entry = code.load(entries, place, _INT)
            code.store(entry, found, code.offset(to, step, i))
            flags = builder.or_(flags, entry)
        with builder.if_then(builder.icmp_signed("!=", shifted, ir.Constant(_AT, 0))):
            for i in range(LANES):
                code.store(code.lane(low, i), lows, code.offset(to, step, i))
        return builder.zext(builder.lshr(flags, ir.Constant(_INT, 24)), _AT)

    return types.int64(*kinds), write
