"""How vLLM's mixtures of experts load quantized experts: decoded, into dense weights."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from watersic_hf.checkpoint import PACKED, CheckpointError
from watersic_hf.nn.forms import Part, form_of
from watersic_hf.vllm_plugin.arrivals import FIELDS, Arrivals

#: Names of the tensors of an expert's matrix, within the module of experts.
_NAME = re.compile(rf"(?:.*\.)?{PACKED}\.(\d+)\.(\w+)\.({'|'.join(FIELDS)})")

Weights = Iterable[tuple[str, Tensor]]


class WaterSICExpertsMethod(UnquantizedFusedMoEMethod):
    """Decode quantized experts while they are loaded, and run them as dense ones.

    Args:
        moe: configuration of the module.
        backend: implementation, one of `watersic_hf.nn.backends.BACKENDS`.
    """

    def __init__(self, moe: Any, backend: str) -> None:
        super().__init__(moe)
        self.backend = backend

    def create_weights(self, layer: nn.Module, *sizes: Any, **options: Any) -> None:
        """Give the module its dense weights, and a loader that decodes."""
        super().create_weights(layer, *sizes, **options)
        self.arrivals: dict[tuple[int, str], Arrivals] = {}
        self.loaded: set[tuple[int, str]] = set()
        layer.load_weights = functools.partial(self._load, layer, layer.load_weights)

    def _load(
        self, layer: nn.Module, load: Callable[[Weights], Iterable[str]], weights: Weights
    ) -> Iterable[str]:
        """Load weights as the module does, quantized ones decoded."""
        return load(self._decoded(layer, weights))

    def _decoded(self, layer: nn.Module, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """Yield weights under the names that the module knows; quantized ones once complete."""
        for name, tensor in weights:
            found = _NAME.fullmatch(name)
            if found is None:
                yield name, tensor
                continue
            expert, matrix, field = int(found[1]), found[2], found[3]
            if layer._map_global_expert_id_to_local_expert_id(expert) == -1:
                continue
            title = f"{layer.layer_name}.{PACKED}.{expert}.{matrix}"
            arrivals = self.arrivals.setdefault((expert, matrix), Arrivals(title, [title]))
            packed = arrivals.add(field, tensor)
            if packed is None:
                continue
            weight_AN = form_of(
                packed,
                Part.whole(packed.shape),
                "dense",
                dtype=layer.params_dtype,
                device=layer.w13_weight.device,
                backend=self.backend,
                name=title,
            ).tensors[0]
            self.loaded.add((expert, matrix))
            yield from self._named(layer, expert, matrix, weight_AN, title)

    def _named(
        self, layer: nn.Module, expert: int, matrix: str, weight_AN: Tensor, title: str
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the dense weights of an expert's matrix under the names of its checkpoint."""
        gate, up = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name
        inner, hidden = self.moe.intermediate_size, self.moe.hidden_dim_unpadded
        shapes = {"down": (hidden, inner), "gate_up": (2 * inner, hidden), "up": (inner, hidden)}
        if shapes.get(matrix) != tuple(weight_AN.shape):
            raise CheckpointError(
                f"{title}: the checkpoint's matrix is {tuple(weight_AN.shape)}, but the model "
                f"needs {shapes.get(matrix)}. The file belongs to another model."
            )
        if matrix == "gate_up":
            gate_AN, up_AN = weight_AN.chunk(2)
            yield f"{expert}.{gate}.weight", gate_AN
            yield f"{expert}.{up}.weight", up_AN
        else:
            name = layer.ckpt_down_proj_name if matrix == "down" else gate
            yield f"{expert}.{name}.weight", weight_AN

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all experts of this process have arrived.

        Raises:
            CheckpointError: a matrix of an expert is missing or incomplete.
        """
        for arrivals in self.arrivals.values():
            arrivals.require_complete([])
        first = "gate_up" if self.moe.is_act_and_mul else "up"
        for expert in range(layer.global_num_experts):
            local = layer._map_global_expert_id_to_local_expert_id(expert) != -1
            for matrix in (first, "down"):
                if local and (expert, matrix) not in self.loaded:
                    raise CheckpointError(
                        f"{layer.layer_name}.{PACKED}.{expert}.{matrix}: the checkpoint lacks this "
                        f"matrix. The file is incomplete: save the model again, or download it "
                        f"again."
                    )
        self.arrivals.clear()
        super().process_weights_after_loading(layer)
