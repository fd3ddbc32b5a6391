"""``watersic quantize``: quantize a model to a folder, or estimate what that takes."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from watersic_hf.checkpoint import (
    CheckReport,
    LayerReport,
    add_check,
    average_bits,
    model_size,
)
from watersic_hf.checkpoint.report import REPORT_FILE
from watersic_hf.cli.options import (
    add_setting,
    add_source_options,
    model_name,
    source_options,
)
from watersic_hf.cli.output import print_json, print_table
from watersic_hf.integration import WaterSICConfig
from watersic_hf.integration.settings import SET_OPTION, Setting, settings_of

if TYPE_CHECKING:
    from watersic_hf.integration.plan import Plan
    from watersic_hf.integration.sizes import Outlook

#: Options that are parsed otherwise than as a plain value.
_PARSED = {
    "dataset": {"default": "pydoc"},
    "tokenizer": {"type": model_name},
    "layer_bits": {"action": "append", "default": []},
    "modules_to_not_convert": {"action": "append"},
}


def _settings(*, with_option: bool) -> dict[str, Setting]:
    """Return the settings with an option of their own, or those of `SET_OPTION`."""
    return {
        name: setting
        for name, setting in settings_of(WaterSICConfig).items()
        if setting.option is not None and (setting.option != SET_OPTION) == with_option
    }


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "quantize",
        parents=[common],
        help="quantize a model",
        epilog=_help_of_set(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", type=model_name, help="folder or Hub name of the model")
    parser.add_argument("out", help="folder to save to")
    for name in _settings(with_option=True):
        add_setting(parser, name, **_PARSED.get(name, {}))
    parser.add_argument(
        SET_OPTION,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting, with its value in JSON; may be repeated; see below",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="dtype of the layers that are not quantized (default: the checkpoint's)",
    )
    parser.add_argument("--device-map", help="device to compute on (default: a GPU if available)")
    add_source_options(parser)
    parser.add_argument(
        "--max-shard-size", default="5GB", help="maximum size of a weight file (default: 5GB)"
    )
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not load the saved model again and compare it with the original on a little text",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only estimate memory, disk and time, from the model's config.json",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number of processes that --dry-run assumes (default: 1)",
    )


def _help_of_set() -> str:
    entries = (
        textwrap.fill(
            f"{name}: {setting.help}", initial_indent=" " * 2, subsequent_indent=" " * 6, width=90
        )
        for name, setting in _settings(with_option=False).items()
    )
    return f"settings for {SET_OPTION}, as in {SET_OPTION} drift=0:\n" + "\n".join(entries)


def run(arguments: argparse.Namespace) -> None:
    """Quantize the model, or estimate the run with ``--dry-run``."""
    from watersic_hf.integration import quantize_to_folder
    from watersic_hf.report import write_folder_page
    from watersic_hf.streams.processes import process_group, rank_and_size

    config = _config(arguments)
    if arguments.dry_run:
        _estimate(arguments, config)
        return
    with process_group():
        reports = quantize_to_folder(
            arguments.model,
            arguments.out,
            config,
            dtype=arguments.dtype,
            device_map=arguments.device_map,
            max_shard_size=arguments.max_shard_size,
            announce=_announce,
            **source_options(arguments),
        )
        if rank_and_size()[0] > 0:
            return
    check = _check(arguments) if arguments.check else None
    page = write_folder_page(arguments.out)
    if arguments.json:
        _print_as_json(arguments, config, reports, check)
    else:
        _print_summary(arguments, config, reports, page)
        _print_check(check)
    if check is not None and check.broken:
        layers = ", ".join(check.suspects) or "no single one"
        raise RuntimeError(
            f"{arguments.out} is broken: its KL to the original is {check.kl_mean:.2f} bits per "
            f"token, and {check.kl_expected:.2f} is expected. Layers that stand out: {layers}. "
            f"Please report this, with {arguments.out}/{REPORT_FILE}."
        )


def _announce(outlook: "Outlook") -> None:
    """Say on stderr what the run calibrates on, how long it takes, and what else is possible."""
    times = {windows: _duration(seconds) for windows, seconds in outlook.seconds.items()}
    if outlook.dataset is None:
        text = (
            f"Quantizing without calibration data, which takes about {times[0]}. With it "
            f"(--dataset pydoc), the model is much better."
        )
    else:
        others = " and ".join(
            f"about {time} with --samples {windows}"
            for windows, time in times.items()
            if windows != outlook.windows
        )
        text = (
            f"Calibrating on {outlook.dataset}: {outlook.windows} windows of {outlook.length:,} "
            f"tokens, {outlook.windows * outlook.length:,} tokens. The run takes about "
            f"{times[outlook.windows]}; {others}. More text makes the model better, less makes the "
            f"run faster; --dataset none takes no text at all."
        )
    print(text, file=sys.stderr)


def _duration(seconds: float) -> str:
    """Return a time in the unit in which it is easiest to read."""
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _check(arguments: argparse.Namespace) -> CheckReport | None:
    """Compare the saved model with its original, and note the result in its report and card."""
    from watersic_hf.evaluation import check_folder
    from watersic_hf.integration import ModelSource
    from watersic_hf.integration.saving import add_check_to_card

    original = ModelSource(name=arguments.model, **source_options(arguments))
    check = check_folder(arguments.out, original)
    if check is not None:
        add_check(arguments.out, check)
        add_check_to_card(arguments.out, check)
    return check


def _print_as_json(
    arguments: argparse.Namespace,
    config: WaterSICConfig,
    reports: Sequence[LayerReport],
    check: CheckReport | None,
) -> None:
    size = model_size(arguments.out)
    print_json(
        {
            "bits": config.bits,
            "stored": average_bits(reports),
            "model_parameters": size.parameters,
            "model_bits": size.bits,
            "check": None if check is None else asdict(check),
            "layers": [asdict(report) for report in reports],
        }
    )


def _print_summary(
    arguments: argparse.Namespace,
    config: WaterSICConfig,
    reports: Sequence[LayerReport],
    page: Path,
) -> None:
    size = model_size(arguments.out)
    layers = [report for report in reports if not report.table]
    print(
        f"{arguments.out}: {len(layers)} layers, {sum(r.weights for r in layers):,} weights, "
        f"{average_bits(reports):.4f} stored bits per weight (target: {config.bits:g})"
    )
    for matrix in (report for report in reports if report.table):
        print(
            f"{matrix.name}: {matrix.weights:,} weights, {matrix.bits:.4f} stored bits per weight "
            f"(target: {matrix.asked:g})"
        )
    print(
        f"whole model: {size.parameters:,} parameters, {size.bits:.4f} bits per parameter, "
        f"{size.nbytes:,} bytes; details: {page}"
    )


def _print_check(check: CheckReport | None) -> None:
    if check is None:
        return
    print(
        f"check on {check.tokens} tokens: KL to the original {check.kl_mean:.3f} bits per token "
        f"(median {check.kl_median:.3f}, 90th percentile {check.kl_p90:.3f}; from the errors of "
        f"the layers, {check.kl_expected:.3f} is expected), same most likely token: "
        f"{check.top1_agreement:.1%}"
    )
    if check.text:
        print(f"it writes: {check.text!r}")


def _config(arguments: argparse.Namespace) -> WaterSICConfig:
    settings = {name: getattr(arguments, name) for name in _settings(with_option=True)}
    settings["layer_bits"] = dict(_pattern_bits(arguments.layer_bits))
    if arguments.dataset == "none":
        settings["dataset"] = None
    return WaterSICConfig(**settings, **dict(_other_settings(arguments.set)))


def _pattern_bits(texts: Iterable[str]) -> Iterable[tuple[str, float]]:
    """Parse the values of ``--layer-bits``."""
    for text in texts:
        pattern, equals, bits = text.rpartition("=")
        try:
            yield pattern, float(bits)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--layer-bits {text!r} must be PATTERN=BITS, as in down_proj=3.5")


def _other_settings(texts: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Parse the values of ``--set``; what is not JSON is taken as a string."""
    names = _settings(with_option=False)
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names:
            raise ValueError(
                f"{SET_OPTION} {text!r} must be NAME=VALUE with a name among {', '.join(names)}"
            )
        try:
            yield name, json.loads(value)
        except json.JSONDecodeError:
            yield name, value


def _estimate(arguments: argparse.Namespace, config: WaterSICConfig) -> None:
    """Print the memory, disk and time that a run would take."""
    from watersic_hf.integration.folder import compute_device
    from watersic_hf.integration.plan import plan

    found = plan(
        arguments.model,
        config,
        dtype=arguments.dtype,
        processes=arguments.processes,
        folder=arguments.out,
        device=compute_device(arguments.device_map),
        **source_options(arguments),
    )
    if arguments.json:
        print_json(asdict(found))
        return
    print(
        f"{found.model}: {found.layers} layers in {found.blocks} blocks, {found.weights:,} weights "
        f"at {config.bits:g} bits, {found.tokens:,} calibration tokens, {found.processes} "
        f"process{'es' if found.processes > 1 else ''}\n"
    )
    print_table(
        ("", "at most"),
        (
            *_rows("memory per process, GB", found.memory, 1e9),
            *_rows("disk, GB", found.disk, 1e9),
            *_rows("time, hours", found.seconds, 3600),
        ),
    )
    print(
        f"\nEstimated from rates that were measured on {found.rates.machine}; expect deviations of "
        f"up to a factor of two."
    )
    print(f"\n{_fit(found)}")


def _fit(found: "Plan") -> str:
    """Return whether a run fits this machine, and what to change if it does not."""
    needed = found.processes * sum(found.memory.values()), sum(found.disk.values())
    text = (
        f"This machine has {found.free_memory / 1e9:.1f} GB of free memory and "
        f"{found.free_disk / 1e9:.1f} GB of free disk; the run takes at most "
        f"{needed[0] / 1e9:.1f} GB and {needed[1] / 1e9:.1f} GB"
    )
    if found.fits:
        return f"{text}, so it fits."
    proposal = found.proposal
    if proposal is None:
        return f"{text}. No settings make it fit; use a machine with more."
    return (
        f"{text}, which does not fit. It fits with {proposal.options}: "
        f"{proposal.processes * proposal.memory / 1e9:.1f} GB of memory, "
        f"{proposal.disk / 1e9:.1f} GB of disk, {proposal.seconds / 3600:.1f} hours."
    )


def _rows(title: str, amounts: Mapping[str, float], unit: float) -> Iterable[tuple[str, str]]:
    """Yield a row for the sum of all amounts, and one for each."""
    yield title, f"{sum(amounts.values()) / unit:.2f}"
    for name, amount in amounts.items():
        yield f"  {name}", f"{amount / unit:.2f}"
