import logging

import pytest
import torch
from torch import nn

from watersic_hf import WaterSICLinear, set_residency
from watersic_hf.checkpoint import pack_layer
from watersic_hf.nn import residency as module
from watersic_hf.nn.residency import ResidencyInputs, choose_residency

GB = 10**9


def layer(device="cuda", *, weights=GB, bits=3.0, on_device=False):
    return ResidencyInputs(
        device=torch.device(device),
        weights=weights,
        stored_bytes=int(weights * bits / 8),
        dense_bytes_per_weight=2,
        on_device=on_device,
    )


@pytest.mark.parametrize(
    ("free", "expected"),
    [(8.0, "dense"), (2.4, "packed"), (0.6, "entropy"), (0.1, "entropy")],
)
def test_fastest_residency_that_fits_is_chosen_on_cuda(free, expected):
    # three layers of a third of a billion weights: 2 GB dense, 0.48 packed, 0.39 in a prefix code
    layers = [layer(weights=GB // 3)] * 3

    residency, reason = choose_residency(layers, free=int(free * GB))

    assert residency == expected
    assert "dense 2.00, packed 0.48, entropy 0.39" in reason


def test_payloads_on_the_device_count_as_free_memory():
    free = int(2.6 * GB)

    assert choose_residency([layer()], free=free)[0] == "packed"
    assert choose_residency([layer(on_device=True)], free=free)[0] == "dense"


@pytest.mark.parametrize(("free", "expected"), [(8.0, "dense"), (2.4, "packed"), (0.1, "entropy")])
def test_weights_are_compressed_on_a_cpu_where_dense_ones_do_not_fit(free, expected):
    residency, reason = choose_residency([layer("cpu", on_device=True)], free=int(free * GB))

    assert residency == expected
    assert "dense 2.00, packed 0.48, entropy 0.39, and 70%" in reason


def test_weights_are_dense_where_the_free_memory_is_not_known(monkeypatch):
    monkeypatch.setattr(module, "_free_host_memory", lambda: None)

    residency, reason = choose_residency([layer("cpu")])

    assert residency == "dense"
    assert "free memory of cpu is not known" in reason


def test_other_devices_use_dense_weights():
    residency, reason = choose_residency([layer("mps")])

    assert residency == "dense"
    assert "no compressed form has kernels on mps" in reason


def test_choice_for_a_model_is_logged_once(caplog):
    codes = torch.randint(-3, 4, (8, 8), dtype=torch.int8)
    packed = pack_layer(codes, torch.ones(8), torch.ones(8), name="l")
    layers = [WaterSICLinear.from_packed(packed, dtype=torch.float32) for _ in range(2)]
    model = nn.Sequential(*layers)

    with caplog.at_level(logging.INFO, logger="watersic_hf"):
        set_residency(model, "auto")

    assert [layer.residency for layer in model] == ["dense", "dense"]
    (message,) = caplog.messages
    assert message.startswith("Residency of 2 quantized layers on cpu: dense, since ")
