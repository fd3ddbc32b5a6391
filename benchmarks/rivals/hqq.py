"""HQQ: half-quadratic quantization, without calibration data."""

import argparse

import torch

from .contract import Job, add_bits, linear, package_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bits(parser, (1, 2, 3, 4, 8))
    parser.add_argument("--axis", type=int, choices=(0, 1), default=1, help="axis of the groups")


def quantize(job: Job) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    bits, group, axis = job.options.bits, job.options.group, job.options.axis
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    job.version = package_version("hqq")
    job.settings = f"{bits} bits, group {group}, axis {axis}, bfloat16 scale and zero"
    job.each_layer(
        lambda weight: HQQLinear(
            linear(weight), dict(config), compute_dtype=torch.bfloat16, device="cpu"
        ),
        lambda layer: (layer.dequantize(), layer.state_dict().values()),
    )
