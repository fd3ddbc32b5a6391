"""Quantize a model on the disk or the hub into a folder."""

import contextlib
import copy
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from watersic_hf.checkpoint import LayerReport, read_json, read_report, write_json, write_tensors
from watersic_hf.checkpoint.report import version_of
from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.quantizer import attach_quantizer
from watersic_hf.integration.run import Run, model_windows, quantize_on_disk
from watersic_hf.integration.saving import model_card
from watersic_hf.integration.streaming import fingerprint, open_on_disk
from watersic_hf.quantization import Journal
from watersic_hf.streams.offloaded import OffloadedBlocks
from watersic_hf.streams.processes import barrier, rank_and_size
from watersic_hf.streams.torch_state import default_torch_state

logger = logging.getLogger(__name__)

#: Folder within the output folder that holds what is finished, until the model is complete.
UNFINISHED = "unfinished"
_BATCH_SIZE = "batch_size.json"


@default_torch_state()
def quantize_to_folder(
    model: str,
    folder: str | os.PathLike,
    config: WaterSICConfig,
    *,
    dtype: Any = "auto",
    device_map: Any = None,
    max_shard_size: str = "5GB",
) -> list[LayerReport]:
    """Quantize a model and save it with its tokenizer or processor and a model card.

    The model is loaded as the class that it was saved as, if transformers has that class, and as a
    causal language model otherwise.  Its blocks are in memory one at a time.  What is finished is
    kept in the folder `UNFINISHED` of `folder`: after a crash the same call resumes from there, and
    the folder is removed at the end.

    With torch.distributed initialized, every process calls this with the same arguments.

    Args:
        model: folder or hub name.
        folder: folder to save to; created if it does not exist.
        config: how to quantize.
        dtype: dtype of the layers that stay dense; default: that of the model.
        device_map: device to compute on; default: a GPU if there is one.
        max_shard_size: as in `save_pretrained`.

    Returns:
        The reports of the quantized layers.

    Raises:
        FileExistsError: `folder` already holds a model.
        ValueError: the model is already quantized.
        CheckpointError: the unfinished work in `folder` belongs to another run.
    """
    work = Path(folder) / UNFINISHED
    if not work.is_dir():
        require_no_model(folder)
    elif not (work / "run.json").is_file() and (Path(folder) / "config.json").is_file():
        # killed between the end of the work and its removal
        shutil.rmtree(work)
        return read_report(folder)
    model_config = AutoConfig.from_pretrained(model)
    _require_no_method(model, model_config)
    names = getattr(model_config, "architectures", None) or [""]
    model_class = getattr(transformers, names[0], AutoModelForCausalLM)
    batch_size = config.batch_size
    if (work / _BATCH_SIZE).is_file():
        batch_size = min(batch_size, read_json(work / _BATCH_SIZE))
    device = compute_device(device_map)
    while True:
        try:
            settings = copy.deepcopy(config)
            settings.batch_size = batch_size
            quantized = _quantize(
                model_class,
                model,
                settings,
                model_config=model_config,
                dtype=dtype,
                device=device,
                work=work,
            )
            break
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or batch_size == 1 or rank_and_size()[1] > 1:
                raise
            # outside of this clause, so that nothing of the failed attempt is held any more
            message = str(error)
        batch_size //= 2
        logger.warning("Out of memory; continuing with batches of %d: %s", batch_size, message)
        write_json(work / _BATCH_SIZE, batch_size)
    if rank_and_size()[0] == 0:
        _save_finished(quantized, Path(folder), work, model, max_shard_size)
    barrier()
    return quantized.hf_quantizer.reports


def _quantize(
    model_class: Any,
    name: str,
    config: WaterSICConfig,
    *,
    model_config: Any,
    dtype: Any,
    device: torch.device,
    work: Path,
) -> Any:
    """Return the quantized model, its blocks on the disk; `config` is changed."""
    requested = config.to_dict()
    converted = work / f"converted-{rank_and_size()[0]}"
    model, selection, blocks = open_on_disk(
        model_class, name, config, model_config=model_config, dtype=dtype, folder=converted
    )
    source = OffloadedBlocks(model, blocks, device, layers=selection)
    with source.flow():
        windows = model_windows(model, config)
    identity = {
        "model": fingerprint(name),
        "dtype": str(model.dtype),
        "settings": requested,
        "windows": hashlib.sha256(b"".join(w.numpy().tobytes() for w in windows)).hexdigest(),
        "versions": {p: version_of(p) for p in ("watersic-hf", "torch", "transformers")},
    }
    journal = Journal(work, identity, [len(window) for window in windows])
    run = Run.begin(selection, config, journal=journal)
    block_tensors = quantize_on_disk(model, selection, run, source, windows)
    attach_quantizer(model, selection, run, block_tensors)
    return model


def _save_finished(
    model: Any, folder: Path, work: Path, original: str, max_shard_size: str
) -> None:
    """Save a model whose blocks are on the disk, and remove the folder of unfinished work."""
    # a slow import, with triton among it
    from transformers import modeling_utils

    # the card takes its title from the name of the folder
    whole = work / folder.name
    writer = modeling_utils.safe_save_file
    # transformers has no hook for writing a file, and would hold a shard in memory
    modeling_utils.safe_save_file = write_tensors
    try:
        save_quantized(
            model, whole, tokenizer=original, base=original, max_shard_size=max_shard_size
        )
    finally:
        modeling_utils.safe_save_file = writer
    # config.json last: without it a folder is no model
    for file in sorted(whole.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    (work / "run.json").unlink()
    shutil.rmtree(work)


def compute_device(device_map: Any) -> torch.device:
    """Return the device that blocks are computed on."""
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    if isinstance(device_map, str) and device_map not in ("auto", "balanced", "sequential"):
        return torch.device(device_map)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _require_no_method(name: str, model_config: Any) -> None:
    """Refuse a model that is quantized already."""
    found = getattr(model_config, "quantization_config", None)
    if found is not None:
        found = found if isinstance(found, dict) else found.to_dict()
        raise ValueError(
            f"{name} is quantized already, with {found.get('quant_method')}, and dense weights are "
            f"needed. Name the original model, or dequantize this one and save the result first."
        )


def require_no_model(folder: str | os.PathLike) -> None:
    """Refuse to save over a model.

    Raises:
        FileExistsError: `folder` already holds a model.
    """
    if any(Path(folder).glob("*.safetensors")):
        raise FileExistsError(
            f"{folder} holds a model already. Choose another folder, or empty this one."
        )


def save_quantized(
    model: Any,
    folder: str | os.PathLike,
    *,
    tokenizer: str,
    base: str,
    finetuning: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Save a quantized model with a tokenizer or processor and a model card.

    Args:
        model: the quantized model.
        folder: folder to save to; created if it does not exist.
        tokenizer: folder or hub name of the model whose processor is saved, or its tokenizer if
            there is no processor.
        base: folder or hub name of the model that was quantized, for the card.
        finetuning: data that the scales were finetuned on, for the card; None if they were not.
        max_shard_size: as in `save_pretrained`.
    """
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _save_processor(tokenizer, folder)
    card = model_card(
        model.config.quantization_config,
        model.hf_quantizer.reports,
        repo=folder.name,
        base=Path(base).name,
        model_class=type(model).__name__,
        folder=folder,
        finetuning=finetuning,
    )
    card.save(folder / "README.md")


def _save_processor(name: str, folder: Path) -> None:
    """Save the processor of a model, or its tokenizer if it has no processor."""
    # a slow import, with triton among it
    from transformers import AutoProcessor

    try:
        AutoProcessor.from_pretrained(name).save_pretrained(folder)
        return
    except (OSError, ValueError, ImportError) as error:
        logger.info("No processor is saved, only a tokenizer: %s", error)
    # a model without a tokenizer is still a model
    with contextlib.suppress(OSError, ValueError):
        AutoTokenizer.from_pretrained(name).save_pretrained(folder)
