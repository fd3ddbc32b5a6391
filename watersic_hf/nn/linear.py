"""Linear maps that hold their weight as an entropy-coded payload; WaterSICLinear is the layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from watersic_hf.checkpoint import CheckpointError, PackedLayer, tensor_specs
from watersic_hf.nn import ops
from watersic_hf.nn.residency import RESIDENCIES, Held, choose_residency

#: Names of the tensors of the residencies with a layout of their own, and of all of them.
_LAYOUTS = {residency: kind.names() for residency, kind in ops.LAYOUTS.items()}
_LAID_OUT = tuple(dict.fromkeys(name for names in _LAYOUTS.values() for name in names))


class PackedMatrix(nn.Module):
    """Linear map whose weight is ``diag(row_scale) @ codes @ diag(col_scale)``, codes compressed.

    Life of a `WaterSICLinear`, the layer that is such a map::

        quantize:  layer = WaterSICLinear.from_packed(pack_layer(...), bias=..., dtype=...)
        load:      layer = WaterSICLinear(in, out, payload_bytes=..., ...)   sizes from the file
                   the loader fills weight, row_scale, col_scale, bias
                   layer.check(name); layer.set_residency("dense")
        run:       layer(x)
        save:      state_dict() holds what `watersic_hf.checkpoint.schema` says, and the bias
        undo:      layer.dequantize() -> nn.Linear

    `weight` is the payload: a vector of bytes.  The packed tensors are parameters without gradient
    rather than buffers, so that offloading moves them.  Gradients flow to the input.

    Args:
        in_features: N.
        out_features: A.
        bias: whether the layer has a bias.
        payload_bytes: length of the payload.
        dtype: dtype of the dense weight and of the bias.
        device: where the parameters are made.
    """

    #: Scales whose dtype no cast of the module changes: their checksum is that of float16.
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
        # not that of nn.Linear or nn.Embedding: it would allocate the dense weight
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype or torch.get_default_dtype()
        for name, (shape, kind) in tensor_specs(out_features, in_features, payload_bytes).items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, dtype=kind, device=device), False)
            )
        self.bias = None
        if bias:
            self.bias = nn.Parameter(
                torch.zeros(out_features, dtype=self.compute_dtype, device=device), False
            )
        self.backend = "auto"
        self.register_buffer("dense_weight", None, persistent=False)
        for name in _LAID_OUT:
            self.register_buffer(name, None, persistent=False)
        # read by transformers: nothing here is to be initialised at random
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
        """A layer that holds the tensors of `packed`, with a copy of `bias`.

        With `codes_AN`, what the payload decodes to, its residency is ``dense`` without decoding.
        """
        rows, columns = packed.shape
        layer = cls(
            columns, rows, bias=bias is not None, payload_bytes=len(packed.weight), dtype=dtype,
            device="meta",
        )  # fmt: skip
        for name, tensor in packed.tensors().items():
            setattr(layer, name, nn.Parameter(tensor.to(device), False))
            # read by transformers: the module around may initialise the weights of its parts
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
        if self.words_G is None:
            return "stored"
        return "packed" if self.first_BS is None else "entropy"

    @property
    def held(self) -> Held:
        """What is chosen by, for ``auto``."""
        return Held(
            device=self.row_scale.device, weights=self.in_features * self.out_features,
            stored_bytes=self.weight.nbytes, dense_bytes_per_weight=self.compute_dtype.itemsize,
            on_device=self.weight.device == self.row_scale.device,
        )  # fmt: skip

    def set_residency(self, residency: str, *, backend: str = "auto") -> None:
        """Choose the form of the weight in memory.

        Args:
            residency: ``dense`` decodes the weight once: the speed of an ordinary layer and its
                memory.  ``packed`` keeps the codes in columns of fixed width, some 0.8 bits per
                weight above the payload, and ``entropy`` in a prefix code, about 0.1 bit above it;
                on CUDA kernels multiply with both as they are.  ``stored`` keeps the payload alone
                and decodes it in every forward.  ``auto`` chooses by device and free memory
                (`choose_residency`).  Beside another form the payload rests in host memory.
            backend: of ``packed`` and ``entropy``, one of `ops.BACKENDS`.

        Raises:
            ValueError: another word.
            CheckpointError: the payload or the scales are damaged.
        """
        if residency not in RESIDENCIES:
            raise ValueError(f"residency is {residency!r}, but must be one of {RESIDENCIES}")
        if backend not in ops.BACKENDS:
            raise ValueError(f"backend is {backend!r}, but must be one of {ops.BACKENDS}")
        self.backend = backend
        if residency == "auto":
            residency, _ = choose_residency([self.held])
        if residency != self.residency:
            dense_weight = self._decode(self.compute_dtype) if residency == "dense" else None
            laid_out = self._lay_out(residency) if residency in _LAYOUTS else {}
            self.dense_weight = dense_weight
            for name in _LAID_OUT:
                setattr(self, name, laid_out.get(name))
        self._place_payload()

    def check(self, name: str) -> None:
        """Verify every checksum of the layer.

        Raises:
            CheckpointError: something is damaged; the message names the layer and the part.
        """
        self.packed.verify(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias`` for x of any leading shape, in the dtype of x."""
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
        """An ordinary linear layer with the dequantized weight, in `dtype` (default: as loaded)."""
        dtype = dtype or self.compute_dtype
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self._decode(dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype))
        return layer

    def extra_repr(self) -> str:
        """Sizes, stored bits per weight and residency, for `repr`."""
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

    def _lay_out(self, residency: str) -> dict[str, Tensor]:
        """The buffers of a residency with a layout of its own."""
        try:
            codes_AN = ops.decode(self.weight.data, self.row_scale.device, self.backend)
        except ValueError as error:
            raise CheckpointError(f"the stored weight cannot be decoded: {error}") from error
        return ops.encode(codes_AN, residency).tensors()

    def _place_payload(self) -> None:
        """Have the payload where it is needed: beside the scales, or else in host memory."""
        device = self.row_scale.device if self.residency == "stored" else torch.device("cpu")
        if self.weight.device not in (device, torch.device("meta")):
            # in place: an output head may share the parameter
            self.weight.data = self.weight.data.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast the layer; the scales move, but keep their dtype: the codes need it."""
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
    """The quantized form of a linear layer; an `nn.Linear`, so that adapters find it."""
