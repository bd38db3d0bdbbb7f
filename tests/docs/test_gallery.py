"""The gallery is made of its table, one of its pictures again bit for bit in numbers; and the chooser's code runs."""

import re
from pathlib import Path

import pytest
import torch

from docs.gallery import GALLERY, PAGE, PICTURES, describe, run, section

CHOOSING = Path(__file__).parents[2] / "docs" / "choosing.md"
AGAIN = "type: python -m docs.gallery"


def test_page_and_pictures_belong_to_the_table():
    text = PAGE.read_text()
    files = {path.stem: path for path in PICTURES.iterdir()}
    assert set(files) == {picture.name for picture in GALLERY}, AGAIN
    assert len(files) <= 12
    for picture in GALLERY:
        assert files[picture.name].stat().st_size < 60_000
        assert picture.text in text, AGAIN
        for code, _ in picture.runs:
            assert f"| `{code}` |" in text, AGAIN


@pytest.mark.parametrize("name", ["line_search", "second_order"])
def test_numbers_are_those_of_a_run(name):
    (picture,) = [picture for picture in GALLERY if picture.name == name]
    runs = [run(code, picture.function, most) for code, most in picture.runs]
    assert section(picture, runs) in PAGE.read_text(), AGAIN
    assert describe(1e-9) == "below 1e-08"
    assert describe(0.123) == "0.12"


@pytest.mark.parametrize("picture", GALLERY, ids=lambda picture: picture.name)
def test_every_chain_steps(picture):
    for code, _ in picture.runs:
        if not code.startswith("wrappers."):
            found = run(code, picture.function, 2)
            assert found.steps == 2
            assert found.points[0] != found.points[1]


def test_the_chooser_runs():
    """All blocks, one after another; each step leaves finite parameters."""
    text = CHOOSING.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        exec(compile(block, str(CHOOSING), "exec"), names)
        assert all(bool(p.isfinite().all()) for p in names["model"].parameters())
    assert len(blocks) >= 10
    headings = {line[3:].lower().replace(" ", "-") for line in text.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"\(#([a-z-]+)\)", text)) <= headings
