"""Where the layers of a model are: its blocks, and the layers of a block that share an input.

Read from the modules and from the data that flows through them; no table of architectures.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn


def decoder_blocks(model: nn.Module, layers: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model, in order, with their names.

    They are the entries of the outermost `nn.ModuleList` that holds most of `layers`.

    Raises:
        ValueError: no list of modules holds any of the layers.
    """
    layers = list(layers)
    lists = [
        (sum(layer.startswith(f"{name}.") for layer in layers), -name.count("."), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    held, _, name = max(lists, default=(0, 0, ""))
    if held == 0:
        raise ValueError(
            f"{type(model).__name__}: no list of blocks holds any of the {len(layers)} linear "
            f"layers to quantize, so the model cannot be calibrated block by block. Quantize it "
            f"without `dataset`."
        )
    return [(f"{name}.{i}", block) for i, block in enumerate(model.get_submodule(name))]


@dataclass(frozen=True)
class InputGroup:
    """Layers of one block that are applied to the same tensor, as q, k and v are."""

    layers: tuple[str, ...]
    """Names within the block, in the order in which they are called."""

    calls: int
    """How often the first of them is called in one forward of the block."""


def input_groups(
    block: nn.Module, layers: Iterable[str], run: Callable[[], object]
) -> list[InputGroup]:
    """Group a block's layers by the tensor that they are applied to, in the order of use.

    Args:
        block: the block.
        layers: names within the block of the layers to group.
        run: runs the block once, on any input.

    Returns:
        The groups.  Layers that `run` does not reach are in none of them.
    """
    seen: list[tuple[str, Tensor]] = []

    def record(name: str) -> Callable:
        return lambda module, args: seen.append((name, args[0]))

    handles = [block.get_submodule(name).register_forward_pre_hook(record(name)) for name in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()

    groups: list[tuple[Tensor, list[str]]] = []
    for name, tensor in seen:
        if any(name in names for _, names in groups):
            continue
        for shared, names in groups:
            if shared is tensor:
                names.append(name)
                break
        else:
            groups.append((tensor, [name]))
    calls = [name for name, _ in seen]
    return [InputGroup(tuple(names), calls.count(names[0])) for _, names in groups]
