"""Save the report and the model card beside the weights.

The card begins with the import that a reader needs.
"""

import functools
import os
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from watersic_hf.calibration import describe
from watersic_hf.checkpoint import (
    CheckpointError,
    CheckReport,
    LayerReport,
    average_bits,
    average_error,
    kinds_of,
    model_size,
    write_report,
)
from watersic_hf.integration.adapters import explain_merging
from watersic_hf.integration.names import stored_names
from watersic_hf.integration.source import ModelSource
from watersic_hf.nn import PackedMatrix, WaterSICTiedHead, set_residency

TAGS = ["watersic", "quantized"]

_BODY = """# {title}

```python
import watersic_hf  # registers the format with transformers; pip install watersic-hf
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```

Served with [vLLM](https://docs.vllm.ai), with watersic-hf installed beside it:

```bash
vllm serve {repo}
```

Weights quantized with [WaterSIC](https://arxiv.org/abs/2603.04956): every input column has its own
step size, the rounding error of a column is fed back into the columns after it, and the integer
codes are entropy coded.

| | |
|---|---|
| original | {base} |
| bits per quantized weight, target | {target:g} |
| bits per quantized weight, stored | {stored:.4f} |
| quantized layers | {layers} |
| quantized weights | {weights:,} |
{vocabulary}| bits per parameter of the whole model | {model_bits:.4f} |
| calibration | {calibration} |
"""

_KINDS = """
| layers | | bits per weight | relative output error |
|---|--:|--:|--:|
{rows}

Layer by layer: `watersic_report.jsonl`, or `watersic inspect FOLDER --html page.html`.
"""

_CHECK = """
Loaded again and compared with the original on {tokens} tokens of text that calibration never saw:
KL {mean:.3f} bits per token (median {median:.3f}, 90th percentile {p90:.3f}; {expected:.3f} is
expected from the errors of the layers); the same most likely token for {top1:.1%}.
"""


def model_card(
    config: Any,
    reports: list[LayerReport],
    *,
    repo: str,
    base: str | None,
    model_class: str,
    folder: str | os.PathLike,
    finetuning: str | None = None,
) -> ModelCard:
    """Return the card of a quantized model.

    Args:
        config: its `WaterSICConfig`.
        reports: the reports of its layers.
        repo: name that users will load it by.
        base: name of the model that was quantized; None if it is not known.
        model_class: name of its class.
        folder: folder that the model is saved in, with its weights.
        finetuning: data that its scales were finetuned on; None if they were not.
    """
    causal = model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    data = ModelCardData(
        library_name="transformers",
        tags=list(TAGS),
        pipeline_tag="text-generation" if causal else None,
    )
    tokens = max((report.tokens for report in reports), default=0)
    calibration = f"{describe(config.dataset)}, {tokens:,} tokens" if tokens else "none (data-free)"
    layers, vocabulary = ([r for r in reports if r.table is kind] for kind in (False, True))
    rows = [f"| bits per weight of `{r.name}`, stored | {r.bits:.4f} |\n" for r in vocabulary]
    body = _BODY.format(
        loader="AutoModelForCausalLM" if causal else model_class,
        title=repo.rpartition("/")[2],
        repo=repo,
        base=base or "unknown",
        target=config.bits,
        stored=average_bits(reports),
        layers=len(layers),
        weights=sum(report.weights for report in layers),
        calibration=calibration,
        vocabulary="".join(rows),
        model_bits=model_size(folder).bits,
    )
    if finetuning is not None:
        body += f"| scales finetuned | {finetuning} |\n"
    if reports:
        body += _KINDS.format(rows="\n".join(_kind_rows(layers)))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def add_check_to_card(folder: str | os.PathLike, check: CheckReport) -> None:
    """Add the comparison with the original to the card in a model's folder."""
    card = Path(folder) / "README.md"
    broken = ""
    if check.broken:
        layers = ", ".join(f"`{name}`" for name in check.suspects) or "no single one"
        broken = f"\n**This model is broken.** Layers that stand out: {layers}.\n"
    text = _CHECK.format(
        tokens=check.tokens,
        mean=check.kl_mean,
        median=check.kl_median,
        p90=check.kl_p90,
        expected=check.kl_expected,
        top1=check.top1_agreement,
    )
    card.write_text(f"{card.read_text(encoding='utf-8')}{text}{broken}", encoding="utf-8")


def _kind_rows(reports: Sequence[LayerReport]) -> Iterator[str]:
    kinds: dict[str, list[LayerReport]] = {}
    for report, kind in zip(reports, kinds_of(r.name for r in reports), strict=True):
        kinds.setdefault(f"`{kind}`", []).append(report)
    for kind, layers in [*kinds.items(), ("all", list(reports))]:
        bits, error = average_bits(layers), average_error(layers)
        yield f"| {kind} | {len(layers)} | {bits:.3f} | {error:.2g} |"


def attach_extras(model: nn.Module) -> None:
    """Tag a model, give it `set_residency`, and have it save its report and its card.

    transformers has no hook for further files, and generates a card of its own for every upload.
    Both ways to upload, `push_to_hub` and `save_pretrained(push_to_hub=True)`, end in
    `_upload_modified_files`.  The wrappers have the names of the methods they wrap, so
    that a pickled model finds them.
    """
    explain_merging()
    model.add_model_tags(TAGS)
    # a partial, since a pickled bound method would be looked up in the model's class
    model.set_residency = functools.partial(set_residency, model)
    model.save_pretrained = types.MethodType(save_pretrained, model)
    model.resize_token_embeddings = types.MethodType(resize_token_embeddings, model)
    model._upload_modified_files = types.MethodType(_upload_modified_files, model)


def detach_extras(model: nn.Module) -> None:
    """Undo `attach_extras` on a model that is no longer quantized."""
    del model.save_pretrained, model._upload_modified_files, model.set_residency
    del model.resize_token_embeddings
    model.model_tags = [tag for tag in model.model_tags if tag not in TAGS]


def save_pretrained(
    model: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
) -> None:
    """Save a model with `PreTrainedModel.save_pretrained`, and its report beside the weights.

    Raises:
        CheckpointError: the tensors of a layer were changed in memory, and do not fit together.
        ValueError: an output head is tied to a quantized embedding that was replaced.
    """
    _check_state(model)
    reports = model.hf_quantizer.reports
    if reports:
        names = stored_names(model, [report.name for report in reports])
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_report(
            save_directory,
            [replace(r, stored_as=n if (n := names[r.name]) != r.name else None) for r in reports],
            model.hf_quantizer.run,
        )
    type(model).save_pretrained(model, save_directory, *args, **kwargs)


def resize_token_embeddings(
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> nn.Module:
    """Call `PreTrainedModel.resize_token_embeddings`, if it changes no quantized matrix.

    Args:
        model: the model.
        new_num_tokens: number of tokens; default: as it is.
        pad_to_multiple_of: number whose multiple the number of tokens shall be; default: any.
        args: further arguments of the method.
        kwargs: further keyword arguments of the method.

    Raises:
        ValueError: the size of a quantized vocabulary matrix would change.
    """
    embedding = model.get_input_embeddings()
    vocabulary = [module for module in (embedding, model.get_output_embeddings()) if module]
    names = {module: name for name, module in model.named_modules()}
    quantized = [names[m] for m in vocabulary if isinstance(m, PackedMatrix | WaterSICTiedHead)]
    if not quantized:
        return type(model).resize_token_embeddings(
            model, new_num_tokens, pad_to_multiple_of, *args, **kwargs
        )
    size = embedding.num_embeddings
    wanted = new_num_tokens or size
    if pad_to_multiple_of is not None:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != size:
        raise ValueError(
            f"{', '.join(quantized)}: a quantized vocabulary matrix cannot be resized, from {size} "
            f"to {wanted} tokens. Resize the original model before quantizing it, or call "
            f"`model.dequantize()` first."
        )
    return embedding


def _check_state(model: nn.Module) -> None:
    """Refuse to save a model that could not be loaded again."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        tied = isinstance(module, WaterSICTiedHead) and not module.weight.is_floating_point()
        if tied and module.embedding not in modules.values():
            raise ValueError(
                f"{name}: the head is tied to a quantized embedding that the model no longer has. "
                f"Call `model.tie_weights()` to tie it to the new one."
            )
        if not isinstance(module, PackedMatrix) or module.weight.is_meta:
            continue
        try:
            module.check(name)
        except CheckpointError as error:
            raise CheckpointError(
                f"{name}: the codes or scales were changed in memory and do not match their "
                f"checksum ({error}). Load the model again, or set all tensors of the layer to "
                f"those of `watersic_hf.checkpoint.rescale_layer`."
            ) from error


def _upload_modified_files(
    model: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    readme = Path(working_dir) / "README.md"
    generated = readme.is_file() and "has been automatically generated" in readme.read_text("utf-8")
    if generated or not readme.is_file():
        config = model.config.quantization_config
        card = model_card(
            config,
            model.hf_quantizer.reports,
            repo=repo_id,
            base=ModelSource(name=model.name_or_path).title if model.name_or_path else None,
            model_class=type(model).__name__,
            folder=working_dir,
        )
        card.save(readme)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)
