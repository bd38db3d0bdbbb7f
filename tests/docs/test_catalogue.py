"""The page of optimizer modules says what their docstrings say."""

import pytest

from docs import catalogue
from tests.optim.examples import ALIASES, PUBLIC


@pytest.fixture(scope="module")
def rows():
    found = {}
    for line in catalogue.PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").replace("\\|", "\0").split("|")]
        if cells[0].startswith("`"):
            found[cells[0].strip("`")] = [cell.replace("\0", "|") for cell in cells]
    return found


def test_every_module_has_a_row(rows):
    assert set(rows) == set(PUBLIC) | set(ALIASES)


def test_rows_are_up_to_date(rows):
    """All but the measured column, whose shares are compared for three."""
    for name, kind in PUBLIC.items():
        _, description, cost, _, source = rows[name]
        assert description == catalogue.description(kind), f"python -m docs.catalogue ({name})"
        assert cost == catalogue.cost(kind), f"python -m docs.catalogue ({name})"
        assert source == catalogue.section(kind, "Reference"), f"python -m docs.catalogue ({name})"
    for name in ("Adam", "Lion", "Averaging"):
        assert rows[name][3] == catalogue.state_bytes(name)


def test_every_module_says_what_it_does():
    for name, kind in PUBLIC.items():
        assert catalogue.description(kind).strip(), name
