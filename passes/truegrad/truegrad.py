"""The pass: which parameters are tracked, what becomes of those that cannot be served."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.annotations import (
    GRAD_SNR,
    GRAD_VARIANCE,
    KEYS,
    NUM_SAMPLES,
    SAMPLE_GRAD_NORM,
    SUM_GRAD_SQUARED,
    SUM_POSITION_GRAD_SQUARED,
    Key,
)
from graphopt.capture import CapturedGraph, InputKind
from graphopt.errors import OptionError, SampleAxisError, UnsupportedError
from graphopt.passes.truegrad.editor import OPERATOR_NAMES
from graphopt.passes.truegrad.ops import register_decompositions
from graphopt.passes.truegrad.propagation import BETWEEN_GRAPHS, find_sample_axes
from graphopt.passes.truegrad.rewrite import Rewriter
from graphopt.passes.truegrad.sample_axis import Layouts, SampleAxis
from graphopt.passes.truegrad.single_sample import axes_of_one_sample, rewrite_single_sample
from graphopt.passes.truegrad.uses import find_uses
from graphopt.pipeline import Coverage, Pass, PassResult, Status

COMPLEX = (
    "it is complex, and the square of a complex gradient is not what optimizers mean. Keep real and imaginary parts on a last "
    "axis of 2, as one real parameter p, and use torch.view_as_complex(p) in the model"
)
Where = str | Sequence[str] | Callable[[str, Tensor], bool] | None


@final
@dataclass(frozen=True)
class TrueGrad(Pass):
    """Compute, beside every gradient, the sum over samples of its squares: ``p.sum_grad_squared``.

    With g_n sample n's contribution to ``p.grad`` (the g_n add up to it), the statistic is the sum over n of g_n squared,
    element by element, in at least float32. Uses of a tied parameter and positions of a sequence are added before squaring.
    Samples that meet in the model (batch normalisation) count with their own rows, statistics of the batch taken as given.

    Attributes:
        per: ``"sample"``, or ``"token"``: every position at which a parameter is applied counts by itself. The two are
            different statistics; the first is the one that optimizers expect.
        where: which parameters: name patterns (``"encoder.*"``), or a predicate of name and (fake) tensor; ``None`` is all.
        unsupported: what to do with a parameter that cannot be served exactly: ``"error"``, or ``"skip"`` and report it.
        square_dtype: dtype in which squares are multiplied where a parameter meets one position per sample, such as
            ``torch.bfloat16``; ``None`` is the gradient's own, at least float32.
        statistics: names of the annotations to provide from the one backward pass: always ``"sum_grad_squared"``, and as asked
            for ``"sample_grad_norm"`` (the norm of each sample's gradient) and ``"sum_position_grad_squared"``. ``grad_variance``
            and ``grad_snr`` follow from the first and cost nothing.
        max_bytes: memory that the per-sample gradients of parameters without a closed form (tied, computed with) may take at a
            time; where they need more they are made in slices of samples, which is slower.

    Raises:
        UnsupportedError: from the first call of the model, naming every parameter that cannot be served, and why.
        SampleAxisError: the graph does not say where the samples are.
    """

    per: Literal["sample", "token"] = "sample"
    where: Where = None
    unsupported: Literal["error", "skip"] = "error"
    square_dtype: torch.dtype | None = None
    statistics: tuple[str, ...] = (SUM_GRAD_SQUARED.name,)
    max_bytes: int = 2**27

    name: ClassVar[str] = "truegrad"
    provides: ClassVar[frozenset[Key[Any]]] = frozenset({SUM_GRAD_SQUARED, NUM_SAMPLES, GRAD_VARIANCE, GRAD_SNR})
    changes_numerics: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option, value, allowed in (
            ("per", self.per, ("sample", "token")),
            ("unsupported", self.unsupported, ("error", "skip")),
        ):
            if value not in allowed:
                raise OptionError(f"TrueGrad({option}={value!r}): it is one of {list(allowed)}")
        if self.max_bytes < 1:
            raise OptionError(f"TrueGrad(max_bytes={self.max_bytes}): it is a number of bytes, at least 1")
        if self.square_dtype is not None and not self.square_dtype.is_floating_point:
            raise OptionError(f"TrueGrad(square_dtype={self.square_dtype}): it is a floating-point dtype")
        object.__setattr__(self, "statistics", self._checked_statistics())
        if isinstance(self.where, list):
            object.__setattr__(self, "where", tuple(self.where))

    @property
    def skips_unsupported(self) -> bool:
        """With ``unsupported="skip"``."""
        return self.unsupported == "skip"

    def _checked_statistics(self) -> tuple[str, ...]:
        given = (self.statistics,) if isinstance(self.statistics, str) else tuple(self.statistics)
        derived = [key.name for key in KEYS if key.derive is not None]
        names = [key.name for key in OPERATOR_NAMES]
        if unknown := [name for name in given if name not in (*names, *derived)]:
            raise OptionError(f"TrueGrad(statistics={unknown}): they are {names}, and derived from them {derived}")
        if self.per == "token" and set(given) & {SAMPLE_GRAD_NORM.name, SUM_POSITION_GRAD_SQUARED.name}:
            raise OptionError(
                "TrueGrad(per='token') counts every position as a sample and provides sum_grad_squared only; use per='sample' "
                "with these statistics"
            )
        return tuple(name for name in names if name in given or name == SUM_GRAD_SQUARED.name)

    @property
    def _keys(self) -> list[Key[Any]]:
        return [key for key in OPERATOR_NAMES if key.name in self.statistics]

    def run(self, graph: CapturedGraph) -> PassResult:
        """Rewrite the graph."""
        register_decompositions()
        tracked, rows = self._tracked(graph)
        if not tracked or not graph.grad_enabled:  # the graphs behind it still ask where the samples are
            with contextlib.suppress(SampleAxisError):  # nothing to be exact about here; who needs to know will say so
                graph.output_sample_axes = _axes_of_outputs(graph, find_sample_axes(graph))
            return PassResult(graph, 0)
        samples = [
            fake.shape[described.sample_axis]
            for described, fake in zip(graph.inputs, graph.fake_inputs, strict=True)
            if described.kind is InputKind.SAMPLES and described.sample_axis is not None
        ]
        if not samples and not any(i.kind is InputKind.BETWEEN and i.requires_grad for i in graph.inputs):
            return self._without_samples(graph, tracked, rows)
        one = self.per == "sample" and SUM_POSITION_GRAD_SQUARED.name not in self.statistics
        if one and samples and all(isinstance(size, int) and size == 1 for size in samples):
            graph.output_sample_axes = axes_of_one_sample(graph)
            changed, found = rewrite_single_sample(graph, tracked, self._keys)
            return PassResult(graph, changed, ("one sample: its squared gradient is the statistic",), (*found, *rows))
        return self._rewrite(graph, tracked, rows)

    def _rewrite(
        self, graph: CapturedGraph, tracked: list[Node], rows: list[Coverage], collected: frozenset[str] = frozenset()
    ) -> PassResult:
        names = {node: described.name for node, described in zip(graph.placeholders, graph.inputs, strict=True)}
        layouts = find_sample_axes(graph)
        axes = _axes_of_outputs(graph, layouts)
        pristine = graph.copy()
        uses = find_uses(graph, layouts, tracked)
        options: dict[str, Any] = {"per_token": self.per == "token", "square_dtype": self.square_dtype}
        again = [node for node in tracked if names[node] in collected]
        rewriter = Rewriter(
            graph, layouts, uses, statistics=self._keys, max_bytes=self.max_bytes, collected=again, **options
        )
        changed = rewriter.run()
        if rewriter.to_collect:  # what has no rule, and what vmap cannot batch inside the graph
            collected |= {names[node] for node in rewriter.to_collect}
            return self._rewrite(pristine, _find(pristine, {names[node] for node in tracked}), rows, collected)
        if uses.problems:
            problems = {names[param]: problem for param, problem in uses.problems.items()}
            if self.unsupported == "error":
                raise UnsupportedError(_explain(problems))
            skipped = [
                Coverage(name, tuple(int(s) for s in param.meta["val"].shape), Status.SKIPPED, problems[name])
                for param, name in names.items()
                if name in problems
            ]
            kept = _find(pristine, {names[node] for node in tracked} - problems.keys())
            if not kept:
                return PassResult(pristine, 0, coverage=(*skipped, *rows))
            rest = self._rewrite(pristine, kept, [], collected)
            return PassResult(rest.graph, rest.num_changed, rest.notes, (*rest.coverage, *skipped, *rows))
        graph.output_sample_axes = axes
        return PassResult(graph, changed, coverage=(*rewriter.coverage.values(), *rows))

    def _without_samples(self, graph: CapturedGraph, tracked: list[Node], rows: list[Coverage]) -> PassResult:
        """A graph that no tensor with samples enters: fine as long as it differentiates nothing, as a part of a model may be."""
        problems = find_uses(graph, find_sample_axes(graph), tracked).problems
        names = {node: described.name for node, described in zip(graph.placeholders, graph.inputs, strict=True)}
        if problems and self.unsupported == "error":
            between = [described.name for described in graph.inputs if described.kind is InputKind.BETWEEN]
            if between:
                raise SampleAxisError(
                    f"a graph that uses {names[next(iter(problems))]} has no input that is known to hold samples. "
                    + BETWEEN_GRAPHS.format(name=", ".join(between))
                )
            raise SampleAxisError(
                "the model was called without a tensor that holds samples, so there is nothing to sum squares over. Pass the "
                "batch as a tensor argument, or train it without this pass: graphopt.transform(model, passes=[])"
            )
        skipped = [
            Coverage(
                names[param],
                tuple(int(s) for s in param.meta["val"].shape),
                Status.SKIPPED,
                "no samples enter its graph",
            )
            for param in problems
        ]
        return PassResult(graph, 0, coverage=(*skipped, *rows))

    def _tracked(self, graph: CapturedGraph) -> tuple[list[Node], list[Coverage]]:
        """Trainable parameters that were asked for, and rows for those that were not."""
        tracked, rows, problems = [], [], {}
        served = {described.companion_of for described in graph.inputs}
        entries = zip(graph.placeholders, graph.inputs, graph.fake_inputs, strict=True)
        for position, (node, described, fake) in enumerate(entries):
            if position in served:
                continue
            if described.kind is not InputKind.PARAMETER or not described.requires_grad:
                continue
            if self.selects(described.name, fake):
                if fake.is_complex():
                    problems[described.name] = COMPLEX
                    rows.append(Coverage(described.name, tuple(fake.shape), Status.SKIPPED, COMPLEX))
                else:
                    tracked.append(node)
            else:
                rows.append(Coverage(described.name, tuple(fake.shape), Status.SKIPPED, "not selected by where"))
        if problems and self.unsupported == "error":
            raise UnsupportedError(_explain(problems))
        return tracked, rows

    def selects(self, name: str, value: Tensor) -> bool:
        """Whether ``where`` asks for a parameter."""
        if self.where is None:
            return True
        if callable(self.where):
            return bool(self.where(name, value))
        patterns = [self.where] if isinstance(self.where, str) else self.where
        return any(fnmatchcase(name, pattern) for pattern in patterns)


def _axes_of_outputs(graph: CapturedGraph, layouts: Layouts) -> tuple[int | None, ...]:
    """Where graphs behind this one find the samples in what it returns."""
    outputs = [layouts.get(value) if isinstance(value, Node) else None for value in graph.output_nodes]
    return tuple(
        layout.axis if isinstance(layout, SampleAxis) and layout.is_plain and not layout.order else None
        for layout in outputs
    )


def _find(graph: CapturedGraph, names: set[str]) -> list[Node]:
    """The placeholders of parameters with these names."""
    entries = zip(graph.placeholders, graph.inputs, strict=True)
    return [node for node, described in entries if described.name in names and described.companion_of is None]


def _explain(problems: dict[str, str]) -> str:
    lines = [f"  {name}: {problem}" for name, problem in problems.items()]
    return (
        f"{len(problems)} parameter{'s' if len(problems) > 1 else ''} cannot have an exact sum of squared per-sample gradients:\n"
        + "\n".join(lines)
        + "\nLeave them out with TrueGrad(where=...), or report and skip them with TrueGrad(unsupported='skip')"
    )
