"""SINQ: scales for rows and columns, without calibration data."""

import argparse

import torch

from .contract import Job, add_bits, flat, linear, package_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bits(parser, (2, 3, 4, 8))


def quantize(job: Job) -> None:
    from sinq.sinqlinear import SINQLinear, sinq_base_quant_config

    bits, group = job.options.bits, job.options.group
    config = sinq_base_quant_config(bits, group, method="sinq")
    job.version = package_version("sinq")
    job.settings = f"sinq, {bits} bits, group {group}, 1D tiles, scales and zeros of 8 bits"
    job.each_layer(
        lambda weight: SINQLinear(
            linear(weight), config, compute_dtype=torch.bfloat16, device="cpu"
        ),
        lambda layer: (layer.dequantize(), flat(layer.state_dict())),
    )
