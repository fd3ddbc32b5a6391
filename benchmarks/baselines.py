"""Baselines that differ from WaterSIC only in how one layer is rounded.

Blocks, moments, codec, scales and files are the library's; `METHODS` lists the ways to round.  All
have one step per row, the same for all columns.  The methods with "-ec" are entropy coded by our
codec, with the step searched for the requested bits; the others have 2^bits levels per row and are
counted as codes of fixed width plus 16 bits per row.

Shapes: A = out_features (rows), N = in_features (columns).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from watersic_hf.checkpoint import LayerReport, PackedLayer, layer_charge, pack_layer
from watersic_hf.core import Moments
from watersic_hf.core.metrics import relative_output_error
from watersic_hf.core.rate import search_step
from watersic_hf.core.whiten import damped_cholesky
from watersic_hf.core.zsic import zsic
from watersic_hf.quantization import LayerQuantizer


@dataclass(frozen=True)
class Method:
    """How a layer is rounded."""

    feedback: bool
    """GPTQ's error feedback (Frantar et al. 2022, arXiv 2210.17323); False rounds to nearest."""
    entropy_coded: bool
    """Code with our codec at any rate; False stores codes of fixed width."""
    activation_order: bool = False
    """Quantize the columns in the order of their inputs' power, strongest first."""


METHODS = {
    "rtn": Method(feedback=False, entropy_coded=False),
    "rtn-ec": Method(feedback=False, entropy_coded=True),
    "gptq": Method(feedback=True, entropy_coded=False),
    "gptq-act": Method(feedback=True, entropy_coded=False, activation_order=True),
    "gptq-ec": Method(feedback=True, entropy_coded=True),
    "gptq-act-ec": Method(feedback=True, entropy_coded=True, activation_order=True),
}

#: GPTQ's damping.
DAMPING = 1e-2


class BaselineQuantizer(LayerQuantizer):
    """The library's quantizer of layers, with one of `METHODS` in place of the paper's rounding."""

    method: Method

    @torch.no_grad()
    def quantize(
        self, name: str, weight_AN: Tensor, moments: Moments
    ) -> tuple[PackedLayer, Tensor]:
        asked = self.budget.bits_for(name)
        rounding = Rounding(weight_AN, moments, self.method, name)
        if self.method.entropy_coded:
            step = search_step(
                rounding.bits_at, asked, start=rounding.start(asked), tolerance=4e-3 * asked
            )
            codes_AN = rounding.codes(step)
        else:
            levels = 2 ** round(asked)
            step, codes_AN = rounding.fixed(levels)
        row_scale_A = step * rounding.row_scale_A
        packed = pack_layer(
            codes_AN, row_scale_A, torch.ones(weight_AN.shape[1], dtype=torch.float64), name=name
        )
        bits = packed.bits_per_weight
        if not self.method.entropy_coded:
            bits = math.log2(levels) + 16 / weight_AN.shape[1]
        self.budget.spend(name, bits)
        error = relative_output_error(weight_AN, codes_AN * row_scale_A[:, None], moments)
        rows, columns = weight_AN.shape
        self.reports.append(
            LayerReport(
                name=name,
                rows=rows,
                columns=columns,
                asked=asked,
                bits=bits,
                error=error,
                damping=DAMPING,
                tokens=moments.tokens,
                seconds=0.0,
            )
        )
        return packed, codes_AN


class Rounding:
    """One layer, rounded at any step; its rows are scaled to a largest magnitude of 1."""

    def __init__(self, weight_AN: Tensor, moments: Moments, method: Method, name: str) -> None:
        weight_AN = weight_AN.double()
        self.row_scale_A = weight_AN.abs().amax(1).clamp(min=1e-12)
        self.weight_AN = weight_AN / self.row_scale_A[:, None]
        cov = moments.layer_cov
        self.order_N = torch.arange(len(cov))
        if method.activation_order:
            # the recursion starts with the last column
            self.order_N = cov.diagonal().argsort()
        self.chol = torch.ones(len(cov), dtype=torch.float64)
        if method.feedback:
            ordered_NN = cov[self.order_N][:, self.order_N].double()
            chol_NN, _ = damped_cholesky(ordered_NN, DAMPING, tokens=moments.tokens, name=name)
            # one step for all columns: the factor's diagonal is divided out
            self.chol = chol_NN / chol_NN.diagonal()
        ordered_AN = self.weight_AN[:, self.order_N]
        self.target_AN = ordered_AN @ self.chol if method.feedback else ordered_AN

    def start(self, bits: float) -> float:
        """Return the step that Gaussian weights need, to start the search with."""
        return (
            float(self.weight_AN.square().mean().sqrt())
            * math.sqrt(2 * math.pi * math.e)
            / (2.0**bits)
        )

    def bits_at(self, step: float) -> float:
        """Return the stored bits per weight at a step."""
        codes_AN = self.codes(step)
        return layer_charge(codes_AN, len(codes_AN))

    def codes(self, step: float, levels: int | None = None) -> Tensor:
        """Return the codes at a step, clipped to `levels` if given, in the order of the columns."""

        def block_step(target_BA, chol_BB, step, codes_BA, shrinkage_B):
            # GPTQ has no shrinkage
            shrinkage_B.fill_(1)
            for i in reversed(range(len(target_BA))):
                z_A = (target_BA[i] / step).round_()
                if levels is not None:
                    z_A.clamp_(-(levels // 2), (levels - 1) // 2)
                codes_BA[i] = z_A
                torch.mul(z_A, step, out=target_BA[i])
                target_BA[:i].addr_(chol_BB[i, :i], target_BA[i], alpha=-1)

        if self.chol.ndim == 1:
            codes_AN = (self.target_AN / step).round().to(torch.int32)
            if levels is not None:
                codes_AN.clamp_(-(levels // 2), (levels - 1) // 2)
        else:
            codes_AN, _ = zsic(self.target_AN, self.chol, step, block_step=block_step)
        found_AN = torch.empty_like(codes_AN)
        found_AN[:, self.order_N] = codes_AN
        return found_AN

    def fixed(self, levels: int) -> tuple[float, Tensor]:
        """Return the step whose clipping gives the weights the least error, and its codes."""
        ranges = torch.linspace(0.4, 1.0, 13).tolist()
        steps = [clipped * 2 / (levels - 1) for clipped in ranges]

        def error(step: float) -> float:
            codes_AN = (self.weight_AN / step).round().clamp(-(levels // 2), (levels - 1) // 2)
            return float((codes_AN * step - self.weight_AN).square().sum())

        step = min(steps, key=error)
        return step, self.codes(step, levels)
