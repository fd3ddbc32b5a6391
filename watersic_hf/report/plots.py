"""The plots of the page as SVG, a function for each; colours and fonts are in `page.css`.

Every plot is drawn in a picture of `WIDTH` by `HEIGHT` units that scales with its column.  Points
of layers are one path per kind of layer, so that thousands of them stay small; the attribute
``data-layers`` says which layer each point is, and `page.js` finds the nearest one to the pointer.
"""

import html
import math
from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest

from watersic_hf.core import BINS_PER_BIT
from watersic_hf.report.facts import Facts, LayerFacts

WIDTH, HEIGHT = 560, 340
LEFT, MARGIN, BOTTOM = 70, 14, 50
_SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
#: Least height of a histogram among others, and what its name takes of that.
ROW, NAME = 46, 21
#: Colours of kinds in `page.css`; further kinds begin again.
COLOURS = 10


class Axes:
    """A pair of axes: from values to units of the picture.

    Args:
        x: least and largest value.
        y: the same upwards.
        log_y: the values of `y` are positive, and their logarithms count.
        right: unit at which the x axis ends.
        bottom: unit at which the y axis begins.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        log_y: bool = False,
        right: float = WIDTH - MARGIN,
        bottom: float = HEIGHT - BOTTOM,
    ) -> None:
        self.log_y = log_y
        self.x = x
        self.y = (math.log10(y[0]), math.log10(y[1])) if log_y else y
        self.right = right
        self.bottom = bottom

    def at_x(self, value: float) -> float:
        """Units from the left."""
        low, high = self.x
        return LEFT + (self.right - LEFT) * (value - low) / (high - low)

    def at_y(self, value: float) -> float:
        """Units from the top."""
        low, high = self.y
        value = math.log10(value) if self.log_y else value
        return self.bottom - (self.bottom - MARGIN) * (value - low) / (high - low)

    def at(self, x: float, y: float) -> str:
        """A point of a path."""
        return f"{self.at_x(x):.1f} {self.at_y(y):.1f}"

    def draw_x(self, label: str, ticks: Iterable[float] | None = None, unit: str = "") -> str:
        """The axis, its ticks (round numbers unless they are given) and its label."""
        parts = [f'<path class="axis" d="M{LEFT} {self.bottom}H{self.right}"/>']
        for tick in round_ticks(*self.x) if ticks is None else ticks:
            x = self.at_x(tick)
            parts.append(f'<path class="axis" d="M{x:.1f} {self.bottom}v4"/>')
            parts.append(_text(x, self.bottom + 18, f"{tick:g}{unit}", "tick middle"))
        parts.append(_text((LEFT + self.right) / 2, self.bottom + 40, label, "label middle"))
        return "".join(parts)

    def draw_y(self, label: str) -> str:
        """Lines across the plot at round numbers, or powers of ten, and the label."""
        low, high = self.y
        decades = [10.0**e for e in range(math.ceil(low), math.floor(high) + 1)]
        parts = []
        for tick in decades if self.log_y else round_ticks(low, high):
            y = self.at_y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{self.right}"/>')
            number = _power(tick) if self.log_y else f"{tick:g}"
            parts.append(_text(LEFT - 8, y + 4, number, "tick end"))
        place = f'transform="translate(14 {(MARGIN + self.bottom) / 2:.1f}) rotate(-90)"'
        parts.append(f'<text class="label middle" {place}>{html.escape(label)}</text>')
        return "".join(parts)


def round_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _power(tick: float) -> str:
    return "10" + str(round(math.log10(tick))).translate(_SUPERSCRIPT)


def bits_by_block(facts: Facts) -> str:
    """Bits of every kind of layer from block to block; of several in a block, range and median."""
    # what is in no stack of blocks stands behind them, so that blocks keep their numbers
    blocks = dict.fromkeys((r.location.stack, r.location.block) for r in facts.layers)
    blocks = sorted(blocks, key=lambda block: not block[0])
    number = {block: n for n, block in enumerate(blocks)}
    axes = Axes((-0.5, len(blocks) - 0.5), (0, max(1.0, 1.08 * max(r.bits for r in facts.layers))))
    inside = sum(bool(stack) for stack, _ in blocks)
    whole = [tick for tick in round_ticks(*axes.x) if tick == int(tick) and tick < inside]
    parts = [axes.draw_y("stored bits per weight"), axes.draw_x("block", whole)]
    for kind, layers in enumerate(_by_kind(facts, facts.layers)):
        spans, points = [], []
        for block, group in groupby(layers, lambda r: number[r.location.stack, r.location.block]):
            ranked = sorted(group, key=lambda r: r.bits)
            points.append((axes.at(block, ranked[len(ranked) // 2].bits), ranked[len(ranked) // 2]))
            if len(ranked) > 1:
                spans.append(f"M{axes.at(block, ranked[0].bits)}V{axes.at_y(ranked[-1].bits):.1f}")
        line = f'<path class="line" d="M{"L".join(point for point, _ in points)}"/>'
        span = f'<path class="span" d="{"".join(spans)}"/>'
        parts.append(_kind(kind, line + span + _points(points)))
    mean = axes.at_y(facts.totals["bits"])
    parts.append(f'<path class="mean" d="M{LEFT} {mean:.1f}H{axes.right}"/>')
    return _svg("bits-by-block", "Stored bits of the layers, block by block", parts)


def error_against_bits(facts: Facts) -> str:
    """Relative output error of every layer against its bits, as far as errors are known."""
    known = [r for r in facts.layers if r.error]
    if not known:
        return ""
    low, high = 0.7 * min(r.error for r in known), 1.5 * max(r.error for r in known)
    right = max(1.0, 1.08 * max(r.bits for r in known))
    axes = Axes((0, right), (min(low, high / 30), high), log_y=True)
    parts = [axes.draw_y("relative output error"), axes.draw_x("stored bits per weight")]
    for kind, layers in enumerate(_by_kind(facts, known)):
        parts.append(_kind(kind, _points([(axes.at(r.bits, r.error), r) for r in layers])))
    return _svg("error-against-bits", "Output error against stored bits, a point per layer", parts)


def column_rates(facts: Facts) -> str:
    """A histogram of the entropies of the columns for every kind of layer, one above the other."""
    histograms = [
        _sum(r.profile.histogram for r in layers if r.profile is not None)
        for layers in _by_kind(facts, facts.layers)
    ]
    # an embedding is not looked at column by column
    shown = [(kind, histogram) for kind, histogram in enumerate(histograms) if histogram]
    if not shown:
        return ""
    bins = max(len(histogram) for _, histogram in shown)
    bottom = max(HEIGHT - BOTTOM, MARGIN + ROW * len(shown))
    row = (bottom - MARGIN) / len(shown)
    axes = Axes((0, max(4, math.ceil(bins / BINS_PER_BIT))), (0, 1), bottom=bottom)
    parts = [axes.draw_x("entropy of a column's codes, bits")]
    for number, (kind, histogram) in enumerate(shown, 1):
        base, tallest = MARGIN + row * number, max(histogram)
        edges = [axes.at_x(n / BINS_PER_BIT) for n in range(len(histogram) + 1)]
        path = f"M{edges[0]:.1f} {base:.1f}"
        for left, right, count in zip(edges, edges[1:], histogram, strict=False):
            y = base - (row - NAME) * count / tallest
            path += f"M{left:.1f} {base:.1f}V{y:.1f}H{right:.1f}V{base:.1f}"
        name = _text(LEFT, base - row + NAME - 5, facts.kinds[kind], "note")
        grid = f'<path class="grid" d="M{LEFT} {base:.1f}H{axes.right}"/>'
        parts.append(grid + _kind(kind, f'<path class="area" d="{path}"/>') + name)
    return _svg(
        "column-rates", "Entropies of the columns, by kind of layer", parts, bottom + BOTTOM
    )


def waterfilling(facts: Facts) -> str:
    """The axes of the picture of one layer; `page.js` draws the layer that is chosen into it."""
    profiles = [r.profile for r in facts.layers if r.profile is not None]
    if not profiles:
        return ""
    low = min(min(p.waterfilling) for p in profiles)
    high = max(max(*p.waterfilling, *p.entropies) for p in profiles)
    share = 0.72 * WIDTH
    axes = Axes((0, 100), (math.floor(min(low, -1)), math.ceil(high)), right=share)
    parts = [
        axes.draw_y("bits above the water level"),
        axes.draw_x("columns, strongest first", [0, 25, 50, 75, 100], "%"),
        _text((share + WIDTH) / 2, axes.bottom + 40, "columns", "label middle"),
        '<g id="chosen"></g>',
        f'<path class="level" d="M{LEFT} {axes.at_y(0):.1f}H{WIDTH - MARGIN}"/>',
    ]
    scale = {
        "left": LEFT, "right": share, "zero": axes.at_y(0), "bit": axes.at_y(0) - axes.at_y(1),
        "side": share + 10, "end": WIDTH - MARGIN, "bins": BINS_PER_BIT,
    }  # fmt: skip
    attributes = "".join(f' data-{name}="{value:.2f}"' for name, value in scale.items())
    title = "What the columns of a layer get, and what their codes cost"
    return _svg("waterfilling", title, parts, attributes=attributes)


def _by_kind(facts: Facts, layers: Iterable[LayerFacts]) -> list[list[LayerFacts]]:
    kinds: list[list[LayerFacts]] = [[] for _ in facts.kinds]
    for layer in layers:
        kinds[layer.kind].append(layer)
    return kinds


def _sum(histograms: Iterable[Sequence[int]]) -> list[int]:
    return [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)]


def _points(points: Sequence[tuple[str, LayerFacts]]) -> str:
    """A dot for each place; lines of no length with round ends are the smallest way to say it."""
    path = "".join(f"M{place}h0" for place, _ in points)
    layers = " ".join(str(layer.number) for _, layer in points)
    return f'<path class="points" d="{path}" data-layers="{layers}"/>'


def colour(kind: int) -> str:
    """The style of a kind of layer; from `COLOURS` on they begin again, with smaller marks."""
    return f"c{kind % COLOURS}" + (" again" if kind >= COLOURS else "")


def _kind(kind: int, content: str) -> str:
    return f'<g class="kind {colour(kind)}" data-kind="{kind}">{content}</g>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


def _svg(
    name: str, title: str, parts: Sequence[str], height: float = HEIGHT, attributes: str = ""
) -> str:
    box = f'viewBox="0 0 {WIDTH} {height:.0f}"'
    return (
        f'<svg id="{name}" class="plot" role="img" aria-label="{html.escape(title)}" {box}'
        f"{attributes}>{''.join(parts)}</svg>"
    )
