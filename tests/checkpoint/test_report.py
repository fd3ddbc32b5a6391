import json
from dataclasses import asdict

import pytest
import torch

from watersic_hf.checkpoint import average_bits, average_error, kinds_of, with_reports
from watersic_hf.checkpoint.report import (
    REPORT_FILE,
    LayerReport,
    describe_run,
    layer_report,
    location_of,
    read_report,
    read_run,
    write_report,
)
from watersic_hf.core import ColumnProfile


def report(name, columns=3, bits=2.5, **more):
    known = {"rows": 2, "asked": 3.0, "error": 0.1, "damping": 1e-4, "tokens": 5, "seconds": 0.5}
    return LayerReport(name=name, columns=columns, bits=bits, **known | more)


def test_reports_are_read_as_they_were_written(tmp_path):
    profile = ColumnProfile(waterfilling=(2.5, -1.0), entropies=(2.0, 0.0), histogram=(1, 0, 2))
    reports = [report("a", 3, 2.5), report("b", 1, 4.5, profile=profile)]
    done = describe_run(1.5)

    write_report(tmp_path, reports, done)

    assert read_report(tmp_path) == reports
    assert read_run(tmp_path) == done
    assert done.versions["torch"] == torch.__version__
    assert read_report(tmp_path / "nowhere") == []
    assert read_run(tmp_path / "nowhere") is None


def test_reports_of_other_versions_are_read(tmp_path):
    row = asdict(report("a"))
    row["key_of_a_later_version"] = 1
    del row["profile"], row["pooled"], row["table"], row["stored_as"]
    (tmp_path / REPORT_FILE).write_text(json.dumps(row) + "\n", encoding="utf-8")

    assert read_report(tmp_path) == [report("a")]
    assert layer_report(row) == report("a")


def test_layers_of_the_files_are_joined_with_their_reports(tmp_path):
    reports = [report("a"), report("b", stored_as="model.b")]
    write_report(tmp_path, reports)
    rows = [{"name": "model.b"}, {"name": "a"}, {"name": "b"}]

    assert with_reports(rows, tmp_path) == [
        (rows[0], reports[1]),
        (rows[1], reports[0]),
        (rows[2], None),
    ]
    assert with_reports(rows[:1], tmp_path / "nowhere") == [(rows[0], None)]


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("model.layers.12.mlp.down_proj", ("model.layers", 12, "mlp.down_proj")),
        ("model.layers.3.mlp.experts.17.up", ("model.layers", 3, "mlp.experts.*.up")),
        ("decoder.block.0.layer.1.Enc.q", ("decoder.block", 0, "layer.*.Enc.q")),
        ("lm_head", ("", 0, "lm_head")),
    ],
)
def test_location_of_a_layer_is_read_from_its_name(name, location):
    assert location_of(name) == location


def test_kinds_name_the_stack_only_if_there_are_several():
    decoder, encoder = "decoder.block.1.q", "encoder.block.0.q"

    assert kinds_of([decoder, "lm_head"]) == ["q", "lm_head"]
    assert kinds_of([decoder, encoder, "lm_head"]) == [
        "decoder.block.*.q",
        "encoder.block.*.q",
        "lm_head",
    ]


def test_averages_are_weighted_by_the_number_of_weights():
    reports = [report("a", 3, 2.0, error=0.1), report("b", 1, 4.0, error=0.5)]

    assert average_bits(reports) == pytest.approx(2.5)
    assert average_error(reports) == pytest.approx(0.2)
    assert average_bits([]) == 0


def test_average_bits_leave_out_vocabulary_matrices():
    reports = [report("a", 3, 2.0), report("lm_head", 1, 8.0, table=True)]

    assert average_bits(reports) == pytest.approx(2.0)
