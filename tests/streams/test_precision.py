import pytest
import torch
from torch import nn

from watersic_hf.streams import precision
from watersic_hf.streams.precision import computing_fast, fast_dtype, in_fast_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Model(nn.Module):
    """Weights in bfloat16, one of them shared, beside a weight and a buffer in float32."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3, dtype=torch.bfloat16)
        self.head = nn.Linear(3, 4, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight
        self.router = nn.Linear(3, 2)
        self.block = nn.Linear(3, 3, device="meta", dtype=torch.bfloat16)
        self.register_buffer("scale", torch.ones(3, dtype=torch.float16))

    @property
    def dtype(self):
        return self.embedding.weight.dtype

    device = CPU


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(precision, "_has_units", lambda dtype: False)


def test_half_precision_is_computed_in_float32_where_it_is_slow(slow):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert fast_dtype(dtype, CPU) == torch.float32
        assert fast_dtype(dtype, CUDA) == dtype
    assert fast_dtype(torch.float64, CPU) == torch.float64


def test_units_are_used_where_they_are(monkeypatch):
    monkeypatch.setattr(precision, "_has_units", lambda dtype: True)

    assert fast_dtype(torch.bfloat16, CPU) == torch.bfloat16


def test_a_model_computes_in_float32_meanwhile(slow):
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with computing_fast(model):
        assert model.head.weight is model.embedding.weight
        assert {t.dtype for t in (model.head.weight, model.scale)} == {torch.float32}
        assert model.block.weight.dtype == torch.bfloat16
        # made meanwhile
        model.block = nn.Linear(3, 3)

    assert model.head.weight is model.embedding.weight
    assert model.block.weight.dtype == torch.bfloat16
    after = model.state_dict()
    for name in before.keys() - {"block.weight", "block.bias"}:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])


def test_nothing_changes_where_nothing_is_slow(slow):
    model = Model().to(torch.float32)
    tensors = [tensor.data_ptr() for tensor in model.parameters()]

    with computing_fast(model):
        assert [tensor.data_ptr() for tensor in model.parameters()] == tensors
    assert in_fast_dtype(model) is model
