"""Mixtures of experts that a model holds fused, in 3-D parameters: one matrix for every expert.

Shapes: T = tokens, K = experts of a token, S = T K, E = experts, H = hidden size,
        A = out_features and N = in_features of an expert's matrix.

transformers holds the experts of a layer in two parameters, ``gate_up_proj`` (or ``up_proj``) and
``down_proj``, E x A x N or E x N x A.  `fused_experts` recognises such a module, by its parameters
and by what it computes.  `separate` turns it into the same module with two matrices an expert,
``packed.<expert>.gate_up`` and ``packed.<expert>.down``, which are layers like others to whoever
calibrates, quantizes, stores and loads them; `fuse` turns it back.

These names are matched by none of the patterns by which transformers renames, fuses and splits the
weights of experts, on loading and on saving.
"""

import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from watersic_hf.checkpoint import PACKED
from watersic_hf.nn.linear import PackedMatrix

#: Tokens, and experts of each, on which a module is tried out.
_PROBE_TOKENS = 5
_PROBE_EXPERTS = 3


@dataclass(frozen=True, kw_only=True)
class FusedExperts:
    """How a module holds its experts."""

    first: str
    """Name of the matrix that is applied first: that of its parameter without ``_proj``."""
    last: str
    """Name of the matrix that is applied last."""
    experts: int
    """E."""
    hidden: int
    """H: inputs of the first, outputs of the last."""
    inner: int
    """Inputs of the last."""
    gated: bool
    """Whether the first puts out two numbers for every input of the last."""
    transposed: bool
    """Whether an expert's matrix is held as N x A."""

    @property
    def matrices(self) -> tuple[str, str]:
        """The matrices of an expert, in the order of use."""
        return self.first, self.last

    def shape(self, matrix: str) -> tuple[int, int]:
        """(A, N) of a matrix."""
        if matrix == self.last:
            return self.hidden, self.inner
        return self.inner * (2 if self.gated else 1), self.hidden

    def names(self) -> dict[str, tuple[int, str]]:
        """By its name within the module, the expert of every matrix, and its name in the expert."""
        every = itertools.product(range(self.experts), self.matrices)
        return {f"{PACKED}.{expert}.{matrix}": (expert, matrix) for expert, matrix in every}

    def slice(self, parameter: Tensor, expert: int) -> Tensor:
        """An expert's matrix, A x N, as a view."""
        return parameter[expert].T if self.transposed else parameter[expert]


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """How a module holds its experts; None if it is no such module.

    Whether its forward is the usual one is tried out on a small copy with random weights, so the
    module itself may be on meta.
    """
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if len(shapes) != 2 or "down_proj" not in shapes:
        return None
    (name,) = shapes.keys() - {"down_proj"}
    if not name.endswith("_proj"):
        return None
    (experts, *first), (others, *last) = shapes[name], shapes["down_proj"]
    for transposed in (False, True):
        rows, columns = first[::-1] if transposed else first
        hidden, inner = last[::-1] if transposed else last
        if experts == others and columns == hidden and rows in (inner, 2 * inner):
            layout = FusedExperts(
                first=name.removesuffix("_proj"), last="down", experts=experts, hidden=hidden,
                inner=inner, gated=rows != inner, transposed=transposed,
            )  # fmt: skip
            if _behaves(module, layout):
                return layout
    return None


class SeparateExperts(nn.Module):
    """A module of experts with a matrix for every expert and projection.

    It is used as the first base of a class whose second is the module's own, `fused_class`: what
    that does between the two projections is kept, and so are its other parameters.
    """

    fused_class: type[nn.Module]
    layout: FusedExperts
    packed: nn.ModuleList

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The outputs of every token's experts, weighted and summed, T x H."""
        if torch.compiler.is_compiling():
            return mix_experts(hidden_states, top_k_index, top_k_weights, self.handle)
        return self.mix(hidden_states, top_k_index, top_k_weights)

    def mix(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """As `forward`: one expert after another, each on all of its tokens at once."""
        T, K = index_TK.shape
        experts = self.layout.experts
        # a number beyond the experts stands for none of them
        expert_S, order_S = index_TK.flatten().clamp(max=experts).sort(stable=True)
        counts = torch.bincount(expert_S, minlength=experts + 1).tolist()
        slots = order_S.split(counts)
        outputs = [
            self.outer(expert, self.inner(expert, hidden_TH[slot_s // K]))
            for expert, slot_s in enumerate(slots[:-1])
            if len(slot_s)
        ]
        outputs.append(hidden_TH.new_zeros(len(slots[-1]), self.layout.hidden))
        y_TKH = torch.cat(outputs)[order_S.argsort()].view(T, K, -1)
        return (y_TKH * weight_TK[..., None]).sum(1).to(hidden_TH.dtype)

    def inner(self, expert: int, x_SN: Tensor) -> Tensor:
        """What an expert's last matrix is applied to."""
        y_SA = self._project(expert, self.layout.first, x_SN)
        return self._apply_gate(y_SA) if self.layout.gated else self.act_fn(y_SA)

    def outer(self, expert: int, x_SN: Tensor) -> Tensor:
        """An expert's output, before it is weighted."""
        y_SH = self._project(expert, self.layout.last, x_SN)
        return self.post_expert_norm(y_SH) if getattr(self, "has_post_expert_norm", False) else y_SH

    def _project(self, expert: int, matrix: str, x_SN: Tensor) -> Tensor:
        y_SA = self.packed[expert][matrix](x_SN)
        bias_EA = getattr(self, f"{matrix}_proj_bias", None)
        return y_SA if bias_EA is None else y_SA + bias_EA[expert].to(y_SA.dtype)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # the class is made on the fly, and is not found by its name
        return _empty, (self.fused_class,), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register(self)


def separate(
    module: nn.Module, layout: FusedExperts, make: Callable[[int, str], nn.Module]
) -> None:
    """Turn a module of fused experts, in place, into one with a matrix for each.

    Args:
        module: what `fused_experts` gave `layout` for.
        layout: how it holds its experts.
        make: the matrix of an expert, by the number of the expert and by its own name.
    """
    matrices = [
        nn.ModuleDict({matrix: make(expert, matrix) for matrix in layout.matrices})
        for expert in range(layout.experts)
    ]
    for matrix in layout.matrices:
        delattr(module, f"{matrix}_proj")
    module.__class__ = _separate_class(type(module))
    module.layout = layout
    module.packed = nn.ModuleList(matrices).train(module.training)
    # read by transformers: nothing here is to be initialised at random
    module._is_hf_initialized = True
    _register(module)


def separate_dense(module: nn.Module, layout: FusedExperts) -> None:
    """`separate` into linear layers on the memory of the fused parameters."""
    fused = {matrix: getattr(module, f"{matrix}_proj") for matrix in layout.matrices}

    def linear(expert: int, matrix: str) -> nn.Linear:
        rows, columns = layout.shape(matrix)
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        weight_AN = layout.slice(fused[matrix].data, expert)
        layer.weight = nn.Parameter(weight_AN, fused[matrix].requires_grad)
        return layer

    separate(module, layout, linear)


@torch.no_grad()
def fuse(module: SeparateExperts, dtype: torch.dtype | None = None) -> None:
    """Undo `separate`, in place; packed matrices are dequantized to `dtype`, default as loaded."""
    layout = module.layout
    for matrix in layout.matrices:
        fused = None
        for expert, parts in enumerate(module.packed):
            part = parts[matrix]
            weight_AN = (part.dequantize(dtype) if isinstance(part, PackedMatrix) else part).weight
            if fused is None:
                rows, columns = weight_AN.shape
                shape = (columns, rows) if layout.transposed else (rows, columns)
                fused = weight_AN.new_empty((layout.experts, *shape))
            layout.slice(fused, expert).copy_(weight_AN)
        module.register_parameter(f"{matrix}_proj", nn.Parameter(fused))
    del module.packed, module.layout, module.handle
    module.__class__ = module.fused_class
    if dtype is not None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


def separate_experts(model: nn.Module) -> Iterator[tuple[str, SeparateExperts]]:
    """The modules of a model with a matrix for every expert, by name."""
    for name, module in model.named_modules():
        if isinstance(module, SeparateExperts):
            yield name, module


_MODULES: "weakref.WeakValueDictionary[int, SeparateExperts]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()

# the operator waits for the counts of tokens, which a CUDA graph cannot
_TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("watersic::mix_experts", mutates_args=(), **_TAGS)
def mix_experts(hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, handle: int) -> Tensor:
    """`SeparateExperts.mix` of the module with this handle, as one node of a compiled graph.

    How many tokens an expert gets is known only when it runs, so a graph cannot hold the experts
    themselves.
    """
    return _MODULES[handle].mix(hidden_TH, index_TK, weight_TK)


@mix_experts.register_fake
def _(hidden_TH, index_TK, weight_TK, handle):
    return torch.empty_like(hidden_TH)


def _no_backward(ctx, grad_y):
    raise RuntimeError(
        "a compiled model has no gradients through quantized experts: their tokens are grouped "
        "in one operator. Train the adapters without torch.compile."
    )


mix_experts.register_autograd(_no_backward)


def _register(module: SeparateExperts) -> None:
    """Give a module a handle of its own, by which the operator finds it."""
    module.handle = next(_HANDLES)
    _MODULES[module.handle] = module


@functools.cache
def _separate_class(kind: type[nn.Module]) -> type[SeparateExperts]:
    return type(f"Separate{kind.__name__}", (SeparateExperts, kind), {"fused_class": kind})


def _empty(kind: type[nn.Module]) -> SeparateExperts:
    made = _separate_class(kind)
    return made.__new__(made)


def _behaves(module: nn.Module, layout: FusedExperts) -> bool:
    """Whether a small copy of a module computes what it computes with its experts separated."""
    options = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32}
    try:
        # while transformers makes a model, all that is made is on meta
        with torch.no_grad(), torch.device("cpu"):
            probe, layout = _shrunk(module, layout, options)
            hidden_TH = torch.randn(_PROBE_TOKENS, layout.hidden, **options)
            scores_TE = torch.rand(_PROBE_TOKENS, layout.experts, **options)
            weight_TK, index_TK = scores_TE.topk(min(2, layout.experts))
            forward = type(probe).forward
            # transformers' choice among implementations wraps the one that defines them
            forward = getattr(forward, "__wrapped__", forward)
            expected_TH = forward(probe, hidden_TH, index_TK, weight_TK)
            separate_dense(probe, layout)
            found_TH = probe.mix(hidden_TH, index_TK, weight_TK)
        return torch.allclose(found_TH, expected_TH, rtol=1e-4, atol=1e-5)
    except Exception:
        # it needs something else than tokens, their experts and weights, or has other parts
        return False


def _shrunk(
    module: nn.Module, layout: FusedExperts, options: dict[str, Any]
) -> tuple[nn.Module, FusedExperts]:
    """A copy of a module with few and small experts, and random parameters."""
    sizes = {layout.inner: 6, 2 * layout.inner: 12}
    sizes.setdefault(layout.hidden, 8)
    sizes.setdefault(layout.experts, min(layout.experts, _PROBE_EXPERTS))
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(getattr(module, "config", None)): getattr(module, "config", None)}
    for tensor in tensors:
        shape = [sizes.get(size, size) for size in tensor.shape]
        small = torch.randn(shape, **options) / 2
        memo[id(tensor)] = nn.Parameter(small) if isinstance(tensor, nn.Parameter) else small
    probe = copy.deepcopy(module, memo)
    for part in probe.modules():
        for name, value in vars(part).items():
            if type(value) is int and value in sizes:
                setattr(part, name, sizes[value])
    small = {name: sizes[getattr(layout, name)] for name in ("experts", "hidden", "inner")}
    return probe, replace(layout, **small)
