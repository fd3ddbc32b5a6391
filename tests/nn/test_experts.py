import copy
import pickle
import re

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from watersic_hf.checkpoint import pack_layer
from watersic_hf.nn import (
    PackedMatrix,
    SeparateExperts,
    fuse,
    fused_experts,
    separate,
    separate_dense,
    set_residency,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
    "_experts_implementation": "eager",
}
KINDS = {
    "gated": (MixtralExperts, MixtralConfig),
    "transposed": (GptOssExperts, GptOssConfig),
    "plain": (NemotronHExperts, NemotronHConfig),
}


@pytest.fixture(params=KINDS)
def experts(request):
    kind, config = KINDS[request.param]
    module = kind(config(**SIZES))
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture
def routed():
    """Hidden states, the experts of every token and their weights; expert 2 gets no token."""
    g = torch.Generator().manual_seed(0)
    index_TK = torch.stack([torch.tensor([0, 1, 3])[torch.randperm(3)[:2]] for _ in range(9)])
    return torch.randn(9, 32, generator=g), index_TK, torch.rand(9, 2, generator=g)


def packed(module):
    """The same experts with packed matrices."""
    module = copy.deepcopy(module)
    layout = fused_experts(module)

    def matrix(expert, name):
        weight_AN = layout.slice(getattr(module, f"{name}_proj").data, expert)
        codes_AN = (weight_AN / 0.05).round().int()
        scales = (torch.full((n,), 0.05**0.5) for n in weight_AN.shape)
        return PackedMatrix.from_packed(pack_layer(codes_AN, *scales, name=name), dtype=torch.float)

    separate(module, layout, matrix)
    return module


def test_separate_and_fuse_keep_outputs_memory_and_state(experts, routed):
    expected = experts(*routed)
    pointer = experts.down_proj.data_ptr()
    weights = {name: value.clone() for name, value in experts.state_dict().items()}
    kind = type(experts)

    separate_dense(experts, fused_experts(experts))

    assert isinstance(experts, SeparateExperts)
    assert isinstance(experts, kind)
    torch.testing.assert_close(experts(*routed), expected)
    assert experts.packed[0]["down"].weight.data_ptr() == pointer
    fuse(experts)
    assert type(experts) is kind
    assert experts.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in experts.state_dict().items())


@pytest.mark.parametrize("residency", ["entropy", "packed"])
def test_residency_does_not_change_the_outputs(experts, routed, residency):
    module = packed(experts)
    set_residency(module, "dense")
    expected = module(*routed)

    set_residency(module, residency)

    torch.testing.assert_close(module(*routed), expected)
    fuse(module)
    torch.testing.assert_close(module(*routed), expected)


@pytest.mark.parametrize("experts", ["transposed"], indirect=True)
def test_compile_deepcopy_and_pickle_give_each_module_its_own_handle(experts, routed):
    module = packed(experts)
    twin = copy.deepcopy(module)
    for part in twin.packed:
        part["down"].row_scale.data *= 2
    again = pickle.loads(pickle.dumps(twin))

    torch.compiler.reset()
    for one in (module, twin, again):
        with torch.no_grad():
            found = torch.compile(one, fullgraph=True, backend="eager")(*routed)
        torch.testing.assert_close(found, one.mix(*routed))
    assert not torch.allclose(module(*routed), twin(*routed))
    assert torch.equal(again(*routed), twin(*routed))
    assert len({one.handle for one in (module, twin, again)}) == 3


@pytest.mark.parametrize("experts", ["transposed"], indirect=True)
def test_gradients_flow_in_eager_mode_and_are_refused_when_compiled(experts, routed):
    module = packed(experts)
    hidden_TH, index_TK, weight_TK = routed
    hidden_TH.requires_grad_()

    module(hidden_TH, index_TK, weight_TK).square().sum().backward()
    assert bool(hidden_TH.grad.isfinite().all())
    assert bool(hidden_TH.grad.any())

    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=re.escape("without torch.compile")):
        compiled(hidden_TH, index_TK, weight_TK).sum().backward()


def test_matrices_of_experts_are_not_linear_layers(experts):
    assert not any(isinstance(module, nn.Linear) for module in packed(experts).modules())


def test_experts_with_another_forward_are_not_recognized():
    module = Llama4TextExperts(Llama4TextConfig(hidden_size=32, intermediate_size=48))

    assert fused_experts(module) is None
    assert fused_experts(nn.Linear(4, 4)) is None


def test_index_beyond_the_experts_means_no_expert(experts, routed):
    hidden_TH, index_TK, weight_TK = routed
    separate_dense(experts, fused_experts(experts))
    index_TK[:, 1] = 4

    found = experts(hidden_TH, index_TK, weight_TK)

    torch.testing.assert_close(found, experts(hidden_TH, index_TK[:, :1], weight_TK[:, :1]))
