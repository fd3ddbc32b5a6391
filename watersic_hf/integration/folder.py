"""From a model on the disk or the hub to a quantized folder."""

import contextlib
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
    """Quantize a model and save it with its tokenizer and a model card.

    It is loaded as the class that it was saved as, if transformers has that, and as a causal
    language model otherwise.

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
    require_no_model(folder)
    names = getattr(AutoConfig.from_pretrained(model), "architectures", None) or [""]
    model_class = getattr(transformers, names[0], AutoModelForCausalLM)
    quantized = model_class.from_pretrained(
        model, quantization_config=config, dtype=dtype, device_map=device_map
    )
    save_quantized(quantized, folder, tokenizer=model, base=model, max_shard_size=max_shard_size)
    return quantized.hf_quantizer.reports


def require_no_model(folder: str | os.PathLike) -> None:
    """Refuse to save over a model.

    Raises:
        FileExistsError: `folder` holds a model already.
    """
    if any(Path(folder).glob("*.safetensors")):
        raise FileExistsError(f"{folder} holds a model already; choose another folder or empty it")


def save_quantized(
    model: Any,
    folder: str | os.PathLike,
    *,
    tokenizer: str,
    base: str,
    finetuning: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Save a quantized model with a tokenizer and a model card.

    Args:
        model: the quantized model.
        folder: where to save; made if it is not there.
        tokenizer: folder or hub name of a model; if it has no tokenizer, none is saved.
        base: folder or hub name of the model that was quantized, for the card.
        finetuning: for the card, on what the scales were finetuned; None = they were not.
        max_shard_size: as in `save_pretrained`.
    """
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    # a model without a tokenizer is still a model
    with contextlib.suppress(OSError, ValueError):
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    card = model_card(
        model.config.quantization_config, model.hf_quantizer.reports, repo=folder.name,
        base=Path(base).name, model_class=type(model).__name__, finetuning=finetuning,
    )  # fmt: skip
    card.save(folder / "README.md")
