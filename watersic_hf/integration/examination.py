"""Find layers whose weights other modules use, by running a copy of the model without memory.

A quantized layer computes what the dense one did, but has no weight that its model could multiply
with, divide or measure itself.
"""

import copy
import logging
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from watersic_hf.streams.batches import model_inputs

logger = logging.getLogger(__name__)

#: Tokens that the copy reads.
_TOKENS = 4
#: What may be read of a weight: it is the same for its payload.
_HARMLESS = (Tensor.device.__get__, Tensor.is_meta.__get__, Tensor.is_cuda.__get__)
_DTYPE = Tensor.dtype.__get__
_VALUES = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item)
#: Values of tensors that a run may ask for; more of them may be a loop without end.
_MOST_VALUES = 10_000


def on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose tensors are on meta, and take no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def kind_of(name: str) -> str:
    """Return the name of a module with ``*`` for its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


@torch.no_grad()
def weights_used_elsewhere(
    model: nn.Module, layers: Collection[str], *, bypassed: Collection[str] = ()
) -> set[str]:
    """Return the layers whose weight is used outside of their own forward pass.

    A copy of the model reads a few tokens on meta.  A model that cannot do so is examined as far as
    it runs; what is found in one block holds for all blocks.

    Args:
        model: the model; it is not changed, nor run.
        layers: names of the layers to watch.
        bypassed: names of modules that return their input: experts, whose choice depends on data.
    """
    found: set[str] = set()
    try:
        copied = on_meta(model).eval()
        for name in layers:
            _watch(copied.get_submodule(name), lambda name=name: found.add(kind_of(name)))
        for name in bypassed:
            copied.get_submodule(name).forward = lambda hidden, *args, **kwargs: hidden
        with torch.device("meta"), _ValuesAreOne():
            tokens_BT = torch.zeros(1, _TOKENS, dtype=torch.long)
            copied(**model_inputs(copied, tokens_BT))
    except Exception as error:
        # whatever is raised here says nothing about the model, which may need data to run
        logger.debug("%s was not examined to its end: %s", type(model).__name__, error)
    return {name for name in layers if kind_of(name) in found}


class _WatchedWeight(Tensor):
    """The weight of a layer as other modules get it; it tells what is done with it."""

    report: Callable[[], object]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Report any use; the dtype is that of a payload, which does no harm by itself."""
        if func == _DTYPE:
            return torch.uint8
        if func not in _HARMLESS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, _WatchedWeight):
                    leaf.report()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _ValuesAreOne(TorchFunctionMode):
    """Let the values of tensors on meta be one, and conditions be true.

    The conditions of transformers ask whether no token is masked.
    """

    asked = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return one where a number is made of a tensor."""
        if func not in _VALUES:
            return func(*args, **(kwargs or {}))
        self.asked += 1
        if self.asked > _MOST_VALUES:
            raise RuntimeError(f"more than {_MOST_VALUES} values of tensors are needed")
        return {Tensor.__bool__: True, Tensor.__float__: 1.0}.get(func, 1)


def _watch(module: nn.Module, report: Callable[[], object]) -> None:
    """Make a layer report the use of its weight by others, and inputs of the payload's dtype."""
    kind, depth = type(module), 0

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        dtype = self._parameters["weight"].dtype
        if x.dtype == torch.uint8:
            # it was cast to the dtype of the weight
            report()
            x = x.to(dtype)
        depth += 1
        try:
            return kind.forward(self, x, *args, **kwargs)
        finally:
            depth -= 1

    def weight(self: nn.Module) -> Tensor:
        parameter = self._parameters["weight"]
        if depth:
            return parameter
        watched = parameter.detach().as_subclass(_WatchedWeight)
        watched.report = report
        return watched

    module.__class__ = type(
        kind.__name__, (kind,), {"forward": forward, "weight": property(weight)}
    )
