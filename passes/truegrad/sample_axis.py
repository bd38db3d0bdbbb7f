"""Where the samples are in a value: the axis that counts them and how rows are grouped along it.

Dynamo's symbol says how many samples there are; it does not say in which order rows lie after a flattening: both
``(N, T, D) -> (N*T, D)`` and ``(T, N, D) -> (T*N, D)`` have ``N*T`` rows. So the axis is followed operator by operator, from
the inputs that hold samples (`propagation`). What an operator does to it is an **axis rule**; those of ordinary operators
stand in ``axes/``, that of an operator with a file in ``rules/`` may stand there. An operator without one loses the axis, and
a parameter that meets such a value is refused by name.

A value is one of three kinds:

* `Free`: does not depend on any sample (parameters, constants, what is computed from them alone);
* `SampleAxis`: row ``i`` of ``axis`` belongs to sample ``(i // inner) % num``;
* `Lost`: depends on samples, but no axis tells them apart any more; says which node did that.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

Size: TypeAlias = sympy.Expr


@dataclass(frozen=True)
class Free:
    """Depends on no sample."""


@dataclass(frozen=True)
class Lost:
    """Depends on samples that no axis tells apart any more."""

    node: Node
    why: str


@dataclass(frozen=True)
class SampleAxis:
    """Row ``i`` of ``axis`` belongs to sample ``(i // inner) % num``; the axis has ``outer * num * inner`` rows.

    Attributes:
        axis: position among the value's axes.
        num: number of samples.
        source: the input, and its axis, that counts them.
        outer: how often the samples are repeated along the axis.
        inner: consecutive rows that belong to one sample.
        is_iota: the values along the axis are the sample's own numbers, as in ``torch.arange(batch_size)``.
        order: the indices that the samples were reordered by, one after the other; ``None`` for constants, which fit any order.
    """

    axis: int
    num: Size
    source: tuple[int, int]
    outer: Size = sympy.S.One
    inner: Size = sympy.S.One
    is_iota: bool = False
    order: tuple[Node, ...] | None = ()

    @property
    def is_plain(self) -> bool:
        """Whether the axis counts samples and nothing else."""
        return bool(self.outer == 1 and self.inner == 1)

    def at(self, axis: int) -> SampleAxis:
        """The same grouping at another position."""
        return replace(self, axis=axis, is_iota=False)


Layout = Free | Lost | SampleAxis
Layouts = dict[Node, Layout | list[Layout]]

FREE = Free()


class Known(Protocol):
    """What an axis rule may ask."""

    def layout(self, node: Any) -> Layout:
        """The layout of an argument; `Free` for anything that is not a node."""


AxisRule = Callable[[Node, Tensor, Known], Layout]

axis_rules: dict[str, AxisRule] = {}


def axis_rule(*names: str) -> Callable[[AxisRule], AxisRule]:
    """Register the axis rule of operators, by the names of their overload packets (``"einsum"``).

    A rule is called for an operator that at least one value with samples enters, once for each output that is a tensor, with
    the node, the output's fake value, and a way to ask for the layouts of the arguments.
    """

    def register(rule: AxisRule) -> AxisRule:
        for name in names:
            if name in axis_rules:
                raise ValueError(
                    f"{name} has two axis rules: in {axis_rules[name].__module__} and in {rule.__module__}"
                )
            axis_rules[name] = rule
        return rule

    return register


def agreed(found: Set[SampleAxis], node: Node) -> Layout:
    """The layout of a result whose operands have these; `Lost` if they disagree."""
    if len(found) == 1:
        return next(iter(found))
    places = {replace(layout, order=None, is_iota=False) for layout in found}
    return Lost(node, "samples meet in different orders" if len(places) == 1 else "samples meet on different axes")


def size_of(size: int | torch.SymInt) -> Size:
    """A size as an expression, with what Dynamo has learnt about its symbols."""
    if isinstance(size, torch.SymInt):
        return cast(Size, size.node.shape_env.replace(size.node.expr))
    return sympy.Integer(size)


def shape_of(value: Any) -> list[Size]:
    """The sizes of a fake tensor as expressions."""
    return [size_of(size) for size in value.shape]


def value_of(node: Any) -> Tensor:
    """The fake value of a node that is a tensor."""
    return cast(Tensor, node.meta["val"])


def argument_of(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument, however it was given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def functional_name(node: Node) -> str:
    """The name of an operator, that of one which writes in place without its underscore."""
    packet = cast(Any, node.target)
    name = str(packet.overloadpacket.__name__)
    return name.removesuffix("_") if packet._schema.is_mutable else name


def is_pointwise(target: Any) -> bool:
    """Whether an operator works element by element, with broadcasting; in-place forms included."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if (
        torch.Tag.pointwise in target.tags or target.overloadpacket is torch.ops.aten.where
    ):  # not all of its forms are tagged
        return True
    name = target.overloadpacket.__name__
    if name.startswith("__"):  # what ``a & b`` becomes
        return name.strip("_").removeprefix("i") in ("and", "or", "xor", "lshift", "rshift")
    if not name.endswith("_") or not hasattr(torch.ops.aten, name[:-1]):
        return False
    functional = getattr(torch.ops.aten, name[:-1])
    overload = target._overloadname
    return overload in functional.overloads() and torch.Tag.pointwise in getattr(functional, overload).tags
