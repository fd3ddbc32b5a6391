"""The plot of `compare.py`: KL and perplexity against stored bits, as an SVG without dependencies.

Lengths are in pixels.
"""

import math
from collections.abc import Sequence

#: Size of a panel, and the room for labels around its axes.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 340, 48, 16, 34, 40

#: Width of the legend beside the panels.
LEGEND = 150

#: Methods get a color and a dash pattern in alphabetical order; the full method is black and thick.
COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#e08e0b", "#7a4fb5", "#0a9396", "#b07d62", "#c71585")
DASHES = ("", "6 3", "2 3")

#: Values above this multiple of a panel's least value are not drawn.
CUT = 128


def plot(rows: Sequence[dict], text: str) -> str:
    """Return an SVG of KL and perplexity on one evaluation text, with a row of panels per model."""
    methods = sorted({row["method"] for row in rows} - {"full"})
    looks = {
        method: (COLORS[n % len(COLORS)], DASHES[n // len(COLORS) % len(DASHES)], 1.5)
        for n, method in enumerate(methods)
    } | {"full": ("#000000", "", 3)}
    models = sorted({row["model"] for row in rows})
    parts = []
    for line, model in enumerate(models):
        of_model = [row for row in rows if row["model"] == model]
        for column, key in enumerate((f"KL {text}", f"ppl {text}")):
            floor = of_model[0].get(f"original {key}")
            panel = _panel(of_model, key, f"{model}: {key}", looks, floor)
            x, y = column * WIDTH, line * HEIGHT
            parts.append(f'<g transform="translate({x},{y})">{panel}</g>')
    for number, (method, (color, dash, width)) in enumerate(reversed(looks.items())):
        y = TOP + 18 * number
        parts.append(
            f'<path d="M{2 * WIDTH + 8},{y - 4}h28" stroke="{color}" stroke-width="{width}" '
            f'stroke-dasharray="{dash}"/>' + _text(2 * WIDTH + 42, y, method)
        )
    size = f'viewBox="0 0 {2 * WIDTH + LEGEND} {HEIGHT * len(models)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _panel(
    rows: Sequence[dict], key: str, title: str, looks: dict[str, tuple], floor: float | None
) -> str:
    """Return one pair of axes: the values of `key`, on a logarithmic axis, against bits."""
    values = [row[key] for row in rows]
    least = min(values) if floor is None else min(floor, *values)
    most = min(max(values), CUT * least)
    octaves = math.log2(most / least) or 1
    first, last = 1, math.ceil(max(row["bits"] for row in rows))

    def position(bits: float, value: float) -> tuple[float, float]:
        height = math.log2(value / least) / octaves
        x = LEFT + (bits - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - height * (HEIGHT - BOTTOM - TOP)

    parts = [_text(LEFT, 20, f"{title} (log) against stored bits")]
    for bits in range(first, last + 1):
        x, y = position(bits, least)
        parts.append(f'<path d="M{x:.1f},{TOP}V{y:.1f}" stroke="#dddddd"/>')
        parts.append(_text(x, y + 18, str(bits), anchor="middle"))
    for octave in range(int(octaves) + 1):
        x, y = position(first, least * 2**octave)
        parts.append(f'<path d="M{x:.1f},{y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(x - 6, y + 4, f"{least * 2**octave:.3g}", anchor="end"))
    for method, (color, dash, width) in looks.items():
        points = sorted(
            position(row["bits"], row[key])
            for row in rows
            if row["method"] == method and row[key] <= most
        )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
            f'stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    return "".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222222">{text}</text>'
