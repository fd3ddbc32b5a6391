import copy

import pytest
import torch
from torch import nn

from watersic_hf.streams.attention import AttentionObserver
from watersic_hf.streams.hooks import BlockView, group_inputs, group_record
from watersic_hf.streams.outputs import FileStore, MemoryStore
from watersic_hf.streams.replay import Replay
from watersic_hf.streams.stream import BlockStream
from watersic_hf.streams.topology import input_groups

WIDTH = 6


class Mlp(nn.Module):
    """Two layers; with `in_place`, the activation overwrites what the first one returns."""

    def __init__(self, in_place=False):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.in_place = in_place

    def forward(self, x):
        return self.down(nn.functional.relu(self.up(x), inplace=self.in_place))


class Block(nn.Module):
    """Two modules of layers, the first of which may be called twice."""

    def __init__(self, *, repeats=1, in_place=False, adds_in_place=False):
        super().__init__()
        self.first, self.second = Mlp(in_place), Mlp(in_place)
        self.repeats = repeats
        self.adds_in_place = adds_in_place

    def forward(self, hidden):
        x = hidden.clone()
        for _ in range(self.repeats):
            y = self.first(x)
            x = y.add_(x) if self.adds_in_place else y + x
        return x + self.second(x)


LAYERS = ("first.up", "first.down", "second.up", "second.down")
KINDS = {
    "plain": {},
    "called twice": {"repeats": 2},
    "activation in place": {"in_place": True},
    "sum in place": {"adds_in_place": True},
    "sum in place, called twice": {"adds_in_place": True, "repeats": 2},
}


def stream_of(batches=2):
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(3, 4, WIDTH, generator=g) for _ in range(batches)]
    return BlockStream(hidden, [[((), {})]] * batches)


def views(block, *, pending, store=None):
    """The block with and without replay; both share its modules."""
    replay = Replay(LAYERS, pending=pending, store=store or MemoryStore(1 << 20))
    return BlockView(stream_of(), 0, block, replay), BlockView(stream_of(), 0, block)


def count_calls(block):
    calls = dict.fromkeys(LAYERS, 0)
    for name in LAYERS:
        layer = block.get_submodule(name)

        def forward(x, name=name, forward=layer.forward):
            calls[name] += 1
            return forward(x)

        layer.forward = forward
    return calls


def walk(view, groups, *, replace=False):
    """What the groups and the end of the block see, when layers change after their group."""
    seen = []
    for group in groups:
        for batch in range(view.batches):
            seen += group_inputs(view, group, batch)
        for layer in group.layers:
            if replace:
                module = view.block.get_submodule(layer)
                module.weight = nn.Parameter(module.weight * 1.5)
            if view.replay is not None:
                view.replay.finish(layer)
    view.advance()
    return [*seen, *view.stream.hidden]


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path):
    yield MemoryStore(1 << 20) if request.param == "memory" else FileStore(tmp_path, streams=1)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_seen_is_as_without_replay(kind, replace, store):
    torch.manual_seed(0)
    block = Block(**KINDS[kind])
    with_replay, without = views(block, pending=LAYERS if replace else (), store=store)
    without = BlockView(without.stream, 0, copy.deepcopy(block))
    groups = input_groups(block, LAYERS, lambda: without.run(0), without.stream.hidden[0])

    found = walk(with_replay, groups, replace=replace)
    wanted = walk(without, groups, replace=replace)

    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))


@torch.no_grad()
@pytest.mark.parametrize("pending", [(), LAYERS])
@pytest.mark.parametrize("kind", ["plain", "called twice"])
def test_layers_run_once(kind, pending, store):
    block = Block(**KINDS[kind])
    view, plain = views(block, pending=pending, store=store)
    groups = input_groups(block, LAYERS, lambda: plain.run(0), plain.stream.hidden[0])
    calls = count_calls(block)

    walk(view, groups)

    repeats = block.repeats
    wanted = {layer: 2 * (repeats if layer.startswith("first") else 1) for layer in LAYERS}
    if pending and repeats == 2:
        # what runs behind a layer that is still to be replaced is not final
        wanted["first.up"] += 2 * 2
        wanted["first.down"] += 2 * 2
    assert calls == wanted


class Attention(nn.Module):
    """Self-attention with one head, whose queries are keys and values as well."""

    def __init__(self):
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q = self.q(x)[:, None]
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return x + self.o(y[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("replace", [False, True])
def test_attention_runs_once(replace, store):
    torch.manual_seed(0)
    layers = ("0.q", "0.o", "1.up", "1.down")
    block = nn.Sequential(Attention(), Mlp())
    plain = BlockView(stream_of(), 0, copy.deepcopy(block))
    replay = Replay(layers, pending=layers if replace else (), store=store)
    view = BlockView(stream_of(), 0, block, replay)
    groups = input_groups(block, layers, lambda: plain.run(0), plain.stream.hidden[0])
    calls = []

    with AttentionObserver(lambda: calls.append(1)):
        found = walk(view, groups, replace=replace)
    wanted = walk(plain, groups, replace=replace)

    assert len(calls) == view.batches
    assert all(map(torch.equal, found, wanted))


@torch.no_grad()
def test_limit_of_memory():
    block = Block()
    for limit, wanted in ((0, 5), (3 * 4 * WIDTH * 4, 3), (1 << 20, 1)):
        view, plain = views(block, pending=(), store=MemoryStore(limit))
        view.stream.hidden = view.stream.hidden[:1]
        groups = input_groups(block, LAYERS, lambda p=plain: p.run(0), plain.stream.hidden[0])
        calls = count_calls(block)

        walk(view, groups)

        assert calls["first.up"] <= wanted
        for name in LAYERS:
            del block.get_submodule(name).forward
    assert calls["first.up"] == 1


@torch.no_grad()
def test_observed_modules_run_inside_what_was_answered():
    block = Block()
    view, plain = views(block, pending=())
    groups = input_groups(block, LAYERS, lambda: plain.run(0), plain.stream.hidden[0])
    view.run_on(0)

    wanted = group_record(plain, groups[1], 0)
    found = group_record(view, groups[1], 0)

    assert all(map(torch.equal, found.inputs, wanted.inputs))


@torch.no_grad()
def test_forwards_are_restored():
    block = Block()
    view, _ = views(block, pending=())

    def own(x):
        return x[..., :WIDTH]

    block.second.forward = own
    view.run_on(0)

    assert block.second.forward is own
    assert "forward" not in vars(block.first)
    assert "forward" not in vars(block.first.up)
