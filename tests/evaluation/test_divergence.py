import pytest
import torch
from torch.nn import functional as F

from watersic_hf.evaluation.divergence import kl_nats, log_probabilities

VOCABULARY = 320


def logits(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(23, VOCABULARY, generator=g).to(dtype)


@pytest.mark.parametrize("rows", [1, 5, 23, 100])
def test_chunks_cover_every_token_once(rows):
    first, second = logits(0, torch.bfloat16).requires_grad_(), logits(1)

    chunks = list(log_probabilities(first, second, scratch_bytes=4 * VOCABULARY * rows))

    assert [i for part, _ in chunks for i in range(23)[part]] == list(range(23))
    assert max(len(log_p) for _, pair in chunks for log_p in pair) == min(rows, 23)
    for number, whole in enumerate((first, second)):
        found = torch.cat([pair[number] for _, pair in chunks])
        assert not found.requires_grad
        assert torch.equal(found, F.log_softmax(whole.detach().float(), dim=-1))


def test_a_chunk_has_at_least_one_token():
    assert len(list(log_probabilities(logits(0), scratch_bytes=1))) == 23


def test_kl_is_that_of_the_first_distribution_from_the_second():
    p, q = (logits(seed).double().softmax(-1) for seed in (0, 1))

    assert kl_nats(p.log(), q.log()) == pytest.approx(float((p * (p / q).log()).sum()))
