"""Linear maps whose weight is an entropy-coded payload: `PackedMatrix` and `WaterSICLinear`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from watersic_hf.checkpoint import CheckpointError, PackedLayer, tensor_specs
from watersic_hf.nn import ops
from watersic_hf.nn.residency import RESIDENCIES, ResidencyInputs, choose_residency

#: Names of the tensors of each residency that has a layout of its own.
_LAYOUTS = {residency: layout.codes.names() for residency, layout in ops.LAYOUTS.items()}
#: Names of the tensors of all layouts; some are common to several.
_ALL_TENSORS = tuple(dict.fromkeys(name for names in _LAYOUTS.values() for name in names))
#: For each of these residencies a tensor that only its layout has.
_MARKERS = {
    residency: next(n for n in names if sum(n in other for other in _LAYOUTS.values()) == 1)
    for residency, names in _LAYOUTS.items()
}


class PackedMatrix(nn.Module):
    """Linear map with the weight ``diag(row_scale) @ codes @ diag(col_scale)``, codes compressed.

    The life of a `WaterSICLinear`, the layer that is such a map::

        quantize:  layer = WaterSICLinear.from_packed(pack_layer(...), bias=..., dtype=...)
        load:      layer = WaterSICLinear(in, out, payload_bytes=..., ...)   sizes from the file
                   the loader fills weight, row_scale, col_scale, bias
                   layer.check(name); layer.set_residency("dense")
        run:       layer(x)
        save:      state_dict() holds the tensors of `watersic_hf.checkpoint.schema` and the bias
        undo:      layer.dequantize() -> nn.Linear

    The parameter `weight` is the payload, a vector of bytes.  The packed tensors are parameters
    without gradient rather than buffers, so that offloading moves them.  Gradients flow to the
    input.

    Args:
        in_features: N, columns of the weight.
        out_features: A, rows of the weight.
        bias: whether the layer has a bias; default: no.
        payload_bytes: length of the payload.
        dtype: dtype of the dense weight and of the bias; default: torch's default dtype.
        device: device of the parameters.
    """

    #: Scales whose dtype no cast of the module changes: their checksum is that of float16 values.
    fixed_scales = ("row_scale", "col_scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        payload_bytes: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        # not the constructor of nn.Linear or nn.Embedding, which would allocate the dense weight
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype or torch.get_default_dtype()
        for name, (shape, kind) in tensor_specs(out_features, in_features, payload_bytes).items():
            empty = torch.empty(shape, dtype=kind, device=device)
            self.register_parameter(name, nn.Parameter(empty, False))
        self.bias = None
        if bias:
            zeros = torch.zeros(out_features, dtype=self.compute_dtype, device=device)
            self.bias = nn.Parameter(zeros, False)
        self.backend = "auto"
        self.register_buffer("dense_weight", None, persistent=False)
        for name in _ALL_TENSORS:
            self.register_buffer(name, None, persistent=False)
        # transformers reads this mark: it must not initialize the parameters at random
        self._is_hf_initialized = True

    @classmethod
    def from_packed(
        cls,
        packed: PackedLayer,
        *,
        bias: Tensor | None = None,
        codes_AN: Tensor | None = None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> "PackedMatrix":
        """Make a layer that holds the tensors of `packed`.

        Args:
            packed: the stored tensors.
            bias: bias of the layer; default: none.
            codes_AN: the codes, if the caller has them: the layer is then ``dense`` from the start,
                without decoding its payload.
            dtype: dtype of the dense weight and of the bias.
            device: device of the layer; default: where the tensors are.
        """
        rows, columns = packed.shape
        size = len(packed.weight)
        layer = cls(
            columns, rows, bias=bias is not None, payload_bytes=size, dtype=dtype, device="meta"
        )
        for name, tensor in packed.tensors().items():
            setattr(layer, name, nn.Parameter(tensor.to(device), False))
            # transformers reads this mark, as the parent module may initialize its parts' weights
            getattr(layer, name)._is_hf_initialized = True
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(device=device, dtype=dtype), False)
        if codes_AN is not None:
            layer.dense_weight = ops.scale_codes(
                codes_AN.to(device), layer.row_scale, layer.col_scale, dtype
            )
        return layer

    @property
    def packed(self) -> PackedLayer:
        """The stored tensors of this layer."""
        return PackedLayer(
            weight=self.weight.data, row_scale=self.row_scale.data, col_scale=self.col_scale.data
        )

    @property
    def residency(self) -> str:
        """Form of the weight in memory: ``dense``, ``packed``, ``entropy`` or ``stored``."""
        if self.dense_weight is not None:
            return "dense"
        for residency, name in _MARKERS.items():
            if getattr(self, name) is not None:
                return residency
        return "stored"

    @property
    def residency_inputs(self) -> ResidencyInputs:
        """Inputs for resolving ``auto``."""
        return ResidencyInputs(
            device=self.row_scale.device,
            weights=self.in_features * self.out_features,
            stored_bytes=self.weight.nbytes,
            dense_bytes_per_weight=self.compute_dtype.itemsize,
            on_device=self.weight.device == self.row_scale.device,
        )

    def set_residency(self, residency: str, *, backend: str = "auto") -> None:
        """Choose the form of the weight in memory.

        Args:
            residency: ``dense`` decodes the weight once and has the speed and the memory of an
                ordinary layer.  ``packed`` stores the codes in tiles of fixed width, with about 0.8
                bits per weight more than the payload; ``entropy`` stores them in a prefix code,
                with about 0.1 bits more.  CUDA kernels multiply with both directly.  ``stored``
                keeps only the payload and decodes it in every forward.  ``auto`` chooses by device
                and free memory (`choose_residency`).  For every residency except ``stored`` the
                payload stays in host memory.
            backend: implementation for ``packed`` and ``entropy``, one of `ops.BACKENDS`.

        Raises:
            ValueError: an unknown residency or backend.
            CheckpointError: the payload is damaged.
        """
        if residency not in RESIDENCIES:
            raise ValueError(f"residency is {residency!r}, but must be one of {RESIDENCIES}")
        if backend not in ops.BACKENDS:
            raise ValueError(f"backend is {backend!r}, but must be one of {ops.BACKENDS}")
        self.backend = backend
        if residency == "auto":
            residency, _ = choose_residency([self.residency_inputs])
        if residency != self.residency:
            dense_weight = self._decode(self.compute_dtype) if residency == "dense" else None
            tensors = self._encode(residency) if residency in _LAYOUTS else {}
            self.dense_weight = dense_weight
            for name in _ALL_TENSORS:
                setattr(self, name, tensors.get(name))
        self._place_payload()

    def check(self, name: str) -> None:
        """Verify every checksum of the layer.

        Raises:
            CheckpointError: a tensor is damaged; the message names the layer and the tensor.
        """
        self.packed.verify(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias``, in the dtype of `x`, for `x` of shape (..., N)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.dense_weight is not None:
            return F.linear(x, self.dense_weight.to(x.dtype), bias)
        if self.words_G is not None:
            residency = self.residency
            layout = [getattr(self, name) for name in _LAYOUTS[residency]]
            scales = self.row_scale, self.col_scale
            y = ops.coded_linear(x, residency, layout, *scales, self.backend)
        else:
            y = ops.dequant_linear(x, self.weight, self.row_scale, self.col_scale)
        return y if bias is None else y + bias

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an ordinary linear layer with the dequantized weight.

        Args:
            dtype: dtype of the weight and of the bias; default: the dtype the layer was loaded in.
        """
        dtype = dtype or self.compute_dtype
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self._decode(dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype))
        return layer

    def extra_repr(self) -> str:
        """Return sizes, stored bits per weight and residency, for `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.packed.bits_per_weight:.3f}, "
            f"residency={self.residency}"
        )

    def _decode(self, dtype: torch.dtype) -> Tensor:
        try:
            return ops.dequantize(self.weight.data, self.row_scale.data, self.col_scale.data, dtype)
        except ValueError as error:
            raise CheckpointError(f"the stored weight cannot be decoded: {error}") from error

    def _encode(self, residency: str) -> dict[str, Tensor]:
        """Encode the codes in the layout of a residency; return its tensors by name."""
        try:
            codes_AN = ops.decode(self.weight.data, self.row_scale.device, self.backend)
        except ValueError as error:
            raise CheckpointError(f"the stored weight cannot be decoded: {error}") from error
        return ops.encode(codes_AN, residency).tensors()

    def _place_payload(self) -> None:
        """Move the payload to where it is needed: next to the scales, or into host memory."""
        device = self.row_scale.device if self.residency == "stored" else torch.device("cpu")
        if self.weight.device not in (device, torch.device("meta")):
            # in place, as a tied output head shares the parameter
            self.weight.data = self.weight.data.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast the layer; `fixed_scales` move but keep their dtype."""
        scales = {name: getattr(self, name).data for name in self.fixed_scales}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            device = getattr(self, name).device
            setattr(self, name, nn.Parameter(before.to(device), False))
        if self.dense_weight is not None:
            self.compute_dtype = self.dense_weight.dtype
        self._place_payload()
        return self


class WaterSICLinear(PackedMatrix, nn.Linear):
    """A quantized linear layer.  It is an `nn.Linear`, so that adapters find it."""
