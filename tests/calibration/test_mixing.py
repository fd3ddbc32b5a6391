import copy

import pytest
import torch
from torch import nn

from watersic_hf.calibration.mixing import golden_section, search_mixture
from watersic_hf.calibration.moments import group_moments
from watersic_hf.core import LayerSettings
from watersic_hf.streams.hooks import BlockView
from watersic_hf.streams.stream import block_stream
from watersic_hf.streams.topology import decoder_blocks, input_groups


@pytest.mark.parametrize("best", [0.0, 0.3, 0.62, 1.0])
def test_golden_section_approaches_minimum(best):
    point, value = golden_section(lambda x: (x - best) ** 2, steps=6)

    assert point == pytest.approx(best, abs=0.1)
    assert value == (point - best) ** 2


def test_golden_section_tries_no_point_twice():
    tried = []

    golden_section(lambda x: tried.append(round(x, 6)) or x, steps=5)

    assert len(tried) == len(set(tried)) == 2 + 6


def test_golden_section_returns_best_point_tried():
    point, _ = golden_section(lambda x: -1.0 if x == 1 else x)

    assert point == 1


@torch.no_grad()
@pytest.mark.parametrize("weighted", [True, False])
def test_search_mixture_tries_corners_and_restores_weights(make_llama, weighted):
    model = make_llama()
    layers = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    name, block = decoder_blocks(model, layers)[0]
    g = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 320, (32,), generator=g) for _ in range(8)]
    original = BlockView(
        block_stream(model, [block], windows, batch_size=4), 0, copy.deepcopy(block)
    )
    working = BlockView(original.stream.copy(), 0, block)
    noise = 0.3 * torch.randn(4, 32, 64, generator=g)
    working.stream.hidden = [h + noise for h in original.stream.hidden]
    projections = [n.removeprefix(f"{name}.") for n in layers if n.startswith(f"{name}.")]
    run = lambda: working.stream.run(0, block, 0)  # noqa: E731
    groups = input_groups(block, projections, run, working.stream.hidden[0])
    importance = [torch.rand(4, 32, generator=g) for _ in range(2)]
    plain, heavy = group_moments(
        working, groups[0], name=name, original=original, importance=importance
    )
    before = copy.deepcopy(block.state_dict())
    tried = []

    def mixture(drift, attention):
        tried.append((drift, attention))
        return plain.mix(heavy, attention).with_drift(drift)

    found = search_mixture(
        mixture,
        groups[0],
        groups[1],
        working,
        original,
        bits=3.0,
        settings=LayerSettings(),
        weighted=weighted,
    )

    assert found in tried
    assert {(0.0, 0.0), (1.0, 0.0)} <= set(tried)
    assert any(attention > 0 for _, attention in tried) == weighted
    assert all(torch.equal(before[k], v) for k, v in block.state_dict().items())
