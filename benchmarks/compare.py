"""Compare methods on one model: ours, its parts switched off one by one, and baselines.

    python benchmarks/compare.py run --model FOLDER --calibration calib.txt --text eval.txt \\
        --method full plain gptq-ec rtn-ec --bits 2 3 4 --json results.json
    python benchmarks/compare.py judge --model FOLDER --text eval.txt --json results.json DIR...
    python benchmarks/compare.py show results.json --plot results.svg

`run` quantizes with this library or with the baselines of `baselines.py`, and appends a row per
method, rate and seed; `judge` appends a row for every folder that `run_rival.py` wrote; `show`
prints the table, with means over seeds and their standard deviations, and plots KL and perplexity
against stored bits.  For every method, bits are computed from the bytes of the stored tensors.
"full at" is the rate at which the full method reaches a row's KL on a text, and how many fewer
bytes that is; between measured rates the logarithm of its KL is interpolated.
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

from rate_plot import plot
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

#: Changes to the default settings, by method: one part switched off or on at a time; everything
#: but the lattice and the feedback off ("plain"); what the paper has; and the default, finetuned.
OURS = {
    "full": {},
    "scalar": {"lattice": "scalar"},
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
        "allocation": "uniform",
        "row_importance": False,
        "drift": 0.0,
        "residual": False,
    },
    "paper": {
        "allocation": "uniform",
        "row_importance": False,
        "drift": 1.0,
        "residual": True,
        "mixing": True,
    },
    "finetuned": {},
}

#: Settings of the method "finetuned", which trains on other windows of the calibration text; there
#: are as many as for the calibration.
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
    run.add_argument("--blocks", type=int, help="quantize only so many first blocks")
    judge = commands.add_parser("judge")
    judge.set_defaults(run=_judge)
    judge.add_argument("folders", nargs="+", help="folders that run_rival.py wrote")
    for command in (run, judge):
        command.add_argument("--model", required=True)
        command.add_argument(
            "--text", nargs="+", default=["pydoc"], help="for evaluation: files, pydoc"
        )
        command.add_argument("--sequence-length", type=int, default=512)
        command.add_argument("--windows", type=int, default=24, help="per evaluation text")
        command.add_argument("--json", required=True, help="file that rows are appended to")
    show = commands.add_parser("show")
    show.set_defaults(run=_show)
    show.add_argument("json", nargs="+")
    show.add_argument("--plot", help="also plot KL and perplexity to this SVG file")
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
    """One model and calibration set, quantized by one method after another.

    Args:
        folder: folder of the dense model.
        blocks: number of first blocks to quantize; None quantizes all.
        seed: seed of the method.
        windows: calibration windows, 1-D tensors of token ids.
        others: windows for finetuning.
    """

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
        """Sensitivities, measured once for all methods and rates, and the seconds that it took."""
        start = time.process_time()
        sensitivities = layer_sensitivities(
            self.load(),
            self.windows,
            self.layers,
            seed=self.seed,
            damping=None,
            tokens=CalibrationSettings.sensitivity_tokens,
        )
        return sensitivities, time.process_time() - start

    def quantized(self, method: str, bits: float) -> tuple[nn.Module, dict]:
        """Return a model quantized by a method of `OURS` or `baselines.py`, and its row."""
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
        # processor time: the machine may be shared
        start = time.process_time()
        quantize_blocks(
            model,
            self.windows,
            layers=self.layers,
            quantizer=quantizer,
            settings=settings,
            sensitivities=sensitivities,
        )
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
    """Evaluation against one original, whose logits are computed once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = arguments.model
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.original = CachedLogits(AutoModelForCausalLM.from_pretrained(arguments.model).eval())
        self.texts = {
            Path(file).stem: evaluation_windows(
                evaluation_text(None if file == "pydoc" else file),
                self.tokenizer,
                sequence_length=arguments.sequence_length,
                limit=arguments.windows,
            )
            for file in arguments.text
        }
        self.file = Path(arguments.json)
        self.rows: list[dict] = json.loads(self.file.read_text()) if self.file.is_file() else []

    def add(self, quantized: tuple[nn.Module, dict]) -> None:
        """Evaluate a model on every text, and append its row to the file."""
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


class CachedLogits:
    """A model that keeps logits in its own dtype, as far as they fit, and computes them once.

    Args:
        model: the model.
        limit: bytes of logits to keep; those of further windows are computed every time.
    """

    def __init__(self, model: nn.Module, *, limit: int = 4 << 30) -> None:
        self.model = model
        self.device = model.device
        self.limit = limit
        self.logits: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        key = tuple(input_ids.flatten().tolist())
        if key in self.logits:
            return SimpleNamespace(logits=self.logits[key])
        logits = self.model(input_ids=input_ids, use_cache=use_cache).logits
        if self.limit >= logits.nbytes:
            self.logits[key] = logits
            self.limit -= logits.nbytes
        return SimpleNamespace(logits=logits)


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
                # some rows may have been evaluated on fewer texts
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
    """Return a cell: the rate at which the full method has the mean KL of other rows."""
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
    """Return the bits at which a curve of (bits, KL) points reaches a KL; None outside of it."""
    points = sorted(curve)
    for (low, worse), (high, better) in itertools.pairwise(points):
        if better <= kl <= worse:
            fraction = math.log(worse / kl) / math.log(worse / better)
            return low + fraction * (high - low)
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


if __name__ == "__main__":
    main()
