import io
import sys

import pytest

from watersic_hf.checkpoint import LayerReport
from watersic_hf.streams.progress import LINE_EVERY, Progress


def report(name, bits, error=0.01):
    return LayerReport(name=name, rows=10, columns=100, asked=bits, bits=bits, error=error,
                       damping=1e-4, tokens=64, seconds=0.1)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def go_through(monkeypatch, stream, seconds=0.0):
    clock = iter(n * seconds for n in range(1000))
    monkeypatch.setattr("watersic_hf.streams.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(layers=4, weights=4000, blocks=2) as progress:
        for block in (0, 1):
            progress.block(f"h.{block}")
            progress.layer(report(f"h.{block}.q", 2.0))
            progress.layer(report(f"h.{block}.o", 4.0))
    return stream.getvalue()


def test_a_terminal_has_a_bar_and_says_where_it_is(monkeypatch):
    shown = go_through(monkeypatch, Terminal())

    assert "Quantizing 100%" in shown
    assert "4.00k of 4.00k weights" in shown
    assert "left" in shown
    assert "block 2/2, layer 4/4, 3.000 bits, error 0.01 so far" in shown
    assert "h.1.o: 4.00 bits, error 0.01" in shown


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 1), (LINE_EVERY, 4)])
def test_elsewhere_there_are_plain_lines_and_not_too_many(monkeypatch, seconds, lines):
    shown = go_through(monkeypatch, io.StringIO(), seconds)

    assert "\r" not in shown
    assert shown.count("\n") == lines
    last = shown.splitlines()[-1]
    assert "00:00 left, block 2/2, layer 4/4, 3.000 bits, error 0.01 so far" in last
    assert "peak" in last or sys.platform != "linux"


def test_no_time_is_told_before_this_run_has_quantized_a_block(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("watersic_hf.streams.progress.LINE_EVERY", 0.0)
    with Progress(layers=5, weights=5000, blocks=3) as progress:
        for block, layers in (("h.0", "q"), ("h.1", "qo"), ("h.2", "qo")):
            progress.block(block)
            for layer in layers:
                progress.layer(report(f"{block}.{layer}", 2.0), earlier=block == "h.0")

    left = [line.split(" gone, ")[1].split(" left")[0] for line in shown.getvalue().splitlines()]
    assert left == ["?", "?", "?", "00:00", "00:00"]
