import pytest

from watersic_hf.checkpoint import LayerReport, inspect_checkpoint, read_report, write_report
from watersic_hf.report import read_facts


def row(name):
    fields = ("bits", "payload_bits", "pooled_entropy", "class_entropy", "profile")
    return {"name": name, "rows": 4, "columns": 4} | dict.fromkeys(fields)


def test_layers_are_in_model_order(tmp_path):
    names = [
        f"{stack}.{block}.{layer}"
        for stack in ("encoder.h", "decoder.h")
        for block in (2, 10)
        for layer in ("q", "k")
    ]
    # one of the stacks has another name in the files
    stored = [name.replace("decoder", "a") for name in names]
    reports = [
        LayerReport(
            name=name,
            rows=4,
            columns=4,
            asked=3.0,
            bits=3.0,
            error=0.1,
            damping=1e-4,
            tokens=7,
            seconds=0.1,
            stored_as=None if other == name else other,
        )
        for name, other in zip(names, stored, strict=True)
    ]
    write_report(tmp_path, reports)
    found = {"layers": [row(name) for name in sorted(stored)], "dense": [], "totals": {}}

    facts = read_facts(tmp_path, found)

    assert [layer.name for layer in facts.layers] == names
    assert facts.kinds == ["encoder.h.*.q", "encoder.h.*.k", "decoder.h.*.q", "decoder.h.*.k"]
    assert [layer.kind for layer in facts.layers] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert all(layer.error == 0.1 for layer in facts.layers)
    assert facts.tokens == 7


def test_sizes_from_headers_equal_those_of_decoded_layers(quantized_folder):
    decoded, headers = (inspect_checkpoint(quantized_folder, decode=d) for d in (True, False))

    known = ("name", "rows", "columns", "bits", "payload_bits")
    for first, second in zip(decoded["layers"], headers["layers"], strict=True):
        assert {k: first[k] for k in known} == pytest.approx({k: second[k] for k in known})
        assert second["class_entropy"] is None
    assert headers["totals"].items() <= decoded["totals"].items()


def test_profiles_come_from_the_report_and_agree_with_those_from_the_codes(quantized_folder):
    reports = {r.name: r for r in read_report(quantized_folder)}
    found = inspect_checkpoint(quantized_folder)

    for layer, seen in zip(
        read_facts(quantized_folder, found).layers,
        sorted(found["layers"], key=lambda r: list(reports).index(r["name"])),
        strict=True,
    ):
        assert layer.profile == reports[layer.name].profile
        assert layer.profile.histogram == seen["profile"]["histogram"]
        # well above the water level, rounding and rescaling hardly change the power of the columns
        pairs = zip(layer.profile.waterfilling, seen["profile"]["waterfilling"], strict=True)
        assert all(height == pytest.approx(h, abs=0.2) for height, h in pairs if height > 2)
