"""Linear maps whose weight is an entropy-coded payload: `PackedMatrix` and `WaterSICLinear`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from watersic_hf import codec
from watersic_hf.checkpoint import CheckpointError, PackedLayer, tensor_specs
from watersic_hf.nn import ops
from watersic_hf.nn.backends import BACKENDS
from watersic_hf.nn.bands import scale_codes
from watersic_hf.nn.decoding import decode
from watersic_hf.nn.paging import release
from watersic_hf.nn.residency import RESIDENCIES, ResidencyInputs, choose_residency
from watersic_hf.nn.source import Source

#: Dtypes in which the packed tensors are stored, by name.
_STORED_DTYPES = {name: kind for name, (_, kind) in tensor_specs(0, 0, 0).items()}
#: Names of the tensors of each residency that has a layout of its own.
_LAYOUTS = {residency: layout.codes.names() for residency, layout in ops.LAYOUTS.items()}
#: Names of the tensors of all layouts; some are common to several.
_ALL_TENSORS = tuple(dict.fromkeys(name for names in _LAYOUTS.values() for name in names))


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

    A weight in another form than the payload is made again when the packed tensors change, whether
    by `load_state_dict` or by new parameters; see `refresh`.

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
        # the residency whose layout holds the codes; None if none does
        self.coded_as: str | None = None
        # the tensors that the weight below was made from; None if there is none, or is outdated
        self.source: Source | None = None
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
            scales = layer.row_scale, layer.col_scale
            layer.hold_dense(scale_codes(codes_AN.to(device), *scales, dtype))
        return layer

    @property
    def packed(self) -> PackedLayer:
        """The stored tensors of this layer, in the dtypes of the file."""
        parameters = self._packed_parameters()
        return PackedLayer(**{n: p.data.to(_STORED_DTYPES[n]) for n, p in parameters.items()})

    @property
    def residency(self) -> str:
        """Form of the weight in memory: ``dense``, ``packed``, ``entropy`` or ``stored``."""
        if self.dense_weight is not None:
            return "dense"
        return self.coded_as or "stored"

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
                payload stays in host memory, or in the file that it is mapped from.
            backend: implementation for ``packed`` and ``entropy``, one of `BACKENDS`.

        Raises:
            ValueError: an unknown residency or backend.
            CheckpointError: the payload is damaged.
        """
        if residency not in RESIDENCIES:
            raise ValueError(f"residency is {residency!r}, but must be one of {RESIDENCIES}")
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, but must be one of {BACKENDS}")
        self.backend = backend
        if residency == "auto":
            residency, _ = choose_residency([self.residency_inputs])
        if residency != self.residency:
            self._make(residency)
        else:
            self.refresh()
        self._place_payload()

    def hold_dense(self, weight_AN: Tensor) -> None:
        """Take over a dense weight that the caller has made from the present packed tensors."""
        self.dense_weight, self.coded_as = weight_AN, None
        for name in _ALL_TENSORS:
            setattr(self, name, None)
        self._note_source()

    def refresh(self) -> None:
        """Make the weight again if the packed tensors are not those that it was made from.

        Called by every forward that is not compiled; `load_state_dict` calls it for compiled ones,
        too.  Only writing into ``parameter.data`` in place goes unnoticed: set the residency to
        ``stored`` before that, and back after it.

        Raises:
            CheckpointError: the payload is damaged.
        """
        found = self._packed_parameters()
        if self.source is not None and self.source.is_current(found):
            return
        residency = self.residency
        if residency == "stored" or any(tensor.is_meta for tensor in found.values()):
            return
        if self.source is not None and self.source.same_values(found):
            self._place_payload()
            self._note_source()
        else:
            self._make(residency)
            self._place_payload()

    def check(self, name: str) -> None:
        """Verify every checksum of the layer.

        Raises:
            CheckpointError: a tensor is damaged; the message names the layer and the tensor.
        """
        self.packed.verify(name)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias``, for `x` of shape (..., N).

        The result has the dtype of `x`, or under autocast that of an ordinary linear layer.
        """
        x = x.to(ops.autocast_dtype(x))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        current = self._is_current()
        if current and self.dense_weight is not None:
            return F.linear(x, self.dense_weight.to(x.dtype), bias)
        if current and self.words_G is not None:
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

    def _packed_parameters(self) -> dict[str, nn.Parameter]:
        return {name: self._parameters[name] for name in _STORED_DTYPES}

    def _is_current(self) -> bool:
        """Return whether the weight is up to date, after an attempt to make it so.

        A compiled graph cannot decode: where it finds other parameters it uses the payload.
        """
        if not torch.compiler.is_compiling():
            self.refresh()
            return True
        return self.source is not None and self.source.same_parameters(self._packed_parameters())

    def _note_source(self) -> None:
        self.source = Source(self._packed_parameters()) if self.residency != "stored" else None

    def _make(self, residency: str) -> None:
        """Make the weight in the form of a residency from the packed tensors."""
        dense_weight = self._decode(self.compute_dtype) if residency == "dense" else None
        tensors = self._encode(residency) if residency in _LAYOUTS else {}
        self.dense_weight = dense_weight
        self.coded_as = residency if residency in _LAYOUTS else None
        for name in _ALL_TENSORS:
            setattr(self, name, tensors.get(name))
        self._note_source()

    def _decode(self, dtype: torch.dtype) -> Tensor:
        try:
            return ops.dequantize(self.weight.data, self.row_scale.data, self.col_scale.data, dtype)
        except ValueError as error:
            raise CheckpointError(f"the stored weight cannot be decoded: {error}") from error

    def _encode(self, residency: str) -> dict[str, Tensor]:
        """Encode the codes in the layout of a residency; return its tensors by name."""
        try:
            codes_AN = decode(self.weight.data, self.row_scale.device, self.backend)
        except ValueError as error:
            raise CheckpointError(f"the stored weight cannot be decoded: {error}") from error
        return ops.encode(codes_AN, residency, codec.read_path(self.weight.data)).tensors()

    def _place_payload(self) -> None:
        """Move the payload to where it is needed: next to the scales, or into host memory."""
        device = self.row_scale.device if self.residency == "stored" else torch.device("cpu")
        if self.weight.device not in (device, torch.device("meta")):
            # in place, as a tied output head shares the parameter
            self.weight.data = self.weight.data.to(device)
            if self.source is not None:
                self._note_source()
        if self.residency != "stored" and self.weight.device.type == "cpu":
            release(self.weight.data)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast the layer; `fixed_scales` move but keep their dtype."""
        self.refresh()
        # the layer may hold no tensor of the dtype that is cast
        self.compute_dtype = fn(self.row_scale.new_empty(0, dtype=self.compute_dtype)).dtype
        scales = {name: getattr(self, name).data for name in self.fixed_scales}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            device = getattr(self, name).device
            setattr(self, name, nn.Parameter(before.to(device), False))
        self._place_payload()
        self._note_source()
        if self.coded_as is not None:
            layout = [getattr(self, name) for name in _LAYOUTS[self.coded_as]]
            ops.LAYOUTS[self.coded_as].prepare(layout[0].device, layout)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Save the packed tensors in the dtypes of the file, whatever they were cast to."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dtype in _STORED_DTYPES.items():
            destination[f"{prefix}{name}"] = destination[f"{prefix}{name}"].to(dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load the packed tensors, a payload of any length, and make the weight again."""
        resize_payload(self.weight, state_dict.get(f"{prefix}weight"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if any(f"{prefix}{name}" in state_dict for name in _STORED_DTYPES):
            *_, error_msgs = args
            self.reload(prefix, error_msgs)

    def reload(self, prefix: str, error_msgs: list[str]) -> None:
        """Make the weight again after loading.

        Args:
            prefix: name of the layer and a dot, for messages.
            error_msgs: receives what was wrong with the loaded tensors.
        """
        self.source = None
        try:
            self.refresh()
        except CheckpointError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling and copying; addresses and versions would change."""
        self.refresh()
        return self.__dict__ | {"source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._note_source()


def resize_payload(parameter: nn.Parameter, payload: Tensor | None) -> None:
    """Give the parameter of a payload the length of one that is about to be loaded."""
    fits = payload is None or payload.shape == parameter.shape
    if not fits and payload.ndim == 1 and payload.dtype == parameter.dtype:
        # in place, as a tied output head shares the parameter
        parameter.data = parameter.data.new_empty(payload.shape)


class WaterSICLinear(PackedMatrix, nn.Linear):
    """A quantized linear layer.  It is an `nn.Linear`, so that adapters find it."""
