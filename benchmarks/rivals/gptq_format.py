"""Folders in GPTQ's format, which more than one package writes.

Shapes: A = out_features, N = in_features, G = groups of inputs that share a scale.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .contract import Job, nbytes


def read_gptq(job: Job, folder: Path, *, first_zero: int) -> None:
    """Read stored bytes and dequantized weights from a folder in GPTQ's format.

    A layer has `qweight` (codes, packed along the inputs), `qzeros` (zeros minus `first_zero`,
    packed along the outputs), `scales` (G x A) and `g_idx` (the group of every input).

    Args:
        job: receives `stored`, `weights` and `counted`.
        folder: folder with the quantized model.
        first_zero: what to add to the stored zeros.
    """
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, shape in job.shapes.items():
        stem = name.removesuffix("weight")
        stored = {key: tensor for key, tensor in tensors.items() if key.startswith(stem)}
        job.stored[name] = nbytes(stored.values())
        codes_NA = unpack(stored[stem + "qweight"], bits=job.options.bits)
        zeros_GA = unpack(stored[stem + "qzeros"].T, bits=job.options.bits).T + first_zero
        group_N = torch.arange(shape[1]) // job.options.group
        group_N = stored.get(stem + "g_idx", group_N).long()
        scales_GA = stored[stem + "scales"].float()
        job.weights[name] = ((codes_NA - zeros_GA[group_N]) * scales_GA[group_N]).T
    job.counted = "tensors of the saved GPTQ file: codes, scales, zeros, group indices"


def unpack(words: Tensor, *, bits: int) -> Tensor:
    """Return the unsigned integers of `bits` bits in int32 words, lowest bit first, along dim 0."""
    columns = words.shape[1]
    shifts = torch.arange(32, dtype=torch.int32)[None, :, None]
    stream = ((words[:, None] >> shifts) & 1).reshape(-1, columns)
    powers = (1 << torch.arange(bits))[None, :, None]
    return (stream.reshape(-1, bits, columns) * powers).sum(1)
