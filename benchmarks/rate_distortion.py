"""Compare error and rate with the Gaussian bound, and with simpler quantizers at equal entropy.

Usage: python benchmarks/rate_distortion.py [--rows 1024] [--cols 512] [--rates 1 2 3 4]
           [--lattice trellis]

The weight is Gaussian with independent entries, so that the bound is known: reverse waterfilling
over the eigenvalues of the input covariance.  Errors are mean squares of the layer's output,
relative to the output.  `R` is the rate that the step was chosen for, `bound` the least rate at
which the measured error is possible.  `pooled` and `classes` are empirical entropies of the codes,
which in a small layer are below the true ones.  `stored` is the size of the payload without scales.
All rates are in bits per weight.  The simpler quantizers spend the class entropy of WaterSIC:

* uniform spacing: the same recursion and rescaler, all columns with one spacing (as in GPTQ);
* round to nearest: no feedback, one spacing per row, proportional to the row's RMS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from watersic_hf import codec
from watersic_hf.core import (
    LATTICES,
    LayerSettings,
    Moments,
    gap_to_bound,
    quantize_weight,
    relative_output_error,
)
from watersic_hf.core.rate import search_step
from watersic_hf.core.rescale import rescale
from watersic_hf.core.waterfill import shannon_rate
from watersic_hf.core.whiten import damped_cholesky, whitened_target
from watersic_hf.core.zsic import zsic
from watersic_hf.nn import path_search
from watersic_hf.testing import random_layer

DAMPING = 1e-4
COLUMNS = {
    "rate": "R",
    "bound": "bound",
    "pooled": "pooled",
    "classes": "classes",
    "stored": "stored",
    "gap": "classes - bound",
    "stored_gap": "stored - bound",
    "error": "error",
    "uniform_error": "uniform spacing",
    "nearest_error": "round to nearest",
}


class Layer:
    """One Gaussian layer, and what three ways to quantize it need."""

    def __init__(self, rows: int, cols: int, input_spread: float) -> None:
        self.weight_AN, cov_NN = random_layer(
            rows, cols, seed=0, input_spread=input_spread, weight_spread=0.0
        )
        self.moments = Moments(cov=cov_NN, tokens=0)
        self.linear_AN = self.moments.linear_term(self.weight_AN)
        self.energy = float((self.linear_AN * self.weight_AN).sum())
        self.variance_N = self.weight_AN.square().mean() * torch.linalg.eigvalsh(cov_NN)
        chol_NN, damping = damped_cholesky(cov_NN, DAMPING, tokens=0, name="benchmark")
        target_AN = whitened_target(self.weight_AN, self.moments, chol_NN, damping)
        # with columns scaled to a unit diagonal, one step is one spacing for all columns
        self.unit_chol_NN = chol_NN / chol_NN.diagonal()
        self.unit_target_AN = target_AN / chol_NN.diagonal()

    def error(self, dequantized_AN: Tensor) -> float:
        return relative_output_error(self.weight_AN, dequantized_AN, self.moments)

    def distortion(self, error: float) -> float:
        """Return the mean square error per whitened component."""
        return error * self.energy / self.weight_AN.numel()

    def uniform(self, spacing: float) -> tuple[Tensor, Tensor]:
        """Return codes and weight of the recursion with one spacing for all columns."""
        codes_AN, shrinkage_N = zsic(self.unit_target_AN, self.unit_chol_NN, spacing)
        row_A, gain_N = rescale(
            codes_AN,
            torch.full_like(shrinkage_N, spacing),
            shrinkage_N,
            cov=self.moments.cov,
            linear_AN=self.linear_AN,
            energy=self.energy,
        )
        return codes_AN, codes_AN * (spacing * gain_N) * row_A[:, None]

    def nearest(self, spacing: float) -> tuple[Tensor, Tensor]:
        """Return codes and weight of rounding with one spacing per row, relative to its RMS."""
        spacing_A1 = spacing * self.weight_AN.square().mean(1, keepdim=True).sqrt()
        codes_AN = (self.weight_AN / spacing_A1).round().int()
        return codes_AN, codes_AN * spacing_A1


def error_at(
    layer: Layer, method: Callable[[float], tuple[Tensor, Tensor]], bits: float, start: float
) -> float:
    """Return the error of a method whose codes have a class entropy of `bits`."""
    spacing = search_step(
        lambda step: codec.code_statistics(method(step)[0]).class_entropy,
        bits,
        start=start,
        tolerance=0.003,
    )
    return layer.error(method(spacing)[1])


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Print a markdown table and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--cols", type=int, default=512)
    parser.add_argument("--input-spread", type=float, default=0.7)
    parser.add_argument("--lattice", choices=LATTICES, default=LayerSettings.lattice)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1, 2, 3, 4, 6])
    options = parser.parse_args(argv)
    layer = Layer(options.rows, options.cols, options.input_spread)
    print(f"| {' | '.join(COLUMNS.values())} |\n|{'---|' * len(COLUMNS)}")
    table = []
    for rate in options.rates:
        quantized = quantize_weight(
            layer.weight_AN,
            layer.moments,
            rate=rate,
            settings=LayerSettings(lattice=options.lattice),
            search=path_search(layer.weight_AN.device) if options.lattice == "trellis" else None,
        )
        codes_AN = quantized.codes_AN
        statistics = codec.code_statistics(codes_AN, path=quantized.path)
        distortion = layer.distortion(quantized.error)
        spacing = float(layer.weight_AN.square().mean().sqrt()) * 2.0**-rate
        bits = statistics.class_entropy
        stored = 8 * len(codec.encode(codes_AN, path=quantized.path)) / codes_AN.numel()
        row = {
            "rate": rate,
            "bound": shannon_rate(layer.variance_N, distortion),
            "pooled": statistics.pooled_entropy,
            "classes": bits,
            "stored": stored,
            "gap": gap_to_bound(bits, layer.variance_N, distortion),
            "stored_gap": gap_to_bound(stored, layer.variance_N, distortion),
            "error": quantized.error,
            "uniform_error": error_at(layer, layer.uniform, bits, spacing),
            "nearest_error": error_at(layer, layer.nearest, bits, 2.0**-rate),
        }
        table.append(row)
        print(f"| {' | '.join(f'{row[key]:.4g}' for key in COLUMNS)} |", flush=True)
    return table


if __name__ == "__main__":
    main()
