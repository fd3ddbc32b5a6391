"""Compressed vocabulary matrices: `WaterSICEmbedding`, and `WaterSICTiedHead`, which shares one.

Shapes: A = rows of the matrix (tokens of the vocabulary), N = columns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from watersic_hf.checkpoint import PackedLayer, pack_layer, rescale_layer
from watersic_hf.codec import Path
from watersic_hf.nn import ops
from watersic_hf.nn.linear import PackedMatrix, resize_payload
from watersic_hf.nn.packing import PackedCodes


class WaterSICEmbedding(PackedMatrix, nn.Embedding):
    """Embedding whose vocabulary matrix is compressed.

    Called with integers it gathers rows; called with floats it multiplies by the matrix, so a head
    that is tied to it has no weight of its own.  Every residency except ``dense`` decodes only the
    rows asked for: ``packed`` row by row; ``entropy`` and ``stored`` decode the chunks of the
    payload that hold them.

    `col_scale` is the first parameter and has the dtype that the embedding was loaded in, as that
    is where transformers looks for the dtype and the device of a model.  Its values are exact in
    bfloat16, float16 and float32 (`pack_vocabulary_matrix`), and it is saved in float16.

    Args:
        in_features: N.
        out_features: A.
        scale: factor of the gathered rows, as in Gemma; default: 1.
        options: keyword arguments of `PackedMatrix`.
    """

    fixed_scales = ("row_scale",)

    def __init__(
        self, in_features: int, out_features: int, *, scale: float = 1.0, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, **options)
        self.num_embeddings, self.embedding_dim = out_features, in_features
        # PEFT reads these: it gathers the rows of its adapters in the same way
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.scale = scale
        # transformers takes a model's dtype from its first parameter: make that col_scale
        others = {name: self._parameters.pop(name) for name in ("weight", "row_scale")}
        self._parameters |= others
        self.adopt_dtype()

    @classmethod
    def from_packed(cls, packed: PackedLayer, *, scale: float = 1.0, **options: Any) -> Any:
        """Make an embedding that holds the tensors of `packed`.

        Args:
            packed: the stored tensors.
            scale: factor of the gathered rows; default: 1.
            options: keyword arguments of `PackedMatrix.from_packed`.
        """
        embedding = super().from_packed(packed, **options)
        embedding.scale = scale
        embedding.adopt_dtype()
        return embedding

    def adopt_dtype(self) -> None:
        """Cast `col_scale` to the dtype of the rows; a loader leaves it in that of the file."""
        self.col_scale.data = self.col_scale.data.to(self.compute_dtype)

    def set_residency(self, residency: str, *, backend: str = "auto") -> None:
        """Choose the form of the matrix in memory; see `PackedMatrix.set_residency`."""
        self.adopt_dtype()
        super().set_residency(residency, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """Return the scaled rows with these indices; for floats, their product with the matrix."""
        if input.is_floating_point():
            return super().forward(input)
        current = self._is_current()
        if current and self.dense_weight is not None:
            rows = F.embedding(input, self.dense_weight)
        else:
            scales = (self.row_scale, self.col_scale, self.compute_dtype)
            if current and self.residency == "packed":
                layout = [getattr(self, name) for name in PackedCodes.names()]
                rows = ops.packed_rows(input, layout, *scales)
            else:
                rows = ops.payload_rows(input, self.weight, *scales)
        if self.scale == 1:
            return rows
        # round the factor first, as models do whose factor is a buffer
        return rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Return an ordinary embedding with the dequantized weight.

        It does not apply `scale`: the model's own class of embeddings does that.

        Args:
            dtype: dtype of the weight; default: the dtype the embedding was loaded in.
        """
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        embedding.weight = nn.Parameter(self._decode(dtype or self.compute_dtype))
        return embedding

    def reload(self, prefix: str, error_msgs: list[str]) -> None:
        """Make the matrix again after loading; see `PackedMatrix.reload`."""
        self.adopt_dtype()
        super().reload(prefix, error_msgs)


class WaterSICTiedHead(nn.Linear):
    """Output head that is tied to a `WaterSICEmbedding`; `weight` is the same parameter, a payload.

    Args:
        embedding: the input embedding that the head is tied to.
    """

    def __init__(self, embedding: WaterSICEmbedding) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        self.weight = embedding.weight
        self.bias = None
        # in a tuple, so that the embedding does not become a submodule of the head
        self._embedding = (embedding,)
        self._is_hf_initialized = True

    @property
    def embedding(self) -> WaterSICEmbedding:
        """The embedding that the head is tied to."""
        return self._embedding[0]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the dense weight; read by PEFT."""
        return self.embedding.compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T``, by calling the embedding, whose hooks load offloaded weights."""
        if self.weight.is_floating_point():
            # the model has been given another embedding, which the head was tied to
            return super().forward(x)
        return self.embedding(x)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if not self.weight.is_floating_point():
            # a loader may have replaced only one of the two
            self.weight = self.embedding.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load the payload into the embedding, too, and have it made again."""
        payload = state_dict.get(f"{prefix}weight")
        if self.weight.is_floating_point() or payload is None:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        self.weight = self.embedding.weight
        resize_payload(self.weight, payload)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.embedding.weight = self.weight
        *_, error_msgs = args
        self.embedding.reload(prefix, error_msgs)

    def extra_repr(self) -> str:
        """Return sizes, for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def pack_vocabulary_matrix(
    codes_AN: Tensor,
    row_scale_A: Tensor,
    col_scale_N: Tensor,
    *,
    path: Path | None = None,
    name: str,
) -> PackedLayer:
    """Pack codes as `pack_layer` does, with column scales that bfloat16 holds exactly.

    `WaterSICEmbedding` needs such scales: it casts them to the dtype of the model.

    Args:
        codes_AN: integer codes, or values of a trellis.
        row_scale_A: row scales.
        col_scale_N: column scales, which are rounded.
        path: path of the values of a trellis; default: the matrix has codes.
        name: name of the layer, for error messages.
    """
    packed = pack_layer(codes_AN, row_scale_A, col_scale_N, path=path, name=name)
    return rescale_layer(packed, packed.row_scale, packed.col_scale.bfloat16(), name=name)
