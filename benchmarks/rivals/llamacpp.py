"""llama.cpp: llama-quantize with an importance matrix of the calibration windows.

The importance of an input is its mean square, as in llama-imatrix.
"""

import argparse
import json
import math
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .contract import Job, add_windows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_windows(parser)
    parser.add_argument("--type", required=True, help="as llama-quantize names it: Q3_K_M, IQ2_XXS")
    parser.add_argument("--pure", action="store_true", help="one type instead of the type's recipe")
    parser.add_argument("--fold", action="store_true", help="join rows so that k- and i-quants fit")
    parser.add_argument("--squares", help="file that keeps the importances between runs")
    parser.add_argument("--tools", help="folder of llama-quantize (default: the PATH)")
    parser.add_argument("--release", default="unknown", help="of llama.cpp, for the record")


def quantize(job: Job) -> None:
    import gguf

    options = job.options
    tool = shutil.which("llama-quantize", path=options.tools)
    if tool is None:
        raise SystemExit("llamacpp: no `llama-quantize` on the PATH or in the folder of --tools")
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "gemma3_text": gguf.MODEL_ARCH.GEMMA3}[
        config["model_type"]
    ]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    names = {names.get_name(n, try_suffixes=(".weight",)): n for n in job.weights}
    fold = {n: folding(w.shape[1]) if options.fold else 1 for n, w in job.weights.items()}
    types = Counter()
    with tempfile.TemporaryDirectory() as scratch, job.timed():
        source, matrix, target = (f"{scratch}/{name}.gguf" for name in ("source", "matrix", "out"))
        write_source(job, source, gguf.MODEL_ARCH_NAMES[arch], config, names, fold)
        write_matrix(job, matrix, names, fold)
        pure = ["--pure"] * options.pure
        command = [tool, "--imatrix", matrix, *pure, source, target, options.type, "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"llamacpp: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
        for tensor in gguf.GGUFReader(target).tensors:
            name = names[tensor.name]
            dense = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            job.weights[name] = dense.reshape(job.shapes[name])
            job.stored[name] = int(tensor.n_bytes)
            types[tensor.tensor_type.name] += job.shapes[name].numel()
    weights = sum(types.values())
    parts = ", ".join(f"{n} {w / weights:.1%}" for n, w in types.most_common())
    job.version = options.release
    job.counted = "tensors of the GGUF file"
    job.settings = f"{options.type}{' pure' * options.pure}, importance matrix"
    job.settings += ", rows folded to multiples of 256 columns" * options.fold + f" ({parts})"


def write_source(job: Job, file: str, arch: str, config: dict, names: dict, fold: dict) -> None:
    """Write a GGUF of the linear layers alone, with the metadata that llama-quantize needs.

    Rows are quantized independently of each other, so q and k need not be permuted as in the models
    that llama.cpp runs.
    """
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config.get("sliding_window") or 0)
    writer.add_vocab_size(config["vocab_size"])
    for short, name in names.items():
        columns = fold[name] * job.shapes[name][1]
        writer.add_tensor(short, job.weights[name].float().reshape(-1, columns).numpy())
    close(writer)


def write_matrix(job: Job, file: str, names: dict, fold: dict) -> None:
    """Write an importance matrix of the windows, in llama-imatrix's format."""
    import gguf

    squares = load_or_make(job.options.squares, partial(mean_squares, job))
    tokens = float(job.windows.numel())
    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["windows"])
    writer.add_uint32("imatrix.chunk_count", len(job.windows))
    writer.add_uint32("imatrix.chunk_size", job.windows.shape[1])
    for short, name in names.items():
        total = (squares[name] * tokens).tile(fold[name])
        writer.add_tensor(f"{short}.in_sum2", total[None].numpy())
        writer.add_tensor(f"{short}.counts", torch.full((1, 1), tokens).numpy())
    close(writer)


def close(writer) -> None:
    """Write the file of a `GGUFWriter` and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def folding(columns: int) -> int:
    """Return how many rows to join so that their length is a multiple of 256.

    That is the block length of k-quants and i-quants.
    """
    return 256 // math.gcd(columns, 256)


def load_or_make(file: str | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a file, which is made and written first if it does not exist."""
    if file and Path(file).is_file():
        return load_file(file)
    made = make()
    if file:
        save_file(made, file)
    return made


@torch.no_grad()
def mean_squares(job: Job) -> dict[str, Tensor]:
    """Return, by tensor name, the mean square of every input of a layer over the windows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16).eval()
    sums = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

    for name in job.weights:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(partial(add, name))
    for window in job.windows:
        model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    return {name: (total / job.windows.numel()).float() for name, total in sums.items()}
