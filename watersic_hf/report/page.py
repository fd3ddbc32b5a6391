"""The page about a model: a single HTML file that contains its style, script and data."""

import html
import json
import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from watersic_hf.checkpoint import CheckReport, inspect_checkpoint
from watersic_hf.report.facts import Facts, LayerFacts, read_facts
from watersic_hf.report.plots import (
    bits_by_block,
    colour,
    column_rates,
    error_against_bits,
    waterfilling,
)

#: Name of the page's file in the folder of the model.
PAGE_FILE = "report.html"

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<title>{title}: quantized with WaterSIC</title>
<link rel="icon" href="data:,"/>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{subtitle}</p></header>
<main>
{body}
</main>
<script type="application/json" id="layers">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def write_folder_page(folder: str | os.PathLike) -> Path:
    """Write the page about a model into its folder.

    Only the headers of the model's files are read: layers are not decoded, so the page has no
    entropies of the layers.

    Args:
        folder: folder of the model.

    Returns:
        The file of the page.

    Raises:
        CheckpointError: a file is damaged, or nothing in the folder is quantized.
    """
    file = Path(folder) / PAGE_FILE
    write_page(file, read_facts(folder, inspect_checkpoint(folder, decode=False)))
    return file


def write_page(file: str | os.PathLike, facts: Facts) -> None:
    """Write the page about a model to a file.

    Args:
        file: the HTML file to write.
        facts: facts about the model, from `read_facts`.
    """
    Path(file).write_text(model_page(facts), encoding="utf-8")


def model_page(facts: Facts) -> str:
    """Return the page about a model as HTML; it loads no other file."""
    sections = [
        _tiles(facts),
        _legend(facts),
        f'<div class="figures">{"".join(_figures(facts))}</div>',
        _section("Quantized layers", _layer_table(facts)),
        _section("Dense matrices", _dense_table(facts)),
        f'<div class="pairs">{_section("Settings", _pairs(_settings(facts)))}'
        f"{_section('Environment', _pairs(_environment(facts)))}</div>",
    ]
    return _PAGE.format(
        title=html.escape(facts.title),
        subtitle=html.escape(_subtitle(facts)),
        style=_part("page.css"),
        body="\n".join(sections),
        data=_data(facts.layers),
        script=_part("page.js"),
    )


def _part(name: str) -> str:
    return files("watersic_hf.report").joinpath(name).read_text(encoding="utf-8")


def _data(layers: Iterable[LayerFacts]) -> str:
    """Return what the script needs to know about every layer, as JSON."""
    rows = []
    for layer in layers:
        row: dict[str, Any] = {"name": layer.name, "text": _layer_text(layer)}
        if layer.profile is not None:
            # hundredths of a bit: integers are shorter
            for field in ("waterfilling", "entropies"):
                row[field] = [round(100 * bits) for bits in getattr(layer.profile, field)]
            row["histogram"] = layer.profile.histogram
        rows.append(row)
    text = json.dumps(rows, separators=(",", ":"))
    # a name must not be able to close the element that contains the data
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _layer_text(layer: LayerFacts) -> str:
    text = f"{layer.rows} \u00d7 {layer.columns}, {layer.bits:.3f} bits"
    return text if layer.error is None else f"{text}, error {layer.error:.2g}"


def _subtitle(facts: Facts) -> str:
    parts = [facts.architecture, f"{facts.totals['layers']:,} layers quantized with WaterSIC"]
    if facts.run is not None:
        parts.append(facts.run.date[:10])
    return ", ".join(parts)


# -- key numbers ------------------------------------------------------------------------------


def _tiles(facts: Facts) -> str:
    totals, run = facts.totals, facts.run
    target = facts.settings.get("bits")
    bytes_of_16_bits = 2 * (totals["weights"] + totals["table_weights"]) + totals["dense_bytes"]
    scope = "whole model"
    if totals["tables"]:
        scope = f"vocabulary matrices: {totals['table_bits']:.3f}"
    tiles = [
        (
            "bits per weight",
            f"{totals['bits']:.3f}",
            f"stored; target: {target:g}" if target else "stored",
        ),
        ("bits per parameter", f"{totals['model_bits']:.3f}", scope),
        ("file size", _bytes(totals["file_bytes"]), f"{_bytes(bytes_of_16_bits)} at 16 bits"),
        ("quantized weights", _count(totals["weights"]), f"{totals['layers']:,} layers"),
        ("mean output error", _optional(facts.error, ".3g"), "relative, weighted by size"),
        ("calibration tokens", f"{facts.tokens:,}" if facts.tokens else "none", None),
        (
            "KL to the original",
            None if facts.check is None else f"{facts.check.kl_mean:.3g} bits",
            None if facts.check is None else _checked(facts.check),
        ),
        ("run time", None if run is None else _duration(run.seconds), None),
        (
            "peak memory",
            None if run is None or not run.peak_bytes else _bytes(run.peak_bytes),
            None,
        ),
    ]
    cells = [
        f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd>"
        f"<small>{html.escape(note or '')}</small></div>"
        for name, value, note in tiles
        if value
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _checked(check: CheckReport) -> str:
    """Return what a comparison with the original says, in a few words."""
    if check.broken:
        return f"BROKEN: {check.kl_expected:.3g} expected; {', '.join(check.suspects)}"
    return f"per token, on {check.tokens} tokens; {check.kl_expected:.3g} expected"


# -- figures ----------------------------------------------------------------------------------


def _legend(facts: Facts) -> str:
    buttons = (
        f'<button type="button" class="{colour(kind)}" data-kind="{kind}" aria-pressed="true">'
        f"{html.escape(name)}</button>"
        for kind, name in enumerate(facts.kinds)
    )
    return f'<nav class="legend" aria-label="Layer kinds">{"".join(buttons)}</nav>'


def _figures(facts: Facts) -> Iterable[str]:
    several = len({(r.location.stack, r.location.block, r.kind) for r in facts.layers}) < len(
        facts.layers
    )
    yield _figure(
        "Bits by layer",
        bits_by_block(facts),
        "The dashed line is the average over all weights."
        + (" Bars show the range over the layers of a kind in the same block." if several else ""),
    )
    unmeasured = sum(r.error == 0 for r in facts.layers)
    yield _figure(
        "Output error versus bits",
        error_against_bits(facts),
        "Squared error of a layer\u2019s output, relative to the power of the output. Each "
        "additional bit divides it by about four."
        + (f" Layers without a measured error ({unmeasured}) are not shown." if unmeasured else ""),
    )
    yield _figure(
        "Column rates",
        column_rates(facts),
        "Every input column has its own quantization step and therefore its own rate. The "
        "histograms count the columns of each kind of layer by the entropy of their codes.",
    )
    yield _figure(
        "Waterfilling",
        waterfilling(facts),
        "All columns receive the same distortion, the water level. In theory, a column costs as "
        "many bits as it rises above that level, and nothing if it lies below. At high rates its "
        "codes cost a quarter of a bit more, the price of rounding to a scalar lattice. Right: "
        "histogram of the columns by the entropy of their codes.",
        _chooser(facts.layers),
    )


def _figure(title: str, plot: str, caption: str, head: str = "") -> str:
    if not plot:
        head, plot = "", '<p class="absent">Not recorded in the model\u2019s folder.</p>'
    return (
        f"<figure><h2>{title}</h2>{head}{plot}<figcaption>{html.escape(caption)}</figcaption>"
        f"</figure>"
    )


def _chooser(layers: Sequence[LayerFacts]) -> str:
    """Return the selector of a layer, and the legend of its plot."""
    # the layer with the fewest bits shows the water level best
    first = min(layers, key=lambda layer: layer.bits).number
    keys = (
        ("spent", "above the water level"),
        ("water", "below the water level"),
        ("cost", "entropy of the codes"),
    )
    return (
        f'<p class="choice"><select id="layer" aria-label="Layer" data-first="{first}"></select> '
        f'<output id="chosen-text"></output></p><p class="choice">'
        + "".join(f'<span class="key {name}">{text}</span>' for name, text in keys)
        + "</p>"
    )


# -- tables -----------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


#: Columns of the table of layers: heading, field of `LayerFacts`, format.
_COLUMNS = (
    ("bits", "bits", ".3f"),
    ("target", "target", ".3f"),
    ("error", "error", ".2e"),
    ("rows", "rows", "d"),
    ("columns", "columns", "d"),
    ("payload", "payload_bits", ".3f"),
    ("H class", "class_entropy", ".3f"),
    ("H pooled", "pooled_entropy", ".3f"),
    ("tokens", "tokens", "d"),
    ("seconds", "seconds", ".1f"),
)


def _layer_table(facts: Facts) -> str:
    """Return a table with one row per layer, without the columns that have no values."""
    columns = [
        (name, style, [getattr(layer, field) for layer in facts.layers])
        for name, field, style in _COLUMNS
    ]
    columns = [column for column in columns if any(value is not None for value in column[2])]
    head = "".join(
        f'<th scope="col"><button type="button">{name}</button></th>'
        for name in ("layer", *(name for name, _, _ in columns))
    )
    most = max(r.bits for r in facts.layers)
    rows = []
    for n, layer in enumerate(facts.layers):
        name = f'<th scope="row" class="{colour(layer.kind)}">{html.escape(layer.name)}</th>'
        cells = "".join(_cell(_optional(values[n], style)) for _, style, values in columns)
        # the length of the bar behind the bits
        fraction = f' style="--fraction:{layer.bits / most:.3f}"'
        rows.append(f'<tr data-layer="{n}"{fraction}>{name}{cells}</tr>')
    return (
        '<p><input id="filter" type="search" placeholder="Filter by name" '
        'aria-label="Filter layers by name"/></p>'
        f'<div class="scroll"><table id="table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _dense_table(facts: Facts) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(row["name"])}</th>{_cell(str(row["tensors"]))}'
        f'{_cell(_bytes(row["bytes"]))}<td class="words">{html.escape(row["reason"])}</td></tr>'
        for row in facts.dense
    )
    head = '<th>matrix</th><th>tensors</th><th>size</th><th class="words">reason</th>'
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>"
    )


def _settings(facts: Facts) -> list[tuple[str, str]]:
    return [(name, _plain(value)) for name, value in facts.settings.items()]


def _environment(facts: Facts) -> list[tuple[str, str]]:
    if facts.run is None:
        return [("", "Not recorded in the model\u2019s folder.")]
    run = facts.run
    return [("date", run.date), ("machine", run.machine), *run.versions.items()]


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        f'<td class="words">{html.escape(value)}</td></tr>'
        for name, value in pairs
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _cell(text: str) -> str:
    return f"<td>{html.escape(text)}</td>"


# -- numbers as text --------------------------------------------------------------------------


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _optional(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _scaled(value: float, units: Sequence[str]) -> str:
    size = 0
    while value >= 999.5 and size + 1 < len(units):
        value, size = value / 1000, size + 1
    return f"{value:.3g}{units[size]}"


def _bytes(value: int) -> str:
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _count(value: int) -> str:
    return _scaled(value, ("", " K", " M", " B"))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
