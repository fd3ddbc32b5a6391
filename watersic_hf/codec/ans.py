"""Lane-interleaved rANS: the steps of a block, vectorised over all lanes of a group of chunks.

A state x is in [2^16, 2^32).  The 16-bit words that the lanes of a chunk read in one step are
stored in lane order, so the stream needs neither padding nor an offset per lane.  The encoder
starts with x = 2^16 in every lane and processes the steps backwards, so the decoder must end with
x = 2^16.  A code with a shift s > 0 has s low bits, which the decoder takes from the state right
after the symbol.

Shapes: L = active lanes, T = steps of a block, C = chunks; `edges` holds the first lane of every
        chunk, and the number of lanes at the end.
"""

from dataclasses import dataclass, field

import numpy as np

from watersic_hf.codec.model import PRECISION, TOTAL

#: Smallest state, and the state in which the encoder starts.
STATE_MIN = 1 << 16

# typed, because numpy 1.26 promotes to 64 bits for an untyped zero-dimensional operand
_SLOT = np.uint32(TOTAL - 1)
_TOTAL = np.uint32(TOTAL)
_PRECISION = np.uint32(PRECISION)
_HEADROOM = np.uint32(32 - PRECISION)
_STATE_MIN = np.uint32(STATE_MIN)
_WORD_BITS = np.uint32(16)
_STATE_BITS = np.uint32(32)
_ONE = np.uint32(1)


@dataclass
class Encoder:
    """The states of the active lanes, and the words that they have emitted.

    Attributes:
        states_L: states, uint32, changed in place.
        edges: first lane of every chunk, and the number of lanes at the end.
        words: emitted words, one uint16 array in lane order per emission, in encoding order.
        counts: number of words per chunk, for each array of `words`.
    """

    states_L: np.ndarray
    edges: np.ndarray
    words: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)

    def steps(
        self, entries_TL: np.ndarray, low_TL: np.ndarray | None, shift_TL: np.ndarray | None
    ) -> None:
        """Encode a block of steps, the last one first.

        Args:
            entries_TL: entries of `CodeModel.encoder_table` for the symbols, uint32.
            low_TL: low bits of every code, uint32, or None if no code of the block has any.
            shift_TL: number of low bits of every code, uint32, or None like `low_TL`.
        """
        states_L = self.states_L
        frequency_TL = entries_TL & _SLOT
        divisor_TL = frequency_TL.astype(np.float64)
        start_TL = (entries_TL >> _PRECISION) & _SLOT
        spread_TL = _TOTAL - frequency_TL
        shifted_T = np.zeros(len(entries_TL), bool) if shift_TL is None else shift_TL.any(1)
        head_L, quotient_L = np.empty_like(states_L), np.empty(len(states_L))
        full_L = np.empty(len(states_L), bool)
        for t in range(len(entries_TL) - 1, -1, -1):
            if shifted_T[t]:
                self._low_bits(low_TL[t], shift_TL[t])
            np.right_shift(states_L, _HEADROOM, out=head_L)
            np.greater_equal(head_L, frequency_TL[t], out=full_L)
            self._emit(full_L)
            # exact: a float64 quotient of integers below 2^32 never rounds up to the next integer
            np.divide(states_L, divisor_TL[t], out=quotient_L)
            np.copyto(head_L, quotient_L, casting="unsafe")
            np.multiply(head_L, spread_TL[t], out=head_L)
            np.add(states_L, head_L, out=states_L)
            np.add(states_L, start_TL[t], out=states_L)

    def _low_bits(self, low_L: np.ndarray, shift_L: np.ndarray) -> None:
        """Encode low bits with equal probabilities; a lane with shift 0 does not change."""
        room_L = _STATE_BITS - np.maximum(shift_L, _ONE)
        self._emit(((self.states_L >> room_L) != 0) & (shift_L != 0))
        np.left_shift(self.states_L, shift_L, out=self.states_L)
        np.bitwise_or(self.states_L, low_L, out=self.states_L)

    def _emit(self, full_L: np.ndarray) -> None:
        """Emit a word from every state that is too large for the next symbol."""
        lane = full_L.nonzero()[0]
        if len(lane):
            states = self.states_L.take(lane)
            self.words.append(states.astype(np.uint16))
            self.states_L[lane] = states >> _WORD_BITS
            upto = lane.searchsorted(self.edges)
            self.counts.append(upto[1:] - upto[:-1])


@dataclass
class Decoder:
    """The states of the active lanes, and the read positions of the chunks.

    Attributes:
        states_L: states, uint32, changed in place.
        edges: first lane of every chunk, and the number of lanes at the end.
        words: words of all chunks, uint16.
        cursor_C: index of the next word of every chunk, changed in place.
    """

    states_L: np.ndarray
    edges: np.ndarray
    words: np.ndarray
    cursor_C: np.ndarray

    def __post_init__(self):
        self._count_L = np.arange(len(self.states_L))
        self._needy_L = np.empty(len(self.states_L), bool)
        self._slot_L = np.empty_like(self.states_L)
        self._index_L = np.empty(len(self.states_L), np.intp)

    def steps(
        self, table: np.ndarray, offset_TL: np.ndarray, shift_TL: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Decode a block of steps.

        Args:
            table: result of `CodeModel.decoder_table`.
            offset_TL: first entry of the key's table, which is 4096 times the key, intp.
            shift_TL: number of low bits, uint32, or None if no code of the block has any.

        Returns:
            The entries of the table, uint32 [T, L], and the low bits, uint32 [T, L] or None.
        """
        entries_TL = np.empty(offset_TL.shape, np.uint32)
        low_TL = None if shift_TL is None else np.zeros(offset_TL.shape, np.uint32)
        shifted_T = np.zeros(len(entries_TL), bool) if shift_TL is None else shift_TL.any(1)
        for t, entry_L in enumerate(entries_TL):
            self.symbols(table, offset_TL[t], entry_L)
            if shifted_T[t]:
                low_TL[t] = self.low_bits(shift_TL[t])
        return entries_TL, low_TL

    def symbols(self, table: np.ndarray, offset_L: np.ndarray, entry_L: np.ndarray) -> None:
        """Decode the symbols of one step.

        Args:
            table: result of `CodeModel.decoder_table`.
            offset_L: first entry of the key's table, intp.
            entry_L: receives the entries of the table, uint32.
        """
        states_L, slot_L = self.states_L, self._slot_L
        np.bitwise_and(states_L, _SLOT, out=slot_L)
        np.add(offset_L, slot_L, out=self._index_L)
        table.take(self._index_L, out=entry_L, mode="clip")
        np.bitwise_and(entry_L, _SLOT, out=slot_L)
        np.right_shift(states_L, _PRECISION, out=states_L)
        np.multiply(states_L, slot_L, out=states_L)
        np.right_shift(entry_L, _PRECISION, out=slot_L)
        np.bitwise_and(slot_L, _SLOT, out=slot_L)
        np.add(states_L, slot_L, out=states_L)
        self._take_words()

    def low_bits(self, shift_L: np.ndarray) -> np.ndarray:
        """Decode the low bits of one step, uint32; `shift_L` is their number, uint32."""
        low_L = self.states_L & ((_ONE << shift_L) - _ONE)
        np.right_shift(self.states_L, shift_L, out=self.states_L)
        self._take_words()
        return low_L

    def _take_words(self) -> None:
        """Read a word into every state below 2^16, in lane order within a chunk."""
        np.less(self.states_L, _STATE_MIN, out=self._needy_L)
        lane = self._needy_L.nonzero()[0]
        if len(lane):
            upto = lane.searchsorted(self.edges)
            count_C = upto[1:] - upto[:-1]
            index = (self.cursor_C - upto[:-1]).repeat(count_C)
            index += self._count_L[: len(lane)]
            states = self.states_L.take(lane)
            np.left_shift(states, _WORD_BITS, out=states)
            # a damaged chunk may read words of its neighbour; the caller checks where it ends
            np.bitwise_or(states, self.words.take(index, mode="clip"), out=states)
            self.states_L[lane] = states
            self.cursor_C += count_C
