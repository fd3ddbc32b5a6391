"""Quantize weights without data, one by one, while transformers loads a model."""

import functools
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from watersic_hf.checkpoint import PACKED, PackedLayer
from watersic_hf.integration.linear_layers import is_transposed
from watersic_hf.integration.run import Run
from watersic_hf.integration.selection import Selection
from watersic_hf.nn import PackedMatrix, install_packed, separate
from watersic_hf.quantization import VocabularyStatistics, identity_moments
from watersic_hf.streams.memory import trim_memory
from watersic_hf.streams.torch_state import default_torch_state, replace_inference_tensors

#: Layers between two returns of freed memory to the system.
_LAYERS_PER_TRIM = 8


class QuantizeOnLoad(ConversionOps):
    """Quantize a weight as it is loaded, and replace its module.

    transformers replaces an error from here by one that names neither the layer nor the cause.  So
    the first one is kept, nothing is quantized after it, and `finish` raises it.

    Args:
        selection: of the model that is loaded.
        run: quantizes, and holds the reports.
    """

    def __init__(self, selection: Selection, run: Run) -> None:
        self._selection = selection
        self._run = run
        self._fused: dict[str, dict[str, torch.Tensor]] = {}
        self._error: ValueError | None = None

    @default_torch_state()
    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Pack the one tensor of `input_dict`; nothing is left for the loader to set."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        if self._error is not None:
            return {full_layer_name: weight}
        name, _, tensor = full_layer_name.rpartition(".")
        try:
            if name in self._selection.experts:
                self._convert_experts(model, name, tensor.removesuffix("_proj"), weight)
            elif name in self._selection.vocabulary:
                matrix = self._selection.vocabulary[name]
                statistics = functools.partial(VocabularyStatistics.without_data, weight)
                self._run.quantize_vocabulary(model, matrix, weight, statistics)
            else:
                self._convert_linear(model, name, weight)
        except ValueError as error:
            self._error = error
            return {full_layer_name: weight}
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}

    @default_torch_state()
    def finish(self, model: nn.Module) -> None:
        """Complete a model whose tensors are all loaded.

        Raises:
            ValueError: a layer could not be quantized.
        """
        if self._error is not None:
            raise self._error
        replace_inference_tensors(model)
        self._run.new = self._selection.new_layers(model)
        # biases are loaded in their own time, so that their rows are zeroed here
        for name, rows in self._selection.zero_rows.items():
            bias = getattr(model.get_submodule(name), "bias", None)
            if bias is not None:
                bias.data[rows] = 0

    def _convert_linear(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        module = model.get_submodule(name)
        packed = self._pack(name, weight.T if is_transposed(module) else weight)
        layer = install_packed(model, name, packed, like=weight)
        # it may not be loaded yet
        layer.bias = module.bias

    def _convert_experts(
        self, model: nn.Module, name: str, matrix: str, weight: torch.Tensor
    ) -> None:
        """Pack the fused parameters of a module of experts once both are loaded."""
        layout = self._selection.experts[name]
        fused = self._fused.setdefault(name, {})
        fused[matrix] = weight
        if len(fused) < len(layout.matrices):
            return
        del self._fused[name]

        def pack(expert: int, matrix: str) -> PackedMatrix:
            weight_AN = layout.slice(fused[matrix], expert)
            packed = self._pack(f"{name}.{PACKED}.{expert}.{matrix}", weight_AN)
            return PackedMatrix.from_packed(packed, dtype=weight.dtype, device=weight.device)

        # in one order for all models, whose files have the parameters in different ones
        separate(model.get_submodule(name), layout, pack)

    def _pack(self, name: str, weight_AN: torch.Tensor) -> PackedLayer:
        rows = self._selection.zero_rows.get(name)
        if rows is not None:
            weight_AN = weight_AN.clone()
            weight_AN[rows] = 0
        layers = self._run.layers
        packed, _ = layers.quantize(name, weight_AN, identity_moments(weight_AN))
        if len(layers.reports) % _LAYERS_PER_TRIM == 0:
            trim_memory()
        return packed
