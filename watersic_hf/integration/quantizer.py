"""The quantizer: the hooks that transformers calls while it loads and saves a model.

Three ways through it (hooks in the order in which transformers 5.17 to 5.24 calls them)::

    pre-quantized   before the weights: install an empty layer for each that the files hold packed
                    after them:         verify checksums, choose the residency
    data-free       before the weights: select what to quantize
                    for each weight:    quantize it and replace its module
                    after them:         choose the residency
    calibrated      before the weights: select what to quantize
                    after them:         run the block loop on the model, choose the residency
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers import auto as registry

from watersic_hf.checkpoint import LayerReport, RunReport, read_report, read_run
from watersic_hf.integration.config import QUANT_METHOD, WaterSICConfig
from watersic_hf.integration.on_load import QuantizeOnLoad
from watersic_hf.integration.packed import check_packed, dequantize, prepare_packed
from watersic_hf.integration.run import Run, quantize_in_memory
from watersic_hf.integration.saving import attach_extras
from watersic_hf.integration.selection import Selection
from watersic_hf.nn import PackedMatrix, WaterSICTiedHead, set_residency


class WaterSICHfQuantizer(HfQuantizer):
    """Quantizes a model on load, loads one that was saved, and dequantizes it."""

    quantization_config: WaterSICConfig
    requires_calibration = False

    def __init__(self, quantization_config: WaterSICConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # what is found out about this model is not written into the user's object
        self.quantization_config = copy.deepcopy(quantization_config)
        self.dtype: torch.dtype | None = None
        self.reports: list[LayerReport] = []
        self.run: RunReport | None = None
        self.selection: Selection | None = None
        self._device_map: Any = None
        self._run: Run | None = None
        self._on_load: QuantizeOnLoad | None = None
        self.block_tensors: Callable[[], dict[str, torch.Tensor]] = dict

    @property
    def _calibrated(self) -> bool:
        return not self.pre_quantized and self.quantization_config.dataset is not None

    # -- what transformers asks ---------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to quantize weights that are offloaded to disk."""
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if not self.pre_quantized and "disk" in devices:
            raise ValueError(
                "WaterSIC cannot quantize a model while it is offloaded to disk. Quantize it "
                "without `disk` in the device_map, save it, and load the result with offloading."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Load a model to calibrate on the CPU; it is dispatched once it is quantized."""
        if self._calibrated:
            self._device_map = device_map
            return {"": "cpu"}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Keep the dtype of the model, which decoded weights have."""
        self.dtype = dtype
        return dtype

    def update_tp_plan(self, config: Any) -> Any:
        """Leave the configuration as it is (transformers < 5.21)."""
        return config

    def update_ep_plan(self, config: Any) -> Any:
        """Leave the configuration as it is (transformers < 5.21)."""
        return config

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Refuse tensor parallelism, for which packed layers have no plan (>= 5.21)."""
        size = getattr(getattr(model.config, "distributed_config", None), "tp_size", None)
        if size is not None and size > 1:
            raise ValueError(
                f"WaterSIC layers cannot be split over {size} tensor-parallel ranks. Load the "
                f"model with a device_map instead."
            )

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Return the bytes per element that a parameter will take, to choose its device."""
        name, _, tensor = param_name.rpartition(".")
        if self.pre_quantized:
            return param.element_size()
        fused = name in self.selection.experts and param.ndim == 3
        if (tensor == "weight" and name in self.selection.shapes) or fused:
            return self.quantization_config.bits_of(name) / 8
        matrix = self.selection.vocabulary.get(name) if tensor == "weight" else None
        return param.element_size() if matrix is None or not matrix.bits else matrix.bits / 8

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Return whether a tensor is quantized as it is loaded, or has a size of its own."""
        name, _, tensor = param_name.rpartition(".")
        if self.pre_quantized:
            kinds = PackedMatrix | WaterSICTiedHead
            return tensor == "weight" and isinstance(model.get_submodule(name), kinds)
        if self._calibrated:
            return False
        if name in self.selection.experts:
            return tensor.removesuffix("_proj") in self.selection.experts[name].matrices
        vocabulary = [matrix.name for matrix in self.selection.quantized_vocabulary]
        return tensor == "weight" and (name in self.selection.shapes or name in vocabulary)

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantizes one weight as it is loaded."""
        return self._on_load

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top: yes."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile works: yes, as layers are single operators to it."""
        return True

    # -- loading ------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self.selection = Selection.of(model, config, saved=self.pre_quantized)
        if not self.pre_quantized:
            self._run = Run.begin(self.selection, config)
            self._on_load = QuantizeOnLoad(self.selection, self._run)
            return
        files = checkpoint_files or []
        if files:
            folder = Path(files[0]).parent
            self.reports, self.run = read_report(folder), read_run(folder)
        new = prepare_packed(model, self.selection, files, dtype=self.dtype)
        self.selection.record_new(config, new)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        runtime = self.quantization_config.runtime
        if self.pre_quantized:
            check_packed(model)
        else:
            self._quantize(model)
        if self._device_map is not None:
            if runtime.residency != "dense":
                # chosen and made on its device, without the dense weights of calibration
                set_residency(model, "stored")
            _dispatch(model, self._device_map)
        set_residency(model, runtime.residency, backend=runtime.backend)
        attach_extras(model)
        return model

    def _quantize(self, model: nn.Module) -> None:
        """Calibrate and quantize the model, or complete what was quantized on load."""
        run, on_load = self._run, self._on_load
        self._run = self._on_load = None
        if self._calibrated:
            quantize_in_memory(model, self.selection, run)
        else:
            on_load.finish(model)
        self.reports, self.run = run.finish(model, self.selection)

    # -- saving and undoing -------------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Return the tensors to save: the model's, and those of blocks that are on the disk."""
        on_disk = self.block_tensors()
        if not on_disk:
            return None, {}
        state = model.state_dict()
        return {name: on_disk.get(name, tensor) for name, tensor in state.items()}, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize(model, self.selection, dtype)
        return model


def attach_quantizer(
    model: nn.Module,
    selection: Selection,
    run: Run,
    block_tensors: Callable[[], dict[str, torch.Tensor]],
) -> None:
    """Have a model that was quantized on the disk as if it had been loaded with a quantizer.

    Args:
        model: the model, quantized by `quantize_on_disk`.
        selection: of the model.
        run: the run that quantized it.
        block_tensors: maps the tensors of its blocks into memory.
    """
    reports, run_report = run.finish(model, selection)
    quantizer = WaterSICHfQuantizer(run.config, pre_quantized=True)
    quantizer.selection, quantizer.block_tensors = selection, block_tensors
    quantizer.reports, quantizer.run = reports, run_report
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config
    # the blocks are not in memory, and are not run
    set_residency(model, "stored")
    attach_extras(model)


def register() -> None:
    """Make the plugin known to transformers; calling it again does nothing."""
    if QUANT_METHOD not in registry.AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(WaterSICConfig)
        register_quantizer(QUANT_METHOD)(WaterSICHfQuantizer)
        # transformers honours a user's loading attributes for the classes of this tuple only
        registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (WaterSICConfig,)


def _dispatch(model: nn.Module, device_map: Any) -> None:
    """Move a calibrated model to the devices that the user asked for."""
    from accelerate import dispatch_model, infer_auto_device_map

    if isinstance(device_map, str) and device_map in ("auto", "balanced", "sequential"):
        device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    if not isinstance(device_map, dict):
        device_map = {"": device_map}
    if len(set(device_map.values())) == 1:
        model.to(next(iter(device_map.values())))
    else:
        dispatch_model(model, device_map)
