"""Open a model with its blocks on the disk.

transformers and accelerate load it with the blocks offloaded: the names, dtypes and conversions of
tensors, ties and buffers are theirs.  Tensors that are in the files as the model has them are read
from there when their block is held; others are converted once, into a folder.
"""

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.selection import Selection
from watersic_hf.integration.source import ModelSource
from watersic_hf.streams import block_stacks

#: Positions at which a file is sampled for its fingerprint, from its first byte to its last.
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def open_on_disk(
    source: ModelSource, config: WaterSICConfig, *, model_config: Any, dtype: Any, folder: Path
) -> tuple[nn.Module, Selection, dict[str, nn.Module]]:
    """Load a model with its blocks on the disk.

    Args:
        source: where the model is.
        config: how the model will be quantized.
        model_config: configuration of the model.
        dtype: as in `from_pretrained`.
        folder: for tensors that are not in the files as the model has them.

    Returns:
        The model, what to quantize of it, and its blocks by name.

    Raises:
        ValueError: no list of modules holds linear layers.
    """
    empty = source.empty_model(model_config)
    selection = Selection.of(empty, config)
    names = _blocks(empty, selection)
    model = _load(source, empty, names, model_config=model_config, dtype=dtype, folder=folder)
    if model.all_tied_weights_keys != empty.all_tied_weights_keys:
        # the files hold two matrices where the configuration ties them
        empty.all_tied_weights_keys = model.all_tied_weights_keys
        selection = Selection.of(empty, config)
    return model, selection, {block: model.get_submodule(block) for block in names}


def load_from_disk(source: ModelSource, config: WaterSICConfig, *, folder: Path) -> nn.Module:
    """Return a model, quantized or not, each of whose layers is read from the disk when it runs.

    Args:
        source: where the model is.
        config: how it is quantized, or shall be.
        folder: for tensors that are not in the files as the model has them.
    """
    model_config = AutoConfig.from_pretrained(source.name, **source.options)
    empty = source.empty_model(model_config)
    names = _blocks(empty, Selection.of(empty, config))
    return _load(source, empty, names, model_config=model_config, dtype="auto", folder=folder)


def _blocks(empty: nn.Module, selection: Selection) -> list[str]:
    """Return the names of the blocks of a model."""
    towers = tuple(f"{tower}." for tower in selection.towers)
    layers = [layer for layer in selection.linear if not layer.startswith(towers)]
    return [block for stack in block_stacks(empty, layers) for block, _ in stack]


def _load(
    source: ModelSource,
    empty: nn.Module,
    blocks: Sequence[str],
    *,
    model_config: Any,
    dtype: Any,
    folder: Path,
) -> nn.Module:
    """Load a model with its blocks on the disk; `empty` is the same model on meta."""
    stacks = {block.rpartition(".")[0] for block in blocks}
    with _without_offload_remark():
        return source.load_model(
            model_config,
            dtype=dtype,
            device_map=_blocks_on_disk(empty, stacks),
            offload_folder=str(folder),
        )


@contextmanager
def _without_offload_remark() -> Iterator[None]:
    """Silence accelerate's warning that parameters are on meta, which is the purpose here."""
    log = logging.getLogger("accelerate.big_modeling")

    def is_other(record: logging.LogRecord) -> bool:
        return "because they were offloaded to" not in record.getMessage()

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def fingerprint(source: ModelSource) -> str:
    """Return a fingerprint of a model's files: of their names, sizes, headers and samples."""
    digest = hashlib.sha256()
    files = [f for f in source.folder().iterdir() if f.suffix in (".safetensors", ".bin", ".json")]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for part in range(_SAMPLES):
                handle.seek(part * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _blocks_on_disk(model: nn.Module, stacks: Collection[str]) -> dict[str, str]:
    """Return a device map with the modules of `stacks` on the disk, and all else on the CPU."""
    found: dict[str, str] = {}

    def assign(module: nn.Module, name: str) -> None:
        if name in stacks:
            found[name] = "disk"
        elif name and not any(stack.startswith(f"{name}.") for stack in stacks):
            found[name] = "cpu"
        else:
            prefix = f"{name}." if name else ""
            found.update((f"{prefix}{n}", "cpu") for n in (*module._parameters, *module._buffers))
            for child, part in module.named_children():
                assign(part, f"{prefix}{child}")

    assign(model, "")
    return found
