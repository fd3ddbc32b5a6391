"""Where kernels are launched: on the device of their tensors, which need not be the current one."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


def on_device_of_tensors(launcher: Launcher) -> Launcher:
    """Have a function run with the device of its first tensor argument as the current one.

    Triton launches on the current device; tensors on another would not be accessible there.
    """

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in args if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return launcher(*args, **kwargs)

    return launch
