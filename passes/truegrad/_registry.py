"""How an operator's rule is found, and what it is given.

Two kinds of rule. A **closed form** replaces one operator by one of `graphopt.passes.truegrad.ops`, where the parameter meets
it directly (or through views). A **batched** rule serves the general case, a parameter that is tied or computed with: it
rewrites the operator so that the parameter's value has one row for each sample, and autograd delivers one gradient for each.
Operators without a batched rule broadcast, or go through ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch.fx import Node

from graphopt.passes.truegrad.editor import Editor
from graphopt.passes.truegrad.sample_axis import Layout, SampleAxis
from graphopt.passes.truegrad.uses import Uses


@dataclass(frozen=True)
class Declined:
    """A rule does not apply here; says why."""

    reason: str


@dataclass(frozen=True)
class Refused(Declined):
    """A rule does not apply, and neither may the general ones."""


@dataclass(frozen=True)
class ClosedForm:
    """A rule applies.

    Attributes:
        values: the arguments of the operator that it serves.
        emit: insert the replacement and return it; called in front of the operator.
        flops: estimated additional floating-point operations of one step.
        bytes: estimated additional bytes during backward.
    """

    values: tuple[Node, ...]
    emit: Callable[[], Node]
    flops: int = 0
    bytes: int = 0


class Context(Protocol):
    """What a rule may ask.

    Attributes:
        editor: writes into the graph.
        uses: where each parameter meets samples.
        per_token: whether every position counts as a sample of its own.
        square_dtype: dtype in which squares are multiplied; ``None`` for the gradient's own.
        wanted: the statistics that operators compute, such as ``"square,norm"`` (`graphopt.passes.truegrad.ops.statistics`).
    """

    editor: Editor
    uses: Uses
    per_token: bool
    square_dtype: Any
    wanted: str

    def layout(self, node: Any) -> Layout:
        """Where the samples are in a value."""

    def companions(self, value: Node) -> list[Node]:
        """The companions of the parameter that ``value`` is a view of, through the same views, in the order of ``wanted``."""

    def batched(self, value: Node, like: Node) -> Node:
        """``value`` with one row for each sample, shaped so that it broadcasts against ``like``."""

    def tangent(self, value: Node) -> Node:
        """(N, *value.shape): where the per-sample gradients of ``value`` arrive."""

    def replace(self, old: Node, new: Node) -> None:
        """Let ``new`` take the place of ``old``."""

    def sample_axis(self, node: Node) -> SampleAxis:
        """The layout of a value that has samples."""


ClosedRule = Callable[[Node, Context], ClosedForm | Declined]
BatchedRule = Callable[[Node, Context], Node | Declined]

closed_rules: dict[Any, ClosedRule] = {}
batched_rules: dict[Any, BatchedRule] = {}


def closed_form(*targets: Any) -> Callable[[ClosedRule], ClosedRule]:
    """Register a closed form for these operators."""
    return _register(closed_rules, targets)


def batched_rule(*targets: Any) -> Callable[[BatchedRule], BatchedRule]:
    """Register a batched rule for these operators."""
    return _register(batched_rules, targets)


def _register(registry: dict[Any, Any], targets: tuple[Any, ...]) -> Callable[[Any], Any]:
    def register(rule: Any) -> Any:
        for target in targets:
            if target in registry:
                raise ValueError(f"{target} has two rules: in {registry[target].__module__} and in {rule.__module__}")
            registry[target] = rule
        return rule

    return register
