"""Make the scales of the quantized layers of a model trainable.

Shapes: A = out_features (rows), N = in_features (columns), T = tokens.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from watersic_hf import codec
from watersic_hf.core import to_smallest_dtype
from watersic_hf.nn import PackedMatrix, WaterSICLinear, packed_layers, replace_module


class _ScaledProduct(torch.autograd.Function):
    r"""``y = x @ W.T`` for ``W = diag(row) @ codes @ diag(col)``, with gradients of the scales.

    The derivative with respect to the logarithm of a row's scale is :math:`\sum_T g_{TA} y_{TA}`,
    where g is the gradient of y; with respect to that of a column's scale it is
    :math:`\sum_T x_{TN} (g W)_{TN}`.  Both come from products that the backward pass computes
    anyway, and the gradient of W is never formed.  A scale is its stored value times a factor, so
    the derivative with respect to the factor is that sum divided by the factor.  Gradients pass
    straight through the rounding of the scales and of W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_AN: Tensor, row_factor_A: Tensor, col_factor_N: Tensor
    ) -> Tensor:
        y = F.linear(x, weight_AN)
        ctx.save_for_backward(x, y, weight_AN, row_factor_A, col_factor_N)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight_AN, row_factor_A, col_factor_N = ctx.saved_tensors
        grad_x = grad_y @ weight_AN
        grad_row_A = _sum_of_products(grad_y, y) / row_factor_A
        grad_col_N = _sum_of_products(x, grad_x) / col_factor_N
        return grad_x, None, grad_row_A, grad_col_N


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum a * b over all dimensions but the last, in float32."""
    return (a.float() * b.float()).flatten(0, -2).sum(0)


class TrainableLinear(nn.Module):
    """Replacement of a `PackedMatrix` during finetuning.

    Its forward pass computes exactly what the `PackedMatrix` will compute with the trained scales.

    Args:
        layer: the quantized layer; its bias is used as it is.
    """

    def __init__(self, layer: PackedMatrix) -> None:
        super().__init__()
        device = layer.row_scale.device
        self.codes = to_smallest_dtype(codec.decode(layer.weight.data)).to(device)
        self.row_scale, self.col_scale = layer.row_scale.data.float(), layer.col_scale.data.float()
        self.row_factor = nn.Parameter(torch.ones_like(self.row_scale))
        self.col_factor = nn.Parameter(torch.ones_like(self.col_scale))
        self.bias = layer.bias
        self.compute_dtype = layer.compute_dtype

    def factors(self) -> dict[str, nn.Parameter]:
        """Return the trained factors by their names within the layer."""
        return {"row_factor": self.row_factor, "col_factor": self.col_factor}

    def scales(self, row_factor_A: Tensor, col_factor_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales of rows and columns for given factors, rounded as they are stored."""
        return (self.row_scale * row_factor_A).half(), (self.col_scale * col_factor_N).half()

    @torch.no_grad()
    def weight(self, row_scale_A: Tensor, col_scale_N: Tensor) -> Tensor:
        """Return the dense weight for given scales, bit-equal to that of the stored layer."""
        # the same expression as in `watersic_hf.nn.ops.dequantize`
        weight_AN = row_scale_A[:, None].float() * (self.codes * col_scale_N.float())
        return weight_AN.to(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias`` in the dtype of x."""
        factors = (self.row_factor, self.col_factor)
        weight_AN = self.weight(*self.scales(*(factor.detach() for factor in factors)))
        y = _ScaledProduct.apply(x, weight_AN.to(x.dtype), *factors)
        # the gradient of a row's factor needs the product as saved in the forward pass: without the
        # bias, and not clamped in place, as some models do with the output of a layer
        return y.clone() if self.bias is None else y + self.bias.to(x.dtype)


def layers_to_train(model: nn.Module) -> dict[str, PackedMatrix]:
    """Return the quantized layers whose scales are trained, by name.

    Raises:
        ValueError: no layer is quantized, or some are offloaded.
    """
    # linear layers and the matrices of experts, but no vocabulary matrices, which are subclasses
    kinds = (WaterSICLinear, PackedMatrix)
    layers = {name: layer for name, layer in packed_layers(model) if type(layer) in kinds}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer quantized with WaterSIC, but finetuning trains "
            f"only the scales of such layers. Quantize the model first."
        )
    offloaded = [name for name, layer in layers.items() if layer.weight.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} of {len(layers)} quantized layers are offloaded ({offloaded[0]}, "
            f"...), but finetuning needs all of them in memory. Load the model without offloading."
        )
    return layers


@contextlib.contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode and turn off the gradients of their present parameters."""
    modules = [(m, m.training) for model in models for m in model.modules()]
    parameters = [(p, p.requires_grad) for model in models for p in model.parameters()]
    for model in models:
        model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def trainable(
    model: nn.Module, layers: Mapping[str, PackedMatrix]
) -> Iterator[dict[str, TrainableLinear]]:
    """Replace the given quantized layers of a model by trainable ones.

    Args:
        model: the model.
        layers: its layers to replace, by name; the model has them back on exit, with the residency
            that they had.

    Yields:
        The trainable layers by name.
    """
    dense = {name for name, layer in layers.items() if layer.residency == "dense"}
    replaced: dict[str, TrainableLinear] = {}
    try:
        for name, layer in tqdm(layers.items(), desc="Decoding weights", delay=3, leave=False):
            # frees the weight in its other form, as the codes take memory now
            layer.set_residency("stored")
            replaced[name] = TrainableLinear(layer)
            replace_module(model, name, replaced[name])
        yield replaced
    finally:
        for name, layer in layers.items():
            if name in replaced:
                replace_module(model, name, layer)
                if name in dense:
                    # from the decoded codes: decoding again would take as long as loading the model
                    scales = layer.row_scale.data, layer.col_scale.data
                    layer.hold_dense(replaced.pop(name).weight(*scales))
            elif name in dense:
                layer.set_residency("dense")


@contextlib.contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Keep only the inputs of blocks for the backward pass, and recompute the rest.

    Gradient checkpointing of transformers works in training mode only, which would enable dropout.
    """
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block, _ in before:
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
        yield
    finally:
        for block, forward in before:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
