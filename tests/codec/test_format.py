import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from watersic_hf import codec
from watersic_hf.codec import coder

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "codec_v1").glob("*.safetensors"))
FORMAT = Path(coder.__file__).with_name("FORMAT.md")


@pytest.fixture(scope="module")
def reader():
    """The reader that FORMAT.md prints; running it checks its example."""
    (block,) = re.findall(r"```python\n(.*?)```", FORMAT.read_text(), re.DOTALL)
    names = {}
    exec(compile(block, str(FORMAT), "exec"), names)
    return names["read_payload"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_payloads_do_not_change(path):
    golden = load_file(path)

    assert torch.equal(codec.decode(golden["payload"]), golden["codes"].int())
    assert torch.equal(codec.encode(golden["codes"], associated=b"golden"), golden["payload"])
    codec.verify(golden["payload"], associated=b"golden")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_reader_in_format_md_reads_golden_payloads(path, reader):
    golden = load_file(path)

    assert reader(golden["payload"].numpy().tobytes()) == golden["codes"].tolist()


def test_golden_payloads_use_every_part_of_the_format():
    payloads = [load_file(path)["payload"].numpy() for path in GOLDEN]
    encoded = [codec.EncodedCodes.parse(payload) for payload in payloads]
    geometries = [one.header.geometry for one in encoded]

    assert {one.header.escape_words for one in encoded} == {1, 2}
    assert any(one.model.shift_K.any() for one in encoded)
    assert any(codec.code_statistics(codec.decode(torch.from_numpy(p))).escapes for p in payloads)
    assert {geometry.segments for geometry in geometries} >= {0, 1, 2}
    assert {geometry.bands for geometry in geometries} >= {0, 1, 2}
    assert any(geometry.rows % geometry.rows_per_lane for geometry in geometries)


def test_example_in_format_md_equals_the_encoder_output():
    text = FORMAT.read_text()
    example = "".join(re.findall(r'^    "([0-9a-f]+)"$', text, re.MULTILINE))
    (codes,) = re.findall(r"assert read_payload\(payload\) == (.*)", text)

    payload = codec.encode(torch.tensor(eval(codes)), associated=b"scales")

    assert payload.numpy().tobytes().hex() == example
