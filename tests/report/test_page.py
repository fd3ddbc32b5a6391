import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from watersic_hf.checkpoint import location_of
from watersic_hf.report import model_page
from watersic_hf.report.plots import bits_by_block

VOID = {"meta", "link", "input", "br"}


class Outline(HTMLParser):
    """Checks that every element is closed in order, and keeps what there is."""

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


def test_the_page_is_well_formed_and_holds_every_layer_plot_setting_and_version(make_facts):
    facts = make_facts()

    outline = Outline(model_page(facts))

    assert outline.open == []
    assert {a["id"] for a in outline.find("svg")} == {
        "bits-by-block", "error-against-bits", "column-rates", "waterfilling",
    }  # fmt: skip
    rows = [a for a in outline.find("tr") if "data-layer" in a]
    assert [int(a["data-layer"]) for a in rows] == list(range(len(facts.layers)))
    told = ("wikitext2", "a computer, 2 threads", "9.9", "1 h 02 min", "2.5 GB", "embedding")
    for text in (*told, *facts.kinds, *(layer.name for layer in facts.layers)):
        assert text in outline.text


def test_the_page_asks_for_no_other_file(make_facts):
    page = model_page(make_facts())

    for tag, attributes in Outline(page).elements:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:,").startswith("data:"), (tag, attributes)
    assert "@import" not in page
    assert "url(" not in page
    assert "fetch(" not in page


def test_names_cannot_break_out_of_the_page(make_facts):
    evil = "</script><script>alert(1)</script>&\"'<!--"
    plain = Outline(model_page(make_facts()))
    facts = make_facts(title=evil, settings={"dataset": evil}, kinds=[evil] * 4, architecture=evil)
    for layer in facts.layers:
        object.__setattr__(layer, "name", evil)

    outline = Outline(model_page(facts))

    assert [tag for tag, _ in outline.elements if tag == "script"] == ["script", "script"]
    # one setting less is a row of three elements less
    assert len(outline.elements) == len(plain.elements) - 3
    assert outline.open == []


@pytest.mark.parametrize("plot", ["error-against-bits", "column-rates", "waterfilling"])
def test_what_the_files_do_not_say_is_absent_and_said_to_be(make_facts, plot):
    page = model_page(make_facts(known=False))

    outline = Outline(page)

    assert plot not in {a["id"] for a in outline.find("svg")}
    assert outline.text.count("report does not say") == 4
    assert "None" not in outline.text
    assert "seconds" not in outline.text


def test_several_layers_of_a_kind_in_a_block_are_one_point_with_their_range(make_facts):
    page = model_page(make_facts(blocks=5, experts=7))

    plot = page[page.index('<svg id="bits-by-block"') : page.index("Error against bits")]
    spans = re.findall(r'class="span" d="([^"]*)"', plot)
    assert [d.count("M") for d in spans] == [0, 0, 0, 5]
    assert [len(d.split()) for d in re.findall(r'data-layers="([^"]*)"', plot)] == [5, 5, 5, 5]


def test_what_is_in_no_block_does_not_shift_the_numbers_of_blocks(make_facts):
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
