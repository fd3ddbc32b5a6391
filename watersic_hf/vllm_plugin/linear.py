"""How vLLM's linear layers load quantized weights and multiply with them."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from watersic_hf.nn.forms import Form, JoinedForms, Part, form_of
from watersic_hf.vllm_plugin.arrivals import (
    FIELDS,
    SCALES,
    Arrivals,
    Loader,
    loader_of,
    missing_rows,
    part_of_columns,
    part_of_rows,
)


class WaterSICLinearMethod(LinearMethodBase):
    """Load a module whose layers are quantized, all or some, and multiply with it.

    Every stored layer takes the form of the residency as soon as its three tensors are there, so
    that payloads do not pile up.  The tensors have no size that the configuration of the model
    tells; the parameters that vLLM finds are empty, and their weight loaders collect.

    One instance belongs to one module.

    Args:
        residency: ``dense``, ``packed``, ``entropy`` or ``stored``.
        backend: implementation, one of `watersic_hf.nn.backends.BACKENDS`.
        layers: names of the stored layers that the module joins, in the order of its shards.
    """

    #: Whether the module is an output head.
    is_head = False

    def __init__(self, residency: str, backend: str, layers: Sequence[str]) -> None:
        self.residency, self.backend = residency, backend
        self.dense = self._dense_method()
        self._layers = layers
        self._parts: list[tuple[int, int]] = []
        self._forms: list[tuple[int, Form]] = []
        self._finished = False

    def _dense_method(self) -> Any:
        """Return the method that multiplies in the residency ``dense``."""
        return UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Give the module the parameters that vLLM loads into."""
        self._layer, self._dtype = layer, params_dtype
        self._rows, self._columns = sum(output_partition_sizes), input_size_per_partition
        self._loader: Loader = attributes.pop("weight_loader")
        self._arrivals = Arrivals(layer.prefix, self._layers)
        attributes["weight_loader"] = loader_of(self._take, "weight")
        if self.residency == "dense":
            sizes = input_size_per_partition, output_partition_sizes, input_size, output_size
            self.dense.create_weights(layer, *sizes, params_dtype, **attributes)
        else:
            # no memory, but a dtype and a device; heads and embeddings do not look alike
            shape = (0, 0 if self.is_head else self._columns)
            weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            layer.register_parameter("weight", weight)
            set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0} | attributes)
        for field in SCALES:
            scale = nn.Parameter(torch.empty(0, dtype=FIELDS[field]), requires_grad=False)
            layer.register_parameter(field, scale)
            set_weight_attrs(scale, {"weight_loader": loader_of(self._take, field)})

    def _take(self, field: str, tensor: Tensor, shard_id: Hashable) -> None:
        """Take a tensor of the checkpoint; a complete layer takes its form."""
        if self._finished:
            raise NotImplementedError(
                f"{self._layer.prefix}: loading new weights into a running engine is not supported "
                f"for quantized models. Start the engine again."
            )
        if field == "weight" and tensor.is_floating_point():
            self._take_dense(tensor, shard_id)
            return
        packed = self._arrivals.add(field, tensor, shard_id)
        if packed is None:
            return
        name, device = self._arrivals.title(shard_id), self._layer.weight.device
        first, part = self._place(packed.shape, shard_id, name)
        form = form_of(
            packed,
            part,
            self.residency,
            dtype=self._dtype,
            device=device,
            backend=self.backend,
            name=name,
        )
        self._put(first, part, form)

    def _take_dense(self, weight_AN: Tensor, shard_id: Hashable) -> None:
        """Take the weight of a layer that is not quantized, of a module that joins several."""
        first, part = self._place(tuple(weight_AN.shape), shard_id, self._arrivals.title(shard_id))
        weight_rn = weight_AN[part.rows_r][:, part.columns]
        weight_rn = weight_rn.to(self._layer.weight.device, self._dtype, copy=True)
        self._put(first, part, Form(residency="dense", tensors=(weight_rn,)))

    def _place(self, shape: tuple[int, int], shard_id: Hashable, name: str) -> tuple[int, Part]:
        """Return the first row of the module that a layer fills, and the part that it holds."""
        if isinstance(self._layer, RowParallelLinear):
            return part_of_columns(self._loader, shape, self._columns, name)
        return part_of_rows(self._loader, shape, (self._rows, self._columns), shard_id, name)

    def _put(self, first: int, part: Part, form: Form) -> None:
        rows = len(part.rows_r)
        self._parts.append((first, rows))
        if self.residency == "dense":
            self._layer.weight.data[first : first + rows] = form.tensors[0]
        else:
            self._forms.append((first, form))

    def _empty_rows(self) -> list[int]:
        """Return the rows of the module that have no weight."""
        return missing_rows(self._parts, self._rows)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything has arrived, and join the forms.

        Raises:
            CheckpointError: something is missing; the message names the layer.
        """
        if self._finished:
            return
        self._arrivals.require_complete(self._empty_rows())
        self._finished = True
        for field in SCALES:
            delattr(layer, field)
        if self.residency == "dense":
            self.dense.process_weights_after_loading(layer)
            return
        forms = [form for _, form in sorted(self._forms, key=lambda placed: placed[0])]
        self._forms.clear()
        layer.watersic = JoinedForms(forms, self._rows, self.backend)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``."""
        if self.residency == "dense":
            return self.dense.apply(layer, x, bias)
        y = layer.watersic(x)
        return y if bias is None else y + bias
