"""From a model on the disk or the hub to a quantized folder."""

import contextlib
import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from watersic_hf.calibration import LayerReport
from watersic_hf.integration.config import WaterSICConfig
from watersic_hf.integration.saving import model_card


def quantize_to_folder(
    model: str,
    folder: str | os.PathLike,
    config: WaterSICConfig,
    *,
    dtype: Any = "auto",
    device_map: Any = None,
    max_shard_size: str = "5GB",
) -> list[LayerReport]:
    """Quantize a causal language model and save it with its tokenizer and a model card.

    Args:
        model: folder or hub name.
        folder: where to save; made if it is not there.
        config: what to do.
        dtype: of the layers that stay dense; default: that of the model.
        device_map: as in `from_pretrained`.
        max_shard_size: as in `save_pretrained`.

    Returns:
        The report of every quantized layer.

    Raises:
        FileExistsError: `folder` holds a model already.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder} holds a model already; choose another folder or empty it")
    quantized = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=dtype, device_map=device_map
    )
    quantized.save_pretrained(folder, max_shard_size=max_shard_size)
    # a model without a tokenizer is still a model
    with contextlib.suppress(OSError, ValueError):
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    reports = quantized.hf_quantizer.reports
    card = model_card(
        quantized.config.quantization_config, reports, repo=folder.name, base=Path(model).name
    )
    card.save(folder / "README.md")
    return reports
