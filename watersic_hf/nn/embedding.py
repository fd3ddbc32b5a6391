"""WaterSICEmbedding: a table of rows, compressed; WaterSICTiedHead: the head that multiplies by it.

Shapes: A = rows of the table (tokens), N = columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from watersic_hf.checkpoint import PackedLayer, pack_layer, rescale_layer
from watersic_hf.nn import ops
from watersic_hf.nn.linear import PackedMatrix
from watersic_hf.nn.packing import PackedCodes

_COL_SCALE_DTYPE = torch.float16


class WaterSICEmbedding(PackedMatrix, nn.Embedding):
    """Table of rows with a compressed weight.

    Called with integers it gathers rows, called with floats it multiplies by the table: a head that
    is tied to it has no weight of its own.  Every residency but ``dense`` decodes the rows that are
    asked for, and no others: ``packed`` row by row; ``entropy`` and ``stored`` from the payload, in
    the chunks that hold them.

    `col_scale` is the first parameter and has the dtype that the table was loaded in, since that is
    where transformers looks for the dtype and the device of a model.  Its values are exact in
    bfloat16, float16 and float32 alike (`pack_table`), and it is saved in float16.

    Args:
        in_features: N.
        out_features: A.
        scale: what rows are multiplied by on their way out, as in Gemma.
        options: of `PackedMatrix`.
    """

    fixed_scales = ("row_scale",)

    def __init__(
        self, in_features: int, out_features: int, *, scale: float = 1.0, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, **options)
        self.num_embeddings, self.embedding_dim = out_features, in_features
        # read by PEFT, which gathers the rows of its adapters in the same way
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.scale = scale
        others = {name: self._parameters.pop(name) for name in ("weight", "row_scale")}
        self._parameters |= others
        self.adopt_dtype()

    @classmethod
    def from_packed(cls, packed: PackedLayer, *, scale: float = 1.0, **options: Any) -> Any:
        """A table that holds the tensors of `packed`, as `PackedMatrix.from_packed`."""
        table = super().from_packed(packed, **options)
        table.scale = scale
        table.adopt_dtype()
        return table

    @property
    def packed(self) -> PackedLayer:
        """The stored tensors of the table."""
        return PackedLayer(
            weight=self.weight.data, row_scale=self.row_scale.data,
            col_scale=self.col_scale.data.to(_COL_SCALE_DTYPE),
        )  # fmt: skip

    def adopt_dtype(self) -> None:
        """Have `col_scale` in the dtype of the rows; a loader gives it that of the file."""
        self.col_scale.data = self.col_scale.data.to(self.compute_dtype)

    def set_residency(self, residency: str, *, backend: str = "auto") -> None:
        """Choose the form of the table in memory; see `PackedMatrix.set_residency`."""
        self.adopt_dtype()
        super().set_residency(residency, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table by number, scaled; or, of floats, their product with the table."""
        if input.is_floating_point():
            return super().forward(input)
        if self.dense_weight is not None:
            rows = F.embedding(input, self.dense_weight)
        else:
            scales = (self.row_scale, self.col_scale, self.compute_dtype)
            if self.residency == "packed":
                layout = [getattr(self, name) for name in PackedCodes.names()]
                rows = ops.packed_rows(input, layout, *scales)
            else:
                rows = ops.payload_rows(input, self.weight, *scales)
        if self.scale == 1:
            return rows
        # rounded first, as where the factor is a buffer of the model
        return rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An ordinary table with the dequantized weight, in `dtype` (default: as loaded).

        It does not scale: that is for the class of the model's own table to do.
        """
        table = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        table.weight = nn.Parameter(self._decode(dtype or self.compute_dtype))
        return table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.compute_dtype = self.col_scale.dtype
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}col_scale"
        destination[name] = destination[name].to(_COL_SCALE_DTYPE)


class WaterSICTiedHead(nn.Linear):
    """Output head whose weight is a table's: `weight` is the table's payload, the same parameter.

    Args:
        table: the input embedding that the head is tied to.
    """

    def __init__(self, table: WaterSICEmbedding) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = table.in_features, table.out_features
        self.weight = table.weight
        self.bias = None
        # in a tuple, since the head has no part in the table's place among the modules
        self._table = (table,)
        self._is_hf_initialized = True

    @property
    def table(self) -> WaterSICEmbedding:
        """The embedding that the head is tied to."""
        return self._table[0]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the dense weight; read by PEFT."""
        return self.table.compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T``, as the table's product: its hooks load what is offloaded."""
        return self.table(x)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def pack_table(
    codes_AN: Tensor, row_scale_A: Tensor, col_scale_N: Tensor, *, name: str
) -> PackedLayer:
    """`pack_layer` with column scales that bfloat16 holds exactly; see `WaterSICEmbedding`."""
    packed = pack_layer(codes_AN, row_scale_A, col_scale_N, name=name)
    return rescale_layer(packed, packed.row_scale, packed.col_scale.bfloat16(), name=name)
