"""What the plugin for vLLM does without it: collecting, and asking a loader for its part."""

import re

import pytest
import torch

from watersic_hf.checkpoint import CheckpointError, pack_layer
from watersic_hf.vllm_plugin.arrivals import (
    Arrivals,
    missing_rows,
    part_of_columns,
    part_of_rows,
)


def packed_layer():
    return pack_layer(torch.randint(-3, 4, (8, 6)), torch.ones(8), torch.ones(6), name="layer")


def column_loader(rank: int):
    """The loader of a column-parallel layer, as vLLM's."""

    def load(param, tensor):
        size = param.shape[param.output_dim]
        param.data.copy_(tensor.narrow(param.output_dim, rank * size, size))

    return load


def row_loader(rank: int):
    def load(param, tensor):
        size = param.shape[param.input_dim]
        param.data.copy_(tensor.narrow(param.input_dim, rank * size, size))

    return load


def joined_loader(sizes: dict[str, int], rank: int, ranks: int):
    """The loader of a module that joins layers; without a shard id they are joined on the disk."""

    def load(param, tensor, shard_id=None):
        if shard_id is None:
            for name, part in zip(sizes, tensor.split(list(sizes.values())), strict=True):
                load(param, part, name)
            return
        first = sum(size // ranks for size in list(sizes.values())[: list(sizes).index(shard_id)])
        size = sizes[shard_id] // ranks
        param.data[first : first + size].copy_(tensor.narrow(0, rank * size, size))

    return load


def test_a_layer_is_complete_with_its_third_tensor_in_any_order():
    packed = packed_layer()
    arrivals = Arrivals("qkv_proj", ["q_proj", "k_proj"])

    assert arrivals.add("col_scale", packed.col_scale, "k") is None
    assert arrivals.add("weight", packed.weight, "k") is None
    assert arrivals.add("row_scale", packed.row_scale, "q") is None

    complete = arrivals.add("row_scale", packed.row_scale, "k")
    assert torch.equal(complete.weight, packed.weight)


@pytest.mark.parametrize("lost", ["weight", "row_scale", "col_scale"])
def test_an_incomplete_layer_is_named(lost):
    packed, arrivals = packed_layer(), Arrivals("qkv_proj", ["q_proj", "k_proj", "v_proj"])
    for field, tensor in packed.tensors().items():
        if field != lost:
            arrivals.add(field, tensor, "k")

    with pytest.raises(CheckpointError, match=rf"k_proj: .*no tensor k_proj\.{lost}"):
        arrivals.require_complete([])


def test_rows_without_a_weight_are_named():
    arrivals = Arrivals("model.qkv_proj", ["model.q_proj", "model.k_proj"])

    with pytest.raises(CheckpointError, match=r"model\.qkv_proj: 2 rows from 4 on .*model\.k_proj"):
        arrivals.require_complete(missing_rows([(0, 4)], 6))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(6), torch.zeros(6).half()]
)
def test_a_tensor_of_another_kind_is_refused(tensor):
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: found torch"):
        Arrivals("down_proj", ["down_proj"]).add("weight", tensor)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_rows_of_a_process(rank):
    first, part = part_of_rows(column_loader(rank), (12, 5), (4, 5), None, "layer")

    assert first == 0
    assert part.rows_r.tolist() == list(range(4 * rank, 4 * rank + 4))
    assert part.columns == slice(0, 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_columns_of_a_process(rank):
    first, part = part_of_columns(row_loader(rank), (3, 10), 5, "layer")

    assert first == 0
    assert part.rows_r.tolist() == [0, 1, 2]
    assert part.columns == slice(5 * rank, 5 * rank + 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_of_a_layer_that_is_joined_with_others(rank):
    loader = joined_loader({"q": 8, "k": 4, "v": 4}, rank, 2)

    first, part = part_of_rows(loader, (4, 5), (8, 5), "k", "layer")

    assert first == 4
    assert part.rows_r.tolist() == [2 * rank, 2 * rank + 1]


def test_rows_of_a_layer_that_is_joined_in_the_files():
    loader = joined_loader({"q": 8, "k": 4, "v": 4}, 1, 2)

    first, part = part_of_rows(loader, (16, 5), (8, 5), None, "layer")

    assert first == 0
    assert part.rows_r.tolist() == [4, 5, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize(
    ("shape", "found"), [((9, 5), "9 rows"), ((12, 7), "7 columns"), ((3, 5), "3 rows")]
)
def test_a_layer_of_another_model_is_refused(shape, found):
    with pytest.raises(CheckpointError, match=re.escape("model.layer: the checkpoint's layer")):
        part_of_rows(column_loader(2), shape, (4, 5), None, "model.layer")
