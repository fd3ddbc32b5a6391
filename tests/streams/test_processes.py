import pytest

from watersic_hf.streams import processes
from watersic_hf.streams.processes import shard_by_cost

COSTS = {"a": 1, "b": 8, "c": 1, "d": 4, "e": 4, "f": 1}


def shares(monkeypatch, size, costs=COSTS):
    found = []
    for rank in range(size):
        monkeypatch.setattr(processes, "rank_and_size", lambda rank=rank: (rank, size))
        found.append(shard_by_cost(list(costs), costs.get))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_item_has_one_process(monkeypatch, size):
    found = shares(monkeypatch, size)

    assert sorted(item for share in found for item in share) == list(COSTS)
    # in the order in which they were given
    assert all(share == sorted(share) for share in found)


def test_expensive_items_go_to_different_processes(monkeypatch):
    found = shares(monkeypatch, 2)

    work = [sum(map(COSTS.get, share)) for share in found]
    # every other item would give 6 and 13
    assert sorted(work) == [9, 10]


def test_equal_items_are_dealt_in_turn(monkeypatch):
    costs = dict.fromkeys("abcde", 3)

    assert shares(monkeypatch, 2, costs) == [["a", "c", "e"], ["b", "d"]]
