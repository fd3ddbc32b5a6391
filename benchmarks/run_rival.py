"""Quantize a model with another quantizer, as a baseline for `compare.py`.

    python benchmarks/run_rival.py windows --model FOLDER --text calib.txt --out WINDOWS
    python benchmarks/run_rival.py hqq --model FOLDER --bits 3 --out DIR
    python benchmarks/run_rival.py gptq --model FOLDER --bits 3 --windows WINDOWS --out DIR

Every method quantizes the linear layers of the decoder blocks and nothing else.  DIR becomes an
ordinary dense bfloat16 folder with the dequantized weights, so that ``compare.py judge`` evaluates
all methods in the same way, and `rival.json`, which records what ran and what it stores.  Its
`seconds` are processor time, summed over all threads.  `reproduced` is the fraction of weights in
layers whose error is lower than `Job.reproduced` allows: above 0, the model has been quantized
before and the method has met that grid again, so the run says nothing about the method.

Only `windows` needs watersic_hf; the others need the package of the method
(`benchmarks/rivals/README.md` lists the environments).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rivals import autoround, bnb, gptq, hqq, llamacpp, quanto, sinq, torchao
from rivals import windows as calibration
from rivals.contract import Job, linear_weights, record, write_dense

#: By name of the command; `rivals/contract.py` says what a module defines.
METHODS = {
    "hqq": hqq,
    "sinq": sinq,
    "bnb": bnb,
    "quanto": quanto,
    "torchao": torchao,
    "llamacpp": llamacpp,
    "gptq": gptq,
    "autoround": autoround,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="rival", required=True)
    for name, module in {"windows": calibration, **METHODS}.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        command.add_argument("--model", required=True, help="folder of the dense model")
        command.add_argument("--out", required=True, help="folder, or for `windows` file, to write")
        module.add_arguments(command)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict | None:
    options = parse(argv)
    if options.rival == "windows":
        return calibration.write_windows(options)
    job = Job(options, linear_weights(Path(options.model)))
    if getattr(options, "windows", None):
        job.windows = calibration.read_windows(options.windows)
    try:
        METHODS[options.rival].quantize(job)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{options.rival}: the package `{error.name}` is not installed here; "
            "benchmarks/rivals/README.md lists the environment of each method"
        ) from error
    out = Path(options.out)
    write_dense(job, out)
    result = record(job)
    (out / "rival.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    json.dump(result, sys.stdout, indent=2)
    print()
    return result


if __name__ == "__main__":
    main()
