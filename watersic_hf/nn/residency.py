"""Which form the weights have in device memory, where nobody has chosen one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: The forms that a weight can have in memory; see `PackedMatrix.set_residency`.
RESIDENCIES = ("auto", "dense", "packed", "entropy", "stored")

#: Bits per weight that a form takes above the stored ones, at most, of real layers.
PACKED_BITS, ENTROPY_BITS = 0.85, 0.12

#: Share of the free memory that weights may take; the rest is for activations and caches.
SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the choice needs to know of a layer."""

    device: torch.device
    """Where its scales are, and its weight is to be."""

    weights: int
    """Weights of the layer."""

    stored_bytes: int
    """Bytes of its payload."""

    dense_bytes_per_weight: int
    """Bytes of a weight in the dtype that it would be decoded to."""

    on_device: bool
    """Whether the payload is on the device now; there it makes room for another form."""


def choose_residency(layers: Sequence[Held], *, free: int | None = None) -> tuple[str, str]:
    """The form of layers that share a device, and the reason.

    Dense weights run at the speed that is known, so they are taken where they leave room; then the
    faster of the compressed forms that does.

    Args:
        layers: of one device; at least one.
        free: bytes of memory that are free there; default: as the device says.
    """
    device = layers[0].device
    if device.type != "cuda":
        return "dense", f"kernels for compressed weights run on CUDA, not on {device.type}"
    if free is None:
        free, _ = torch.cuda.mem_get_info(device)
        # what torch keeps of freed memory is free to us
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free += sum(layer.stored_bytes for layer in layers if layer.on_device)
    weights = sum(layer.weights for layer in layers)
    stored = sum(layer.stored_bytes for layer in layers)
    sizes = {
        "dense": sum(layer.weights * layer.dense_bytes_per_weight for layer in layers),
        "packed": stored + PACKED_BITS * weights / 8,
        "entropy": stored + ENTROPY_BITS * weights / 8,
    }
    residency = next((form for form, size in sizes.items() if size <= SHARE * free), "entropy")
    told = ", ".join(f"{form} {size / 1e9:.2f}" for form, size in sizes.items())
    return residency, f"weights would take (GB) {told}, and {SHARE:.0%} of {free / 1e9:.2f} may go"
