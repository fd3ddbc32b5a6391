"""The block loop: capture, quantize, replace, propagate.

Every block is calibrated on what the quantized blocks before it put out, and within a block every
group of layers on what the quantized groups before it put out, so that later layers can make up for
the errors of earlier ones.
"""

import functools
import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from watersic_hf.calibration.capture import BlockStream, block_stream, group_moments
from watersic_hf.calibration.layer import LayerQuantizer
from watersic_hf.calibration.report import average_bits
from watersic_hf.calibration.topology import decoder_blocks, input_groups
from watersic_hf.nn import WaterSICLinear, replace_module

logger = logging.getLogger(__name__)


@torch.no_grad()
def quantize_blocks(
    model: nn.Module,
    windows: Sequence[Tensor],
    layers: Iterable[str],
    quantizer: LayerQuantizer,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> None:
    """Quantize the layers of a model in place, block by block, on calibration windows.

    Args:
        model: a model in evaluation mode whose blocks map hidden states to hidden states.
        windows: 1-D token ids.
        layers: names of the `nn.Linear` modules to quantize.
        quantizer: does the layers, and holds their budget and reports.
        batch_size: windows in a batch.
        device: where blocks are moved to while it is their turn; default: they stay where they are.

    Layers outside the blocks, or that no calibration window reaches, stay as they are, with a
    warning that names them.

    Raises:
        CalibrationError: a layer cannot be quantized; the message names it.
    """
    layers = list(layers)
    blocks = decoder_blocks(model, layers)
    _warn_of_few_tokens(model, windows, layers)
    stream = block_stream(model, [block for _, block in blocks], windows, batch_size=batch_size)
    done: set[str] = set()
    with tqdm(total=len(layers), desc="Quantizing", unit="layer") as bar:
        for index, (name, block) in enumerate(blocks):
            home = next(block.parameters()).device
            block.to(device or home)
            inside = [n.removeprefix(f"{name}.") for n in layers if n.startswith(f"{name}.")]
            for layer in _quantize_block(index, name, block, inside, stream, quantizer):
                done.add(layer)
                bar.set_postfix_str(
                    f"block {index + 1}/{len(blocks)}, {layer.removeprefix(f'{name}.')}, "
                    f"{average_bits(quantizer.reports):.3f} bits, "
                    f"error {quantizer.reports[-1].error:.2g}"
                )
                bar.update()
            stream.advance(index, block)
            block.to(home)
    left = [layer for layer in layers if layer not in done]
    if left:
        logger.warning(
            "Left dense, since no calibration data reaches them: %s. Name them in "
            "`modules_to_not_convert` to say so on purpose.",
            ", ".join(left),
        )


def _warn_of_few_tokens(model: nn.Module, windows: Sequence[Tensor], layers: Sequence[str]) -> None:
    """Say so when there are fewer than two tokens for every input of the widest layer."""
    tokens = sum(len(window) for window in windows)
    columns = max(model.get_submodule(layer).in_features for layer in layers)
    if tokens < 2 * columns:
        logger.warning(
            "%d calibration tokens do not determine the moments of %d inputs, and the result can "
            "be worse than without data. Use at least %d tokens, better a hundred times as many, "
            "or raise `damping` (3e-2).",
            tokens,
            columns,
            2 * columns,
        )


def _quantize_block(
    index: int,
    name: str,
    block: nn.Module,
    layers: Sequence[str],
    stream: BlockStream,
    quantizer: LayerQuantizer,
) -> Iterable[str]:
    """Quantize the layers of one block, group by group; yields their full names when done."""
    for group in input_groups(block, layers, functools.partial(stream.run, index, block, 0)):
        moments = group_moments(stream, index, block, group, name=name)
        for layer in group.layers:
            linear = block.get_submodule(layer)
            packed = quantizer.quantize(f"{name}.{layer}", linear.weight, moments)
            quantized = WaterSICLinear.from_packed(
                packed, bias=linear.bias, dtype=linear.weight.dtype, device=linear.weight.device
            )
            quantized.set_residency("dense")
            replace_module(block, layer, quantized)
            yield f"{name}.{layer}"
