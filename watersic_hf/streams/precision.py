"""Compute in float32 on processors that compute slowly in half precision."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from watersic_hf.nn import PackedMatrix

logger = logging.getLogger(__name__)

#: Functions of torch that tell whether a CPU multiplies matrices of a dtype at full speed.
_CHECKS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that a device computes in at full speed with tensors of a dtype.

    It is float32 for half precision on a CPU without units for that, where products of matrices
    take 5 to 30 times as long as in float32, and otherwise `dtype`.
    """
    slow = device.type == "cpu" and dtype in _CHECKS and not _has_units(dtype)
    return torch.float32 if slow else dtype


@functools.cache
def _has_units(dtype: torch.dtype) -> bool:
    check = getattr(torch.ops.mkldnn, _CHECKS[dtype], None)
    return check is None or check()


def in_fast_dtype(model: Any) -> Any:
    """Return a model that is in memory, cast to the dtype that its device computes in fast."""
    dtype = fast_dtype(model.dtype, model.device)
    if dtype == model.dtype:
        return model
    _log(model)
    return model.to(dtype)


@contextmanager
def computing_fast(model: Any, device: torch.device | None = None) -> Iterator[None]:
    """Have the tensors of a model in the dtype that is fast, and in their own again afterwards.

    Nothing is lost: float32 holds every value of half precision.  Tensors on meta are left alone.

    Args:
        model: the model; layers may be replaced by quantized ones meanwhile.
        device: device that computes; default: that of each tensor.
    """
    tensors = {n: t for n, t in _own_tensors(model) if t.is_floating_point() and not t.is_meta}
    before = {name: tensor.dtype for name, tensor in tensors.items()}
    dtype = model.dtype
    fast = {n: fast_dtype(t.dtype, device or t.device) for n, t in tensors.items()}
    if fast == before:
        yield
        return
    _log(model)
    for name, tensor in tensors.items():
        tensor.data = tensor.data.to(fast[name])
    del tensors, tensor
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, PackedMatrix) and module.compute_dtype != dtype:
                module.to(dtype)
        for name, tensor in _own_tensors(model):
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.data = tensor.data.to(before.get(name, dtype))


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers, without those of quantized layers."""
    for prefix, module in model.named_modules():
        if not isinstance(module, PackedMatrix):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{prefix}.{name}".lstrip("."), tensor


def _log(model: Any) -> None:
    logger.info(
        "%s: this processor is slow in %s, so the model computes in float32; whatever is saved has "
        "its own dtype.",
        type(model).__name__,
        model.dtype,
    )
