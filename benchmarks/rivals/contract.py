"""What `run_rival.py` and the modules of this folder agree on.

A module quantizes with one package and defines

* ``add_arguments(parser)``: add the command-line options of the method;
* ``quantize(job)``: quantize every weight in `Job.weights`, usually with `Job.each_layer`.

`quantize` replaces the entries of `Job.weights` by dequantized weights, counts the bytes of what is
stored in `Job.stored`, counts its processor time with `Job.timed`, and sets `Job.settings` and
`Job.version`.  `run_rival.py` does the rest: it reads the weights, writes the dense folder and the
record.  The package is imported inside `quantize`, so that the other methods run without it.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Keys of `rival.json`, in this order.
RECORD = (
    "rival",
    "version",
    "settings",
    "model",
    "weights",
    "bytes",
    "counted",
    "bits",
    "reproduced",
    "seconds",
    "calibration",
)


@dataclass
class Job:
    """One run: what is quantized, with which options, and what is stored in the end."""

    options: argparse.Namespace
    """Options of the command line; those of a method are defined by its ``add_arguments``."""
    weights: dict[str, Tensor]
    """By tensor name: the weights to quantize, and after the run the dequantized weights."""
    windows: Tensor | None = None
    """Calibration windows, int64, windows x tokens; None if the method takes none."""
    settings: str = ""
    """The settings of the method, in words."""
    version: str = ""
    """The version of the package."""
    counted: str = "tensors in memory, as the layer's state_dict holds them"
    """What the stored bytes are counted from."""
    stored: dict[str, int] = field(default_factory=dict)
    """By tensor name: bytes stored for it."""
    seconds: float = 0.0
    """Processor time in seconds, summed over all threads and subprocesses."""
    original: dict[str, Tensor] = field(init=False)
    shapes: dict[str, torch.Size] = field(init=False)

    def __post_init__(self) -> None:
        self.original = dict(self.weights)
        self.shapes = {name: weight.shape for name, weight in self.weights.items()}

    @property
    def model(self) -> Path:
        """The folder of the dense model."""
        return Path(self.options.model)

    @property
    def bytes(self) -> int:
        """Bytes stored for all weights."""
        return sum(self.stored.values())

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    def reproduced(self) -> float:
        """Return the fraction of weights in layers whose error is too small to be genuine.

        The bound is what Gaussian weights allow, 4^-bits of their mean square.  Scalar quantizers
        stay at least 0.25 bit above it, unless the weights already lie on a grid that they find.
        """
        count = 0
        for name, dense in self.weights.items():
            weight = self.original[name].double()
            error = (dense.double() - weight).square().sum() / weight.square().sum()
            if error < 4.0 ** (-8 * self.stored[name] / weight.numel()):
                count += weight.numel()
        return count / self.count

    @contextmanager
    def timed(self):
        """Add the processor time of the block, including subprocesses, to `seconds`."""
        start = sum(os.times()[:4])
        yield
        self.seconds += sum(os.times()[:4]) - start

    def each_layer(self, quantize: Callable, dequantize: Callable) -> None:
        """Quantize layer by layer.

        Args:
            quantize: maps a weight to a quantized layer; only this is timed.
            dequantize: maps a quantized layer to its dense weight and to the tensors that are
                stored for it.
        """
        for name, weight in self.weights.items():
            with self.timed():
                quantized = quantize(weight)
            dense, stored = dequantize(quantized)
            self.weights[name] = dense
            self.stored[name] = nbytes(stored)


def linear_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the decoder blocks' linear layers by name, in the file's dtype."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, a safe_open is no mapping
                if in_block(name) and len(tensors.get_slice(name).get_shape()) == 2:
                    found[name] = tensors.get_tensor(name)
    if not found:
        raise SystemExit(f"{folder}: no linear layers of decoder blocks in its *.safetensors")
    return dict(sorted(found.items()))


def in_block(name: str) -> bool:
    """Return whether a tensor is a weight inside a decoder block; those of norms are, too."""
    return re.search(r"(^|\.)layers\.\d+\..*\.weight$", name) is not None


def write_dense(job: Job, out: Path) -> None:
    """Write a copy of the model's folder with the dequantized weights, in bfloat16."""
    for name, weight in job.weights.items():
        if weight.shape != job.shapes[name] or not weight.isfinite().all():
            raise ValueError(
                f"{name}: the dequantized weight has shape {tuple(weight.shape)} instead of "
                f"{tuple(job.shapes[name])}, or values that are not finite"
            )
    out.mkdir(parents=True, exist_ok=True)
    for file in job.model.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            dense = {name: job.weights.get(name, tensor) for name, tensor in tensors.items()}
            dense = {name: t.to(torch.bfloat16).contiguous() for name, t in dense.items()}
            save_file(dense, out / file.name, metadata={"format": "pt"})
        elif file.is_file():
            shutil.copyfile(file, out / file.name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def record(job: Job) -> dict:
    """Return the contents of `rival.json`."""
    calibration = None
    if job.windows is not None:
        calibration = "{} windows of {} tokens".format(*job.windows.shape)
    values = (
        job.options.rival,
        job.version,
        job.settings,
        job.model.name,
        job.count,
        job.bytes,
        job.counted,
        8 * job.bytes / job.count,
        round(job.reproduced(), 4),
        round(job.seconds, 1),
        calibration,
    )
    return dict(zip(RECORD, values, strict=True))


def nbytes(values: Iterable) -> int:
    """Return the bytes of those values that are tensors."""
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


def flat(nested) -> list:
    """Return the leaves of nested dicts, lists and tuples."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, list | tuple):
        return [leaf for branch in nested for leaf in flat(branch)]
    return [nested]


def linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer with a copy of a weight, without a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def package_version(package: str) -> str:
    """Return the version of an installed package."""
    return importlib.metadata.version(package)


def add_bits(parser: argparse.ArgumentParser, choices: Iterable[int]) -> None:
    """Add the options of methods with codes of fixed width and a scale per group."""
    parser.add_argument("--bits", type=int, choices=tuple(choices), required=True)
    parser.add_argument(
        "--group", type=int, default=64, help="weights that share a scale (default: 64)"
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Add the option of methods that need calibration data."""
    parser.add_argument("--windows", required=True, help="file written by `run_rival.py windows`")
