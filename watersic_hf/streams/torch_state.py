"""The global state of torch, which must not change what is computed."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

#: Device types whose autocast is turned off.
_DEVICE_TYPES = ("cpu", "cuda")


@contextlib.contextmanager
def default_torch_state() -> Iterator[None]:
    """Run with the defaults of torch, whatever the caller has set; also usable as a decorator.

    These are: gradients and neither autocast nor inference mode, new tensors in float32 on the CPU,
    and products of float32 matrices in full precision.  A demand for deterministic algorithms
    stays, but an operation that has none warns instead of failing.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _DEVICE_TYPES:
            # entering it for a device that is missing would warn
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # slows down every call of torch, so only where it is needed
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        precision = torch.get_float32_matmul_precision()
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")
        if torch.are_deterministic_algorithms_enabled():
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield


@torch.no_grad()
def replace_inference_tensors(model: nn.Module) -> None:
    """Replace tensors that were made in inference mode by copies, outside of that mode.

    Autograd cannot use them, and they cannot be changed in place.  Tensors that modules share stay
    shared.

    Args:
        model: the model; changed in place.
    """
    places: dict[int, list[tuple[dict, str]]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and value.is_inference():
                    places.setdefault(id(value), []).append((tensors, name))
    for uses in places.values():
        tensors, name = uses[0]
        value = tensors[name]
        copy = value.clone()
        if isinstance(value, nn.Parameter):
            copy = nn.Parameter(copy, value.requires_grad)
        # marks of transformers, as that a parameter is initialized
        vars(copy).update(vars(value))
        for tensors, name in uses:
            tensors[name] = copy
