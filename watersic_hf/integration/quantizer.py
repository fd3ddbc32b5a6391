"""The quantizer that transformers calls while it loads and saves a model.

Three ways through it (hooks in the order in which transformers 5.17 .. 5.23 call them)::

    pre-quantized   before: a WaterSICLinear on meta for every layer that the files hold packed
                    after:  verify checksums, choose the residency
    data-free       before: list the layers
                    per tensor: WaterSICQuantize.convert packs it and replaces its module
                    after:  choose the residency
    calibrated      before: list the layers
                    after:  run the block loop on the loaded model, choose the residency
"""

import copy
import functools
import logging
import math
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, dot_natural_key
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers import auto as registry

from watersic_hf.calibration import (
    calibration_windows,
    check_rows,
    massive_rows,
    outside,
    zero_rows,
)
from watersic_hf.checkpoint import (
    PACKED,
    CheckpointError,
    LayerReport,
    PackedLayer,
    RunReport,
    TensorHeader,
    read_headers,
    read_report,
    read_run,
    read_tensors,
    stored_layers,
    validate_layer,
)
from watersic_hf.core import Moments
from watersic_hf.integration.config import QUANT_METHOD, WaterSICConfig
from watersic_hf.integration.dense import (
    as_linear,
    is_transposed,
    left_dense,
    like,
    linear_layers,
    shape_of,
    towers_without_text,
)
from watersic_hf.integration.experts import (
    find_experts,
    has_biases,
    matrix_shapes,
    prepare_experts,
    routing_layers,
)
from watersic_hf.integration.headers import model_headers
from watersic_hf.integration.saving import attach_extras, detach_extras
from watersic_hf.integration.streaming import StreamedRun, give_back_memory
from watersic_hf.integration.tables import Table, embedding_like, find_tables
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
    separate_dense,
    separate_experts,
    set_residency,
)
from watersic_hf.quantization import (
    LayerQuantizer,
    VocabularyStatistics,
    quantize_blocks,
    quantize_vocabulary,
    quantize_without_data,
    vocabulary_statistics,
)
from watersic_hf.streams import ResidentBlocks, decoder_blocks

logger = logging.getLogger(__name__)

_TRIM_EVERY = 8

#: Why vision towers and projectors stay dense.
_NO_TEXT = "beside the language model, where text does not run"


class WaterSICHfQuantizer(HfQuantizer):
    """Quantizes on load, loads what was saved, and dequantizes; see the module docstring."""

    quantization_config: WaterSICConfig
    requires_calibration = False

    def __init__(self, quantization_config: WaterSICConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # what is resolved for this model is not written into the user's object
        self.quantization_config = copy.deepcopy(quantization_config)
        self.dtype: torch.dtype | None = None
        self.reports: list[LayerReport] = []
        self.run: RunReport | None = None
        self._device_map: Any = None
        self._layers: set[str] = set()
        self._shapes: dict[str, tuple[int, int]] = {}
        self._fused: dict[str, FusedExperts] = {}
        self._experts: dict[str, FusedExperts] = {}
        self._fused_weights: dict[str, dict[str, torch.Tensor]] = {}
        self._shells: dict[str, nn.Module] = {}
        self._skip: dict[str, str] = {}
        self._tables: dict[str, Table] = {}
        self._dense_tables: dict[str, str] = {}
        self._table_reports: dict[str, LayerReport] = {}
        self._zero_rows: dict[str, list[int]] = {}
        self._quantizer: LayerQuantizer | None = None
        self._failure: ValueError | None = None
        self._run: StreamedRun | None = None
        self._saved: Callable[[], dict[str, torch.Tensor]] = dict

    # -- what transformers asks ---------------------------------------------------------------

    @property
    def _calibrated(self) -> bool:
        return not self.pre_quantized and self.quantization_config.dataset is not None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(A, N) of the layers that are to be quantized, by name, once the model is known."""
        return dict(self._shapes)

    @property
    def experts(self) -> dict[str, FusedExperts]:
        """The modules of experts that are to be quantized, once the model is known."""
        return dict(self._experts)

    @property
    def tables(self) -> list[Table]:
        """The tables that are to be quantized, once the model is known."""
        return [*self._tables.values()]

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work: quantizing into weights that are offloaded to disk."""
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if not self.pre_quantized and "disk" in devices:
            raise ValueError(
                "WaterSIC cannot quantize a model while it is offloaded to disk. Quantize it "
                "without `disk` in the device_map, save it, and load the result with offloading."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Load a model that is to be calibrated on the CPU; it is placed when it is packed."""
        if self._calibrated:
            self._device_map = device_map
            return {"": "cpu"}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype of the model: it is that of the decoded weights."""
        self.dtype = dtype
        return dtype

    def update_tp_plan(self, config: Any) -> Any:
        """Tensor parallelism has no plan for packed layers (transformers < 5.21)."""
        return config

    def update_ep_plan(self, config: Any) -> Any:
        """As `update_tp_plan`."""
        return config

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Refuse to shard packed layers (transformers >= 5.21)."""
        size = getattr(getattr(model.config, "distributed_config", None), "tp_size", None)
        if size is not None and size > 1:
            raise ValueError(
                f"WaterSIC layers cannot be split over {size} tensor-parallel ranks. Load the "
                f"model with a device_map instead."
            )

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element that a parameter will take, for placing it on devices."""
        name, _, tensor = param_name.rpartition(".")
        fused = name in self._experts and param.ndim == 3
        if not self.pre_quantized and ((tensor == "weight" and name in self._layers) or fused):
            return self.quantization_config.bits_of(name) / 8
        if not self.pre_quantized and tensor == "weight" and name in self._tables:
            return self._tables[name].bits / 8
        return param.element_size()

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the file is quantized as it comes, or has a size of its own."""
        name, _, tensor = param_name.rpartition(".")
        if name in self._experts and not self.pre_quantized:
            fused = tensor.removesuffix("_proj") in self._experts[name].matrices
            return not self._calibrated and fused
        if tensor != "weight":
            return False
        if self.pre_quantized:
            return isinstance(model.get_submodule(name), PackedMatrix | WaterSICTiedHead)
        return not self._calibrated and (name in self._layers or name in self._tables)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that packs one weight as it is loaded."""
        return WaterSICQuantize(self)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are single operators to torch.compile."""
        return True

    # -- before the weights -------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        linear = linear_layers(model)
        self._fused = experts = find_experts(model)
        self._skip = skip = self._skipped(model, experts)
        self._experts = {n: e for n, e in experts.items() if module_matches(n, skip) is None}
        # what `dequantize` puts back; the model is on meta, so they take no memory
        self._shells = {
            name: copy.deepcopy(module)
            for name, module in linear.items()
            if type(module) is not nn.Linear
        }
        if self.pre_quantized:
            self._prepare_packed(model, linear, skip, checkpoint_files)
            return
        self._choose_tables(model)
        shapes = {name: shape_of(module) for name, module in linear.items()}
        shapes = {n: shape for n, shape in shapes.items() if module_matches(n, skip) is None}
        shapes |= matrix_shapes(self._experts)
        self._shapes, self._layers = shapes, set(shapes)
        if not self._layers:
            raise ValueError(
                f"{type(model).__name__} has no linear layer to quantize: {len(linear)} were "
                f"found, and `modules_to_not_convert` = {sorted(skip)} leaves all of them dense."
            )
        spared = self._layers | self._table_modules
        dense = [name for name in linear if name not in spared]
        self._keep_dense(model, [*dense, *(experts.keys() - self._experts.keys())])
        self._note_dense(model, spared)
        config = self.quantization_config
        targets = {n: (math.prod(shape), config.bits_of(n)) for n, shape in shapes.items()}
        pinned = [name for name in targets if module_matches(name, config.layer_bits) is not None]
        if isinstance(config.zero_rows, Mapping):
            self._zero_rows = {
                name: config.zero_rows[pattern]
                for name in targets
                if (pattern := module_matches(name, config.zero_rows)) is not None
            }
            for name, rows in self._zero_rows.items():
                check_rows(name, rows, shapes[name][0])
        self._quantizer = LayerQuantizer(
            targets, settings=config.settings, seed=config.seed, pinned=pinned
        )

    def _choose_tables(self, model: nn.Module) -> None:
        """Find the embedding and the head that are to be quantized, and why they cannot be."""
        config = self.quantization_config
        tables, self._dense_tables = find_tables(
            model, head_bits=config.head_bits, embedding_bits=config.embedding_bits
        )
        user = config.modules_to_not_convert or ()
        for table in tables:
            if table.bits is None:
                continue
            if module_matches(table.name, user) is not None:
                self._dense_tables[table.name] = "named in modules_to_not_convert"
                continue
            self._tables[table.name] = table
            if table.embedding is not None:
                self._shells[table.name] = copy.deepcopy(model.get_submodule(table.name))
        for name, reason in self._dense_tables.items():
            logger.warning("%s was to be quantized, but stays dense: %s.", name, reason)

    @property
    def _table_modules(self) -> set[str]:
        """Names of the embedding and the head, as far as they are to be quantized."""
        modules = {
            name for table in self._tables.values() for name in (table.embedding, table.head)
        }
        return modules - {None}

    def _skipped(self, model: nn.Module, experts: Mapping[str, FusedExperts]) -> dict[str, str]:
        """Why layers stay dense, by pattern."""
        wide = getattr(model, "_keep_in_fp32_modules", None) or ()
        user = self.quantization_config.modules_to_not_convert or ()
        return (
            dict.fromkeys(self.get_modules_to_not_convert(model), "output head, or tied to one")
            | {name.replace(".", r"\."): _NO_TEXT for name in towers_without_text(model)}
            | dict.fromkeys(wide, "the model keeps it in float32")
            | dict.fromkeys(user, "named in modules_to_not_convert")
            | routing_layers(model, experts)
        )

    def _keep_dense(self, model: nn.Module, names: list[str]) -> None:
        """Write down which linear layers are dense, so that a loader knows which are missing."""
        prefix = f"{model.base_model_prefix}."
        self.quantization_config.modules_to_not_convert = sorted(
            name.removeprefix(prefix).replace(".", r"\.") for name in names
        )

    def _note_dense(self, model: nn.Module, packed: Collection[str]) -> None:
        """Write down what of the model is dense, and why, for people to read."""
        head = model.get_output_embeddings()
        reasons = {
            name: self._skip[pattern]
            if (pattern := module_matches(name, self._skip)) is not None
            else "no calibration data reaches it"
            for name in (*linear_layers(model), *self._fused)
            if model.get_submodule(name) is not head
        }
        towers = tuple(f"{name}." for name in towers_without_text(model))
        reasons |= {n: _NO_TEXT for n, _ in model.named_modules() if f"{n}.".startswith(towers)}
        biased = [n for n in self._experts if has_biases(model.get_submodule(n))]
        reasons |= dict.fromkeys(biased, "biases of experts")
        packed = {*packed, *(self._experts.keys() - biased)}
        self.quantization_config.left_dense = left_dense(
            model, packed, reasons | self._dense_tables
        )

    def _prepare_packed(
        self,
        model: nn.Module,
        linear: Mapping[str, nn.Module],
        skip: list[str],
        files: list[str] | None,
    ) -> None:
        """Put an empty quantized layer of the right size wherever the files hold one."""
        headers = model_headers(model, files or [])
        if files:
            folder = Path(files[0]).parent
            self.reports, self.run = read_report(folder), read_run(folder)
        stored = stored_layers({name: (h.shape, h.dtype) for name, h in headers.items()})
        for table in find_tables(model)[0]:
            if table.embedding is not None and (found := stored.get(table.name)):
                validate_layer(table.name, found, *table.shape)
                self._shells[table.name] = copy.deepcopy(model.get_submodule(table.name))
                payload_bytes = found.get("weight", (0,))[0]
                table.install(model, table.module(
                    payload_bytes=payload_bytes, dtype=self.dtype, device="meta"
                ))  # fmt: skip
        self._place_packed(model, linear, self._experts, skip, headers)
        if next(packed_layers(model), None) is None:
            raise CheckpointError(
                f"{type(model).__name__}: config.json says that the model is quantized with "
                f"{QUANT_METHOD}, but the files hold no quantized layer of it."
            )

    def _place_packed(
        self,
        model: nn.Module,
        linear: Mapping[str, nn.Module],
        experts: Mapping[str, FusedExperts],
        skip: Collection[str],
        headers: Mapping[str, TensorHeader],
    ) -> None:
        """Put an empty quantized layer of the right size wherever some headers have one."""
        stored = stored_layers({name: (h.shape, h.dtype) for name, h in headers.items()})
        for name, module in linear.items():
            found = stored.get(name, {})
            if not found and module_matches(name, skip) is not None:
                continue
            rows, columns = shape_of(module)
            # without files (a state dict was passed) the loader sets tensors of any size
            if headers:
                validate_layer(name, found, rows, columns)
            layer = WaterSICLinear(
                columns, rows, bias=module.bias is not None,
                payload_bytes=found.get("weight", (0,))[0], dtype=self.dtype, device="meta",
            )  # fmt: skip
            replace_module(model, name, layer)
        prepare_experts(model, experts, stored, sized=bool(headers), dtype=self.dtype)

    # -- after the weights --------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._failure is not None:
            raise self._failure
        if self.pre_quantized:
            self._check_packed(model)
        elif self._calibrated:
            self._calibrate(model)
        elif self._run is not None:
            self._quantize_without_data(model, self._run)
        else:
            self._zero_biases(model)
        if self._quantizer is not None:
            dense = self.quantization_config.left_dense.items()
            logger.info("Dense: %s.", "; ".join(f"{name} ({reason})" for name, reason in dense))
            tables = [self._table_reports[name] for name in self._tables]
            self.reports = self._quantizer.reports + tables
            self.run = self._quantizer.run_report()
            self.quantization_config.tables = sorted(self._tables)
            self._quantizer = None
        runtime = self.quantization_config.runtime
        if self._calibrated and self._device_map is not None:
            if runtime.residency != "dense":
                # chosen and made where they are to be, without the dense weights of calibration
                set_residency(model, "stored")
            _place(model, self._device_map)
        # one whose blocks are on the disk is not run
        residency = runtime.residency if self._run is None else "stored"
        set_residency(model, residency, backend=runtime.backend)
        attach_extras(model)
        return model

    def _zero_biases(self, model: nn.Module) -> None:
        """Do to biases, which come when they come, what was done to weights while they loaded."""
        for name in self._zero_rows.keys() - matrix_shapes(self._experts).keys():
            bias = model.get_submodule(name).bias
            if bias is not None:
                bias.data[self._zero_rows[name]] = 0

    def _check_packed(self, model: nn.Module) -> None:
        """Verify what was loaded."""
        for name, layer in packed_layers(model):
            layer.requires_grad_(False)
            if isinstance(layer, WaterSICEmbedding):
                layer.adopt_dtype()
            if layer.weight.device.type != "meta":
                layer.check(name)

    def _calibrate(self, model: nn.Module) -> None:
        model.eval()
        config, run = self.quantization_config, self._run
        blocks = () if run is None else tuple(f"{name}." for name in run.source.blocks)
        source = ResidentBlocks("cuda" if torch.cuda.is_available() else None)
        if run is not None:
            source = run.source
        windows = self.windows(model) if run is None else run.windows
        layers = [name for name, _ in model.named_modules() if name in self._layers]
        # in this order, as experts are no modules of their own yet
        layers += [name for name in matrix_shapes(self._experts) if name in self._layers]
        if config.zero_rows == "auto":
            find = functools.partial(
                massive_rows, model, decoder_blocks(model, layers), windows,
                outside(layers, self._experts),
                batch_size=config.batch_size, source=source,
            )  # fmt: skip
            self._zero_rows = find() if run is None else run.journal.fact("zero_rows", find)
            config.zero_rows = {
                name.replace(".", r"\."): rows for name, rows in self._zero_rows.items()
            }
        self.open_layers(model, skip=blocks)
        ends = quantize_blocks(
            model, windows, layers, self._quantizer, settings=config.calibration,
            batch_size=config.batch_size, source=source,
            journal=None if run is None else run.journal,
        )  # fmt: skip
        # a head first: what reaches it is not that of a quantized embedding
        for table in sorted(self._tables.values(), key=lambda table: table.head is None):
            weight_AN = model.get_submodule(table.name).weight.data
            find = functools.partial(
                vocabulary_statistics,
                model,
                windows,
                ends,
                head=table.head,
                embedding=table.embedding,
                drift=config.drift,
                source=source,
            )
            self._quantize_table(model, table, weight_AN, find)
        self.close_layers(model)
        if run is not None:
            self._fill(model, run)
        self._experts = {n: module.layout for n, module in separate_experts(model)}
        dense = self._fused.keys() - self._experts.keys()
        self._keep_dense(model, [*linear_layers(model), *dense])
        self._note_dense(model, {name for name, _ in packed_layers(model)})

    def _quantize_without_data(self, model: nn.Module, run: StreamedRun) -> None:
        """Do to a model whose blocks are on the disk what is done to others while they load."""
        source = run.source
        self.open_layers(model, skip=tuple(f"{name}." for name in source.blocks))
        quantize_without_data(
            model, sorted(self._shapes, key=_order_of_loading), self._quantizer,
            blocks=source.blocks, source=source, journal=run.journal,
        )  # fmt: skip
        for table in self._tables.values():
            weight_AN = model.get_submodule(table.name).weight.data
            self._quantize_table(model, table, weight_AN, functools.partial(_white, weight_AN))
        self.close_layers(model)
        self._fill(model, run)

    def quantize_streamed(self, model: nn.Module, run: StreamedRun) -> None:
        """Quantize a model whose blocks are on the disk, as if it was loaded with this quantizer.

        Its blocks are on meta afterwards, and their tensors in the files of the run's journal; it
        can be saved.
        """
        self._run = run
        self._quantizer.journal = run.journal
        model.hf_quantizer = self
        self.postprocess_model(model)

    def _fill(self, model: nn.Module, run: StreamedRun) -> None:
        """Have the blocks of a model as their files have them."""
        headers, files = {}, {}
        for name, file, _ in map(run.journal.block, range(run.journal.blocks)):
            for tensor, header in read_headers([file]).items():
                headers[f"{name}.{tensor}"] = header
                files[f"{name}.{tensor}"] = file, tensor
        linear = linear_layers(model)
        found = {name: linear[name] for name in linear if f"{name}.row_scale" in headers}
        experts = {
            name: layout
            for name, layout in self._experts.items()
            if any(tensor.startswith(f"{name}.{PACKED}.") for tensor in headers)
        }
        self._place_packed(model, found, experts, (), headers)

        def saved() -> dict[str, torch.Tensor]:
            state = {n: t for b in run.source.blocks for n, t in run.source.mapped(b).items()}
            for name, (file, tensor) in files.items():
                state |= {name: read_tensors(file, [tensor])[tensor]}
            return state

        self._saved = saved

    def get_state_dict_and_metadata(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What is saved: the model's tensors; those of blocks on the disk mapped into memory."""
        on_disk = self._saved()
        if not on_disk:
            return None, {}
        state = model.state_dict()
        return {name: on_disk.get(name, tensor) for name, tensor in state.items()}, {}

    def windows(self, model: nn.Module) -> list[torch.Tensor]:
        """The calibration windows of a model."""
        config = self.quantization_config
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
        if config.sequence_length > longest:
            logger.info("Calibration windows are cut to the model's %d positions.", longest)
        return calibration_windows(
            config.dataset, tokenizer=_tokenizer(config.tokenizer, model.name_or_path), model=model,
            samples=config.samples, sequence_length=min(config.sequence_length, longest),
            seed=config.seed,
        )  # fmt: skip

    def open_layers(self, part: nn.Module, prefix: str = "", *, skip: tuple[str, ...] = ()) -> None:
        """Give the model, or a part of it, the layers that are to be quantized as they are known.

        The calibration knows one class of linear layers; rows that are to be zero become zero.

        Args:
            part: what to change.
            prefix: of its modules' names in the model, with a dot.
            skip: prefixes of layers that are not in it, or not now.
        """
        names = {
            name: name.removeprefix(prefix)
            for name in self._layers
            if name.startswith(prefix) and not name.startswith(skip)
        }
        for name, layout in self._experts.items():
            if name.startswith(prefix) and not name.startswith(skip):
                separate_dense(part.get_submodule(name.removeprefix(prefix)), layout)
        for name in names.keys() & self._shells.keys():
            replace_module(part, names[name], as_linear(part.get_submodule(names[name])))
        zero_rows(part, {names[n]: rows for n, rows in self._zero_rows.items() if n in names})

    def close_layers(self, part: nn.Module, prefix: str = "") -> None:
        """Give what is not quantized back its own class; the reverse of `open_layers`."""
        for name, shell in self._shells.items():
            if name in self._layers and name.startswith(prefix):
                module = part.get_submodule(name.removeprefix(prefix))
                if type(module) is nn.Linear:
                    replace_module(part, name.removeprefix(prefix), like(shell, module))
        for _, module in list(separate_experts(part)):
            if not any(isinstance(matrix, PackedMatrix) for matrix in module.modules()):
                fuse(module)

    def _quantize_table(
        self,
        model: nn.Module,
        table: Table,
        weight_AN: torch.Tensor,
        find_statistics: Callable[[], VocabularyStatistics],
    ) -> None:
        """Quantize an embedding or a head, and put what came out in its place."""
        config = self.quantization_config

        def prepare() -> Callable[[], tuple[PackedLayer, torch.Tensor, LayerReport]]:
            return functools.partial(
                quantize_vocabulary, table.name, weight_AN, find_statistics(), bits=table.bits,
                settings=config.settings, seed=config.seed, embedding=table.embedding is not None,
            )  # fmt: skip

        options = {"dtype": weight_AN.dtype, "device": weight_AN.device}
        if self._run is not None:
            packed, report = self._run.journal.layer_outside(table.name, prepare)
        else:
            packed, codes_AN, report = prepare()()
            if self._calibrated:
                # while the model loads, what is no parameter is overwritten
                options["codes_AN"] = codes_AN
        self._table_reports[table.name] = report
        if table.embedding is not None:
            module = WaterSICEmbedding.from_packed(packed, scale=table.scale, **options)
        else:
            bias = model.get_submodule(table.name).bias
            module = WaterSICLinear.from_packed(packed, bias=bias, **options)
        table.install(model, module)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        experts = list(separate_experts(model))
        matrices = matrix_shapes({name: module.layout for name, module in experts})
        # as config.json holds it
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        packed = list(packed_layers(model))
        for name, layer in packed:
            if layer.weight.device.type == "meta":
                raise ValueError(
                    f"{name}: the layer is offloaded and cannot be dequantized in place. Load the "
                    f"model without offloading first."
                )
            if name in matrices:
                continue
            dense = layer.dequantize(dtype)
            # under an adapter a layer has a name of PEFT's
            shell = self._shells.get(name.removesuffix(".base_layer"))
            if isinstance(layer, WaterSICEmbedding):
                dense = embedding_like(model, shell, dense)
            elif shell is not None:
                dense = like(shell, dense)
            replace_module(model, name, dense)
        for _, module in experts:
            fuse(module, dtype)
        for name, head in list(model.named_modules()):
            if isinstance(head, WaterSICTiedHead):
                dense = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
                table = next(n for n, module in packed if module is head.embedding)
                dense.weight = model.get_submodule(table).weight
                replace_module(model, name, dense)
        detach_extras(model)
        return model


class WaterSICQuantize(ConversionOps):
    """Quantizes one weight without data as it is loaded, and replaces its module."""

    def __init__(self, quantizer: WaterSICHfQuantizer) -> None:
        self.hf_quantizer = quantizer

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
        """Pack the one tensor of `input_dict`; nothing is left for the loader to set.

        The first error is kept and raised when all is loaded, since transformers would replace an
        error from here by one that names neither the layer nor the cause.
        """
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        hf_quantizer = self.hf_quantizer
        if hf_quantizer._failure is not None:
            return {full_layer_name: weight}
        name, _, tensor = full_layer_name.rpartition(".")
        try:
            if name in hf_quantizer._experts:
                self._convert_experts(model, name, tensor.removesuffix("_proj"), weight)
            elif name in hf_quantizer._tables:
                find = functools.partial(_white, weight)
                hf_quantizer._quantize_table(model, hf_quantizer._tables[name], weight, find)
            else:
                module = model.get_submodule(name)
                packed = self._pack(name, weight.T if is_transposed(module) else weight)
                layer = WaterSICLinear.from_packed(packed, dtype=weight.dtype, device=weight.device)
                layer.bias = module.bias
                replace_module(model, name, layer)
        except ValueError as error:
            hf_quantizer._failure = error
            return {full_layer_name: weight}
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}

    def _convert_experts(
        self, model: nn.Module, name: str, matrix: str, weight: torch.Tensor
    ) -> None:
        """Pack the fused parameters of a module of experts once they are all there."""
        layout = self.hf_quantizer._experts[name]
        fused = self.hf_quantizer._fused_weights.setdefault(name, {})
        fused[matrix] = weight
        if len(fused) < len(layout.matrices):
            return
        del self.hf_quantizer._fused_weights[name]

        def pack(expert: int, matrix: str) -> PackedMatrix:
            weight_AN = layout.slice(fused[matrix], expert)
            packed = self._pack(f"{name}.{PACKED}.{expert}.{matrix}", weight_AN)
            return PackedMatrix.from_packed(packed, dtype=weight.dtype, device=weight.device)

        # in one order for all models, whose files have the parameters in different ones
        separate(model.get_submodule(name), layout, pack)

    def _pack(self, name: str, weight_AN: torch.Tensor) -> PackedLayer:
        layers = self.hf_quantizer._quantizer
        rows = self.hf_quantizer._zero_rows.get(name)
        if rows is not None:
            weight_AN = weight_AN.clone()
            weight_AN[rows] = 0
        moments = Moments.identity(weight_AN.shape[1], device=weight_AN.device)
        packed, _ = layers.quantize(name, weight_AN, moments)
        if len(layers.reports) % _TRIM_EVERY == 0:
            give_back_memory()
        return packed


def register() -> None:
    """Make the plugin known to transformers; calling it again does nothing."""
    if QUANT_METHOD not in registry.AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(WaterSICConfig)
        register_quantizer(QUANT_METHOD)(WaterSICHfQuantizer)
        # transformers honours a user's loading attributes for the classes of this tuple only
        registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (WaterSICConfig,)


def _white(weight_AN: torch.Tensor) -> VocabularyStatistics:
    """The statistics of a table that is quantized without data."""
    moments = Moments.identity(weight_AN.shape[1], device=weight_AN.device)
    return VocabularyStatistics(moments=moments)


def _order_of_loading(layer: str) -> list:
    """What to sort layers by to have them as they are loaded, where files name them as the model
    does; experts, which are loaded together, stay in their order.
    """
    return dot_natural_key(f"{layer.partition(f'.{PACKED}.')[0]}.weight")


def _tokenizer(tokenizer: Any, model_name: str) -> Any:
    """The user's tokenizer, or the one beside the model, or None."""
    from transformers import AutoTokenizer

    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(tokenizer or model_name)
    except (OSError, ValueError, ImportError) as error:
        if tokenizer is not None:
            raise
        logger.info("No tokenizer beside the model: %s", error)
        return None


def _place(model: nn.Module, device_map: Any) -> None:
    """Put a calibrated model where the user asked for it."""
    from accelerate import dispatch_model, infer_auto_device_map

    if device_map is None:
        return
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "sequential"):
        device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    if not isinstance(device_map, dict):
        device_map = {"": device_map}
    if len(set(device_map.values())) == 1:
        model.to(next(iter(device_map.values())))
    else:
        dispatch_model(model, device_map)
