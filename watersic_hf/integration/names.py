"""Names of tensors and modules, in the files and in the model."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from watersic_hf.checkpoint import TensorHeader, read_headers


def model_headers(model: nn.Module, files: Sequence[str]) -> dict[str, TensorHeader]:
    """Return the headers of the files' tensors under the names that the model has for them.

    A tensor's name in the file can differ from its name in the model: some architectures rename
    their modules on saving, and a headless model's names lack the prefix of the full model's.

    Raises:
        CheckpointError: a file is damaged, or holds a tensor that is cut short.
    """
    found = read_headers(f for f in files if str(f).endswith(".safetensors"))
    renamings: list[Any] = [
        rule
        for rule in get_model_conversion_mapping(model, None, None)
        if isinstance(rule, WeightRenaming)
    ]
    prefix = f"{model.base_model_prefix}."
    dense_names = model.state_dict()
    headers: dict[str, TensorHeader] = {}
    for name, header in found.items():
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, dense_names)
        for alias in (name, renamed, prefix + renamed, renamed.removeprefix(prefix)):
            headers.setdefault(alias, header)
    return headers


def names_in_model(folder: str | os.PathLike) -> Callable[[str], str]:
    """Return a function from the name of a module in a folder's files to its name in the model."""
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rules = get_checkpoint_conversion_mapping(config.get("model_type")) or ()

    def renamed(name: str) -> str:
        for rule in rules:
            if isinstance(rule, WeightRenaming):
                name, _ = rule.rename_source_key(f"{name}.")
                name = name.removesuffix(".")
        return name

    return renamed


def stored_names(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """Return the names that layers of a model have in the files that it saves, by name."""
    # transformers renames tensors only, so each of these holds the number of its layer
    numbers = {f"{name}.weight": torch.tensor(number) for number, name in enumerate(layers)}
    renamed = revert_weight_conversion(model, numbers)
    return {layers[int(n)]: name.removesuffix(".weight") for name, n in renamed.items()}
