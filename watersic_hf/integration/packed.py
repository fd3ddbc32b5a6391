"""Load a model whose layers are packed in its files, and dequantize it.

Shapes: A = out_features, N = in_features.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from watersic_hf.checkpoint import (
    PACKED,
    CheckpointError,
    TensorHeader,
    stored_layers,
    validate_layer,
)
from watersic_hf.integration.examination import kind_of
from watersic_hf.integration.linear_layers import like
from watersic_hf.integration.names import model_headers
from watersic_hf.integration.saving import detach_extras
from watersic_hf.integration.selection import Selection
from watersic_hf.integration.vocabulary import embedding_like
from watersic_hf.nn import (
    FusedExperts,
    PackedMatrix,
    WaterSICEmbedding,
    WaterSICLinear,
    WaterSICTiedHead,
    fuse,
    module_matches,
    packed_layers,
    replace_module,
    separate,
    separate_experts,
)

StoredLayers = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes of the packed tensors of every layer, as of `stored_layers`."""


def prepare_packed(
    model: nn.Module, selection: Selection, files: Sequence[str], *, dtype: torch.dtype | None
) -> list[str]:
    """Install an empty quantized module of the right size wherever the files hold one.

    A model of another class than the one that was saved may have linear layers that the files lack.
    They stay dense.

    Args:
        model: the model on meta; changed in place.
        selection: of the model.
        files: its checkpoint files; none if a state dict is loaded, whose tensors have any size.
        dtype: of the decoded weights.

    Returns:
        The names of the layers that the files lack.

    Raises:
        CheckpointError: a layer is incomplete or missing, or has another shape than the model's; or
            the files hold no quantized layer at all.
    """
    headers = model_headers(model, files)
    stored = _stored(headers)
    installed: list[str] = []
    for name, matrix in selection.vocabulary.items():
        if matrix.embedding is not None and (found := stored.get(name)):
            validate_layer(name, found, *matrix.shape)
            size = found.get("weight", (0,))[0]
            module = matrix.empty_module(payload_bytes=size, dtype=dtype, device="meta")
            matrix.install(model, module)
            installed += matrix.modules
    linear = [
        name
        for name in selection.linear
        if name not in installed
        and (name in stored or module_matches(name, selection.skipped) is None)
    ]
    new = _new_layers(model, [n for n in linear if n not in stored], headers)
    linear = [name for name in linear if name not in new]
    _install_linear(model, selection, linear, stored, sized=bool(headers), dtype=dtype)
    _install_experts(model, selection.experts, stored, sized=bool(headers), dtype=dtype)
    if next(packed_layers(model), None) is None:
        raise CheckpointError(
            f"{type(model).__name__}: config.json says that the model is quantized with WaterSIC, "
            f"but the files hold no quantized layer of it. Load the folder that the quantized "
            f"model was saved to, or remove `quantization_config` from config.json."
        )
    return new


def _new_layers(
    model: nn.Module, missing: Sequence[str], headers: Mapping[str, TensorHeader]
) -> list[str]:
    """Return those of the missing layers that the class of the model that was saved did not have.

    A layer that other blocks have in the files is lost, not new.
    """
    saved = getattr(model.config, "architectures", None)
    if not headers or not saved or type(model).__name__ in saved:
        return []
    kinds = {kind_of(name.rpartition(".")[0]) for name in headers}
    return [n for n in missing if kind_of(n) not in kinds]


def install_finished(
    model: nn.Module, selection: Selection, headers: Mapping[str, TensorHeader], dtype: torch.dtype
) -> None:
    """Install an empty quantized module, on meta, for every layer that some headers hold.

    Args:
        model: the model; changed in place.
        selection: of the model before quantization.
        headers: headers of tensors, by name in the model.
        dtype: of the decoded weights.
    """
    stored = _stored(headers)
    linear = [name for name in selection.linear if name in stored]
    experts = {
        name: layout
        for name, layout in selection.experts.items()
        if any(layer.startswith(f"{name}.{PACKED}.") for layer in stored)
    }
    _install_linear(model, selection, linear, stored, sized=True, dtype=dtype)
    _install_experts(model, experts, stored, sized=True, dtype=dtype)


def check_packed(model: nn.Module) -> None:
    """Verify the checksums of what was loaded; weights that are offloaded are left out.

    Raises:
        CheckpointError: something is damaged; the message names the layer and the part.
    """
    for name, layer in packed_layers(model):
        layer.requires_grad_(False)
        if isinstance(layer, WaterSICEmbedding):
            layer.adopt_dtype()
        if layer.weight.device.type != "meta":
            layer.check(name)


def dequantize(model: nn.Module, selection: Selection, dtype: torch.dtype | str | None) -> None:
    """Give a model its own classes back, with the weights that its codes stand for, in place.

    Args:
        model: the quantized model.
        selection: of the model before quantization.
        dtype: of the weights, or its name; None keeps that of loading.

    Raises:
        ValueError: a layer is offloaded.
    """
    # config.json holds a name
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    packed = dict(packed_layers(model))
    for name, layer in packed.items():
        if layer.weight.device.type == "meta":
            raise ValueError(
                f"{name}: the layer is offloaded and cannot be dequantized in place. Load the "
                f"model without offloading first."
            )
    experts = dict(separate_experts(model))
    matrices = {f"{name}.{n}" for name, module in experts.items() for n in module.layout.names()}
    for name, layer in packed.items():
        if name in matrices:
            continue
        # under an adapter a layer has a name of PEFT's
        original = selection.originals.get(name.removesuffix(".base_layer"))
        dense = layer.dequantize(dtype)
        if isinstance(layer, WaterSICEmbedding):
            dense = embedding_like(model, original, dense)
        elif original is not None:
            dense = like(original, dense)
        replace_module(model, name, dense)
    for module in experts.values():
        fuse(module, dtype)
    for name, head in list(model.named_modules()):
        if isinstance(head, WaterSICTiedHead):
            dense = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
            embedding = next((n for n, module in packed.items() if module is head.embedding), None)
            # without it, the model was given another embedding, which the head is tied to
            dense.weight = (head if embedding is None else model.get_submodule(embedding)).weight
            replace_module(model, name, dense)
    detach_extras(model)


def _stored(headers: Mapping[str, TensorHeader]) -> StoredLayers:
    return stored_layers({name: (h.shape, h.dtype) for name, h in headers.items()})


def _install_linear(
    model: nn.Module,
    selection: Selection,
    names: Collection[str],
    stored: StoredLayers,
    *,
    sized: bool,
    dtype: torch.dtype | None,
) -> None:
    """Replace linear layers by empty quantized ones; `sized` demands each of them in `stored`."""
    for name in names:
        found = stored.get(name, {})
        rows, columns = selection.linear[name]
        if sized:
            validate_layer(name, found, rows, columns)
        layer = WaterSICLinear(
            columns,
            rows,
            bias=model.get_submodule(name).bias is not None,
            payload_bytes=found.get("weight", (0,))[0],
            dtype=dtype,
            device="meta",
        )
        replace_module(model, name, layer)


def _install_experts(
    model: nn.Module,
    experts: Mapping[str, FusedExperts],
    stored: StoredLayers,
    *,
    sized: bool,
    dtype: torch.dtype | None,
) -> None:
    """Separate experts into empty packed matrices; `sized` demands each of them in `stored`."""
    for name, layout in experts.items():

        def empty(
            expert: int, matrix: str, name: str = name, layout: FusedExperts = layout
        ) -> PackedMatrix:
            full = f"{name}.{PACKED}.{expert}.{matrix}"
            found = stored.get(full, {})
            rows, columns = layout.shape(matrix)
            if sized:
                validate_layer(full, found, rows, columns)
            size = found.get("weight", (0,))[0]
            return PackedMatrix(columns, rows, payload_bytes=size, dtype=dtype, device="meta")

        separate(model.get_submodule(name), layout, empty)
