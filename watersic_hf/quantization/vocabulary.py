r"""Quantize vocabulary matrices: an output head, an input embedding, or one that is both.

Shapes: A = tokens of the vocabulary (rows), N = columns, B = windows in a batch, T = tokens.

An output head is a linear layer behind the last norm.  Like any other layer it is calibrated on the
moments of its input, with the drift that the quantized blocks cause.  An embedding is read one row
at a time: its "input" selects a row, so all columns count the same.  A matrix that is both suffers
from an error of a row in both ways, so its moments are those of the head plus a multiple of the
identity.

Rows are weighted by how often their tokens are read and predicted, but only by the fourth root of
that: a token that is 10,000 times rarer than another one has ten times its squared error, which
saves 1.7 bits per weight, and no row is given up.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from watersic_hf.checkpoint import pack_layer
from watersic_hf.core import LayerSettings, MomentAccumulator, Moments
from watersic_hf.nn import pack_vocabulary_matrix
from watersic_hf.quantization.layer import (
    LayerTask,
    QuantizedLayer,
    identity_moments,
    quantize_and_pack,
)
from watersic_hf.quantization.pipeline import StackOutputs
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.hooks import head_pass
from watersic_hf.streams.processes import all_reduce_sum
from watersic_hf.streams.stacks import bypass_stacks

#: Moment that the lookup of rows adds to every column of a tied head, relative to the mean moment
#: of the head's input.
LOOKUP_FRACTION = 0.1
#: Power of a token's frequency by which the errors of its row are weighted.
FREQUENCY_POWER = 0.25
#: Frequency that is added to that of every token, relative to the mean over the vocabulary.
LEAST_FREQUENCY = 0.01
#: Calibration tokens on which the predictions of the model are computed.
PREDICTED_TOKENS = 8192
#: Tokens whose predictions are in memory in float32 at a time.
_TOKENS_AT_A_TIME = 64

HeadPass = Callable[..., tuple[Tensor, Tensor | None]]
"""`head_pass` of a model and its head: it takes the windows of a batch, and `whole`."""


@dataclass(frozen=True, kw_only=True)
class VocabularyStatistics:
    """How the columns and the rows of a vocabulary matrix are weighted."""

    moments: Moments
    """Second moments by which the columns are weighted."""
    row_importance_A: Tensor | None = None
    """Weight of the squared error of every row; None if all rows count the same."""

    @classmethod
    def without_data(cls, weight_AN: Tensor) -> "VocabularyStatistics":
        """Return the statistics of a vocabulary matrix that is quantized without data."""
        return cls(moments=identity_moments(weight_AN))


def vocabulary_statistics(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    outputs: StackOutputs,
    head: str | None,
    embedding: str | None,
    drift: float,
    source: ResidentBlocks = RESIDENT,
) -> VocabularyStatistics:
    """Return the statistics of a vocabulary matrix: an output head, an embedding, or both.

    With torch.distributed initialised, every process calls this with the same arguments, and runs
    its shard of the windows.

    Args:
        model: the model, with quantized blocks and dense vocabulary matrices.
        windows: 1-D token ids.
        outputs: outputs of the blocks on these windows.
        head: name of the head, if the matrix is one.
        embedding: name of the embedding, if the matrix is one.
        drift: fraction of the drift of the head's input that the head compensates for.
        source: where the blocks come from that `outputs` does not cover (default: memory).

    Raises:
        CalibrationError: the windows do not reach the head.
    """
    weight_AN = model.get_submodule(embedding or head).weight
    rows = len(weight_AN)
    tokens_T = torch.cat(list(windows)).cpu()
    frequency_A = torch.bincount(tokens_T, minlength=rows) / len(tokens_T)
    if head is None:
        moments = replace(identity_moments(weight_AN), tokens=len(tokens_T))
    else:
        run = functools.partial(head_pass, model, head, source=source)
        moments = _head_moments(run, windows, outputs=outputs, like=weight_AN, drift=drift)
        frequency_A = frequency_A + _predictions(run, windows, outputs=outputs, rows=rows)
    if head is not None and embedding is not None:
        moments = _with_lookup(moments)
    return VocabularyStatistics(moments=moments, row_importance_A=_row_importance(frequency_A))


def _head_moments(
    run: HeadPass, windows: Sequence[Tensor], *, outputs: StackOutputs, like: Tensor, drift: float
) -> Moments:
    """Return the moments of the head's input, with the columns and the device of `like`."""
    sums = MomentAccumulator(like.shape[1], drift=bool(drift), device=like.device)
    for batch, numbers in enumerate(outputs.batches):
        tokens_BT = torch.stack([windows[number] for number in numbers])
        inputs = []
        for stacks in (outputs.original, outputs.working) if drift else (outputs.working,):
            with bypass_stacks(stacks, batch):
                inputs.append(run(tokens_BT, whole=False)[0].to(like.device))
        sums.add(*inputs)
    sums.combine(all_reduce_sum)
    return sums.result().with_drift(drift) if drift else sums.result()


def _predictions(
    run: HeadPass, windows: Sequence[Tensor], *, outputs: StackOutputs, rows: int
) -> Tensor:
    """Return the mean of p (1 - p) over predictions for every token of the vocabulary.

    This is the Fisher information of its logit, in the original model if that ran, and zero if the
    model has no logits.
    """
    few = -(-PREDICTED_TOKENS // max(map(len, windows)))
    total_A = torch.zeros(rows, dtype=torch.float64)
    tokens = torch.zeros((), dtype=torch.float64)
    for batch, numbers in enumerate(outputs.batches):
        # one window at a time, as the logits of a batch could exhaust the memory
        for row, number in enumerate(numbers):
            if number >= few:
                continue
            with bypass_stacks(outputs.original or outputs.working, batch, row=row):
                _, logits = run(windows[number][None], whole=True)
            if logits is not None:
                total_A += _information(logits)
                tokens += logits[..., 0].numel()
    all_reduce_sum(total_A)
    all_reduce_sum(tokens)
    return total_A / tokens.clamp(min=1)


def _row_importance(frequency_A: Tensor) -> Tensor:
    """Return the weights of the errors of rows, from the frequencies of their tokens."""
    relative_A = frequency_A.double() / frequency_A.double().mean()
    return (relative_A + LEAST_FREQUENCY) ** FREQUENCY_POWER


def _information(logits: Tensor) -> Tensor:
    """Return the sum of p (1 - p) over the predictions of some tokens."""
    total_A = torch.zeros(logits.shape[-1], dtype=torch.float64)
    for logits_TA in logits.flatten(0, -2).split(_TOKENS_AT_A_TIME):
        p_TA = logits_TA.float().softmax(-1)
        total_A += (p_TA * (1 - p_TA)).sum(0).double().cpu()
    return total_A


def _with_lookup(moments: Moments) -> Moments:
    """Return the moments of a head whose rows are also looked up as an embedding."""
    diagonal_N = moments.layer_cov.diagonal()
    shift_NN = torch.diag(torch.full_like(diagonal_N, LOOKUP_FRACTION * float(diagonal_N.mean())))
    fields = ("cov", "drifted_cov_NN", "cross_cov_NN")
    known = {name: getattr(moments, name) for name in fields}
    return replace(moments, **{k: v + shift_NN for k, v in known.items() if v is not None})


def quantize_vocabulary(
    name: str,
    weight_AN: Tensor,
    statistics: VocabularyStatistics,
    *,
    bits: float,
    settings: LayerSettings,
    seed: int,
    embedding: bool,
) -> QuantizedLayer:
    """Quantize and pack a vocabulary matrix.

    Args:
        name: name of its module.
        weight_AN: dense weight.
        statistics: how its columns and rows are weighted.
        bits: bits per weight to spend.
        settings: settings of the method.
        seed: seed of the run; see `quantize_and_pack`.
        embedding: whether the result is for a `WaterSICEmbedding`.

    Raises:
        CalibrationError: the weight or the moments cannot be used; the message names the matrix.
    """
    task = LayerTask(
        name=name,
        weight_AN=weight_AN,
        moments=statistics.moments,
        bits=bits,
        row_importance_A=statistics.row_importance_A,
        is_vocabulary=True,
    )
    pack = pack_vocabulary_matrix if embedding else pack_layer
    return quantize_and_pack(task, settings=settings, seed=seed, pack=pack)
