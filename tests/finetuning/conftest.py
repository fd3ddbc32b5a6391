import pytest
import torch

from watersic_hf import WaterSICLinear
from watersic_hf.checkpoint import pack_layer


@pytest.fixture(scope="session")
def make_layer():
    """Make a quantized linear layer with random codes and scales and one dead column."""

    def make(*, bias, rows=24, columns=16):
        g = torch.Generator().manual_seed(0)
        codes = (torch.randn(rows, columns, generator=g) * 3).round().to(torch.int8)
        col_scale = torch.rand(columns, generator=g) + 0.1
        col_scale[3] = 0
        packed = pack_layer(codes, torch.rand(rows, generator=g) + 0.5, col_scale, name="l")
        values = 10 * torch.randn(rows, generator=g) if bias else None
        return WaterSICLinear.from_packed(packed, bias=values, dtype=torch.float32)

    return make
