"""optimum-quanto: round to nearest in groups, without calibration data."""

import argparse

from torch import Tensor, nn

from .contract import Job, add_bits, linear, package_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bits(parser, (2, 4))


def quantize(job: Job) -> None:
    from optimum.quanto import QLinear, qtypes

    def quantize_weight(weight: Tensor) -> nn.Module:
        layer = QLinear.from_module(linear(weight), weights=qtypes[f"qint{job.options.bits}"])
        layer.freeze()
        return layer

    job.version = package_version("optimum-quanto")
    job.settings = f"qint{job.options.bits}, its default groups (at most 128) and optimizer"
    job.each_layer(
        quantize_weight, lambda layer: (layer.weight.dequantize(), layer.state_dict().values())
    )
