"""Record which stored tensors a decoded or repacked weight was made from."""

import torch
from torch import Tensor, nn

Parameters = dict[str, nn.Parameter]


class Source:
    """The stored tensors that another form of a weight was made from, as they were at the time.

    A loader may write into a parameter, give it other data, or put another parameter in its place.
    The first changes the version of the tensor, the others its address; `is_current` looks at both
    and costs about a microsecond.  Views keep the old memory alive, so that no later tensor can
    have its address, and its values can be compared.

    Args:
        tensors: the stored tensors by name.
    """

    def __init__(self, tensors: Parameters) -> None:
        self.parameters = tensors
        self.views = {name: tensor.detach() for name, tensor in tensors.items()}
        self.marks = {
            name: (view, view.data_ptr(), None if view.is_inference() else view._version)
            for name, view in self.views.items()
        }

    def is_current(self, found: Parameters) -> bool:
        """Return whether no tensor was written, and none has moved."""
        for name, (view, address, version) in self.marks.items():
            if found[name].data_ptr() != address:
                return False
            # tensors of inference mode have no version
            if version is not None and version != view._version:
                return False
        return True

    def same_parameters(self, found: Parameters) -> bool:
        """Return whether the parameters are the same objects: as much as a compiler can follow."""
        return all(found[name] is tensor for name, tensor in self.parameters.items())

    def same_values(self, found: Parameters) -> bool:
        """Return whether other tensors have the values that these had: copied, moved or cast."""
        return all(
            self._unwritten(name) and _equal(found[name], view) for name, view in self.views.items()
        )

    def _unwritten(self, name: str) -> bool:
        view, _, version = self.marks[name]
        return version is not None and version == view._version


def _equal(found: Tensor, expected: Tensor) -> bool:
    dtype = torch.promote_types(found.dtype, expected.dtype)
    found = found.detach().to(expected.device, dtype)
    return found.shape == expected.shape and torch.equal(found, expected.to(dtype))
