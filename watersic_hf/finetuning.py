"""Finetune the scales of a quantized model by distillation (the paper's WaterSIC-FT).

Shapes: A = out_features (rows), N = in_features (columns), T = tokens, V = vocabulary.
Units:  divergences are summed in nats and reported in bits per token.

The codes of every layer are frozen and so is everything dense; what is trained is one factor per
row and one per column, by which the stored scales are multiplied.  The loss is the divergence
KL(teacher || model) of the predicted distributions, averaged over tokens.  Nothing that is stored
changes its size: the bits per weight stay what they were.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from watersic_hf import codec
from watersic_hf.calibration import Draw, calibration_windows, describe
from watersic_hf.checkpoint import PackedLayer, read_state, rescale_layer, write_state
from watersic_hf.core import to_smallest_dtype
from watersic_hf.integration import WaterSICConfig, require_no_model, save_quantized
from watersic_hf.nn import PackedMatrix, WaterSICLinear, packed_layers, replace_module
from watersic_hf.streams import decoder_blocks

logger = logging.getLogger(__name__)

#: File in the folder to resume from.
STATE_FILE = "finetuning_state.safetensors"

#: Optimizer steps after which the state is written even within an epoch.
SAVE_EVERY = 32

_BITS_PER_NAT = 1 / math.log(2)
#: Bound on the logits that are compared in float32 at a time.
_CHUNK_LOGITS = 1 << 24
#: Bytes of each tensor by which another model is recognised.
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How the scales are trained: Adam on factors around the stored scales, so that the learning
    rate is relative to every scale."""

    epochs: int = 4
    learning_rate: float = 2e-3
    """At the first step; it falls along half a cosine, step by step.  The default suits the tens of
    steps of a small run; the paper takes 5e-4 for hundreds."""
    final_learning_rate: float | None = None
    """Towards which it falls; None = a hundredth of `learning_rate`."""
    batch_size: int = 8
    """Windows per optimizer step; they pass through the model one at a time."""
    clip: float = 1.0
    """Bound on the norm of the gradient of all factors."""
    seed: int = 0
    """Of the order of the windows."""
    validation_share: float = 0.125
    """Share of the windows, from the end, that are never trained on (at least one window); they
    choose the epoch that is kept."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be a positive integer")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, but must be a positive number")
        final = self.final_learning_rate
        if final is not None and not 0 <= final <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate is {final!r}, but must be a number from 0 to learning_rate, "
                f"{self.learning_rate:g}"
            )
        if not 0 < self.validation_share <= 0.5:
            raise ValueError(
                f"validation_share is {self.validation_share!r}, but must be above 0 and at most "
                f"0.5"
            )

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step of `steps`."""
        high, low = self.learning_rate, self.final_learning_rate
        low = high / 100 if low is None else low
        return low + (high - low) * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True, kw_only=True)
class FinetuneReport:
    """What finetuning did.  Divergences are KL(teacher || model) in bits per token."""

    layers: int
    tokens: int
    """Tokens that an epoch trains on."""
    train_kl_bits: tuple[float, ...]
    """Of every epoch, on the windows that are trained on, while they are trained on."""
    validation_kl_bits: tuple[float, ...]
    """On the windows held out: before the first epoch, and after every epoch."""
    kept_epoch: int
    """The epoch whose scales the model has now, the one of least divergence on the windows held
    out; 0 = the scales that it came with, since no epoch made them better."""
    seconds: float

    @property
    def kl_bits_before(self) -> float:
        """Divergence on the windows held out, before."""
        return self.validation_kl_bits[0]

    @property
    def kl_bits_after(self) -> float:
        """Divergence on the windows held out, with the scales that were kept."""
        return self.validation_kl_bits[self.kept_epoch]


def finetune_scales(
    model: nn.Module,
    teacher: nn.Module,
    windows: Sequence[Tensor],
    *,
    settings: FinetuneSettings | None = None,
    resume_folder: str | os.PathLike | None = None,
) -> FinetuneReport:
    """Train the scales of all quantized layers of a causal language model, in place.

    One window is in flight at a time, and of the blocks' activations only the inputs are kept
    (gradient checkpointing).  The model is trained in evaluation mode: no dropout.  The codes are
    held as integers of a byte or more per weight meanwhile, and the packed bytes beside them.  The
    same windows and settings give the same scales.

    Args:
        model: the quantized model; its modes, residencies and gradients are afterwards what they
            were, also when finetuning fails.
        teacher: the original, over the same vocabulary.
        windows: 1-D token ids, at least two windows; the last ones are held out.
        settings: how to train.
        resume_folder: where the state is written after every epoch and every `SAVE_EVERY` steps,
            and from where a call with the same arguments goes on, to the result of a run that was
            never interrupted.

    Returns:
        The divergences, and which epoch was kept: never one that is worse than no finetuning.

    Raises:
        ValueError: there is nothing to train or to train on, the vocabularies differ, or a
            divergence is not finite.
        CheckpointError: the folder to resume from belongs to another run.
    """
    settings = settings or FinetuneSettings()
    layers = _layers_to_train(model, teacher)
    train, held_out = _split(windows, settings.validation_share)
    state_file = identity = None
    if resume_folder is not None:
        state_file = Path(resume_folder) / STATE_FILE
        identity = _identity(model, teacher, windows, settings)
    blocks = [block for _, block in decoder_blocks(model, layers)]
    with _frozen(model, teacher), _trainable(model, layers) as trainable, _checkpointed(blocks):
        run = _Run(trainable, settings, state_file=state_file, identity=identity)
        run.train(model, teacher, train, held_out)
        for name, packed in run.best_layers(layers):
            for tensor, value in packed.tensors().items():
                getattr(layers[name], tensor).data = value.to(layers[name].weight.device)
    progress = run.progress
    return FinetuneReport(
        layers=len(layers),
        tokens=sum(len(window) for window in train),
        train_kl_bits=tuple(progress.train_kl_bits),
        validation_kl_bits=tuple(progress.validation_kl_bits),
        kept_epoch=progress.kept_epoch,
        seconds=progress.seconds,
    )


def finetune_to_folder(
    quantized: str,
    folder: str | os.PathLike,
    teacher: str,
    *,
    dataset: Any = "pydoc",
    tokenizer: str | None = None,
    samples: int = 64,
    sequence_length: int = 512,
    settings: FinetuneSettings | None = None,
    resume_folder: str | os.PathLike | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
) -> FinetuneReport:
    """Finetune a quantized model's scales and save it with its tokenizer and a model card.

    Args:
        quantized: folder or hub name of the quantized model.
        folder: where to save; made if it is not there.
        teacher: folder or hub name of the original.
        dataset: text to train on, as in `watersic_hf.calibration.calibration_windows`; ``"self"``
            is what the teacher samples.  If the model was calibrated on it, other windows of it
            are taken, as far as there are any: calibrated on, a text says little about others.
        tokenizer: folder or hub name; default: that of the quantized model.
        samples: windows, with those held out.
        sequence_length: their tokens.
        settings: how to train; its seed also chooses the windows.
        resume_folder: as in `finetune_scales`.
        dtype: of both models, as in `from_pretrained`.
        device_map: of both models, as in `from_pretrained`.

    Raises:
        FileExistsError: `folder` holds a model already.
        ValueError, CheckpointError: as in `finetune_scales`.
    """
    settings = settings or FinetuneSettings()
    require_no_model(folder)
    options = {"dtype": dtype, "device_map": device_map}
    model = AutoModelForCausalLM.from_pretrained(quantized, **options)
    original = AutoModelForCausalLM.from_pretrained(teacher, **options).eval()
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", sequence_length)
    windows = calibration_windows(
        dataset, tokenizer=AutoTokenizer.from_pretrained(tokenizer or quantized), model=original,
        samples=samples, sequence_length=min(sequence_length, longest), seed=settings.seed,
        seen=_calibration_draw(model, dataset, longest),
    )  # fmt: skip
    report = finetune_scales(
        model, original, windows, settings=settings, resume_folder=resume_folder
    )
    finetuning = f"{describe(dataset)}, {report.tokens:,} tokens, epoch {report.kept_epoch}"
    save_quantized(
        model, folder, tokenizer=quantized, base=teacher,
        finetuning=finetuning if report.kept_epoch else None,
    )  # fmt: skip
    return report


def _calibration_draw(model: nn.Module, dataset: Any, longest: int) -> Draw | None:
    """The windows of a dataset that a model was calibrated on; None if it was another dataset."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, WaterSICConfig):
        return None
    if Path(str(config.dataset)).name != Path(str(describe(dataset))).name:
        return None
    length = min(config.sequence_length, longest)
    return Draw(samples=config.samples, sequence_length=length, seed=config.seed)


class _ScaledLinear(torch.autograd.Function):
    r"""``y = x @ W.T`` for ``W = diag(row) @ codes @ diag(col)``, with gradients of the scales.

    The derivative in the logarithm of a row's scale is :math:`\sum_T g_{TA} y_{TA}` with g the
    gradient in y, and in that of a column's scale :math:`\sum_T x_{TN} (g W)_{TN}`: both come from
    what the backward pass has anyway, and no gradient in W is formed.  A scale is its stored value
    times a factor, so the derivative in the factor is that sum over the factor.  Rounding the
    scales and W passes gradients on as if it were not there.
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
    """Sum of a * b over all dimensions but the last, in float32."""
    return (a.float() * b.float()).flatten(0, -2).sum(0)


class _TrainableLinear(nn.Module):
    """Stands in for a `PackedMatrix` during finetuning, and computes what that will compute."""

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
        """What is trained, by name within the layer."""
        return {"row_factor": self.row_factor, "col_factor": self.col_factor}

    def scales(self, row_factor_A: Tensor, col_factor_N: Tensor) -> tuple[Tensor, Tensor]:
        """The scales of rows and columns under some factors, rounded as they are stored."""
        return (self.row_scale * row_factor_A).half(), (self.col_scale * col_factor_N).half()

    @torch.no_grad()
    def weight(self, row_scale_A: Tensor, col_scale_N: Tensor) -> Tensor:
        """The dense weight under some scales: that of the stored layer, to the last bit."""
        # the expression of `watersic_hf.nn.ops.dequantize`
        weight_AN = row_scale_A[:, None].float() * (self.codes * col_scale_N.float())
        return weight_AN.to(self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias`` in the dtype of x."""
        factors = (self.row_factor, self.col_factor)
        weight_AN = self.weight(*self.scales(*(factor.detach() for factor in factors)))
        y = _ScaledLinear.apply(x, weight_AN.to(x.dtype), *factors)
        # the gradient of a row's factor needs y as it is: without the bias, and not as changed by
        # models that clamp it in place
        return y.clone() if self.bias is None else y + self.bias.to(x.dtype)


@dataclass
class _Progress:
    """What a run has done so far, besides its tensors; all of it goes through JSON and back."""

    step: int = 0
    epoch_nats: float = 0.0
    """Divergence summed over the tokens of the epoch at hand."""
    epoch_tokens: int = 0
    train_kl_bits: list[float] = field(default_factory=list)
    validation_kl_bits: list[float] = field(default_factory=list)
    kept_epoch: int = 0
    seconds: float = 0.0


class _Run:
    """The factors of all layers on their way; written to a file, it goes on as if uninterrupted."""

    def __init__(
        self,
        layers: Mapping[str, _TrainableLinear],
        settings: FinetuneSettings,
        *,
        state_file: Path | None,
        identity: dict[str, Any] | None,
    ) -> None:
        self.layers = layers
        self.settings = settings
        self.state_file = state_file
        self.identity = identity
        self.factors = {
            f"{name}.{factor}": value
            for name, layer in layers.items()
            for factor, value in layer.factors().items()
        }
        self.best = {name: factor.detach().clone() for name, factor in self.factors.items()}
        self.optimizer = torch.optim.Adam(self.factors.values())
        for factor in self.factors.values():
            # a layer that no window reaches has a gradient as well: zero
            factor.grad = torch.zeros_like(factor)
        self.progress = _Progress()
        if state_file is not None and state_file.is_file():
            self._read()

    def train(
        self,
        model: nn.Module,
        teacher: nn.Module,
        windows: Sequence[Tensor],
        held_out: Sequence[Tensor],
    ) -> None:
        """Do all steps that are left."""
        progress, settings = self.progress, self.settings
        start = time.perf_counter() - progress.seconds
        steps_per_epoch = math.ceil(len(windows) / settings.batch_size)
        steps = settings.epochs * steps_per_epoch
        if not progress.validation_kl_bits:
            progress.validation_kl_bits.append(_mean_divergence(model, teacher, held_out))
        bar = tqdm(total=steps, initial=progress.step, desc="Finetuning", unit="step")
        with bar:
            while progress.step < steps:
                epoch, batch = divmod(progress.step, steps_per_epoch)
                order = _order(len(windows), settings.seed, epoch)
                first = batch * settings.batch_size
                chosen = [windows[i] for i in order[first : first + settings.batch_size]]
                nats = self._step(model, teacher, chosen, settings.rate_at(progress.step, steps))
                tokens = sum(len(window) for window in chosen)
                progress.epoch_nats += nats
                progress.epoch_tokens += tokens
                progress.step += 1
                ended = progress.step % steps_per_epoch == 0
                if ended:
                    self._end_epoch(_mean_divergence(model, teacher, held_out))
                progress.seconds = time.perf_counter() - start
                if self.state_file is not None and (ended or progress.step % SAVE_EVERY == 0):
                    self._write()
                bar.set_postfix_str(
                    f"epoch {epoch + 1}/{settings.epochs}, KL {nats / tokens * _BITS_PER_NAT:.4f} "
                    f"bits, held out {progress.validation_kl_bits[-1]:.4f}"
                )
                bar.update()

    def best_layers(self, layers: Mapping[str, PackedMatrix]) -> Iterator[tuple[str, PackedLayer]]:
        """The stored form of every layer with the best scales so far."""
        for name, layer in self.layers.items():
            row_A, col_N = layer.scales(*(self.best[f"{name}.{f}"] for f in layer.factors()))
            yield name, rescale_layer(layers[name].packed, row_A, col_N, name=name)

    def _step(
        self, model: nn.Module, teacher: nn.Module, windows: Sequence[Tensor], rate: float
    ) -> float:
        """One optimizer step; returns the divergence before it, summed over tokens."""
        self.optimizer.zero_grad(set_to_none=False)
        nats = sum(_divergence(model, teacher, window, backward=True) for window in windows)
        tokens = sum(len(window) for window in windows)
        for factor in self.factors.values():
            # here and not in the loss, where gradients of a half precision model would vanish
            factor.grad /= tokens
        nn.utils.clip_grad_norm_(self.factors.values(), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return nats

    def _end_epoch(self, validation_kl_bits: float) -> None:
        progress = self.progress
        progress.train_kl_bits.append(progress.epoch_nats / progress.epoch_tokens * _BITS_PER_NAT)
        progress.epoch_nats, progress.epoch_tokens = 0.0, 0
        if validation_kl_bits < progress.validation_kl_bits[progress.kept_epoch]:
            progress.kept_epoch = len(progress.train_kl_bits)
            self.best = {name: factor.detach().clone() for name, factor in self.factors.items()}
        progress.validation_kl_bits.append(validation_kl_bits)

    def _write(self) -> None:
        tensors = {}
        for name, factor in self.factors.items():
            moments = self.optimizer.state[factor]
            tensors |= {
                f"factor/{name}": factor.detach(),
                f"best/{name}": self.best[name],
                f"mean/{name}": moments["exp_avg"],
                f"square/{name}": moments["exp_avg_sq"],
            }
        write_state(
            self.state_file, tensors, {"identity": self.identity, "progress": asdict(self.progress)}
        )

    @torch.no_grad()
    def _read(self) -> None:
        tensors, facts = read_state(self.state_file, identity=self.identity)
        self.progress = _Progress(**facts["progress"])
        for name, factor in self.factors.items():
            device = factor.device
            factor.copy_(tensors[f"factor/{name}"])
            self.best[name] = tensors[f"best/{name}"].to(device)
            self.optimizer.state[factor] = {
                "step": torch.tensor(float(self.progress.step)),
                "exp_avg": tensors[f"mean/{name}"].to(device),
                "exp_avg_sq": tensors[f"square/{name}"].to(device),
            }
        logger.info("Finetuning goes on after step %d of %s.", self.progress.step, self.state_file)


def _divergence(
    model: nn.Module, teacher: nn.Module, window_T: Tensor, *, backward: bool = False
) -> float:
    """KL(teacher || model) in nats, summed over the tokens of a window.

    With `backward`, its gradient is added to that of the model's parameters.  Logits are compared
    in float32, some tokens at a time.
    """
    with torch.no_grad():
        target_TV = _logits(teacher, window_T)
    logits_TV = _logits(model, window_T)
    if target_TV.shape != logits_TV.shape:
        raise ValueError(
            f"the teacher has a vocabulary of {target_TV.shape[-1]} tokens and the model one of "
            f"{logits_TV.shape[-1]}, but they must be the same. The teacher must be the model that "
            f"was quantized."
        )
    nats = 0.0
    grad_TV = torch.empty_like(logits_TV) if backward else None
    rows = max(1, _CHUNK_LOGITS // logits_TV.shape[-1])
    for part in (slice(first, first + rows) for first in range(0, len(logits_TV), rows)):
        log_q = F.log_softmax(logits_TV[part].detach().float(), dim=-1)
        log_p = F.log_softmax(target_TV[part].to(log_q.device).float(), dim=-1)
        nats += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        if grad_TV is not None:
            grad_TV[part] = log_q.exp_().sub_(log_p.exp_())
    if not math.isfinite(nats):
        raise ValueError(
            f"the divergence of the model from the teacher is {nats}: the logits of one of them "
            f"are not finite. Load both in bfloat16 or float32, or lower the learning rate."
        )
    if grad_TV is not None:
        logits_TV.backward(grad_TV)
    return nats


def _logits(model: nn.Module, window_T: Tensor) -> Tensor:
    return model(input_ids=window_T[None].to(model.device), use_cache=False).logits[0]


@torch.no_grad()
def _mean_divergence(model: nn.Module, teacher: nn.Module, windows: Sequence[Tensor]) -> float:
    """KL(teacher || model) in bits per token."""
    nats = sum(_divergence(model, teacher, window) for window in windows)
    return nats / sum(len(window) for window in windows) * _BITS_PER_NAT


def _layers_to_train(model: nn.Module, teacher: nn.Module) -> dict[str, PackedMatrix]:
    # layers, and the matrices of experts, but no tables
    kinds = (WaterSICLinear, PackedMatrix)
    layers = {n: m for n, m in packed_layers(model) if type(m) in kinds}
    if model is teacher:
        raise ValueError(
            "the teacher is the model itself, which has nothing to learn from it. Load the "
            "original model as the teacher."
        )
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer quantized with WaterSIC, and finetuning trains "
            f"nothing but their scales. Quantize the model first."
        )
    offloaded = [name for name, layer in layers.items() if layer.weight.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} of {len(layers)} quantized layers are offloaded ({offloaded[0]}, "
            f"...), but finetuning needs all of them in memory. Load the model without offloading."
        )
    return layers


def _split(windows: Sequence[Tensor], share: float) -> tuple[list[Tensor], list[Tensor]]:
    """The windows to train on, and those held out."""
    if len(windows) < 2:
        raise ValueError(
            f"finetuning needs at least 2 windows, one to train on and one held out, but found "
            f"{len(windows)}. Give more text, or shorter windows."
        )
    held_out = max(1, round(share * len(windows)))
    return list(windows[:-held_out]), list(windows[-held_out:])


def _order(count: int, seed: int, epoch: int) -> list[int]:
    """Order of the windows in an epoch."""
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(count, generator=generator).tolist()


@contextlib.contextmanager
def _frozen(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients for what the models hold now."""
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
def _trainable(
    model: nn.Module, layers: Mapping[str, PackedMatrix]
) -> Iterator[dict[str, _TrainableLinear]]:
    """Put a trainable layer in the place of every quantized one."""
    dense = {name for name, layer in layers.items() if layer.residency == "dense"}
    trainable: dict[str, _TrainableLinear] = {}
    try:
        for name, layer in tqdm(layers.items(), desc="Decoding weights", delay=3, leave=False):
            layer.set_residency("stored")
            trainable[name] = _TrainableLinear(layer)
            replace_module(model, name, trainable[name])
        yield trainable
    finally:
        for name, layer in layers.items():
            if name in trainable:
                replace_module(model, name, layer)
                if name in dense:
                    # from the codes at hand: decoding them again takes as long as loading the model
                    scales = layer.row_scale.data, layer.col_scale.data
                    layer.dense_weight = trainable.pop(name).weight(*scales)
            elif name in dense:
                layer.set_residency("dense")


@contextlib.contextmanager
def _checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the inputs of blocks for the backward pass, and compute the rest again.

    transformers would do so in training mode only, which turns dropout on.
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


def _identity(
    model: nn.Module, teacher: nn.Module, windows: Sequence[Tensor], settings: FinetuneSettings
) -> dict[str, Any]:
    """By what a run is told from others.

    Of the models' tensors only the first bytes are read: they hold a checksum of every payload.
    """
    return {
        "settings": asdict(settings),
        "model": _digest(model.state_dict().items(), limit=_SAMPLE_BYTES),
        "teacher": _digest(teacher.state_dict().items(), limit=_SAMPLE_BYTES),
        "windows": _digest((str(i), window) for i, window in enumerate(windows)),
    }


def _digest(tensors: Iterable[tuple[str, Tensor]], *, limit: int | None = None) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.device.type != "meta":
            start = tensor.detach().flatten()[:limit].cpu().contiguous()
            digest.update(start.view(torch.uint8).numpy()[:limit].tobytes())
    return digest.hexdigest()
