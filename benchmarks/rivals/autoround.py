"""AutoRound: rounding trained by signed gradient descent, with calibration windows."""

import argparse
import tempfile
from pathlib import Path

import torch

from .contract import Job, add_bits, add_windows, package_version
from .gptq_format import read_gptq


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bits(parser, (2, 3, 4))
    add_windows(parser)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--iters", type=int, default=200, help="iterations (default: 200)")
    parser.add_argument("--lr", type=float, help="learning rate; its light recipe has 5e-3")
    parser.add_argument("--batch", type=int, default=8, help="windows per iteration (default: 8)")
    parser.add_argument("--alg-ext", action="store_true", help="its recommendation for 2 bits")


def quantize(job: Job) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = job.options
    count, length = job.windows.shape
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        with job.timed():
            rounding = AutoRound(
                model,
                AutoTokenizer.from_pretrained(job.model),
                bits=options.bits,
                group_size=options.group,
                sym=not options.asymmetric,
                dataset=list(job.windows.split(options.batch)),
                nsamples=count,
                seqlen=length,
                batch_size=options.batch,
                enable_alg_ext=options.alg_ext,
                device_map="cpu",
                enable_torch_compile=False,
                iters=options.iters,
                **({"lr": options.lr} if options.lr else {}),
            )
            rounding.quantize_and_save(scratch, format="auto_gptq")
        folder = Path(scratch)
        if not list(folder.glob("*.safetensors")):
            (folder,) = (file.parent for file in folder.rglob("model*.safetensors"))
        read_gptq(job, folder, first_zero=1)
    symmetry = "asymmetric" if options.asymmetric else "symmetric"
    job.version = package_version("auto-round")
    job.settings = (
        f"{options.bits} bits, group {options.group}, {symmetry}, {options.iters} iterations, "
        f"learning rate {options.lr or 'default'}, batch {options.batch}"
    )
    if options.alg_ext:
        job.settings += ", alg_ext"
