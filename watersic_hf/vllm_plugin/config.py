"""What vLLM knows of a quantized model: which of its layers are packed, and how they load."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from watersic_hf.checkpoint import (
    FORMAT_VERSION,
    PACKED,
    CheckpointError,
    checkpoint_files,
    layer_shape,
    read_headers,
    stored_layers,
)
from watersic_hf.integration import WaterSICRuntime
from watersic_hf.integration.completeness import require_tensors
from watersic_hf.nn.residency import ResidencyInputs, choose_residency

logger = logging.getLogger("vllm.watersic")

#: Fraction of vLLM's share of the memory that weights may take; the cache gets the rest.
WEIGHTS_FRACTION = 0.5


class WaterSICVllmConfig(QuantizationConfig):
    """The configuration of a quantized model, in the form that vLLM asks for.

    The residency is that of `WaterSICRuntime`, that is of the environment, unless the engine has
    ``additional_config={"watersic": {"residency": ...}}``.

    Args:
        settings: the ``quantization_config`` of the model.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)
        # names in the files of the packed layers, by the names that vLLM has for them
        self.packed: dict[str, str] = {}
        # shapes by name in the files, and the layers that no module has taken yet
        self.shapes: dict[str, tuple[int, int]] = {}
        self.waiting: dict[str, tuple[int, int]] = {}
        self.has_head = True
        # for the choice of a residency
        self.weights = self.stored_bytes = 0
        self.table_packed = False
        self.runtime: WaterSICRuntime | None = None

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the format in config.json."""
        return "watersic"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that a model can run in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability of a GPU, 10 times the number."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the names of further files; config.json holds everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WaterSICVllmConfig":
        """Return the configuration of a model.

        Raises:
            CheckpointError: the format of the model is newer than this version reads.
        """
        version = config.get("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"the model has version {version} of the checkpoint format, and this version of "
                f"watersic-hf reads {FORMAT_VERSION}: update watersic-hf"
            )
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers of the files: they tell which layers are packed.

        Raises:
            CheckpointError: a file is missing or damaged, or holds no quantized layer.
        """
        headers = _headers(model_name, revision)
        if Path(model_name).is_dir():
            # vLLM itself does not notice missing tensors of quantized models (0.32)
            require_tensors(model_name)
        layers = stored_layers(headers)
        if not layers:
            raise CheckpointError(
                f"{model_name}: config.json says that the model is quantized with WaterSIC, but "
                f"the files hold no quantized layer. Serve the folder that the quantized model was "
                f"saved to."
            )
        self.packed = {name: name for name in layers}
        self.has_head = any(name.endswith("lm_head.weight") for name in headers)
        for name, shapes in layers.items():
            self.shapes[name] = rows, columns = layer_shape(shapes)
            self.weights += rows * columns
            self.stored_bytes += shapes.get("weight", (0,))[0]
        in_blocks = re.compile(r"\.\d+\.")
        self.waiting = {n: shape for n, shape in self.shapes.items() if not in_blocks.search(n)}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add the names that vLLM has for the layers of the checkpoint."""
        for name, stored in list(self.packed.items()):
            renamed = hf_to_vllm_mapper.map_name(name)
            if renamed is not None:
                self.packed[renamed] = stored

    def get_checkpoint_weight_mapper(self) -> Any:
        """Return a mapper that decodes the layers outside of the blocks that no module has taken.

        It is asked for when the modules are there.
        """
        from watersic_hf.vllm_plugin.stream import DecodingMapper

        backend = self.runtime.backend if self.runtime else "auto"
        if self.waiting:
            logger.info("watersic: decoded, as vLLM has no packed form: %s", [*self.waiting])
        return DecodingMapper(self.waiting, backend)

    def stored_names(self, prefix: str) -> list[str]:
        """Return the names of the layers of the checkpoint that a module of vLLM joins."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        joined = [f"{parent}.{part}" if parent else part for part in parts]
        # a layer that is joined in the files, too, has the name of the module
        return [prefix] if prefix in self.packed else joined

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method of a module, or None if it is none that can be quantized."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from watersic_hf.vllm_plugin.embedding import WaterSICEmbeddingMethod
        from watersic_hf.vllm_plugin.experts import WaterSICExpertsMethod
        from watersic_hf.vllm_plugin.linear import WaterSICLinearMethod

        if self.runtime is None:
            self.runtime = self._choose_runtime()
        how = self.runtime.residency, self.runtime.backend
        is_head = isinstance(layer, ParallelLMHead)
        is_table = isinstance(layer, VocabParallelEmbedding)
        if is_table and not is_head and not prefix:
            prefix = self._embedding_name(layer)
        layers = self.stored_names(prefix)
        quantized = any(name in self.packed for name in layers)
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            for name in layers:
                self.waiting.pop(self.packed.get(name), None)
        if isinstance(layer, LinearBase):
            return WaterSICLinearMethod(*how, layers) if quantized else UnquantizedLinearMethod()
        if is_table:
            if is_head and not self.has_head and self.table_packed:
                # tied: it has no tensors of its own
                return WaterSICEmbeddingMethod(*how, [], is_head=True)
            if not quantized:
                return None
            self.table_packed |= not is_head
            return WaterSICEmbeddingMethod(*how, layers, is_head=is_head)
        if isinstance(layer, RoutedExperts) and self._has_experts(prefix):
            return WaterSICExpertsMethod(layer.moe_config, self.runtime.backend)
        return None

    def _embedding_name(self, layer: Any) -> str:
        """Return the name of an embedding that its model has given none, as it fits only one."""
        shape = layer.org_vocab_size, layer.embedding_dim
        fitting = [n for n, s in self.waiting.items() if s == shape and not n.endswith("lm_head")]
        return fitting[0] if len(fitting) == 1 else ""

    def _has_experts(self, prefix: str) -> bool:
        """Return whether a module of experts is quantized."""
        if not any(name.startswith(f"{prefix}.{PACKED}.") for name in self.packed):
            return False
        if self.runtime is not None and self.runtime.residency != "dense":
            logger.warning(
                "watersic: the experts of %s are decoded, and take the memory of dense ones.",
                prefix,
            )
        return True

    def _choose_runtime(self) -> WaterSICRuntime:
        """Return how this process runs quantized layers, and tell vLLM about it."""
        engine = get_current_vllm_config()
        options = engine.additional_config if isinstance(engine.additional_config, dict) else {}
        runtime = WaterSICRuntime(**options.get("watersic", {}))
        if runtime.residency == "auto":
            residency, reason = self._choose_residency(engine)
            logger.info("watersic: residency %s: %s", residency, reason)
            runtime = WaterSICRuntime(residency=residency, backend=runtime.backend)
        # part of the key of vLLM's cache of compiled graphs, which differ between residencies
        options["watersic"] = {"residency": runtime.residency, "backend": runtime.backend}
        return runtime

    def _choose_residency(self, engine: Any) -> tuple[str, str]:
        """Return the residency for ``auto``, and the reason."""
        parallel = engine.parallel_config
        ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        device = torch.device(engine.device_config.device_type)
        free = None
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
            total = torch.cuda.get_device_properties(device).total_memory
            free = int(total * engine.cache_config.gpu_memory_utilization)
        inputs = ResidencyInputs(
            device=device,
            weights=self.weights // ranks,
            stored_bytes=self.stored_bytes // ranks,
            dense_bytes_per_weight=engine.model_config.dtype.itemsize,
            on_device=False,
        )
        return choose_residency([inputs], free=free, fraction=WEIGHTS_FRACTION)


def _headers(model: str, revision: str | None) -> dict[str, tuple[Sequence[int], str]]:
    """Return shape and dtype of every tensor of a model, in a folder or on the Hub, by name."""
    if Path(model).is_dir():
        found = read_headers(checkpoint_files(model))
        return {name: (header.shape, header.dtype) for name, header in found.items()}
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    metadata = get_safetensors_params_metadata(model, revision=revision)
    return {
        name: (tuple(entry["shape"]), entry["dtype"])
        for name, entry in metadata.items()
        if name != "__metadata__"
    }
