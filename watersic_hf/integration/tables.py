"""The tables of a model: its input embedding and its output head, tied or not.

Shapes: A = tokens of the vocabulary, N = columns.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from watersic_hf.integration.dense import linear_layers, shape_of
from watersic_hf.nn import (
    PackedMatrix,
    WaterSICEmbedding,
    WaterSICLinear,
    WaterSICTiedHead,
    replace_module,
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """One matrix with a row per token: an embedding, an output head, or both in one."""

    embedding: str | None
    """Name of the embedding, None for a head of its own."""
    head: str | None
    """Name of the output head that multiplies by it; None if none does."""
    shape: tuple[int, int]
    """(A, N)."""
    scale: float = 1.0
    """What rows of the embedding are multiplied by."""
    bits: float | None = None
    """Bits asked for; None if it is to stay dense."""

    @property
    def name(self) -> str:
        """The module under whose name its tensors are stored."""
        return self.embedding or self.head

    def module(self, **options: object) -> PackedMatrix:
        """An empty quantized module for it."""
        rows, columns = self.shape
        if self.embedding is None:
            return WaterSICLinear(columns, rows, **options)
        return WaterSICEmbedding(columns, rows, scale=self.scale, **options)

    def install(self, model: nn.Module, module: PackedMatrix) -> None:
        """Put a quantized module in its place, and a head that is tied to it beside it."""
        replace_module(model, self.name, module)
        if self.embedding is not None and self.head is not None:
            replace_module(model, self.head, WaterSICTiedHead(module))


def find_tables(
    model: nn.Module, *, head_bits: float | None = None, embedding_bits: float | None = None
) -> tuple[list[Table], dict[str, str]]:
    """The tables of a model, and why some cannot be quantized, by name of module.

    Args:
        model: the model, whose parameters may be on meta.
        head_bits: asked for the output head; None = nothing.
        embedding_bits: asked for the input embedding; None = nothing.

    Raises:
        ValueError: head and embedding are one table, and different bits are asked for them.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = _input_embedding(model), model.get_output_embeddings()
    head = head if names.get(head) in linear_layers(model) else None
    tables: list[Table] = []
    reasons: dict[str, str] = {}
    tied = _tied_to(model, names.get(embedding))
    if embedding is not None:
        name, scale = names[embedding], embedding_scale(model, embedding)
        obstacle = None
        if scale is None:
            obstacle = f"{type(embedding).__name__} is no plain table"
        elif tied and (head is None or tied != [names[head]]):
            obstacle = f"tied to {', '.join(tied)}"
        elif tied and head.bias is not None:
            obstacle = "tied to a head with a bias"
        bits = embedding_bits
        if tied and head is not None and head_bits is not None:
            if embedding_bits is not None and embedding_bits != head_bits:
                raise ValueError(
                    f"{name} and {names[head]} are one table, but {embedding_bits:g} bits are "
                    f"asked for the embedding and {head_bits:g} for the head. Ask for one number."
                )
            bits = head_bits
        if obstacle is None:
            tables.append(Table(
                embedding=name, head=names[head] if tied else None,
                shape=(embedding.num_embeddings, embedding.embedding_dim), scale=scale, bits=bits,
            ))  # fmt: skip
        elif bits is not None:
            reasons |= dict.fromkeys([name, *tied], obstacle)
    if head is not None and names[head] not in tied:
        tables.append(Table(embedding=None, head=names[head], shape=shape_of(head), bits=head_bits))
    return tables, reasons


def embedding_like(model: nn.Module, shell: nn.Module, table: nn.Embedding) -> nn.Module:
    """An embedding of the class of `shell`, which may be on meta, with the weight of `table`."""
    module = _initialized(model, shell)
    module.weight = table.weight
    return module


def embedding_scale(model: nn.Module, shell: nn.Module) -> float | None:
    """The factor of an embedding that is a table times a factor; None if it is anything else."""
    if not isinstance(shell, nn.Embedding) or shell.max_norm is not None:
        return None
    probe = _initialized(model, shell)
    probe.padding_idx = None
    # transformers prepares a model with meta as the default device
    weight = torch.linspace(-1, 1, 6 * shell.embedding_dim, device="cpu").view(6, -1)
    probe.weight = nn.Parameter(weight, False)
    index = torch.tensor([[3, 0, 5]], device="cpu")
    try:
        rows = probe(index)
    except Exception:
        # it needs more than numbers of rows, so it is something else
        return None
    scale = float(rows[0, 1, 0] / weight[0, 0])
    return scale if torch.allclose(rows, scale * weight[index]) else None


def _initialized(model: nn.Module, shell: nn.Module) -> nn.Module:
    """A copy of a module, its buffers as transformers makes them, its weight on meta."""
    module = copy.deepcopy(shell)
    module.weight = nn.Parameter(torch.empty_like(shell.weight, device="meta"), False)
    for name, buffer in module.named_buffers():
        setattr(module, name, torch.empty_like(buffer, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        model._init_weights(module)
    return module


def _input_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _tied_to(model: nn.Module, name: str | None) -> list[str]:
    """Modules whose weight is that of the module called `name`."""
    sources: Mapping[str, str] = model.all_tied_weights_keys
    weight = sources.get(f"{name}.weight", f"{name}.weight")
    members = {weight, *(target for target, source in sources.items() if source == weight)}
    return sorted(member.removesuffix(".weight") for member in members - {f"{name}.weight"})
