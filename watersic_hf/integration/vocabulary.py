"""The vocabulary matrices of a model: its input embedding and its output head, tied or not.

Shapes: A = tokens of the vocabulary, N = columns.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from watersic_hf.integration.linear_layers import shape_of
from watersic_hf.nn import (
    PackedMatrix,
    WaterSICEmbedding,
    WaterSICLinear,
    WaterSICTiedHead,
    replace_module,
)


@dataclass(frozen=True, kw_only=True)
class VocabularyMatrix:
    """One matrix with a row per token: an embedding, an output head, or both in one."""

    embedding: str | None
    """Name of the embedding, None for a head of its own."""
    head: str | None
    """Name of the output head that multiplies by it, None if none does."""
    shape: tuple[int, int]
    """(A, N)."""
    scale: float = 1.0
    """Factor on the rows of the embedding."""
    bits: float | None = None
    """Bits per weight to spend; None if it stays dense."""

    @property
    def name(self) -> str:
        """Name of the module under which its tensors are stored."""
        return self.embedding or self.head

    @property
    def modules(self) -> list[str]:
        """Names of the modules that use it."""
        return [name for name in (self.embedding, self.head) if name is not None]

    def empty_module(self, **options: object) -> PackedMatrix:
        """Return an empty quantized module for it, with `options` of `PackedMatrix`."""
        rows, columns = self.shape
        if self.embedding is None:
            return WaterSICLinear(columns, rows, **options)
        return WaterSICEmbedding(columns, rows, scale=self.scale, **options)

    def install(self, model: nn.Module, module: PackedMatrix) -> None:
        """Install a quantized module in a model, and the head that is tied to it."""
        replace_module(model, self.name, module)
        if self.embedding is not None and self.head is not None:
            replace_module(model, self.head, WaterSICTiedHead(module))


def find_vocabulary_matrices(
    model: nn.Module,
    linear: Collection[str],
    *,
    head_bits: float | None,
    embedding_bits: float | None,
) -> tuple[list[VocabularyMatrix], dict[str, str]]:
    """Find the input embedding and the output head of a model.

    Args:
        model: the model, whose parameters may be on meta.
        linear: names of its linear layers.
        head_bits: bits for the output head; None leaves it dense.
        embedding_bits: bits for the input embedding; None leaves it dense.  A head that is tied to
            the embedding is the same matrix: either number is for both.

    Returns:
        The matrices that can be quantized; and, by name of module, why an embedding that was to be
        quantized cannot be.

    Raises:
        ValueError: head and embedding are one matrix, and different bits are asked for them.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = _input_embedding(model)
    head_module = model.get_output_embeddings()
    head = names[head_module] if names.get(head_module) in linear else None
    tied = _tied_to(model, names.get(embedding))
    found: list[VocabularyMatrix] = []
    obstacles: dict[str, str] = {}
    if embedding is not None:
        name, scale = names[embedding], embedding_scale(model, embedding)
        both = head if head in tied else None
        bits = embedding_bits
        if both is not None and head_bits is not None:
            if embedding_bits is not None and embedding_bits != head_bits:
                raise ValueError(
                    f"{name} and {head} are one matrix, but {embedding_bits:g} bits are asked for "
                    f"the embedding and {head_bits:g} for the head. Ask for one number."
                )
            bits = head_bits
        obstacle = None
        if scale is None:
            obstacle = f"{type(embedding).__name__} is no plain table"
        elif tied and tied != [head]:
            obstacle = f"tied to {', '.join(tied)}"
        elif tied and head_module.bias is not None:
            obstacle = "tied to a head with a bias"
        if obstacle is None:
            shape = embedding.num_embeddings, embedding.embedding_dim
            found.append(
                VocabularyMatrix(embedding=name, head=both, shape=shape, scale=scale, bits=bits)
            )
        elif bits is not None:
            obstacles |= dict.fromkeys([name, *tied], obstacle)
    if head is not None and head not in tied:
        shape = shape_of(head_module)
        found.append(VocabularyMatrix(embedding=None, head=head, shape=shape, bits=head_bits))
    return found, obstacles


def embedding_like(model: nn.Module, original: nn.Module, dense: nn.Embedding) -> nn.Module:
    """Return an embedding of the class of `original`, which may be on meta, with a weight.

    Args:
        model: the model that it belongs to.
        original: the embedding before quantization.
        dense: an embedding with the weight to use.
    """
    module = _initialized(model, original)
    module.weight = dense.weight
    return module


def embedding_scale(model: nn.Module, embedding: nn.Module) -> float | None:
    """Return the factor of an embedding that looks up rows times a factor; None if it does else."""
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None:
        return None
    probe = _initialized(model, embedding)
    probe.padding_idx = None
    # transformers builds a model with meta as the default device
    weight = torch.linspace(-1, 1, 6 * embedding.embedding_dim, device="cpu").view(6, -1)
    probe.weight = nn.Parameter(weight, False)
    index = torch.tensor([[3, 0, 5]], device="cpu")
    try:
        rows = probe(index)
    except Exception:
        # it needs more than row numbers, so it is something else
        return None
    scale = float(rows[0, 1, 0] / weight[0, 0])
    return scale if torch.allclose(rows, scale * weight[index]) else None


def _initialized(model: nn.Module, embedding: nn.Module) -> nn.Module:
    """Return a copy of an embedding: buffers initialized by transformers, weight on meta."""
    module = copy.deepcopy(embedding)
    module.weight = nn.Parameter(torch.empty_like(embedding.weight, device="meta"), False)
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
    """Return the names of the modules whose weight is tied to that of module `name`."""
    sources: Mapping[str, str] = model.all_tied_weights_keys
    weight = sources.get(f"{name}.weight", f"{name}.weight")
    members = {weight, *(target for target, source in sources.items() if source == weight)}
    return sorted(member.removesuffix(".weight") for member in members - {f"{name}.weight"})
