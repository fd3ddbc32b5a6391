"""Quantize a model on the disk or the hub into a folder."""

import contextlib
import copy
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_torch_state_dict_into_shards

from watersic_hf.checkpoint import LayerReport, read_json, read_report, write_json, write_tensors
from watersic_hf.checkpoint.report import REPORT_FILE, version_of
from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.quantizer import attach_quantizer
from watersic_hf.integration.rates import measure_rates
from watersic_hf.integration.run import Run, model_windows, quantize_on_disk
from watersic_hf.integration.saving import model_card
from watersic_hf.integration.selection import Selection
from watersic_hf.integration.sizes import Outlook, RunSizes
from watersic_hf.integration.source import ModelSource
from watersic_hf.integration.streaming import fingerprint, open_on_disk
from watersic_hf.quantization import Journal
from watersic_hf.streams.offloaded import OffloadedBlocks
from watersic_hf.streams.precision import computing_fast
from watersic_hf.streams.processes import barrier, rank_and_size
from watersic_hf.streams.torch_state import default_torch_state

logger = logging.getLogger(__name__)

#: Folder within the output folder that holds what is finished, until the model is complete.
UNFINISHED = "unfinished"
_BATCH_SIZE = "batch_size.json"
#: Files of a model in any format, and those that are written beside its weights.
_TAKEN = (
    *(f"*.{kind}" for kind in ("safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx")),
    *("config.json", "adapter_config.json", "generation_config.json", "tokenizer*", "README.md"),
    *(REPORT_FILE, "report.html"),
)


@default_torch_state()
def quantize_to_folder(
    model: str,
    folder: str | os.PathLike,
    config: WaterSICConfig,
    *,
    dtype: Any = "auto",
    device_map: Any = None,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    subfolder: str = "",
    trust_remote_code: bool = False,
    announce: Callable[[Outlook], object] | None = None,
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
        revision: branch, tag or commit of a model on the hub; default: the main branch.
        subfolder: folder within the repository that holds the model.
        trust_remote_code: whether Python code of the repository may be run.
        announce: called in the first process before the work begins, with what the run calibrates
            on and how long it will take; measuring that takes some seconds.  Default: nothing.

    Returns:
        The reports of the quantized layers.

    Raises:
        FileExistsError: `folder` already holds a model, or another run works in it.
        ValueError: the model is already quantized, or an adapter; or an argument cannot be used.
        CheckpointError: the unfinished work in `folder` belongs to another run.
    """
    source = ModelSource(
        name=model, revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code
    )
    folder = Path(os.path.abspath(folder))
    work = folder / UNFINISHED
    if not work.is_dir():
        require_no_model(folder)
    # needed at the end only, and checked before the work
    check_shard_size(max_shard_size)
    device = compute_device(device_map)
    model_config = source.load_config()
    with _only_run_in(work):
        if not (work / "run.json").is_file() and (folder / "config.json").is_file():
            # an earlier run was killed between the end of its work and the removal of its folder
            reports = read_report(folder)
        else:
            quantized = _quantize_with_halved_batches(
                source,
                config,
                model_config=model_config,
                dtype=dtype,
                device=device,
                work=work,
                announce=announce,
            )
            reports = quantized.hf_quantizer.reports
            if rank_and_size()[0] == 0:
                _save_finished(quantized, folder, work, source, max_shard_size)
        barrier()
    if rank_and_size()[0] == 0:
        shutil.rmtree(work, ignore_errors=True)
    return reports


@contextlib.contextmanager
def _only_run_in(work: Path) -> Iterator[None]:
    """Hold the lock of the folder of unfinished work; the first process holds it for all.

    Raises:
        FileExistsError: another run holds it.
    """
    if rank_and_size()[0] > 0:
        yield
        return
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FileExistsError(
            f"{work.parent}: another run is active in this folder. Wait until it ends, or choose "
            f"another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _quantize_with_halved_batches(
    source: ModelSource,
    config: WaterSICConfig,
    *,
    model_config: Any,
    dtype: Any,
    device: torch.device,
    work: Path,
    announce: Callable[[Outlook], object] | None,
) -> Any:
    """Return the quantized model; when memory runs out, try again with batches of half the size."""
    batch_size = config.batch_size
    if (work / _BATCH_SIZE).is_file():
        batch_size = min(batch_size, read_json(work / _BATCH_SIZE))
    while True:
        settings = copy.deepcopy(config)
        settings.batch_size = batch_size
        try:
            return _quantize(
                source,
                settings,
                model_config=model_config,
                dtype=dtype,
                device=device,
                work=work,
                announce=announce,
            )
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or batch_size == 1 or rank_and_size()[1] > 1:
                raise
            # outside of this clause, so that nothing of the failed attempt is held any more
            message = str(error)
        batch_size //= 2
        announce = None
        logger.warning("Out of memory; continuing with batches of %d: %s", batch_size, message)
        write_json(work / _BATCH_SIZE, batch_size)


def _quantize(
    source: ModelSource,
    config: WaterSICConfig,
    *,
    model_config: Any,
    dtype: Any,
    device: torch.device,
    work: Path,
    announce: Callable[[Outlook], object] | None,
) -> Any:
    """Return the quantized model, its blocks on the disk; `config` is changed."""
    requested = config.to_dict()
    converted = work / f"converted-{rank_and_size()[0]}"
    model, selection, blocks = open_on_disk(
        source, config, model_config=model_config, dtype=dtype, folder=converted
    )
    blocks_source = OffloadedBlocks(model, blocks, device, layers=selection)
    own_dtype = model.dtype
    with computing_fast(model, device):
        with blocks_source.flow():
            windows = model_windows(model, config, tokenizer_options=source.options)
        identity = {
            "model": fingerprint(source),
            "dtype": str(own_dtype),
            "computed_in": str(model.dtype),
            "settings": requested,
            "windows": hashlib.sha256(b"".join(w.numpy().tobytes() for w in windows)).hexdigest(),
            "versions": {p: version_of(p) for p in ("watersic-hf", "torch", "transformers")},
        }
        journal = Journal(work, identity, [len(window) for window in windows])
        run = Run.begin(selection, config, journal=journal)
        if announce is not None and rank_and_size()[0] == 0:
            announce(_outlook(model, selection, config, device, windows=len(windows)))
        block_tensors = quantize_on_disk(
            model, selection, run, blocks_source, windows, dtype=own_dtype
        )
    attach_quantizer(model, selection, run, block_tensors)
    return model


def _outlook(
    model: Any,
    selection: Selection,
    config: WaterSICConfig,
    device: torch.device,
    *,
    windows: int,
) -> Outlook:
    """Return what a run on some windows will take; the speed of the machine is measured."""
    _, processes = rank_and_size()
    # what it computes in; times do not depend on the dtype of the files
    dtype = model.dtype
    sizes = RunSizes.of(model, selection, config, dtype=dtype, computed=dtype, processes=processes)
    rates = measure_rates(dtype, device, config.lattice, quick=True)
    return Outlook.of(sizes, rates, windows)


def _save_finished(
    model: Any, folder: Path, work: Path, source: ModelSource, max_shard_size: int | str
) -> None:
    """Save a model whose blocks are on the disk, and mark the work as done."""
    # a slow import, with triton among it
    from transformers import modeling_utils

    whole = work / "finished"
    writer = modeling_utils.safe_save_file
    # transformers has no hook for writing a file, and would hold a shard in memory
    modeling_utils.safe_save_file = write_tensors
    try:
        save_quantized(
            model,
            whole,
            tokenizer=source,
            base=source,
            title=folder.name,
            max_shard_size=max_shard_size,
        )
    finally:
        modeling_utils.safe_save_file = writer
    # config.json last: without it a folder is no model
    for file in sorted(whole.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, folder / file.name)
    (work / "run.json").unlink()


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


def check_shard_size(max_shard_size: int | str) -> None:
    """Refuse a size of weight files that `save_pretrained` could not read.

    Raises:
        ValueError: it is neither a number of bytes nor a text such as "5GB".
    """
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(
            f"the maximum size of a weight file is {max_shard_size!r}, but must be a number of "
            f'bytes, or a number with the unit KB, MB, GB or TB, as in "5GB"'
        ) from error


def require_no_model(folder: str | os.PathLike) -> None:
    """Refuse a folder in which saving would overwrite something, or mix two models.

    Raises:
        FileExistsError: `folder` is a file, or already holds a model or a file of the same name.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Name a folder to save to.")
    found = [file.name for pattern in _TAKEN for file in sorted(folder.glob(pattern))]
    if found:
        raise FileExistsError(
            f"{folder} holds a model already, or files that would be overwritten: "
            f"{', '.join(found[:3])}. Choose another folder, or empty this one."
        )


def save_quantized(
    model: Any,
    folder: str | os.PathLike,
    *,
    tokenizer: str | ModelSource,
    base: str | ModelSource,
    title: str | None = None,
    finetuning: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Save a quantized model with a tokenizer or processor and a model card.

    Args:
        model: the quantized model.
        folder: folder to save to; created if it does not exist.
        tokenizer: model whose processor is saved, or tokenizer if it has no processor: a folder,
            a hub name, or its source.
        base: model that was quantized, in the same forms, for the card.
        title: title of the card; default: the name of the folder.
        finetuning: data that the scales were finetuned on, for the card; None if they were not.
        max_shard_size: as in `save_pretrained`.
    """
    folder = Path(os.path.abspath(folder))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _source(tokenizer).save_processor(folder)
    card = model_card(
        model.config.quantization_config,
        model.hf_quantizer.reports,
        repo=title or folder.name,
        base=_source(base).title,
        model_class=type(model).__name__,
        folder=folder,
        finetuning=finetuning,
    )
    card.save(folder / "README.md")


def _source(model: str | ModelSource) -> ModelSource:
    return model if isinstance(model, ModelSource) else ModelSource(name=model)
