"""GPTQModel: GPTQ with groups, with calibration windows."""

import argparse
import os
import tempfile
from pathlib import Path

import torch

from .contract import Job, add_bits, add_windows, package_version
from .gptq_format import read_gptq


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bits(parser, (2, 3, 4))
    add_windows(parser)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument(
        "--mse",
        type=float,
        default=0.0,
        help="norm of its search for scales; 2.4 is usual (default: 0, no search)",
    )


def quantize(job: Job) -> None:
    # on machines with one or two cores its thread pool asks for more workers than it has
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=job.options.bits,
        group_size=job.options.group,
        sym=not job.options.asymmetric,
        mse=job.options.mse,
        device="cpu",
    )
    examples = [
        {"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]}
        for window in job.windows
    ]
    with tempfile.TemporaryDirectory() as scratch:
        with job.timed():
            model = GPTQModel.load(str(job.model), config)
            model.quantize(examples, batch_size=1)
            model.save(scratch)
        read_gptq(job, Path(scratch), first_zero=1)
    job.version = package_version("gptqmodel")
    job.settings = (
        f"GPTQ, {config.bits} bits, group {config.group_size}, "
        f"{'symmetric' if config.sym else 'asymmetric'}, act_group_aware {config.act_group_aware}, "
        f"desc_act {config.desc_act}, damping {config.damp_percent}, mse {config.mse}"
    )
