"""Open a model with its blocks on the disk.

transformers and accelerate load it with the blocks offloaded: the names, dtypes and conversions of
tensors, ties and buffers are theirs.  Tensors that are in the files as the model has them are read
from there when their block is held; others are converted once, into a folder.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.selection import Selection
from watersic_hf.streams import block_stacks

#: Positions at which a file is sampled for its fingerprint, from its first byte to its last.
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def empty_model(model_class: Any, model_config: Any) -> nn.Module:
    """Return the model of a configuration on meta: its modules and shapes, and no memory."""
    # a class of an architecture, or one that finds it
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        return build(model_config)


def open_on_disk(
    model_class: Any,
    name: str,
    config: WaterSICConfig,
    *,
    model_config: Any,
    dtype: Any,
    folder: Path,
) -> tuple[nn.Module, Selection, dict[str, nn.Module]]:
    """Load a model with its blocks on the disk.

    Args:
        model_class: class with a `from_pretrained`.
        name: folder or hub name.
        config: how the model will be quantized.
        model_config: configuration of the model.
        dtype: as in `from_pretrained`.
        folder: for tensors that are not in the files as the model has them.

    Returns:
        The model, what to quantize of it, and its blocks by name.

    Raises:
        ValueError: no list of modules holds linear layers.
    """
    empty = empty_model(model_class, model_config)
    selection = Selection.of(empty, config)
    towers = tuple(f"{tower}." for tower in selection.towers)
    layers = [layer for layer in selection.linear if not layer.startswith(towers)]
    names = [block for stack in block_stacks(empty, layers) for block, _ in stack]
    stacks = {block.rpartition(".")[0] for block in names}
    model = model_class.from_pretrained(
        name, dtype=dtype, device_map=_blocks_on_disk(empty, stacks), offload_folder=str(folder)
    )
    if model.all_tied_weights_keys != empty.all_tied_weights_keys:
        # the files hold two matrices where the configuration ties them
        empty.all_tied_weights_keys = model.all_tied_weights_keys
        selection = Selection.of(empty, config)
    return model, selection, {block: model.get_submodule(block) for block in names}


def fingerprint(name: str) -> str:
    """Return a fingerprint of a model's files: of their names, sizes, headers and samples.

    Args:
        name: folder or hub name.
    """
    folder = Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent
    digest = hashlib.sha256()
    files = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".json")]
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
