r"""Quantize an output head, an input embedding, or the one table that is both.

Shapes: A = tokens of the vocabulary (rows), N = columns, B = windows in a batch, T = tokens.

A head is a linear layer behind the last norm, and has the moments of its input like any other,
drifted by all that was quantized in the blocks.  An embedding is read a row at a time: its "input"
picks a row, and all of its columns count the same.  In a table that is both, an error of a row does
both kinds of damage, so that its moment is the head's plus a share of the identity.

Rows count by how often their tokens are read and predicted, but only by the fourth root of that: a
token that is 10,000 times as rare as another has ten times its squared error, 1.7 bits per weight,
and no row is given up.
"""

import functools
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from watersic_hf.checkpoint import PackedLayer, layer_charge, pack_layer
from watersic_hf.checkpoint.report import LayerReport
from watersic_hf.core import LayerSettings, MomentAccumulator, Moments, quantize_tall
from watersic_hf.nn import block_step, pack_vocabulary_matrix
from watersic_hf.quantization.pipeline import Ends
from watersic_hf.streams.blocks import RESIDENT, ResidentBlocks
from watersic_hf.streams.capture import behind, head_pass
from watersic_hf.streams.processes import add_up

#: What the columns of a table count for where rows are gathered, against the mean over columns of
#: what they count for where the head multiplies.
GATHER_SHARE = 0.1
#: Power of a token's frequency that the errors of its row count by.
FREQUENCY_POWER = 0.25
#: Least frequency of a token, against the mean over the vocabulary.
LEAST_FREQUENCY = 0.01
#: Calibration tokens on which the model's predictions are looked at.
PREDICTED_TOKENS = 8192
#: Tokens whose predictions are held in float32 at a time.
_TOKENS_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class VocabularyStatistics:
    """What the columns and the rows of a table count for."""

    moments: Moments
    row_importance_A: Tensor | None = None
    """None = all the same."""


def vocabulary_statistics(
    model: nn.Module,
    windows: Sequence[Tensor],
    ends: Ends,
    *,
    head: str | None,
    embedding: str | None,
    drift: float,
    source: ResidentBlocks = RESIDENT,
) -> VocabularyStatistics:
    """The statistics of a table that is an output head, an embedding, or both.

    With torch.distributed initialised, every process calls this with the same arguments, and runs
    its share of the windows.

    Args:
        model: the model, its blocks quantized, its tables not.
        windows: 1-D token ids.
        ends: what its blocks put out for them.
        head: name of the head, if the table is one.
        embedding: name of the embedding, if the table is one.
        drift: share of the drift of the head's input that the head makes up for.
        source: where blocks come from that `ends` has no output of.

    Raises:
        CalibrationError: the windows do not reach the head.
    """
    weight_AN = model.get_submodule(embedding or head).weight
    rows, columns = weight_AN.shape
    tokens_T = torch.cat(list(windows)).cpu()
    frequency_A = torch.bincount(tokens_T, minlength=rows) / len(tokens_T)
    if head is None:
        ones_N = torch.ones(columns, dtype=torch.float64, device=weight_AN.device)
        moments = Moments(cov=ones_N, tokens=len(tokens_T))
    else:
        run = functools.partial(head_pass, model, head, source=source)
        moments = _head_moments(run, windows, ends, columns, drift, weight_AN.device)
        frequency_A = frequency_A + _predictions(run, windows, ends, rows)
    if head is not None and embedding is not None:
        moments = _also_gathered(moments)
    return VocabularyStatistics(moments=moments, row_importance_A=row_importance(frequency_A))


def _head_moments(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    windows: Sequence[Tensor],
    ends: Ends,
    columns: int,
    drift: float,
    device: torch.device,
) -> Moments:
    """The moments of the head's input."""
    sums = MomentAccumulator(columns, drift=bool(drift), device=device)
    for batch, numbers in enumerate(ends.batches):
        tokens_BT = torch.stack([windows[number] for number in numbers])
        inputs = []
        for passed in (ends.original, ends.working) if drift else (ends.working,):
            with behind(passed, batch):
                inputs.append(run(tokens_BT, whole=False)[0].to(device))
        sums.add(*inputs)
    sums.combine(add_up)
    return sums.result().with_drift(drift) if drift else sums.result()


def _predictions(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    windows: Sequence[Tensor],
    ends: Ends,
    rows: int,
) -> Tensor:
    """The mean of p (1 - p) over predictions, of the original model where it ran: the Fisher
    information of every logit; zeros if there are no logits.
    """
    few = -(-PREDICTED_TOKENS // max(map(len, windows)))
    total_A = torch.zeros(rows, dtype=torch.float64)
    tokens = torch.zeros((), dtype=torch.float64)
    for batch, numbers in enumerate(ends.batches):
        # predictions of many windows at once would fill the memory
        for row, number in enumerate(numbers):
            if number >= few:
                continue
            with behind(ends.original or ends.working, batch, row=row):
                _, logits = run(windows[number][None], whole=True)
            if logits is not None:
                total_A += _information(logits)
                tokens += logits[..., 0].numel()
    add_up(total_A)
    add_up(tokens)
    return total_A / tokens.clamp(min=1)


def row_importance(frequency_A: Tensor) -> Tensor:
    """What the errors of the rows of a table count for, by how often their tokens occur."""
    relative_A = frequency_A.double() / frequency_A.double().mean()
    return (relative_A + LEAST_FREQUENCY) ** FREQUENCY_POWER


def _information(logits: Tensor) -> Tensor:
    """The sum of p (1 - p) over some predictions."""
    total_A = torch.zeros(logits.shape[-1], dtype=torch.float64)
    for logits_TA in logits.flatten(0, -2).split(_TOKENS_AT_A_TIME):
        p_TA = logits_TA.float().softmax(-1)
        total_A += (p_TA * (1 - p_TA)).sum(0).double().cpu()
    return total_A


def _also_gathered(moments: Moments) -> Moments:
    """The moments of a head whose rows are also gathered as they are."""
    diagonal_N = moments.layer_cov.diagonal()
    shift_NN = torch.diag(torch.full_like(diagonal_N, GATHER_SHARE * float(diagonal_N.mean())))
    fields = ("cov", "drifted_cov_NN", "cross_cov_NN")
    known = {name: getattr(moments, name) for name in fields}
    return replace(moments, **{k: v + shift_NN for k, v in known.items() if v is not None})


@torch.no_grad()
def quantize_vocabulary(
    name: str,
    weight_AN: Tensor,
    statistics: VocabularyStatistics,
    *,
    bits: float,
    settings: LayerSettings,
    seed: int,
    embedding: bool,
) -> tuple[PackedLayer, Tensor, LayerReport]:
    """Quantize and pack a table.

    Args:
        name: of its module.
        weight_AN: the table.
        statistics: what its columns and rows count for.
        bits: bits per weight to spend.
        settings: of the method.
        seed: of the rows that are looked at first.
        embedding: whether it is for a `WaterSICEmbedding`.

    Returns:
        The packed table, the codes that it holds, and its report.

    Raises:
        CalibrationError: the weight or the moments cannot be used; the message names the table.
    """
    start = time.perf_counter()
    rows, columns = weight_AN.shape
    quantized = quantize_tall(
        weight_AN, statistics.moments, bits=bits, charge=layer_charge, settings=settings,
        row_importance_A=statistics.row_importance_A, name=name,
        block_step=block_step(weight_AN.device),
        generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed),
    )  # fmt: skip
    pack = pack_vocabulary_matrix if embedding else pack_layer
    packed = pack(quantized.codes_AN, quantized.row_scale_A, quantized.col_scale_N, name=name)
    report = LayerReport(
        name=name, rows=rows, columns=columns, asked=bits, bits=packed.bits_per_weight,
        error=float(quantized.error), damping=quantized.damping,
        tokens=statistics.moments.tokens, seconds=time.perf_counter() - start, table=True,
    )  # fmt: skip
    return packed, quantized.codes_AN, report
