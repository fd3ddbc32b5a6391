import torch
from torch import nn

from watersic_hf.streams.torch_state import default_torch_state, replace_inference_tensors


def state():
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device().type,
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
    }


def test_the_state_of_torch_is_its_default_inside_and_restored_outside():
    default = state()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            torch.device("meta"),
        ):
            before = state()
            inside = default_torch_state()(state)()
            after = state()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)

    # a demand for deterministic algorithms stays, without its errors
    assert inside == default | {"deterministic": True, "warn only": True}
    assert after == before != inside


def test_tensors_of_inference_mode_are_replaced_and_stay_tied():
    with torch.inference_mode():
        model = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False))
        model[2].weight = model[0].weight
        model[0].weight.mark = True
    weight = model[0].weight

    replace_inference_tensors(model)

    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    assert model[2].weight is model[0].weight
    assert model[2].weight.mark
    assert model[2].weight.requires_grad
    assert torch.equal(model[0].weight.detach(), weight)


def test_ordinary_tensors_stay_the_same_objects():
    model = nn.Linear(2, 2)
    before = [id(p) for p in model.parameters()]

    replace_inference_tensors(model)

    assert [id(p) for p in model.parameters()] == before
