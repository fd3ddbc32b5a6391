"""How vLLM's embeddings and output heads load quantized vocabulary matrices."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from watersic_hf.checkpoint import CheckpointError
from watersic_hf.nn.forms import Part
from watersic_hf.vllm_plugin.arrivals import SCALES
from watersic_hf.vllm_plugin.linear import WaterSICLinearMethod


class WaterSICEmbeddingMethod(WaterSICLinearMethod):
    """Load a quantized vocabulary matrix, or some of its rows; gather rows, and multiply.

    In the residency ``entropy`` the matrix is ``packed``: rows cannot be gathered from a prefix
    code, and the payload would be a second form.

    Args:
        residency: ``dense``, ``packed``, ``entropy`` or ``stored``.
        backend: implementation, one of `watersic_hf.nn.backends.BACKENDS`.
        layers: name of the matrix; none for a head that is tied to an embedding.
        is_head: whether the module is an output head.
    """

    def __init__(
        self, residency: str, backend: str, layers: Sequence[str], *, is_head: bool
    ) -> None:
        super().__init__("packed" if residency == "entropy" else residency, backend, layers)
        self.is_head = is_head
        self._tied: nn.Module | None = None

    def _dense_method(self) -> Any:
        return UnquantizedEmbeddingMethod()

    def _place(self, shape: tuple[int, int], shard_id: Hashable, name: str) -> tuple[int, Part]:
        """Return the rows of the matrix that this process holds; they come first in the module."""
        needed = self._layer.org_vocab_size, self._columns
        if shape != needed:
            raise CheckpointError(
                f"{name}: the checkpoint's matrix is {shape[0]} x {shape[1]}, but the model needs "
                f"{needed[0]} x {needed[1]}. The file belongs to another model."
            )
        mine = self._layer.shard_indices
        rows = torch.arange(mine.org_vocab_start_index, mine.org_vocab_end_index, device="cpu")
        return 0, Part(rows_r=rows, columns=slice(0, self._columns))

    def _empty_rows(self) -> list[int]:
        """Return the rows without a weight; vLLM adds rows for padding, which need none."""
        tokens = self._layer.shard_indices.num_org_elements
        if self.residency == "dense":
            self._layer.weight.data[tokens:] = 0
        return [row for row in super()._empty_rows() if row < tokens]

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Return the rows of these tokens."""
        if self.residency == "dense":
            return self.dense.embedding(layer, input_)
        return layer.watersic.gather(input_, self._dtype)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Have a head use what an embedding loads."""
        self._tied = embed_tokens
        layer.weight = embed_tokens.weight
        for field in SCALES:
            delattr(layer, field)
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that everything has arrived, or take over what the tied embedding has."""
        if self._tied is None:
            super().process_weights_after_loading(layer)
            return
        self._tied.quant_method.process_weights_after_loading(self._tied)
        layer.weight = self._tied.weight
        if self.residency == "dense":
            self.dense.process_weights_after_loading(layer)
        else:
            layer.watersic = self._tied.watersic
