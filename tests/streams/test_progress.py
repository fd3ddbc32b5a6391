import io
import sys

import pytest

from watersic_hf.checkpoint import LayerReport
from watersic_hf.streams.progress import SECONDS_BETWEEN_LINES, Progress


def report(name, bits, error=0.01):
    return LayerReport(
        name=name,
        rows=10,
        columns=100,
        asked=bits,
        bits=bits,
        error=error,
        damping=1e-4,
        tokens=64,
        seconds=0.1,
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_progress(monkeypatch, stream, seconds=0.0):
    clock = iter(n * seconds for n in range(1000))
    monkeypatch.setattr("watersic_hf.streams.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(layers=4, weights=4000, blocks=2) as progress:
        for block in (0, 1):
            progress.block(f"h.{block}")
            progress.layer(report(f"h.{block}.q", 2.0))
            progress.layer(report(f"h.{block}.o", 4.0))
    return stream.getvalue()


def test_terminal_shows_bar_and_status_line(monkeypatch):
    shown = run_progress(monkeypatch, Terminal())

    assert "Quantizing 100%" in shown
    assert "4.00k of 4.00k weights" in shown
    assert "remaining" in shown
    assert "block 2/2, layer 4/4, 3.000 bits, error 0.01 so far" in shown
    assert "h.1.o: 4.00 bits, error 0.01" in shown


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 1), (SECONDS_BETWEEN_LINES, 4)])
def test_plain_lines_at_most_one_per_interval_without_terminal(monkeypatch, seconds, lines):
    shown = run_progress(monkeypatch, io.StringIO(), seconds)

    assert "\r" not in shown
    assert shown.count("\n") == lines
    last = shown.splitlines()[-1]
    assert "00:00 remaining, block 2/2, layer 4/4, 3.000 bits, error 0.01 so far" in last
    assert "peak" in last or sys.platform != "linux"


def test_remaining_time_appears_after_first_block_of_this_run(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("watersic_hf.streams.progress.SECONDS_BETWEEN_LINES", 0.0)
    with Progress(layers=5, weights=5000, blocks=3) as progress:
        for block, layers in (("h.0", "q"), ("h.1", "qo"), ("h.2", "qo")):
            progress.block(block)
            for layer in layers:
                progress.layer(report(f"{block}.{layer}", 2.0), earlier=block == "h.0")

    remaining = [
        line.split(" elapsed, ")[1].split(" remaining")[0] for line in shown.getvalue().splitlines()
    ]
    assert remaining == ["?", "?", "?", "00:00", "00:00"]
