"""Mixtures of experts whose weights a model holds fused, separated into one matrix per expert.

Shapes: T = tokens, K = experts of a token, S = T K, s = tokens of one expert, E = experts,
        H = hidden size, A = out_features and N = in_features of an expert's matrix.

transformers holds the experts of a layer in two 3-D parameters, ``gate_up_proj`` (or ``up_proj``)
and ``down_proj``, E x A x N or E x N x A.  `fused_experts` recognizes such a module by its
parameters and by what it computes.  `separate` turns it into the same module with two matrices per
expert, ``packed.<expert>.gate_up`` and ``packed.<expert>.down``, which are calibrated, quantized,
stored and loaded like any other layer.  `fuse` undoes that.

No pattern by which transformers renames, fuses and splits the weights of experts, when loading or
saving, matches these names.
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

#: Size of the test that decides whether a module is supported: its tokens and its experts.
_PROBE_TOKENS = 5
_PROBE_EXPERTS = 3


@dataclass(frozen=True, kw_only=True)
class FusedExperts:
    """Layout of the experts of a module."""

    first: str
    """Name of the matrix that is applied first: its parameter's name without ``_proj``."""
    last: str
    """Name of the matrix that is applied last."""
    experts: int
    """E, the number of experts."""
    hidden: int
    """H, the inputs of the first matrix and the outputs of the last."""
    inner: int
    """Number of inputs of the last matrix."""
    gated: bool
    """Whether the first matrix has two outputs, gate and value, for every input of the last."""
    transposed: bool
    """Whether an expert's matrix is stored as N x A."""

    @property
    def matrices(self) -> tuple[str, str]:
        """The matrices of an expert, in the order of use."""
        return self.first, self.last

    def shape(self, matrix: str) -> tuple[int, int]:
        """Return the shape (A, N) of a matrix, `first` or `last`."""
        if matrix == self.last:
            return self.hidden, self.inner
        return self.inner * (2 if self.gated else 1), self.hidden

    def names(self) -> dict[str, tuple[int, str]]:
        """Return, by the name in the separated module, the expert and the name of every matrix."""
        pairs = itertools.product(range(self.experts), self.matrices)
        return {f"{PACKED}.{expert}.{matrix}": (expert, matrix) for expert, matrix in pairs}

    def slice(self, parameter: Tensor, expert: int) -> Tensor:
        """Return an expert's matrix, A x N, as a view of the fused parameter."""
        return parameter[expert].T if self.transposed else parameter[expert]


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """Return the layout of a module's experts, or None if it does not hold fused experts.

    A small copy with random weights tests whether the module computes what separated experts
    compute, so the module itself may be on meta.
    """
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if len(shapes) != 2 or "down_proj" not in shapes:
        return None
    (name,) = shapes.keys() - {"down_proj"}
    if not name.endswith("_proj"):
        return None
    (experts, *first), (others, *last) = shapes[name], shapes["down_proj"]
    # sizes alone may permit both orders; the test tells them apart
    for transposed in (False, True):
        rows, columns = first[::-1] if transposed else first
        hidden, inner = last[::-1] if transposed else last
        if experts == others and columns == hidden and rows in (inner, 2 * inner):
            layout = FusedExperts(
                first=name.removesuffix("_proj"),
                last="down",
                experts=experts,
                hidden=hidden,
                inner=inner,
                gated=rows != inner,
                transposed=transposed,
            )
            if _behaves(module, layout):
                return layout
    return None


class SeparateExperts(nn.Module):
    """Experts with one matrix per expert and projection.

    This is the first base of a class whose second base is the module's original class,
    `fused_class`.  The module so keeps its other parameters, and what it computes between the two
    projections.
    """

    fused_class: type[nn.Module]
    layout: FusedExperts
    packed: nn.ModuleList

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of every token's experts, T x H."""
        if torch.compiler.is_compiling():
            return mix_experts(hidden_states, top_k_index, top_k_weights, self.handle)
        return self.mix(hidden_states, top_k_index, top_k_weights)

    def mix(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Compute `forward` expert by expert, each on all of its tokens at once.

        Args:
            hidden_TH: hidden states.
            index_TK: experts of every token; E or more means no expert.
            weight_TK: weights of these experts.
        """
        T, K = index_TK.shape
        experts = self.layout.experts
        # an index beyond the experts means no expert: those tokens form a last group
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
        """Return the input of an expert's last matrix, for some tokens."""
        y_SA = self._project(expert, self.layout.first, x_SN)
        return self._apply_gate(y_SA) if self.layout.gated else self.act_fn(y_SA)

    def outer(self, expert: int, x_SN: Tensor) -> Tensor:
        """Return an expert's output for some tokens, before it is weighted."""
        y_SH = self._project(expert, self.layout.last, x_SN)
        return self.post_expert_norm(y_SH) if getattr(self, "has_post_expert_norm", False) else y_SH

    def _project(self, expert: int, matrix: str, x_SN: Tensor) -> Tensor:
        y_SA = self.packed[expert][matrix](x_SN)
        bias_EA = getattr(self, f"{matrix}_proj_bias", None)
        return y_SA if bias_EA is None else y_SA + bias_EA[expert].to(y_SA.dtype)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # the class is created at run time, so pickle cannot find it by name
        return _empty, (self.fused_class,), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register(self)


def separate(
    module: nn.Module, layout: FusedExperts, make: Callable[[int, str], nn.Module]
) -> None:
    """Turn a module of fused experts, in place, into one with a matrix per expert and projection.

    Args:
        module: the module.
        layout: what `fused_experts` returns for it.
        make: returns the module that is an expert's matrix; called with the index of the expert
            and the name of the matrix.
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
    # transformers reads this mark: it must not initialize the parameters at random
    module._is_hf_initialized = True
    _register(module)


def separate_dense(module: nn.Module, layout: FusedExperts) -> None:
    """Call `separate` with linear layers that share the memory of the fused parameters.

    Args:
        module: the module.
        layout: what `fused_experts` returns for it.
    """
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
    """Undo `separate`, in place, and dequantize packed matrices.

    Args:
        module: the module.
        dtype: dtype of all parameters; default: as they are, packed matrices in the dtype they were
            loaded in.
    """
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
    """Yield the modules of a model whose experts are separate, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, SeparateExperts):
            yield name, module


#: Modules by their handles, for the operator: a graph can hold a number, but no module.
_MODULES: "weakref.WeakValueDictionary[int, SeparateExperts]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()

# the operator waits for the token counts on the host, which a CUDA graph cannot do
_TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("watersic::mix_experts", mutates_args=(), **_TAGS)
def mix_experts(hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, handle: int) -> Tensor:
    """Call `SeparateExperts.mix` of the module with this handle, as one node of a compiled graph.

    How many tokens an expert gets is known only at run time, so the graph cannot contain the
    experts themselves.
    """
    return _MODULES[handle].mix(hidden_TH, index_TK, weight_TK)


@mix_experts.register_fake
def _(hidden_TH, index_TK, weight_TK, handle):
    return torch.empty_like(hidden_TH)


def _no_backward(ctx, grad_y):
    raise RuntimeError(
        "a compiled model has no gradients through quantized experts, which run as one operator. "
        "Train the adapters without torch.compile."
    )


mix_experts.register_autograd(_no_backward)


def _register(module: SeparateExperts) -> None:
    """Give a module a handle of its own, by which `mix_experts` finds it."""
    module.handle = next(_HANDLES)
    _MODULES[module.handle] = module


@functools.cache
def _separate_class(kind: type[nn.Module]) -> type[SeparateExperts]:
    """Return the class of separate experts that is derived from a class of fused experts."""
    return type(f"Separate{kind.__name__}", (SeparateExperts, kind), {"fused_class": kind})


def _empty(kind: type[nn.Module]) -> SeparateExperts:
    """Return an instance without state, which unpickling fills."""
    separate_class = _separate_class(kind)
    return separate_class.__new__(separate_class)


def _behaves(module: nn.Module, layout: FusedExperts) -> bool:
    """Return whether a small copy of a module computes the same with its experts separated."""
    options = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32}
    try:
        # transformers creates models under a meta device context, which would hold here, too
        with torch.no_grad(), torch.device("cpu"):
            probe, layout = _shrunk(module, layout, options)
            hidden_TH = torch.randn(_PROBE_TOKENS, layout.hidden, **options)
            scores_TE = torch.rand(_PROBE_TOKENS, layout.experts, **options)
            weight_TK, index_TK = scores_TE.topk(min(2, layout.experts))
            forward = type(probe).forward
            # the unwrapped forward is the eager one; transformers wraps it to select another
            forward = getattr(forward, "__wrapped__", forward)
            expected_TH = forward(probe, hidden_TH, index_TK, weight_TK)
            separate_dense(probe, layout)
            found_TH = probe.mix(hidden_TH, index_TK, weight_TK)
        return torch.allclose(found_TH, expected_TH, rtol=1e-4, atol=1e-5)
    except Exception:
        # it takes other arguments, or has other parts: not a module of this kind
        return False


def _shrunk(
    module: nn.Module, layout: FusedExperts, options: dict[str, Any]
) -> tuple[nn.Module, FusedExperts]:
    """Return a copy of a module with few small experts and random parameters, and its layout.

    Args:
        module: the module, which may be on meta.
        layout: its layout.
        options: keyword arguments of ``torch.randn``.
    """
    sizes = {layout.inner: 6, 2 * layout.inner: 12}
    sizes.setdefault(layout.hidden, 8)
    sizes.setdefault(layout.experts, min(layout.experts, _PROBE_EXPERTS))
    tensors = [*module.parameters(), *module.buffers()]
    # deepcopy takes what is in its memo: small tensors in place of large ones, the config itself
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
