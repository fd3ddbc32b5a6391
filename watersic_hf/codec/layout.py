"""Order of the codes in a payload: chunks of the matrix, lanes of a chunk, steps of a lane.

A chunk is a band of rows times a segment of columns.  It has at most 32 lanes (a warp), among which
the rows of the band are distributed with a stride: lane l of a chunk with `lanes` lanes holds the
rows p * lanes + l of the band for the phases p = 0 .. rows_per_lane - 1.  In an incomplete phase
the active lanes are therefore the first ones.  Within a phase, a lane processes the columns of the
segment in order, one column per step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

LANES = 32
#: Largest number of steps of a lane in the format.
MAX_STEPS = 1 << 16
#: Steps per lane for matrices below and from `LARGE` codes: a lane costs 24 bits beyond its codes.
STEPS_SMALL, STEPS_LARGE, LARGE = 2048, 4096, 1 << 20
#: Number of lanes that are processed together.
GROUP_LANES = 8192
#: Number of codes in a block of steps; the arrays of a block should fit into the cache.
BLOCK = 1 << 15


@dataclass(frozen=True)
class Span:
    """Consecutive steps with the same active lanes, in all chunks that have these steps.

    Lanes are ordered by segment, band, lane.

    Attributes:
        first, stop: range of the steps, as columns of a segment.
        segments: number of leading segments that have these columns.
        active: active lanes of one segment, as indices into the lanes of all bands.
        rows: row of the matrix for every active lane of a segment.
        edges: first lane of every chunk, and the number of lanes at the end.
    """

    first: int
    stop: int
    segments: int
    active: np.ndarray
    rows: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class Block:
    """Consecutive steps of a span that are processed together, T steps by L lanes.

    Attributes:
        span: span of the steps.
        stride: number of columns from one segment to the next.
        first, stop: range of the steps, first .. stop - 1.
    """

    span: Span
    stride: int
    first: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of steps T and number of lanes L."""
        return self.stop - self.first, self.span.segments * len(self.span.rows)

    def keys(self, row_class_A: np.ndarray, col_class_N: np.ndarray) -> np.ndarray:
        """Return the keys of the block, the sums of row class and column class, [T, L]."""
        cols_TS = np.arange(self.first, self.stop)[:, None] + self._starts
        keys_TSL = col_class_N[cols_TS][:, :, None] + row_class_A[self.span.rows]
        return keys_TSL.reshape(self.shape)

    def gather(self, codes_AN: np.ndarray, read: Callable, dtype: type) -> np.ndarray:
        """Return the codes of the block, passed through a function, [T, L].

        Args:
            codes_AN: matrix of codes.
            read: elementwise function that returns a new array.
            dtype: dtype of the result.
        """
        values_TL = np.empty(self.shape, dtype)
        for rows, cols, lanes in self._parts():
            # transpose the compact copy of `read`: columns of a wide matrix collide in the cache
            values_TL[:, lanes] = read(codes_AN[rows, cols]).T
        return values_TL

    def scatter(self, values_TL: np.ndarray, codes_AN: np.ndarray) -> None:
        """Write values [T, L] to their positions in the matrix."""
        for rows, cols, lanes in self._parts():
            codes_AN[rows, cols] = values_TL[:, lanes].T

    def positions(self, index: np.ndarray) -> np.ndarray:
        """Return row, column and chunk (segment, band) of flat indices into [T, L], stacked."""
        step, lane = np.divmod(index, self.shape[1])
        segment, within = np.divmod(lane, len(self.span.rows))
        chunk = self.span.edges.searchsorted(lane, side="right") - 1
        return np.stack([self.span.rows[within], segment * self.stride + self.first + step, chunk])

    @property
    def _starts(self) -> np.ndarray:
        return np.arange(self.span.segments) * self.stride

    def _parts(self) -> Iterator[tuple[np.ndarray | slice, slice, slice]]:
        """Yield the rows, columns and lanes of every segment."""
        rows, lanes = self.span.rows, len(self.span.rows)
        if rows[-1] - rows[0] == lanes - 1:
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
        for segment, start in enumerate(self._starts.tolist()):
            cols = slice(start + self.first, start + self.stop)
            yield rows, cols, slice(segment * lanes, (segment + 1) * lanes)


@dataclass(frozen=True)
class Geometry:
    """Shape of a matrix and of its chunks.

    Attributes:
        rows, cols: shape of the matrix.
        rows_per_lane: number of rows of a lane.
        cols_per_chunk: number of columns of a segment.
    """

    rows: int
    cols: int
    rows_per_lane: int
    cols_per_chunk: int

    @property
    def band_rows(self) -> int:
        """Number of rows of a complete band."""
        return LANES * self.rows_per_lane

    @property
    def bands(self) -> int:
        """Number of bands; 0 for a matrix without columns."""
        return -(-self.rows // self.band_rows) if self.cols else 0

    @property
    def segments(self) -> int:
        """Number of segments; 0 for a matrix without rows."""
        return -(-self.cols // self.cols_per_chunk) if self.rows else 0

    @property
    def chunks(self) -> int:
        """Number of chunks; their order is ``band * segments + segment``."""
        return self.bands * self.segments

    @property
    def lanes_B(self) -> np.ndarray:
        """Number of lanes of a chunk, for every band."""
        rows_B = np.full(self.bands, self.band_rows)
        rows_B[-1:] = self.rows - (self.bands - 1) * self.band_rows
        return -(-rows_B // self.rows_per_lane)

    @property
    def group_bands(self) -> int:
        """Number of bands that are processed together."""
        return max(1, GROUP_LANES // (LANES * max(1, self.segments)))

    def groups(self) -> Iterator[tuple[int, "Geometry"]]:
        """Yield groups of bands to process together: the first band, and the geometry."""
        size = self.group_bands
        for band in range(0, self.bands, size):
            yield band, self.part(band, min(band + size, self.bands))

    def part(self, first: int, stop: int) -> "Geometry":
        """Return the geometry of the bands first .. stop - 1 as a matrix of their own."""
        rows = min(self.rows, stop * self.band_rows) - first * self.band_rows
        return Geometry(rows, self.cols, self.rows_per_lane, self.cols_per_chunk)

    def spans(self) -> Iterator[Span]:
        """Yield the spans in coding order."""
        lanes_B = self.lanes_B
        upto_B = lanes_B.cumsum()
        band = np.arange(self.bands).repeat(lanes_B)
        lane = np.arange(len(band)) - (upto_B - lanes_B).repeat(lanes_B)
        short = self.cols - (self.segments - 1) * self.cols_per_chunk
        for phase in range(self.rows_per_lane):
            within = phase * lanes_B.repeat(lanes_B) + lane
            row = band * self.band_rows + within
            active = np.flatnonzero(row < self.rows)
            if not len(active):
                break
            starts = active.searchsorted(upto_B - lanes_B)
            for begin, end, segments in (
                (0, short, self.segments),
                (short, self.cols_per_chunk, self.segments - 1),
            ):
                if begin < end and segments:
                    flat = (np.arange(segments)[:, None] * len(active) + starts).ravel()
                    edges = np.append(flat, segments * len(active))
                    yield Span(begin, end, segments, active, row[active], edges)


def blocks(span: Span, geometry: Geometry) -> list[Block]:
    """Return the blocks of a span, in coding order."""
    size = max(1, BLOCK // int(span.edges[-1]))
    return [
        Block(span, geometry.cols_per_chunk, step, min(step + size, span.stop))
        for step in range(span.first, span.stop, size)
    ]


def choose_geometry(rows: int, cols: int) -> Geometry:
    """Return a geometry with about 2048 steps per lane, or 4096 for a million codes and more."""
    steps = STEPS_LARGE if rows * cols >= LARGE else STEPS_SMALL
    if cols == 0:
        return Geometry(rows, cols, 1, 1)
    segments = max(1, round(cols / steps))
    rows_per_lane = max(1, min(rows, round(steps / cols)))
    return Geometry(rows, cols, rows_per_lane, -(-cols // segments))


def choose_path_geometry(rows: int, cols: int, path_rows: int) -> Geometry:
    """Return a geometry for the columns of a matrix as paths of `path_rows` rows.

    The matrix is stored with its columns as rows; a chunk holds one path of each of its columns.
    """
    steps = STEPS_LARGE if rows * cols >= LARGE else STEPS_SMALL
    if rows == 0 or cols == 0:
        return Geometry(cols, rows, 1, 1)
    path_rows = min(path_rows, rows)
    return Geometry(cols, rows, max(1, min(cols, round(steps / path_rows))), path_rows)
