"""Operators that are sums of products, each described once in the words of ``einsum``.

``linear``, ``matmul``, ``tensordot``, ``bilinear`` and the like differ only in which axes they sum over. `equation_of` writes
each of them as operands with one letter for every axis, and the letters of the result; what happens to the samples
(``axes/products.py``) and what a parameter's gradient is (``rules/contraction.py``) follow from the letters alone.

An axis of size 1 broadcasts against the other axes of its letter, as in ``torch.einsum``.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Equation:
    """``result = beta * summand + alpha * einsum(letters -> output, operands)``.

    Attributes:
        operands: the factors.
        letters: for each factor, one lower-case letter for each axis; a repeated letter is a diagonal.
        output: the letters of the result, none repeated.
        summand: what is added, broadcast to the result; ``None`` for nothing.
        alpha: factor of the product.
        beta: factor of the summand.
    """

    operands: tuple[Node, ...]
    letters: tuple[str, ...]
    output: str
    summand: Node | None = None
    alpha: float = 1
    beta: float = 1


def equation_of(node: Node) -> Equation | str:
    """The equation of an operator, or why it has none."""
    op = cast(Any, node.target).overloadpacket.__name__
    if op not in _READERS:
        return f"{op} is not a sum of products"
    try:
        equation = _READERS[op](node)
    except _NoEquationError as problem:
        return str(problem)
    names = sorted({letter for letters in equation.letters for letter in letters})
    if len(names) > len(string.ascii_lowercase):
        return f"an equation with more than {len(string.ascii_lowercase)} letters"
    plain = str.maketrans(dict(zip(names, string.ascii_lowercase, strict=False)))
    return Equation(
        equation.operands,
        tuple(letters.translate(plain) for letters in equation.letters),
        equation.output.translate(plain),
        equation.summand,
        equation.alpha,
        equation.beta,
    )


class _NoEquationError(Exception):
    """An operator is used in a way that no equation describes."""


def _shape(node: Any) -> Sequence[Any]:
    return cast(Tensor, node.meta["val"]).shape


def _ndim(node: Any) -> int:
    return len(_shape(node))


def _einsum(node: Node) -> Equation:
    text, operands = cast(tuple[str, Sequence[Node]], node.args[:2])
    sides, arrow, result = text.replace(" ", "").partition("->")
    parts = sides.split(",")
    used = set(text)
    free = [letter for letter in string.ascii_letters if letter not in used]
    hidden = [
        _ndim(operand) - (len(part) - 3) if "..." in part else 0 for part, operand in zip(parts, operands, strict=True)
    ]
    if max(hidden) > len(free):
        raise _NoEquationError("an einsum with too many axes")
    ellipsis = "".join(free[: max(hidden)])
    letters = [
        part.replace("...", ellipsis[len(ellipsis) - count :]) for part, count in zip(parts, hidden, strict=True)
    ]
    if arrow:
        output = result.replace("...", ellipsis)
    else:
        counts = Counter("".join(part.replace(".", "") for part in parts))
        output = ellipsis + "".join(sorted(letter for letter, count in counts.items() if count == 1))
    return Equation(tuple(operands), tuple(letters), output)


def _linear(node: Node) -> Equation:
    input, weight, *bias = cast(Any, node.args)
    rows = string.ascii_lowercase[: _ndim(input) - 1]
    column = "y" if _ndim(weight) == 2 else ""
    return Equation((input, weight), (rows + "x", column + "x"), rows + column, bias[0] if bias else None)


def _bilinear(node: Node) -> Equation:
    left, right, weight, *bias = cast(Any, node.args)
    rows = string.ascii_lowercase[: _ndim(left) - 1]
    letters = (rows + "x", rows + "y", "zxy")
    return Equation((left, right, weight), letters, rows + "z", bias[0] if bias else None)


def _matmul(node: Node) -> Equation:
    left, right = cast(Any, node.args[:2])
    return _product(left, right)


def _product(left: Node, right: Node) -> Equation:
    """``left @ right``; a vector has no row on the left and no column on the right."""
    rows = "x" if _ndim(left) > 1 else ""
    columns = "z" if _ndim(right) > 1 else ""
    batches = [max(0, _ndim(side) - 2) for side in (left, right)]
    shared = string.ascii_lowercase[: max(batches)]
    first, second = (shared[len(shared) - count :] for count in batches)
    return Equation((left, right), (first + rows + "y", second + "y" + columns), shared + rows + columns)


def _added(read: Callable[[Node, Node], Equation]) -> Callable[[Node], Equation]:
    """``beta * summand + alpha * product``."""

    def reader(node: Node) -> Equation:
        summand, left, right = cast(Any, node.args[:3])
        found = read(left, right)
        scales = [cast(float, node.kwargs.get(name, 1)) for name in ("alpha", "beta")]
        return Equation(found.operands, found.letters, found.output, summand, *scales)

    return reader


def _pair(letters: tuple[str, str], output: str) -> Callable[[Node], Equation]:
    def reader(node: Node) -> Equation:
        left, right = cast(Any, node.args[:2])
        return Equation((left, right), letters, output)

    return reader


def _inner(node: Node) -> Equation:
    left, right = cast(Any, node.args)
    if _ndim(left) == 0 or _ndim(right) == 0:
        raise _NoEquationError("an inner product with a scalar")
    letters = string.ascii_lowercase
    rows, columns = letters[: _ndim(left) - 1], letters[_ndim(left) : _ndim(left) + _ndim(right) - 1]
    return Equation((left, right), (rows + "z", columns + "z"), rows + columns)


def _vecdot(node: Node) -> Equation:
    left, right = cast(Any, node.args[:2])
    dim = cast(int, node.kwargs.get("dim", -1))
    width = max(_ndim(left), _ndim(right))
    letters = string.ascii_lowercase[:width]
    along = letters[dim % width]
    if cast(Tensor, left.meta["val"]).is_complex():
        raise _NoEquationError("a product with a complex conjugate")
    sides = tuple(letters[width - _ndim(side) :] for side in (left, right))
    return Equation((left, right), sides, letters.replace(along, ""))


def _tensordot(node: Node) -> Equation:
    left, right, first, second = cast(Any, node.args[:4])
    names = iter(string.ascii_lowercase)
    sides = [[next(names) for _ in range(_ndim(left))], [next(names) for _ in range(_ndim(right))]]
    summed = []
    for a, b in zip(first, second, strict=True):
        sides[1][b % _ndim(right)] = sides[0][a % _ndim(left)]
        summed.append(sides[0][a % _ndim(left)])
    output = [letter for side in sides for letter in side if letter not in summed]
    return Equation((left, right), ("".join(sides[0]), "".join(sides[1])), "".join(output))


def _chain(node: Node) -> Equation:
    matrices = cast(Sequence[Node], node.args[0])
    names = string.ascii_lowercase[: len(matrices) + 1]
    letters = [names[index : index + 2] for index in range(len(matrices))]
    if _ndim(matrices[0]) == 1:
        letters[0] = letters[0][1:]
    if _ndim(matrices[-1]) == 1:
        letters[-1] = letters[-1][:1]
    output = (names[0] if _ndim(matrices[0]) == 2 else "") + (names[-1] if _ndim(matrices[-1]) == 2 else "")
    return Equation(tuple(matrices), tuple(letters), output)


_READERS: dict[str, Callable[[Node], Equation]] = {
    "einsum": _einsum,
    "linear": _linear,
    "bilinear": _bilinear,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matmul,
    "dot": _pair(("x", "x"), ""),
    "outer": _pair(("x", "y"), "xy"),
    "ger": _pair(("x", "y"), "xy"),
    "inner": _inner,
    "linalg_vecdot": _vecdot,
    "tensordot": _tensordot,
    "linalg_multi_dot": _chain,
    "chain_matmul": _chain,
    "addmm": _added(_product),
    "addmv": _added(_product),
    "baddbmm": _added(_product),
    "addbmm": _added(lambda left, right: Equation((left, right), ("axy", "ayz"), "xz")),
    "addr": _added(lambda left, right: Equation((left, right), ("x", "y"), "xy")),
}

PRODUCTS: tuple[str, ...] = tuple(_READERS)
"""Names of the operators that have an equation."""
