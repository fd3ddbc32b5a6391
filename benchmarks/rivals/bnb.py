"""bitsandbytes: 4-bit floating point (NF4, FP4), without calibration data."""

import argparse

from .contract import Job, package_version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--type", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--double", action="store_true", help="quantize the scales too")


def quantize(job: Job) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    job.version = package_version("bitsandbytes")
    job.settings = f"{job.options.type}, block 64" + ", double" * job.options.double
    job.each_layer(
        lambda weight: quantize_4bit(
            weight,
            blocksize=64,
            quant_type=job.options.type,
            compress_statistics=job.options.double,
        ),
        lambda packed: (
            dequantize_4bit(*packed),
            [packed[0], *packed[1].as_dict(packed=True).values()],
        ),
    )
