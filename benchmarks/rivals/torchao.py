"""torchao: 4-bit integers for CPUs, without calibration data."""

import argparse

import torch
from torch import Tensor, nn

from .contract import Job, add_bits, linear, package_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bits(parser, (4,))
    parser.add_argument(
        "--algorithm", default="tinygemm", help="how scales and zeros are chosen: tinygemm, hqq"
    )


def quantize(job: Job) -> None:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    config = PrototypeInt4WeightOnlyConfig(
        group_size=job.options.group, int4_choose_qparams_algorithm=job.options.algorithm
    )

    def quantize_weight(weight: Tensor) -> nn.Module:
        layer = nn.Sequential(linear(weight))
        quantize_(layer, config)
        return layer[0]

    def dequantize(layer: nn.Module) -> tuple[Tensor, list[Tensor]]:
        # the packing is private to the kernel: a product with the identity reads it back exactly
        dense = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T
        return dense, [layer.weight.qdata, layer.weight.scale_and_zero]

    job.version = package_version("torchao")
    job.settings = f"int4 for CPU (opaque), group {job.options.group}, {job.options.algorithm}"
    job.each_layer(quantize_weight, dequantize)
