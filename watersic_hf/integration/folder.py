"""From a model on the disk or the hub to a quantized folder."""

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
from watersic_hf.integration.quantizer import WaterSICHfQuantizer
from watersic_hf.integration.saving import model_card
from watersic_hf.integration.streaming import (
    StreamedBlocks,
    StreamedRun,
    fingerprint,
    open_on_disk,
)
from watersic_hf.quantization import Journal
from watersic_hf.streams.processes import barrier, rank_and_size

logger = logging.getLogger(__name__)

#: Folder beside the model to come, with what is finished of it.
UNFINISHED = "unfinished"
_BATCH_SIZE = "batch_size.json"


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

    It is loaded as the class that it was saved as, if transformers has that, and as a causal
    language model otherwise.  Its blocks are in memory one at a time.  What is finished is in the
    folder `UNFINISHED` of `folder`, from which the same call goes on after a crash, and which is
    removed in the end.

    Every process of a torch.distributed group calls this with the same arguments.

    Args:
        model: folder or hub name.
        folder: where to save; made if it is not there.
        config: what to do.
        dtype: of the layers that stay dense; default: that of the model.
        device_map: the device to compute on; default: a GPU if there is one.
        max_shard_size: as in `save_pretrained`.

    Returns:
        The report of every quantized layer.

    Raises:
        FileExistsError: `folder` holds a model already.
        ValueError: the model is quantized already.
        CheckpointError: what is unfinished in `folder` belongs to another run.
    """
    work = Path(folder) / UNFINISHED
    if not work.is_dir():
        require_no_model(folder)
    elif not (work / "run.json").is_file() and (Path(folder) / "config.json").is_file():
        # it was killed when all was done
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
            quantized = _quantize_streamed(
                model_class, model, model_config, config, work, batch_size, dtype, device
            )
            break
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or batch_size == 1 or rank_and_size()[1] > 1:
                raise
            # outside of this clause, so that nothing of the failed try is held any more
            message = str(error)
        batch_size //= 2
        logger.warning("Out of memory; going on with batches of %d: %s", batch_size, message)
        write_json(work / _BATCH_SIZE, batch_size)
    if rank_and_size()[0] == 0:
        _save_finished(quantized, Path(folder), work, model, max_shard_size)
    barrier()
    return quantized.hf_quantizer.reports


def _quantize_streamed(
    model_class: Any,
    name: str,
    model_config: Any,
    config: WaterSICConfig,
    work: Path,
    batch_size: int,
    dtype: Any,
    device: torch.device,
) -> Any:
    """The quantized model, its blocks on the disk."""
    config = copy.deepcopy(config)
    config.batch_size = batch_size
    converted = work / f"converted-{rank_and_size()[0]}"
    model, blocks = open_on_disk(model_class, name, model_config, dtype=dtype, folder=converted)
    quantizer = WaterSICHfQuantizer(config, pre_quantized=False)
    settings = quantizer.quantization_config.to_dict()
    quantizer.update_dtype(model.dtype)
    quantizer.preprocess_model(model)
    source = StreamedBlocks(
        model, blocks, device,
        prepare=lambda block_name, block: quantizer.open_layers(block, f"{block_name}."),
        settle=lambda block_name, block: quantizer.close_layers(block, f"{block_name}."),
    )  # fmt: skip
    windows: list[torch.Tensor] = []
    if config.dataset is not None:
        with source.flow():
            windows = quantizer.windows(model)
    identity = {
        "model": fingerprint(name),
        "dtype": str(model.dtype),
        "settings": settings,
        "windows": hashlib.sha256(b"".join(w.numpy().tobytes() for w in windows)).hexdigest(),
        "versions": {p: version_of(p) for p in ("watersic-hf", "torch", "transformers")},
    }
    journal = Journal(work, identity, [len(window) for window in windows])
    run = StreamedRun(source=source, journal=journal, windows=windows)
    quantizer.quantize_streamed(model, run)
    return model


def _save_finished(
    model: Any, folder: Path, work: Path, original: str, max_shard_size: str
) -> None:
    """Save a model whose blocks are on the disk, and remove what is unfinished of it."""
    # imports much, triton among it
    from transformers import modeling_utils

    # of the same name, which the card has
    whole = work / folder.name
    writer = modeling_utils.safe_save_file
    # transformers has no hook for how a file is written: shard by shard in memory
    modeling_utils.safe_save_file = write_tensors
    try:
        save_quantized(
            model, whole, tokenizer=original, base=original, max_shard_size=max_shard_size
        )
    finally:
        modeling_utils.safe_save_file = writer
    # the configuration last: without it the folder is no model
    for file in sorted(whole.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    (work / "run.json").unlink()
    shutil.rmtree(work)


def compute_device(device_map: Any) -> torch.device:
    """The device that blocks are computed on."""
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    if isinstance(device_map, str) and device_map not in ("auto", "balanced", "sequential"):
        return torch.device(device_map)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
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
            f"needed. Name the model that it was made of, or dequantize it and save that first."
        )


def require_no_model(folder: str | os.PathLike) -> None:
    """Refuse to save over a model.

    Raises:
        FileExistsError: `folder` holds a model already.
    """
    if any(Path(folder).glob("*.safetensors")):
        raise FileExistsError(f"{folder} holds a model already; choose another folder or empty it")


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
        folder: where to save; made if it is not there.
        tokenizer: folder or hub name of a model; its processor is saved, or its tokenizer if it
            has no other, or nothing if it has none.
        base: folder or hub name of the model that was quantized, for the card.
        finetuning: for the card, on what the scales were finetuned; None = they were not.
        max_shard_size: as in `save_pretrained`.
    """
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _save_processor(tokenizer, folder)
    card = model_card(
        model.config.quantization_config, model.hf_quantizer.reports, repo=folder.name,
        base=Path(base).name, model_class=type(model).__name__, folder=folder,
        finetuning=finetuning,
    )  # fmt: skip
    card.save(folder / "README.md")


def _save_processor(name: str, folder: Path) -> None:
    """Save the processor that is beside a model, or its tokenizer if that is all that loads."""
    # imports Triton, where it is installed
    from transformers import AutoProcessor

    try:
        AutoProcessor.from_pretrained(name).save_pretrained(folder)
        return
    except (OSError, ValueError, ImportError) as error:
        logger.info("No processor is saved, only a tokenizer: %s", error)
    # a model without a tokenizer is still a model
    with contextlib.suppress(OSError, ValueError):
        AutoTokenizer.from_pretrained(name).save_pretrained(folder)
