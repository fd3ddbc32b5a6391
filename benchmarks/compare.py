"""Every method on one model: ours, its parts switched off one by one, baselines and rivals.

    python benchmarks/compare.py run --model FOLDER --calibration calib.txt --text eval.txt \
        --method full plain gptq-ec rtn-ec --bits 2 3 4 --json results.json
    python benchmarks/compare.py judge --model FOLDER --text eval.txt --json results.json RIVAL...
    python benchmarks/compare.py show results.json --plot results.svg

`run` quantizes with our machinery and appends a row per method, rate and seed; `judge` appends one
for every folder that `rivals.py` wrote; `show` prints the table, means over seeds with their
spread, and draws KL and perplexity against stored bits.  Bits are stored bytes of the quantized
tensors, for all.  "full at" is the bits at which the full method reaches a row's KL on a text, and
how much fewer bytes that is; between the rates that were measured, the logarithm of its KL is
interpolated.
"""

import argparse
import functools
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from watersic_hf import WaterSICConfig
from watersic_hf.calibration import Draw, Sensitivity, calibration_windows, layer_sensitivities
from watersic_hf.checkpoint import average_bits
from watersic_hf.core import LayerSettings
from watersic_hf.evaluation import evaluate, evaluation_text, evaluation_windows
from watersic_hf.finetuning import FinetuneSettings, finetune_scales
from watersic_hf.quantization import CalibrationSettings, LayerQuantizer, quantize_blocks
from watersic_hf.streams import decoder_blocks

#: Our method: the default, its parts switched off one by one, what the paper has, and finetuning.
OURS = {
    "full": {},
    "uniform allocation": {"allocation": "uniform"},
    "no row importance": {"row_importance": False},
    "no drift": {"drift": 0.0, "residual": False},
    "whole drift": {"drift": 1.0},
    "no residual": {"residual": False},
    "attention": {"attention": 0.5},
    "mixing": {"mixing": True},
    "no rescalers": {"rescale": False},
    "damping 1e-4": {"damping": 1e-4},
    "damping 1e-2": {"damping": 1e-2},
    "plain": {
        "allocation": "uniform", "row_importance": False, "drift": 0.0, "residual": False,
    },
    "paper": {
        "allocation": "uniform", "row_importance": False, "drift": 1.0, "residual": True,
        "mixing": True,
    },
    "finetuned": {},
}  # fmt: skip

#: For the method "finetuned": on as many windows again as the calibration has, others of its text.
FINETUNING = FinetuneSettings(epochs=2, learning_rate=1e-3, batch_size=2)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run")
    run.set_defaults(run=_run)
    run.add_argument("--method", nargs="+", default=["full", "plain"])
    run.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0, 4.0])
    run.add_argument("--seeds", type=int, nargs="+", default=[0])
    run.add_argument("--calibration", default="pydoc", help="as WaterSICConfig(dataset=...)")
    run.add_argument("--samples", type=int, default=64)
    run.add_argument("--blocks", type=int, help="quantize the layers of the first blocks only")
    judge = commands.add_parser("judge")
    judge.set_defaults(run=_judge)
    judge.add_argument("folders", nargs="+", help="folders that rivals.py wrote")
    for command in (run, judge):
        command.add_argument("--model", required=True)
        command.add_argument("--text", nargs="+", default=["pydoc"], help="files, or pydoc")
        command.add_argument("--sequence-length", type=int, default=512)
        command.add_argument("--windows", type=int, default=24, help="of each evaluation text")
        command.add_argument("--json", required=True, help="rows are appended to this file")
    show = commands.add_parser("show")
    show.set_defaults(run=_show)
    show.add_argument("json", nargs="+")
    show.add_argument("--plot", help="also draw KL and perplexity into this SVG file")
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _run(arguments: argparse.Namespace) -> list[dict]:
    judge = Judge(arguments)
    for seed in arguments.seeds:
        draw = Draw(samples=arguments.samples, sequence_length=arguments.sequence_length, seed=seed)
        windows = functools.partial(
            calibration_windows, arguments.calibration, tokenizer=judge.tokenizer, **asdict(draw)
        )
        others = windows(seen=draw) if "finetuned" in arguments.method else []
        bench = Bench(arguments.model, arguments.blocks, seed, windows(), others)
        for bits in arguments.bits:
            for method in arguments.method:
                judge.add(bench.quantized(method, bits))
    return judge.rows


class Bench:
    """Quantizes one model on one calibration set, by one method after another."""

    def __init__(
        self,
        folder: str,
        blocks: int | None,
        seed: int,
        windows: list[Tensor],
        others: list[Tensor],
    ) -> None:
        self.folder, self.seed, self.windows, self.others = folder, seed, windows, others
        model = self.load()
        self.layers = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module is not model.get_output_embeddings()
        ]
        if blocks is not None:
            first = tuple(f"{name}." for name, _ in decoder_blocks(model, self.layers)[:blocks])
            self.layers = [layer for layer in self.layers if layer.startswith(first)]

    def load(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder).eval().requires_grad_(False)

    @functools.cached_property
    def sensitivities(self) -> tuple[dict[str, Sensitivity], float]:
        """The same for all methods and rates: measured once; and the seconds that it takes."""
        start = time.process_time()
        sensitivities = layer_sensitivities(
            self.load(), self.windows, self.layers, seed=self.seed, damping=None,
            tokens=CalibrationSettings.sensitivity_tokens,
        )  # fmt: skip
        return sensitivities, time.process_time() - start

    def quantized(self, method: str, bits: float) -> tuple[nn.Module, dict]:
        """A model quantized in memory by one of our methods or baselines, and its row."""
        model = self.load()
        targets = {name: (model.get_submodule(name).weight.numel(), bits) for name in self.layers}
        if method in OURS:
            config = WaterSICConfig(bits=bits, **OURS[method])
            quantizer = LayerQuantizer(targets, settings=config.settings, seed=self.seed)
            settings = config.calibration
        else:
            from baselines import METHODS, BaselineQuantizer

            quantizer = BaselineQuantizer(targets, settings=LayerSettings(), seed=self.seed)
            quantizer.method = METHODS[method]
            settings = WaterSICConfig(**OURS["plain"]).calibration
        sensitivities, seconds = self.sensitivities if settings.sensitivity else (None, 0.0)
        # processor time, as on a shared machine
        start = time.process_time()
        quantize_blocks(
            model, self.windows, layers=self.layers, quantizer=quantizer,
            settings=settings, sensitivities=sensitivities,
        )  # fmt: skip
        if method == "finetuned":
            finetune_scales(model, self.load(), self.others, settings=FINETUNING)
        return model, {
            "method": method,
            "settings": "",
            "asked": bits,
            "bits": average_bits(quantizer.reports),
            "seed": self.seed,
            "seconds": seconds + time.process_time() - start,
        }


def _judge(arguments: argparse.Namespace) -> list[dict]:
    judge = Judge(arguments)
    for folder in arguments.folders:
        record = json.loads((Path(folder) / "rival.json").read_text(encoding="utf-8"))
        model = AutoModelForCausalLM.from_pretrained(folder)
        row = {
            "method": record["rival"],
            "settings": record["settings"],
            "asked": None,
            "bits": record["bits"],
            "seed": 0,
            "seconds": record["seconds"],
        }
        judge.add((model, row))
    return judge.rows


class Judge:
    """Evaluates models against one original, whose logits are computed once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = arguments.model
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.original = Remembered(AutoModelForCausalLM.from_pretrained(arguments.model).eval())
        self.texts = {
            Path(file).stem: evaluation_windows(
                evaluation_text(None if file == "pydoc" else file), self.tokenizer,
                sequence_length=arguments.sequence_length, limit=arguments.windows,
            )
            for file in arguments.text
        }  # fmt: skip
        self.file = Path(arguments.json)
        self.rows: list[dict] = json.loads(self.file.read_text()) if self.file.is_file() else []

    def add(self, quantized: tuple[nn.Module, dict]) -> None:
        model, row = quantized
        row = {"model": Path(self.model).name} | row
        for name, windows in self.texts.items():
            result = evaluate(model.eval(), windows, self.original)
            row |= {
                f"KL {name}": result.kl_bits,
                f"ppl {name}": result.perplexity,
                f"original ppl {name}": result.original_perplexity,
                f"top-1 {name}": result.top1_agreement,
            }
        self.rows.append(row)
        self.file.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        print(json.dumps(row), flush=True)


class Remembered:
    """A model whose logits of every window are kept after the first time, in its own dtype."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = model.device
        self.logits: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        key = tuple(input_ids.flatten().tolist())
        if key not in self.logits:
            self.logits[key] = self.model(input_ids=input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=self.logits[key])


def _show(arguments: argparse.Namespace) -> list[dict]:
    rows = [
        row for file in arguments.json for row in json.loads(Path(file).read_text(encoding="utf-8"))
    ]
    keys = dict.fromkeys(key for row in rows for key in row)
    texts = [key.removeprefix("KL ") for key in keys if key.startswith("KL ")]
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["method"], row["settings"], row["asked"]].append(row)
    table = []
    for (model, method, settings, _), members in sorted(groups.items(), key=_by_bits):
        line = {"model": model, "method": method, "settings": settings}
        line["bits"] = _cell([row["bits"] for row in members])
        full = [row for row in rows if row["model"] == model and row["method"] == "full"]
        for text in texts:
            for column in (f"KL {text}", f"ppl {text}", f"top-1 {text}"):
                # some rows may have been judged on fewer texts
                line[column] = _cell([row[column] for row in members if column in row])
            line[f"full at, {text}"] = _full_at(members, full, f"KL {text}")
        line["seeds"] = str(len(members))
        line["cpu s"] = f"{mean(row['seconds'] for row in members):.0f}"
        table.append(line)
    print("| " + " | ".join(table[0]) + " |\n" + "|---" * len(table[0]) + "|")
    for line in table:
        print("| " + " | ".join(line.values()) + " |")
    if arguments.plot:
        Path(arguments.plot).write_text(plot(rows, texts[0]), encoding="utf-8")
    return rows


def _full_at(members: Sequence[dict], full: Sequence[dict], key: str) -> str:
    """The bits at which rows of the full method have the mean KL of others, as a cell."""
    members = [row for row in members if key in row and row["method"] != "full"]
    rates: dict[float, list[dict]] = defaultdict(list)
    for row in full:
        rates[row["asked"]].append(row)
    if not members or not rates:
        return ""
    curve = [(mean(r["bits"] for r in rate), mean(r[key] for r in rate)) for rate in rates.values()]
    kl = mean(row[key] for row in members)
    bits = matching_bits(curve, kl)
    if bits is None:
        return f"below {min(curve)[0]:.3g}" if kl > min(curve)[1] else ""
    return f"{bits:.2f} ({bits / mean(row['bits'] for row in members) - 1:+.0%})"


def matching_bits(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Bits at which a curve of (bits, KL) points reaches a KL; None outside of the curve."""
    points = sorted(curve)
    for (low, worse), (high, better) in itertools.pairwise(points):
        if better <= kl <= worse:
            share = math.log(worse / kl) / math.log(worse / better)
            return low + share * (high - low)
    return None


def _by_bits(group: tuple[tuple, list[dict]]) -> tuple:
    (model, *_), members = group
    return model, round(mean(row["bits"] for row in members), 1), members[0][_first_kl(members[0])]


def _first_kl(row: dict) -> str:
    return next(key for key in row if key.startswith("KL "))


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"


#: Of the panels of a plot, in pixels: width, height, and room for labels around the axes.
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 340, 48, 34, 40
#: A method has a colour and a shape of line by its place in the alphabet; ours is black and thick.
COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#e08e0b", "#7a4fb5", "#0a9396", "#b07d62", "#c71585")
DASHES = ("", "6 3", "2 3")


def plot(rows: Sequence[dict], text: str) -> str:
    """An SVG of what methods give for their bits: KL and perplexity, a line of panels per model."""
    methods = sorted({row["method"] for row in rows} - {"full"})
    looks = {
        method: (COLORS[n % len(COLORS)], DASHES[n // len(COLORS) % len(DASHES)], 1.5)
        for n, method in enumerate(methods)
    } | {"full": ("#000000", "", 3)}
    models = sorted({row["model"] for row in rows})
    parts = []
    for line, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        for column, key in enumerate((f"KL {text}", f"ppl {text}")):
            floor = mine[0].get(f"original {key}")
            panel = _panel(mine, key, f"{model}: {key}", looks, floor)
            x, y = column * WIDTH, line * HEIGHT
            parts.append(f'<g transform="translate({x},{y})">{panel}</g>')
    for number, (method, (color, dash, width)) in enumerate(reversed(looks.items())):
        y = TOP + 18 * number
        parts.append(
            f'<path d="M{2 * WIDTH + 8},{y - 4}h28" stroke="{color}" stroke-width="{width}" '
            f'stroke-dasharray="{dash}"/>' + _text(2 * WIDTH + 42, y, method)
        )
    size = f'viewBox="0 0 {2 * WIDTH + 150} {HEIGHT * len(models)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _panel(
    rows: Sequence[dict], key: str, title: str, looks: dict[str, tuple], floor: float | None
) -> str:
    """One pair of axes: `key`, logarithmic and cut above 128 times its least, against bits."""
    values = [row[key] for row in rows]
    least = min(values) if floor is None else min(floor, *values)
    most = min(max(values), 128 * least)
    octaves = math.log2(most / least) or 1
    first, last = 1, math.ceil(max(row["bits"] for row in rows))

    def place(bits: float, value: float) -> tuple[float, float]:
        share = math.log2(value / least) / octaves
        x = LEFT + (bits - first) / (last - first) * (WIDTH - LEFT - 16)
        return x, HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    parts = [_text(LEFT, 20, f"{title} (log) against stored bits")]
    for bits in range(first, last + 1):
        x, y = place(bits, least)
        parts.append(f'<path d="M{x:.1f},{TOP}V{y:.1f}" stroke="#dddddd"/>')
        parts.append(_text(x, y + 18, str(bits), anchor="middle"))
    for octave in range(int(octaves) + 1):
        x, y = place(first, least * 2**octave)
        parts.append(f'<path d="M{x:.1f},{y:.1f}H{WIDTH - 16}" stroke="#dddddd"/>')
        parts.append(_text(x - 6, y + 4, f"{least * 2**octave:.3g}", anchor="end"))
    for method, (color, dash, width) in looks.items():
        points = sorted(
            place(row["bits"], row[key])
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


if __name__ == "__main__":
    main()
