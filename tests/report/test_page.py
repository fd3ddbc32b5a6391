import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from watersic_hf.checkpoint import inspect_checkpoint, location_of
from watersic_hf.report import model_page, read_facts, write_folder_page
from watersic_hf.report.plots import bits_by_block

VOID = {"meta", "link", "input", "br"}


class Outline(HTMLParser):
    """Check that elements are properly nested, and collect the elements and the text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def find(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_is_well_formed_and_complete(make_facts):
    facts = make_facts()

    outline = Outline(model_page(facts))

    assert outline.open == []
    assert {a["id"] for a in outline.find("svg")} == {
        "bits-by-block",
        "error-against-bits",
        "column-rates",
        "waterfilling",
    }
    rows = [a for a in outline.find("tr") if "data-layer" in a]
    assert [int(a["data-layer"]) for a in rows] == list(range(len(facts.layers)))
    expected = ("wikitext2", "a computer, 2 threads", "9.9", "1 h 02 min", "2.5 GB", "embedding")
    for text in (*expected, *facts.kinds, *(layer.name for layer in facts.layers)):
        assert text in outline.text


def test_the_page_loads_no_other_file(make_facts):
    page = model_page(make_facts())

    for tag, attributes in Outline(page).elements:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:,").startswith("data:"), (tag, attributes)
    assert "@import" not in page
    assert "url(" not in page
    assert "fetch(" not in page


def test_names_are_escaped(make_facts):
    evil = "</script><script>alert(1)</script>&\"'<!--"
    plain = Outline(model_page(make_facts()))
    facts = make_facts(title=evil, settings={"dataset": evil}, kinds=[evil] * 4, architecture=evil)
    for layer in facts.layers:
        object.__setattr__(layer, "name", evil)

    outline = Outline(model_page(facts))

    assert [tag for tag, _ in outline.elements if tag == "script"] == ["script", "script"]
    # the other page has one setting more, a row of three elements
    assert len(outline.elements) == len(plain.elements) - 3
    assert outline.open == []


@pytest.mark.parametrize("plot", ["error-against-bits", "column-rates", "waterfilling"])
def test_plots_without_data_say_so(make_facts, plot):
    page = model_page(make_facts(known=False))

    outline = Outline(page)

    assert plot not in {a["id"] for a in outline.find("svg")}
    assert outline.text.count("Not recorded in the model\u2019s folder") == 4
    assert "None" not in outline.text
    assert "seconds" not in outline.text


def test_layers_of_a_kind_in_a_block_share_a_point_and_a_range(make_facts):
    page = model_page(make_facts(blocks=5, experts=7))

    plot = page[page.index('<svg id="bits-by-block"') : page.index("Output error versus bits")]
    spans = re.findall(r'class="span" d="([^"]*)"', plot)
    assert [d.count("M") for d in spans] == [0, 0, 0, 5]
    assert [len(d.split()) for d in re.findall(r'data-layers="([^"]*)"', plot)] == [5, 5, 5, 5]


def test_layers_outside_of_blocks_come_last(make_facts):
    facts = make_facts(blocks=2, experts=1)
    outside = replace(facts.layers[0], name="lm_head", location=location_of("lm_head"), kind=4)
    layers = [replace(r, number=n) for n, r in enumerate([outside, *facts.layers])]

    plot = bits_by_block(replace(facts, layers=layers, kinds=[*facts.kinds, "lm_head"]))

    points = re.findall(r'class="points" d="M([\d.]+) [^"]*" data-layers="([\d ]+)"', plot)
    first = {layers[int(numbers.split()[0])].name: float(x) for x, numbers in points}
    assert first["lm_head"] == max(first.values())
    assert first["model.layers.0.mlp.gate"] == min(first.values())


def test_the_page_of_thousands_of_layers_stays_small(make_facts):
    facts = make_facts(blocks=60, experts=64)

    page = model_page(facts)

    assert len(facts.layers) == 4020
    assert len(page) < 1200 * len(facts.layers)


def test_the_page_in_a_folder_is_that_of_its_headers(quantized_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(quantized_folder, folder)

    file = write_folder_page(folder)

    assert file == folder / "report.html"
    facts = read_facts(folder, inspect_checkpoint(folder, decode=False))
    assert file.read_text("utf-8") == model_page(facts)
