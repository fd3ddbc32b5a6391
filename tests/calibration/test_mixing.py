import copy

import pytest
import torch
from torch import nn

from watersic_hf.calibration.mixing import golden_section, search_mixture
from watersic_hf.calibration.moments import group_moments
from watersic_hf.core import LayerSettings
from watersic_hf.streams.hooks import Side
from watersic_hf.streams.stream import block_stream
from watersic_hf.streams.topology import decoder_blocks, input_groups


@pytest.mark.parametrize("best", [0.0, 0.3, 0.62, 1.0])
def test_the_golden_section_comes_close_to_a_minimum(best):
    share, value = golden_section(lambda x: (x - best) ** 2, steps=6)

    assert share == pytest.approx(best, abs=0.1)
    assert value == (share - best) ** 2


def test_no_point_is_tried_twice():
    tried = []

    golden_section(lambda x: tried.append(round(x, 6)) or x, steps=5)

    assert len(tried) == len(set(tried)) == 2 + 6


def test_a_function_with_two_valleys_gives_the_best_point_tried():
    share, _ = golden_section(lambda x: -1.0 if x == 1 else x)

    assert share == 1


@torch.no_grad()
@pytest.mark.parametrize("weighted", [True, False])
def test_the_mixture_found_is_no_worse_than_the_corners_and_the_weights_come_back(
    make_llama, weighted
):
    model = make_llama()
    layers = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    name, block = decoder_blocks(model, layers)[0]
    g = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 320, (32,), generator=g) for _ in range(8)]
    original = Side(block_stream(model, [block], windows, batch_size=4), copy.deepcopy(block))
    working = Side(original.stream.copy(), block)
    noise = 0.3 * torch.randn(4, 32, 64, generator=g)
    working.stream.hidden = [h + noise for h in original.stream.hidden]
    inside = [n.removeprefix(f"{name}.") for n in layers if n.startswith(f"{name}.")]
    run = lambda: working.stream.run(0, block, 0)  # noqa: E731
    groups = input_groups(block, inside, run, working.stream.hidden[0])
    importance = [torch.rand(4, 32, generator=g) for _ in range(2)]
    plain, heavy = group_moments(
        working, 0, groups[0], name=name, original=original, importance=importance
    )
    before = copy.deepcopy(block.state_dict())
    tried = []

    def mixture(drift, attention):
        tried.append((drift, attention))
        return plain.mix(heavy, attention).with_drift(drift)

    found = search_mixture(
        mixture, groups[0], groups[1], 0, working, original, bits=3.0,
        settings=LayerSettings(), weighted=weighted,
    )  # fmt: skip

    assert found in tried
    assert {(0.0, 0.0), (1.0, 0.0)} <= set(tried)
    assert any(attention > 0 for _, attention in tried) == weighted
    assert all(torch.equal(before[k], v) for k, v in block.state_dict().items())
