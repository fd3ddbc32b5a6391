"""The plots of the page as SVG, one function per plot; colours and fonts are in `page.css`.

A plot is `WIDTH` by `HEIGHT` units large and scales with its column of the page.  The points of all
layers of a kind are a single path, so that thousands of points stay small; its attribute
``data-layers`` lists the layers of the points, among which `page.js` finds the one nearest to the
pointer.
"""

import html
import math
from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest

from watersic_hf.core import BINS_PER_BIT
from watersic_hf.report.facts import Facts, LayerFacts

WIDTH, HEIGHT = 560, 340
#: Margins in units: left and bottom for labels, the same at the top and on the right.
LEFT, MARGIN, BOTTOM = 70, 14, 50
_SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
#: Minimum height of one histogram of several, and the part of it that its name takes.
ROW, NAME = 46, 21
#: Number of colours for kinds of layers in `page.css`.
COLOURS = 10
#: Width of the plot of one layer's columns, next to which there is a histogram.
COLUMNS_WIDTH = 0.72 * WIDTH


class Axes:
    """A pair of axes, which maps values to units of the plot.

    Args:
        x: smallest and largest value of the x axis.
        y: smallest and largest value of the y axis.
        log_y: whether the y axis is logarithmic; its values must be positive then.
        right: position of the right end of the x axis, in units.
        bottom: position of the lower end of the y axis, in units.
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
        """Return the position of a value of x, in units from the left."""
        low, high = self.x
        return LEFT + (self.right - LEFT) * (value - low) / (high - low)

    def at_y(self, value: float) -> float:
        """Return the position of a value of y, in units from the top."""
        low, high = self.y
        value = math.log10(value) if self.log_y else value
        return self.bottom - (self.bottom - MARGIN) * (value - low) / (high - low)

    def at(self, x: float, y: float) -> str:
        """Return a point as it is written in an SVG path."""
        return f"{self.at_x(x):.1f} {self.at_y(y):.1f}"

    def draw_x(self, label: str, ticks: Iterable[float] | None = None, unit: str = "") -> str:
        """Draw the x axis with its ticks and its label.

        Args:
            label: the label below the axis.
            ticks: values of the ticks (default: round numbers).
            unit: text after every number.
        """
        parts = [f'<path class="axis" d="M{LEFT} {self.bottom}H{self.right}"/>']
        for tick in round_ticks(*self.x) if ticks is None else ticks:
            x = self.at_x(tick)
            parts.append(f'<path class="axis" d="M{x:.1f} {self.bottom}v4"/>')
            parts.append(_text(x, self.bottom + 18, f"{tick:g}{unit}", "tick middle"))
        parts.append(_text((LEFT + self.right) / 2, self.bottom + 40, label, "label middle"))
        return "".join(parts)

    def draw_y(self, label: str) -> str:
        """Draw grid lines at round numbers (powers of ten on a log scale), and the label."""
        low, high = self.y
        decades = [10.0**e for e in range(math.ceil(low), math.floor(high) + 1)]
        parts = []
        for tick in decades if self.log_y else round_ticks(low, high):
            y = self.at_y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{self.right}"/>')
            number = _power(tick) if self.log_y else f"{tick:g}"
            parts.append(_text(LEFT - 8, y + 4, number, "tick end"))
        turned = f'transform="translate(14 {(MARGIN + self.bottom) / 2:.1f}) rotate(-90)"'
        parts.append(f'<text class="label middle" {turned}>{html.escape(label)}</text>')
        return "".join(parts)


def round_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about `count` values from `low` to `high`: multiples of 1, 2 or 5 times 10^n."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _power(tick: float) -> str:
    return "10" + str(round(math.log10(tick))).translate(_SUPERSCRIPT)


def bits_by_block(facts: Facts) -> str:
    """Plot the bits of every kind of layer by block.

    Several layers of a kind in the same block, such as experts, are a point at their median and a
    bar from the lowest to the highest.
    """
    # layers outside of all blocks come last, so that ticks are the numbers of the blocks
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
    return _svg("bits-by-block", "Stored bits of the layers, by block", parts)


def error_against_bits(facts: Facts) -> str:
    """Plot the relative output error of every layer that has one against its bits."""
    known = [r for r in facts.layers if r.error]
    if not known:
        return ""
    low, high = 0.7 * min(r.error for r in known), 1.5 * max(r.error for r in known)
    right = max(1.0, 1.08 * max(r.bits for r in known))
    axes = Axes((0, right), (min(low, high / 30), high), log_y=True)
    parts = [axes.draw_y("relative output error"), axes.draw_x("stored bits per weight")]
    for kind, layers in enumerate(_by_kind(facts, known)):
        parts.append(_kind(kind, _points([(axes.at(r.bits, r.error), r) for r in layers])))
    return _svg("error-against-bits", "Output error versus stored bits, one point per layer", parts)


def column_rates(facts: Facts) -> str:
    """Plot a histogram of the entropies of the columns for every kind of layer."""
    histograms = [
        _sum(r.profile.histogram for r in layers if r.profile is not None)
        for layers in _by_kind(facts, facts.layers)
    ]
    # some layers have no profile, such as a vocabulary matrix that was not decoded
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
    """Plot the axes for the columns of one layer; `page.js` draws the layer that is selected."""
    profiles = [r.profile for r in facts.layers if r.profile is not None]
    if not profiles:
        return ""
    low = min(min(p.waterfilling) for p in profiles)
    high = max(max(*p.waterfilling, *p.entropies) for p in profiles)
    axes = Axes((0, 100), (math.floor(min(low, -1)), math.ceil(high)), right=COLUMNS_WIDTH)
    parts = [
        axes.draw_y("bits above the water level"),
        axes.draw_x("columns, highest rate first", [0, 25, 50, 75, 100], "%"),
        _text((COLUMNS_WIDTH + WIDTH) / 2, axes.bottom + 40, "columns", "label middle"),
        '<g id="chosen"></g>',
        f'<path class="level" d="M{LEFT} {axes.at_y(0):.1f}H{WIDTH - MARGIN}"/>',
    ]
    # `page.js` needs the scale of the axes and of the histogram to the right of them
    scale = {
        "left": LEFT,
        "right": COLUMNS_WIDTH,
        "zero": axes.at_y(0),
        "bit": axes.at_y(0) - axes.at_y(1),
        "side": COLUMNS_WIDTH + 10,
        "end": WIDTH - MARGIN,
        "bins": BINS_PER_BIT,
    }
    attributes = "".join(f' data-{name}="{value:.2f}"' for name, value in scale.items())
    title = "Theoretical rates of the columns of a layer, and entropies of their codes"
    return _svg("waterfilling", title, parts, attributes=attributes)


def _by_kind(facts: Facts, layers: Iterable[LayerFacts]) -> list[list[LayerFacts]]:
    kinds: list[list[LayerFacts]] = [[] for _ in facts.kinds]
    for layer in layers:
        kinds[layer.kind].append(layer)
    return kinds


def _sum(histograms: Iterable[Sequence[int]]) -> list[int]:
    return [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)]


def _points(points: Sequence[tuple[str, LayerFacts]]) -> str:
    """Draw a dot for every point of the path, with the layer that it stands for."""
    # a line of length 0 with round ends is the shortest way to write a dot
    path = "".join(f"M{point}h0" for point, _ in points)
    layers = " ".join(str(layer.number) for _, layer in points)
    return f'<path class="points" d="{path}" data-layers="{layers}"/>'


def colour(kind: int) -> str:
    """Return the CSS classes of a kind of layer.

    Kinds beyond the number of colours use them again, with smaller marks.
    """
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
