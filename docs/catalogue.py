"""Write the table of optimizer modules: ``python -m docs.catalogue`` from the root of the repository (``--check`` only compares).

``docs/catalogue.md`` is made of the docstrings and of what each module remembers after a step; nothing in it is typed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.optim import Modular, Rule
from graphopt.optim.core.module import Module, walk
from tests.optim.examples import ALIASES, PUBLIC, RESIDUALS, make, residuals_of, with_rate
from tests.optim.training import set_gradients

PAGE = Path(__file__).parent / "catalogue.md"
SIZES = ((8, 4), (32, 16))  # of the parameter whose state is measured
HEADS = ("module", "what it does, and the formula", "cost of a step", "state, bytes per element", "source")
INTRODUCTION = """# Optimizer modules

One row for each module of `graphopt.optim.m`, by family; `python -m docs.catalogue` makes this page of the docstrings.
A chain is `Modular(params, m.X(), ..., m.LR(0.1))`. *u* is the update that comes in (the gradient at first), *g* the gradient, θ
the parameter, *t* the step from 1; the result is subtracted. Costs count a parameter of n elements, or a matrix of r rows and c
columns; *element-wise* is a pass over n elements, run in one kernel with its neighbours. State is what a float32 matrix of 8 x 4
(and one of 32 x 16, where that differs) holds after two steps, divided by its elements; of modules that run others it includes
what those of the example in `tests/optim/examples.py` hold. [Which one?](choosing.md) [What they look like](gallery.md).
"""
_FORMULA = re.compile(r"``([^`]+)``")
_IS_FORMULA = re.compile(r" = |[√²Σ←≤·⟨∇]")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is out of date")
    page = make_page()
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text() != page)
    PAGE.write_text(page)
    return 0


def make_page() -> str:
    """The whole page."""
    families: defaultdict[str, list[str]] = defaultdict(list)
    for name, kind in {**PUBLIC, **ALIASES}.items():
        families[_family(kind)].append(name)
    parts = [INTRODUCTION]
    for family in sorted(families):
        summary = importlib.import_module(f"graphopt.optim.{family}").__doc__ or ""
        parts.append(f"\n## {family.replace('_', ' ').capitalize()}\n\n{' '.join(summary.split())}\n")
        parts += [_row(HEADS), _row(["---"] * len(HEADS))]
        parts += [_row(_cells(name)) for name in sorted(families[family], key=str.lower)]
    return "\n".join(parts) + "\n"


def _family(kind: type[Module]) -> str:
    return kind.__module__.removeprefix("graphopt.optim.").partition(".")[0]


def _cells(name: str) -> list[str]:
    if name in ALIASES:
        return [f"`{name}`", f"another name of `{ALIASES[name].__name__}`", "", "", ""]
    kind = PUBLIC[name]
    return [f"`{name}`", description(kind), cost(kind), state_bytes(name), section(kind, "Reference")]


def description(kind: type[Module]) -> str:
    """The first sentence of the docstring, and the formulas in front of its sections."""
    text = inspect.getdoc(kind) or ""
    body = re.split(r"\n\n(?:Args|Raises|Reference|References|Cost|Example|Attributes)", text)[0]
    first = " ".join(body.split("\n\n")[0].split())
    formulas = [f"`{formula}`" for formula in _FORMULA.findall(" ".join(body.split())) if _IS_FORMULA.search(formula)]
    found = _FORMULA.sub(r"`\1`", first)
    return "<br>".join([found, *[formula for formula in formulas if formula not in found]])


def section(kind: type[Module], head: str) -> str:
    """The text behind ``head:`` in a docstring."""
    text = inspect.getdoc(kind) or ""
    found = re.search(rf"^{head}s?: (.*?)(?=\n\n|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return _FORMULA.sub(r"`\1`", " ".join(found[1].split())) if found else ""


def cost(kind: type[Module]) -> str:
    """What the docstring says, else what follows from the class."""
    for base in kind.__mro__:
        if "Cost:" in (base.__doc__ or ""):
            return section(base, "Cost").rstrip(".")
    if issubclass(kind, Rule):
        return "element-wise" if kind.elementwise else "O(n)"
    return "that of its modules" if issubclass(kind, Module) and "routing" in kind.__module__ else "O(n)"


def state_bytes(name: str) -> str:
    """What is remembered for each element; of more than one module, of all that stand in the example."""
    found = [f"{_measured(name, size):.3g}" for size in SIZES]
    return found[0] if len(set(found)) == 1 else f"{found[0]}; {found[1]}"


def _measured(name: str, size: Sequence[int]) -> float:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(*size))
    modules = make(name)
    optimizer = Modular([param], with_rate(modules, 1e-3))

    def closure(backward: bool = True) -> Tensor:
        loss = (param**4).sum() + (param * torch.linspace(0.5, 2, param.numel()).reshape(param.shape)).square().sum()
        if name in RESIDUALS:
            return residuals_of([param])
        if backward:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    needs_closure = any(module.needs_closure for module in walk(modules))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # some print
        warnings.simplefilter("ignore")
        for _ in range(2):
            set_gradients([param], 0)
            optimizer.step(closure if needs_closure else None)
    tensors = {id(value): value for key, value in optimizer.state[param].items() if key.rpartition(".")[2] != "step"}
    return sum(map(_bytes, tensors.values())) / param.numel()


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return 0


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
