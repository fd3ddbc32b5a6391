"""Decode what vLLM's modules cannot take packed, while the weights stream from the files."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from watersic_hf.nn.forms import Part, form_of
from watersic_hf.vllm_plugin.arrivals import FIELDS, Arrivals


class DecodingMapper(WeightsMapper):
    """A mapper of names that also decodes layers: some vocabulary matrices, outside of the blocks.

    vLLM joins it with the mappers of a model by ``|``, and applies the result to all weights.  Most
    models make their embedding without telling a quantization method, so that it can only be dense.

    Args:
        layers: names in the files of the layers to decode, looked up when the weights are loaded.
        backend: implementation, one of `watersic_hf.nn.backends.BACKENDS`.
        fields: fields of `WeightsMapper`.
    """

    def __init__(self, layers: Mapping[str, Any], backend: str, **fields: Any) -> None:
        super().__init__(**fields)
        self._layers, self._backend = layers, backend

    def __or__(self, other: WeightsMapper) -> "DecodingMapper":
        return self._joined(super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> "DecodingMapper":
        return self._joined(WeightsMapper.__or__(other, self))

    def _joined(self, mapper: WeightsMapper) -> "DecodingMapper":
        return DecodingMapper(self._layers, self._backend, **vars(mapper))

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Yield the weights under the names that vLLM has for them."""
        return super().apply(self._decoded(weights))

    def _decoded(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        arriving: dict[str, Arrivals] = {}
        for name, tensor in weights:
            layer, _, field = name.rpartition(".")
            if layer not in self._layers or field not in FIELDS:
                yield name, tensor
                continue
            arrivals = arriving.setdefault(layer, Arrivals(layer, [layer]))
            packed = arrivals.add(field, tensor)
            if packed is not None:
                form = form_of(
                    packed,
                    Part.whole(packed.shape),
                    "dense",
                    dtype=torch.get_default_dtype(),
                    device=torch.device("cpu"),
                    backend=self._backend,
                    name=layer,
                )
                yield f"{layer}.weight", form.tensors[0]
        for arrivals in arriving.values():
            arrivals.require_complete([])
