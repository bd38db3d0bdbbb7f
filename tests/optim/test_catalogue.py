"""Every row of the catalogue has an acceptance test, and every public module a row."""

import ast
from pathlib import Path

from graphopt.optim import wrappers
from tests.optim.catalogue import ROWS
from tests.optim.examples import ALIASES, PUBLIC

TESTS = Path(__file__).parent.parent


def accepted_rows():
    """The rows that tests are decorated with, read from their sources."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_mark = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "accepts"
            if is_mark:
                found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def test_every_row_has_an_acceptance_test():
    assert accepted_rows() == set(ROWS)


def test_every_public_module_has_a_row():
    named = [name for names in ROWS.values() for name in names.split()]
    assert len(named) == len(set(named))
    public = set(PUBLIC) | {name for name in vars(wrappers) if name[0].isupper()}
    assert set(named) >= public
    assert set(named) <= public | set(ALIASES)
