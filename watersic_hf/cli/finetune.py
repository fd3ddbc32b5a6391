"""``watersic finetune``: train the scales of a quantized model by distillation."""

import argparse
from dataclasses import asdict
from typing import Any

from watersic_hf.cli.options import (
    add_source_options,
    given_options,
    model_name,
    source_options,
)
from watersic_hf.cli.output import print_json, print_table
from watersic_hf.finetuning import FinetuneSettings


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "finetune",
        parents=[common],
        help="train the scales of a quantized model; its bits stay the same",
    )
    parser.set_defaults(run=run)
    parser.add_argument("quantized", type=model_name, help="folder or Hub name of the model")
    parser.add_argument("out", help="folder to save to")
    parser.add_argument(
        "--teacher",
        type=model_name,
        required=True,
        metavar="ORIGINAL",
        help="folder or Hub name of the model before quantization",
    )
    parser.add_argument(
        "--dataset", default="pydoc", help="training text, as for quantize (default: pydoc)"
    )
    parser.add_argument(
        "--tokenizer",
        type=model_name,
        help="folder or Hub name of the tokenizer (default: the quantized model's)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=64,
        help="number of windows, of which the last eighth is held out (default: 64)",
    )
    parser.add_argument(
        "--sequence-length", type=int, default=512, help="tokens per window (default: 512)"
    )
    default = FinetuneSettings
    parser.add_argument(
        "--epochs", type=int, help=f"passes over the windows (default: {default.epochs})"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="initial learning rate, relative to the value of each scale (default: "
        f"{default.learning_rate})",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help=f"windows per optimizer step (default: {default.batch_size})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help=f"seed of the choice and order of the windows (default: {default.seed})",
    )
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        help="folder for the state of training, from which an interrupted run is resumed",
    )
    parser.add_argument("--dtype", default="auto", help="dtype of both models (default: their own)")
    add_source_options(parser)
    parser.add_argument("--device-map", help="device map of both models, as in from_pretrained")


def run(arguments: argparse.Namespace) -> None:
    """Finetune the scales, save the model, and print the divergence after each epoch."""
    from watersic_hf.finetuning import finetune_to_folder
    from watersic_hf.report import write_folder_page

    settings = given_options(arguments, "epochs", "learning_rate", "batch_size", "seed")
    report = finetune_to_folder(
        arguments.quantized,
        arguments.out,
        arguments.teacher,
        dataset=arguments.dataset,
        tokenizer=arguments.tokenizer,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        settings=FinetuneSettings(**settings),
        resume_folder=arguments.resume,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        **source_options(arguments),
    )
    write_folder_page(arguments.out)
    before, after = report.kl_bits_before, report.kl_bits_after
    if arguments.json:
        print_json(asdict(report) | {"kl_bits_before": before, "kl_bits_after": after})
        return
    rows = [("0", "", f"{before:.5f}")]
    epochs = zip(report.train_kl_bits, report.validation_kl_bits[1:], strict=True)
    rows += [(str(n), f"{t:.5f}", f"{v:.5f}") for n, (t, v) in enumerate(epochs, 1)]
    print_table(("epoch", "training KL", "held-out KL, bits per token"), rows)
    kept = f"scales of epoch {report.kept_epoch} kept"
    if report.kept_epoch == 0:
        kept = "no epoch lowered the held-out KL, original scales kept"
    print(
        f"\n{arguments.out}: {report.layers} layers, {kept}, "
        f"KL {before:.5f} -> {after:.5f} bits per token; bits per weight unchanged"
    )
