"""The page in a real browser; skipped if none is installed."""

import html
import json
import re
import shutil
import subprocess

import pytest

from watersic_hf.report import model_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]

#: Script that runs in the finished page: it measures what is visible, clicks, and measures again.
MEASURE = """
const found = {errors: window.errors, plots: {}};
for (const plot of document.querySelectorAll("svg.plot")) {
  const box = plot.getBoundingClientRect();
  const inked = [...plot.querySelectorAll("path")].filter((path) => path.getTotalLength() > 0);
  const sizes = [...plot.querySelectorAll("text")].map((text) =>
    parseFloat(getComputedStyle(text).fontSize) * box.width / plot.viewBox.baseVal.width);
  found.plots[plot.id] = {width: box.width, paths: inked.length, text: Math.min(...sizes)};
}
found.points = document.querySelectorAll("#error-against-bits .points").length;
found.width = document.documentElement.scrollWidth;
found.inner = innerWidth;
found.paper = getComputedStyle(document.body).backgroundColor;
const click = (element) => element.dispatchEvent(new MouseEvent("click", {bubbles: true}));
const table = document.getElementById("table");
click(table.querySelectorAll("thead button")[1]);
found.sorted = [...table.tBodies[0].rows].map((row) => Number(row.cells[1].textContent));
click(table.tBodies[0].rows[5]);
found.chosen = document.getElementById("chosen-text").textContent;
found.drawn = document.querySelectorAll("#chosen path").length;
click(document.querySelector(".legend button"));
found.off = document.querySelectorAll(".kind.off").length;
parent.postMessage(JSON.stringify(found), "*");
"""
WATCH = 'window.errors = []; addEventListener("error", (event) => errors.push(event.message));'
#: The page goes into a frame, as browser windows have a minimum width and frames have none.
FRAME = """<!DOCTYPE html><html style="color-scheme: light dark"><body style="margin: 0"><script>
addEventListener("message", (event) => {
  document.body.append(Object.assign(document.createElement("pre"), {textContent: event.data}));
});
</script><iframe src="page.html" style="border: 0; width: %dpx; height: 1800px"></iframe>
"""


def open_page(page, folder, *, width, dark):
    file, screenshot = folder / "frame.html", folder / f"page_{width}.png"
    page = page.replace("<style>", f"<script>{WATCH}</script><style>", 1)
    page = page.replace("</body>", f"<script>{MEASURE}</script></body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    file.write_text(FRAME % width, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = subprocess.run(
        [
            BROWSER,
            *OPTIONS,
            scheme,
            f"--user-data-dir={folder / f'profile_{width}'}",
            f"--window-size={width},1800",
            f"--screenshot={screenshot}",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search("<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(html.unescape(found[1])), screenshot


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_draws_all_plots_without_errors(make_facts, tmp_path, width, dark):
    facts = make_facts(
        blocks=12, title="a-rather-long-name-of-a-model-that-was-quantized-at-3-bits"
    )

    found, screenshot = open_page(model_page(facts), tmp_path, width=width, dark=dark)

    assert found["errors"] == []
    assert found["inner"] == width
    assert found["width"] <= width
    plots = found["plots"]
    assert set(plots) == {"bits-by-block", "error-against-bits", "column-rates", "waterfilling"}
    for plot in plots.values():
        # at least an axis, a grid and a path per kind; the text is legible
        assert plot["paths"] >= 8
        assert plot["text"] > 9
        assert plot["width"] > 0.4 * min(width, 800)
    assert found["points"] == len(facts.kinds)
    assert found["drawn"] == 5
    assert found["sorted"] == sorted(found["sorted"], reverse=True)
    assert f"{found['sorted'][5]:.3f} bits" in found["chosen"]
    assert found["off"] == 3
    assert (found["paper"] == "rgb(20, 22, 26)") == dark
    assert screenshot.stat().st_size > 20_000
