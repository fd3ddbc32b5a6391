"""Train factors of the scales of a quantized model on the divergence from its teacher.

Shapes: A = out_features (rows), N = in_features (columns), T = tokens, V = vocabulary.
Units:  divergences are summed in nats and reported in bits per token.
"""

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
from tqdm.auto import tqdm

from watersic_hf.checkpoint import PackedLayer, read_state, rescale_layer, write_state
from watersic_hf.evaluation.divergence import kl_nats, log_probabilities, window_logits
from watersic_hf.finetuning.layers import (
    TrainableLinear,
    checkpointed,
    frozen,
    layers_to_train,
    trainable,
)
from watersic_hf.finetuning.settings import FinetuneReport, FinetuneSettings
from watersic_hf.nn import PackedMatrix
from watersic_hf.streams import decoder_blocks
from watersic_hf.streams.torch_state import default_torch_state, replace_inference_tensors

logger = logging.getLogger(__name__)

#: Name of the state file in the folder to resume from.
STATE_FILE = "finetuning_state.safetensors"

#: Number of optimizer steps after which the state is written even in the middle of an epoch.
SAVE_EVERY = 32

#: Bound on the bytes of float32 log-probabilities of one model at a time.
SCRATCH_BYTES = 64 << 20

_BITS_PER_NAT = 1 / math.log(2)
#: Bytes of each tensor that go into the digest of a model.
_SAMPLE_BYTES = 4096


@default_torch_state()
def finetune_scales(
    model: nn.Module,
    teacher: nn.Module,
    windows: Sequence[Tensor],
    *,
    settings: FinetuneSettings | None = None,
    resume_folder: str | os.PathLike | None = None,
) -> FinetuneReport:
    """Train the scales of all quantized layers of a causal language model, in place.

    Windows pass through the model one at a time, and only the inputs of the blocks are kept for the
    backward pass (gradient checkpointing).  The model is in evaluation mode throughout, hence
    without dropout.  Memory holds the codes as integers of at least one byte per weight, in
    addition to the compressed payload.  The same windows and settings give the same scales.

    Args:
        model: the quantized model.  Training modes, residencies and gradient settings are restored
            at the end, also if finetuning fails.
        teacher: the original model, over the same vocabulary.
        windows: 1-D token ids, at least two windows; the last ones are held out.
        settings: how to train (default: `FinetuneSettings()`).
        resume_folder: folder for the state, which is written after every epoch and every
            `SAVE_EVERY` steps.  A call with the same arguments resumes from it and ends with the
            result of an uninterrupted run (default: no state is written).

    Returns:
        The divergences and the epoch that was kept.  If no epoch lowers the divergence on the
        held-out windows, the original scales are kept.

    Raises:
        ValueError: the model has no quantized layer or offloaded ones, there are too few windows,
            the vocabularies differ, or a divergence is not finite.
        CheckpointError: the state in the folder to resume from belongs to another run.
    """
    settings = settings or FinetuneSettings()
    if model is teacher:
        raise ValueError(
            "the teacher is the model itself, which has nothing to learn from it. Load the "
            "original model as the teacher."
        )
    for each in (model, teacher):
        replace_inference_tensors(each)
    layers = layers_to_train(model)
    train, held_out = _split(windows, settings.validation_share)
    state_file = identity = None
    if resume_folder is not None:
        state_file = Path(resume_folder) / STATE_FILE
        identity = _identity(model, teacher, windows, settings)
    blocks = [block for _, block in decoder_blocks(model, layers)]
    with frozen(model, teacher), trainable(model, layers) as replaced, checkpointed(blocks):
        trainer = _Trainer(replaced, settings, state_file=state_file, identity=identity)
        trainer.train(model, teacher, train, held_out)
        for name, packed in trainer.best_layers(layers):
            for tensor, value in packed.tensors().items():
                getattr(layers[name], tensor).data = value.to(layers[name].weight.device)
    progress = trainer.progress
    return FinetuneReport(
        layers=len(layers),
        tokens=sum(len(window) for window in train),
        train_kl_bits=tuple(progress.train_kl_bits),
        validation_kl_bits=tuple(progress.validation_kl_bits),
        kept_epoch=progress.kept_epoch,
        seconds=progress.seconds,
    )


@dataclass
class _Progress:
    """Progress of a run except for its tensors; it is saved as JSON."""

    step: int = 0
    """Number of optimizer steps done."""
    epoch_nats: float = 0.0
    """Divergence summed over the tokens of the current epoch so far."""
    epoch_tokens: int = 0
    """Number of these tokens."""
    train_kl_bits: list[float] = field(default_factory=list)
    validation_kl_bits: list[float] = field(default_factory=list)
    kept_epoch: int = 0
    """Best epoch so far; 0 = the original scales."""
    seconds: float = 0.0


class _Trainer:
    """The factors of all layers, the optimizer, and the progress of a run.

    All three are restored from the state file if it exists.

    Args:
        layers: the trainable layers by name.
        settings: how to train.
        state_file: file to save the state to; None = nowhere.
        identity: fingerprint of the run, which a saved state must have as well.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableLinear],
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
        self.best = self._copy_of_factors()
        self.optimizer = torch.optim.Adam(self.factors.values())
        for factor in self.factors.values():
            # a layer that no window reaches has a gradient as well: zero
            factor.grad = torch.zeros_like(factor)
        self.progress = _Progress()
        if state_file is not None and state_file.is_file():
            self._restore()

    def train(
        self,
        model: nn.Module,
        teacher: nn.Module,
        windows: Sequence[Tensor],
        held_out: Sequence[Tensor],
    ) -> None:
        """Do the remaining steps.

        Args:
            model: the model that contains the trainable layers.
            teacher: the original model.
            windows: windows to train on.
            held_out: windows that decide which epoch is kept.
        """
        progress, settings = self.progress, self.settings
        start = time.perf_counter() - progress.seconds
        steps_per_epoch = math.ceil(len(windows) / settings.batch_size)
        steps = settings.epochs * steps_per_epoch
        if not progress.validation_kl_bits:
            progress.validation_kl_bits.append(mean_divergence(model, teacher, held_out))
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
                    self._end_epoch(mean_divergence(model, teacher, held_out))
                progress.seconds = time.perf_counter() - start
                if self.state_file is not None and (ended or progress.step % SAVE_EVERY == 0):
                    self._save()
                bar.set_postfix_str(
                    f"epoch {epoch + 1}/{settings.epochs}, "
                    f"KL {nats / tokens * _BITS_PER_NAT:.4f} bits, "
                    f"held-out KL {progress.validation_kl_bits[-1]:.4f} bits"
                )
                bar.update()

    def best_layers(self, layers: Mapping[str, PackedMatrix]) -> Iterator[tuple[str, PackedLayer]]:
        """Yield the name and the stored form of every layer, with the scales of the best epoch.

        Args:
            layers: the quantized layers that the trainable ones replace, by name.
        """
        for name, layer in self.layers.items():
            row_A, col_N = layer.scales(*(self.best[f"{name}.{f}"] for f in layer.factors()))
            yield name, rescale_layer(layers[name].packed, row_A, col_N, name=name)

    def _copy_of_factors(self) -> dict[str, Tensor]:
        return {name: factor.detach().clone() for name, factor in self.factors.items()}

    def _step(
        self, model: nn.Module, teacher: nn.Module, windows: Sequence[Tensor], rate: float
    ) -> float:
        """Do one optimizer step and return the divergence before it, in nats over all tokens."""
        self.optimizer.zero_grad(set_to_none=False)
        nats = sum(divergence(model, teacher, window, backward=True) for window in windows)
        tokens = sum(len(window) for window in windows)
        for factor in self.factors.values():
            # not in the loss, where the small gradients of a half precision model would vanish
            factor.grad /= tokens
        nn.utils.clip_grad_norm_(self.factors.values(), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return nats

    def _end_epoch(self, validation_kl_bits: float) -> None:
        """Record the divergences of an epoch, and keep its factors if they are the best so far."""
        progress = self.progress
        progress.train_kl_bits.append(progress.epoch_nats / progress.epoch_tokens * _BITS_PER_NAT)
        progress.epoch_nats, progress.epoch_tokens = 0.0, 0
        if validation_kl_bits < progress.validation_kl_bits[progress.kept_epoch]:
            progress.kept_epoch = len(progress.train_kl_bits)
            self.best = self._copy_of_factors()
        progress.validation_kl_bits.append(validation_kl_bits)

    def _save(self) -> None:
        tensors = {}
        for name, factor in self.factors.items():
            moments = self.optimizer.state[factor]
            tensors |= {
                f"factor/{name}": factor.detach(),
                f"best/{name}": self.best[name],
                f"mean/{name}": moments["exp_avg"],
                f"square/{name}": moments["exp_avg_sq"],
            }
        facts = {"identity": self.identity, "progress": asdict(self.progress)}
        write_state(self.state_file, tensors, facts)

    @torch.no_grad()
    def _restore(self) -> None:
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
        logger.info("Resuming finetuning after step %d of %s.", self.progress.step, self.state_file)


def divergence(
    model: nn.Module, teacher: nn.Module, window_T: Tensor, *, backward: bool = False
) -> float:
    """Return KL(teacher || model) in nats, summed over the tokens of a window.

    Args:
        model: the model.
        teacher: the original model.
        window_T: token ids.
        backward: whether to add the gradient of the result to that of the model's parameters
            (default: False).

    Raises:
        ValueError: the vocabularies differ, or the divergence is not finite.
    """
    with torch.no_grad():
        target_TV = window_logits(teacher, window_T)
    logits_TV = window_logits(model, window_T)
    if target_TV.shape != logits_TV.shape:
        raise ValueError(
            f"the teacher has a vocabulary of {target_TV.shape[-1]} tokens and the model one of "
            f"{logits_TV.shape[-1]}, but they must be the same. The teacher must be the model that "
            f"was quantized."
        )
    nats = 0.0
    grad_TV = torch.empty_like(logits_TV) if backward else None
    pair = (logits_TV, target_TV)
    for part, (log_q, log_p) in log_probabilities(*pair, scratch_bytes=SCRATCH_BYTES):
        nats += kl_nats(log_p, log_q)
        if grad_TV is not None:
            # the gradient of the divergence with respect to the model's logits is q - p
            grad_TV[part] = log_q.exp_().sub_(log_p.exp_())
    if not math.isfinite(nats):
        raise ValueError(
            f"the divergence of the model from the teacher is {nats}: the logits of one of them "
            f"are not finite. Load both in bfloat16 or float32, or lower the learning rate."
        )
    if grad_TV is not None:
        logits_TV.backward(grad_TV)
    return nats


@torch.no_grad()
def mean_divergence(model: nn.Module, teacher: nn.Module, windows: Sequence[Tensor]) -> float:
    """Return KL(teacher || model) in bits per token, averaged over all tokens of the windows."""
    nats = sum(divergence(model, teacher, window) for window in windows)
    return nats / sum(len(window) for window in windows) * _BITS_PER_NAT


def _split(windows: Sequence[Tensor], fraction: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return the windows to train on, and the given fraction of them that is held out."""
    if len(windows) < 2:
        raise ValueError(
            f"finetuning needs at least 2 windows, one to train on and one held out, but found "
            f"{len(windows)}. Provide more text, or use shorter windows."
        )
    held_out = max(1, round(fraction * len(windows)))
    return list(windows[:-held_out]), list(windows[-held_out:])


def _order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the windows in an epoch."""
    # derived from the epoch, so that a resumed run needs no saved random state
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(count, generator=generator).tolist()


def _identity(
    model: nn.Module, teacher: nn.Module, windows: Sequence[Tensor], settings: FinetuneSettings
) -> dict[str, Any]:
    """Return the fingerprint of a run, by which a saved state is recognized.

    Only the first bytes of the models' tensors are read; those of a payload include a checksum of
    the whole payload.
    """
    return {
        "settings": asdict(settings),
        "model": _digest(model.state_dict().items(), limit=_SAMPLE_BYTES),
        "teacher": _digest(teacher.state_dict().items(), limit=_SAMPLE_BYTES),
        "windows": _digest((str(i), window) for i, window in enumerate(windows)),
    }


def _digest(tensors: Iterable[tuple[str, Tensor]], *, limit: int | None = None) -> str:
    """Return the sha256 of names, dtypes, shapes and the first `limit` bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.device.type != "meta":
            start = tensor.detach().flatten()[:limit].cpu().contiguous()
            digest.update(start.view(torch.uint8).numpy()[:limit].tobytes())
    return digest.hexdigest()
