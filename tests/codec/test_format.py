import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from watersic_hf import codec
from watersic_hf.codec import coder

pytestmark = pytest.mark.usefixtures("implementation")

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = sorted((FOLDER / "codec_v1").glob("*.safetensors"))
TRELLIS = sorted((FOLDER / "codec_v1_trellis").glob("*.safetensors"))
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


def path_of(golden):
    return codec.Path(golden["row_classes"], int(golden["path_rows"]))


@pytest.mark.parametrize("path", TRELLIS, ids=lambda path: path.stem)
def test_golden_payloads_of_a_trellis_do_not_change(path, reader):
    golden = load_file(path)
    values_AN = golden["values"].int()

    assert torch.equal(codec.decode(golden["payload"]), values_AN)
    payload = codec.encode(values_AN, path=path_of(golden), associated=b"golden")
    assert torch.equal(payload, golden["payload"])
    assert reader(golden["payload"].numpy().tobytes()) == values_AN.tolist()


def test_golden_payloads_of_a_trellis_use_every_part_of_the_format():
    files = [load_file(path) for path in TRELLIS]
    encoded = [codec.EncodedCodes.parse(file["payload"].numpy()) for file in files]

    assert {one.header.escape_words for one in encoded} == {1, 2}
    assert any(one.model.shift_K.any() for one in encoded)
    assert any(codec.code_statistics(f["values"], path=path_of(f)).escapes for f in files)
    assert {one.header.geometry.segments for one in encoded} >= {1, 2}
    assert {one.header.geometry.bands for one in encoded} >= {1, 2}


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
    parts = text.split("bytes.fromhex(")[1:]
    examples = ["".join(re.findall(r'^    "([0-9a-f]+)"$', p, re.MULTILINE)) for p in parts]
    matrices = [
        torch.tensor(eval(m)) for m in re.findall(r"assert read_payload\(\w+\) == (.*)", text)
    ]
    paths = [None, codec.Path(torch.tensor([4, 0, 1, 9, 2]), 3)]

    for matrix, path, example in zip(matrices, paths, examples, strict=True):
        payload = codec.encode(matrix, path=path, associated=b"scales")
        assert payload.numpy().tobytes().hex() == example
