import math

import pytest

from watersic_hf.checkpoint import RunReport, location_of
from watersic_hf.core import ColumnProfile
from watersic_hf.report.facts import Facts, LayerFacts

KINDS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate", "mlp.experts.*.up_proj"]


def profile(rate: float) -> ColumnProfile:
    return ColumnProfile(
        waterfilling=tuple(rate + 1 - n / 8 for n in range(32)),
        entropies=tuple(max(0.0, rate + 1.25 - n / 8) for n in range(32)),
        histogram=(3, 0, 5, 9, 40, 60, 9, 2),
    )


@pytest.fixture(scope="session")
def make_facts():
    """Make facts of a mixture of experts as they would be read from its folder."""

    def make(*, blocks=4, experts=3, known=True, title="model", **changes) -> Facts:
        layers = []
        for block in range(blocks):
            names = [(k, f"model.layers.{block}.{kind}") for k, kind in enumerate(KINDS[:3])]
            names += [(3, f"model.layers.{block}.mlp.experts.{e}.up_proj") for e in range(experts)]
            for kind, name in names:
                bits = 2 + kind / 2 + math.sin(len(layers)) / 3
                layers.append(
                    LayerFacts(
                        number=len(layers),
                        name=name,
                        location=location_of(name),
                        kind=kind,
                        rows=64,
                        columns=128,
                        bits=bits,
                        payload_bits=bits - 0.1,
                        target=bits if known else None,
                        error=4**-bits if known else None,
                        seconds=0.5 if known else None,
                        tokens=7 if known else None,
                        pooled_entropy=None,
                        class_entropy=None,
                        profile=profile(bits) if known else None,
                    )
                )
        run = RunReport(
            date="2026-01-02T03:04:05+00:00",
            seconds=3725.0,
            peak_bytes=2_500_000_000,
            machine="a computer, 2 threads",
            versions={"torch": "9.9"},
        )
        weights = sum(layer.weights for layer in layers)
        found = {
            "title": title,
            "architecture": "MoeForCausalLM",
            "kinds": KINDS,
            "layers": layers,
            "dense": [{"name": "embed.weight", "tensors": 1, "bytes": 640, "reason": "embedding"}],
            "totals": {
                "layers": len(layers),
                "weights": weights,
                "dense_bytes": 640,
                "bits": sum(r.bits * r.weights for r in layers) / weights,
                "file_bytes": 123_456,
                "tables": 0,
                "table_weights": 0,
                "table_bits": 0.0,
                "model_bits": 3.5,
            },
            "tokens": 4096,
            "settings": {"bits": 3.0, "dataset": "wikitext2"},
            "run": run if known else None,
        }
        return Facts(**found | changes)

    return make
