"""What arrives of the stored layers of one module of vLLM, until each of them is complete.

vLLM joins layers with the same input, such as q, k and v, in one module, and names each of them by
a shard id.  It hands over the tensors of a checkpoint one by one, whole, in any order.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from watersic_hf.checkpoint import (
    CheckpointError,
    PackedLayer,
    layer_shape,
    tensor_specs,
    validate_layer,
)
from watersic_hf.nn.forms import Part

#: Names and dtypes of the tensors of a stored layer.
FIELDS = {name: dtype for name, (_, dtype) in tensor_specs(0, 0, 0).items()}
#: Those that a dense layer does not have.
SCALES = tuple(name for name in FIELDS if name != "weight")

Loader = Callable[..., None]
"""A weight loader of vLLM: ``loader(param, tensor)`` or ``loader(param, tensor, shard_id)``."""


class Arrivals:
    """Collect the tensors of the stored layers of one module.

    Args:
        name: name of the module, for messages.
        layers: names of the stored layers that the module joins, in the order of its shards.
    """

    def __init__(self, name: str, layers: Sequence[str]) -> None:
        self.name = name
        self._layers = list(layers)
        self._found: dict[Hashable, dict[str, Tensor]] = {}

    def title(self, shard_id: Hashable) -> str:
        """Return the name of a stored layer, for messages."""
        if len(self._layers) == 1:
            return self._layers[0]
        index = {"q": 0, "k": 1, "v": 2}.get(shard_id, shard_id)
        if isinstance(index, int) and index < len(self._layers):
            return self._layers[index]
        return self.name

    def add(self, field: str, tensor: Tensor, shard_id: Hashable = None) -> PackedLayer | None:
        """Take a tensor; return the layer once all of its tensors are there.

        Raises:
            CheckpointError: the tensor is of another kind than the field needs, or the tensors of
                the layer do not fit each other.
        """
        title = self.title(shard_id)
        if tensor.ndim != 1 or tensor.dtype != FIELDS[field]:
            raise CheckpointError(
                f"{title}.{field}: found {tensor.dtype} of shape {tuple(tensor.shape)}, but a "
                f"quantized layer has {FIELDS[field]} in one dimension. The file is damaged, or of "
                f"a format that this version does not read: update watersic-hf."
            )
        found = self._found.setdefault(shard_id, {})
        found[field] = tensor
        if len(found) < len(FIELDS):
            return None
        del self._found[shard_id]
        return PackedLayer(**found)

    def require_complete(self, empty_rows: Sequence[int]) -> None:
        """Refuse a module of which something has not arrived.

        Args:
            empty_rows: rows of the module that no layer has filled.

        Raises:
            CheckpointError: a layer is incomplete or missing; the message names it.
        """
        for shard_id, found in self._found.items():
            shapes = {field: tuple(tensor.shape) for field, tensor in found.items()}
            validate_layer(self.title(shard_id), shapes, *layer_shape(shapes))
        if len(empty_rows):
            layers = " or ".join(self._layers)
            raise CheckpointError(
                f"{self.name}: {len(empty_rows)} rows from {empty_rows[0]} on have no weight: the "
                f"checkpoint lacks the tensors of {layers}. The file is incomplete: save the model "
                f"again, or download it again."
            )


def part_of_rows(
    loader: Loader,
    shape: tuple[int, int],
    local_shape: tuple[int, int],
    shard_id: Hashable,
    name: str,
) -> tuple[int, Part]:
    """Ask a weight loader of vLLM which rows of a stored layer this process holds.

    The loader is handed a column of numbers in place of a weight: what it copies is what this
    process would have got.

    Args:
        loader: weight loader of the module.
        shape: rows and columns of the stored layer.
        local_shape: rows and columns of the module in this process.
        shard_id: shard id of the layer within the module; None if it is the whole module.
        name: name of the layer, for messages.

    Returns:
        The first of the module's rows that the layer fills, and the part.

    Raises:
        CheckpointError: the layer has another shape than the module needs.
    """
    (rows, columns), (local_rows, needed) = shape, local_shape
    if columns != needed:
        raise CheckpointError(
            f"{name}: the checkpoint's layer has {columns} columns, but the model needs {needed}. "
            f"The file belongs to another model."
        )
    got = _probe(loader, rows, (local_rows, 1), {"output_dim": 0}, shard_id, name)
    here = (got >= 0).nonzero().flatten()
    first = int(here[0]) if len(here) else 0
    if len(here) and len(here) != int(here[-1]) + 1 - first:
        raise CheckpointError(
            f"{name}: vLLM places its rows apart from each other, which is not supported. Run the "
            f"model with transformers, or dequantize it."
        )
    return first, Part(rows_r=got[here], columns=slice(0, columns))


def part_of_columns(
    loader: Loader, shape: tuple[int, int], local_columns: int, name: str
) -> tuple[int, Part]:
    """Ask a weight loader of vLLM which columns of a stored layer this process holds.

    See `part_of_rows`; the module has all rows.

    Args:
        loader: weight loader of the module.
        shape: rows and columns of the stored layer.
        local_columns: columns of the module in this process.
        name: name of the layer, for messages.
    """
    rows, columns = shape
    got = _probe(loader, columns, (1, local_columns), {"input_dim": 1}, None, name)
    part = Part(rows_r=torch.arange(rows), columns=slice(int(got[0]), int(got[-1]) + 1))
    return 0, part


def _probe(
    loader: Loader,
    count: int,
    shape: tuple[int, int],
    attributes: dict[str, int],
    shard_id: Hashable,
    name: str,
) -> Tensor:
    """Return the numbers, of `count` in a row or column, that a loader copies, and -1 elsewhere."""
    probe = nn.Parameter(torch.full(shape, -1, device="cpu"), requires_grad=False)
    for key, value in attributes.items():
        setattr(probe, key, value)
    numbers = torch.arange(count, device="cpu")
    numbers = numbers.view(-1, 1) if shape[1] == 1 and "output_dim" in attributes else numbers[None]
    try:
        loader(probe, numbers, *(() if shard_id is None else (shard_id,)))
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        kind = "rows" if "output_dim" in attributes else "columns"
        raise CheckpointError(
            f"{name}: the checkpoint's layer has {count} {kind}, of which vLLM cannot take this "
            f"process's {max(shape)}: {error}. The file belongs to another model."
        ) from error
    return probe.data.flatten()


def missing_rows(parts: Iterable[tuple[int, int]], rows: int) -> list[int]:
    """Return the rows below `rows` that none of the parts, each a start and a length, has."""
    missing = torch.ones(rows, dtype=torch.bool)
    for start, length in parts:
        missing[start : start + length] = False
    return missing.nonzero().flatten().tolist()


def loader_of(take: Callable[..., None], field: str) -> Loader:
    """Return a weight loader that hands a tensor and its shard id to `take`."""

    # a function, as vLLM looks at the names of loaders
    def load(param: nn.Parameter, tensor: Tensor, shard_id: Hashable = None) -> None:
        take(field, tensor, shard_id)

    return load
