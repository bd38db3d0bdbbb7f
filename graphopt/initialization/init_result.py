"""What learning an initialisation has done: the scales, the way to them, and a picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.errors import OptionError


@dataclass(frozen=True)
class InitStep:
    """One iteration.

    Attributes:
        step: its number, from 0.
        loss: on S; of LSUV, nothing.
        grad_norm: norm of the gradient there, over all parameters: L1 for Adam, L2 for SGD.
        is_constraint: whether the norm of the gradient was lowered, rather than the loss after a step.
        lookahead_loss: on S~ after a step of the optimizer, if that was lowered.
        objective: of MetaInit, the gradient quotient; of LSUV, the variance of the outputs that was found.
        seconds: wall time.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    is_constraint: bool = False
    lookahead_loss: float | None = None
    objective: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class InitStatistics:
    """What a parameter was like.

    Attributes:
        weight_norm: Euclidean norm.
        grad_variance: variance of its gradient over batches, mean over its elements; ``None`` with fewer than two batches.
        grad_norm: Euclidean norm of the mean gradient.
    """

    weight_norm: float
    grad_variance: float | None
    grad_norm: float


@dataclass(frozen=True)
class InitResult:
    """What `graphopt.learn_init` returns.

    Attributes:
        method: as asked for.
        scales: what each parameter was multiplied by, by name.
        trajectory: the iterations.
        before: of each parameter, before.
        after: and after.
        left_alone: parameters that kept their values, with the reason.
    """

    method: str
    scales: Mapping[str, float]
    trajectory: Sequence[InitStep]
    before: Mapping[str, InitStatistics] = field(default_factory=dict)
    after: Mapping[str, InitStatistics] = field(default_factory=dict)
    left_alone: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_constraint_steps(self) -> int:
        """How many iterations lowered the norm of the gradient."""
        return sum(step.is_constraint for step in self.trajectory)

    @property
    def seconds(self) -> float:
        """Wall time of all iterations."""
        return sum(step.seconds for step in self.trajectory)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw scale, norm and gradient variance of each weight, before and after, and the trajectory.

        Args:
            path: of the picture; its suffix says the format (``.png``, ``.svg``, ``.pdf``).

        Returns:
            The path.

        Raises:
            OptionError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise OptionError("a plot needs matplotlib: pip install 'graphopt[viz]'") from error
        names = [name for name in self.scales if name not in self.left_alone] or list(self.scales)
        make: Any = Figure
        figure = make(figsize=(max(8.0, 0.16 * len(names)), 10), layout="constrained")
        scale, norm, variance, way = figure.subplots(4, 1)
        places = range(len(names))
        scale.bar(places, [self.scales[name] for name in names], color="tab:green")
        scale.axhline(1, color="black", linewidth=0.5)
        scale.set_ylabel("scale")
        drawn: list[tuple[Any, str, Callable[[InitStatistics], float]]] = [
            (norm, "weight norm", lambda row: row.weight_norm),
            (variance, "gradient variance", lambda row: row.grad_variance or 0.0),
        ]
        for axes, label, read in drawn:
            for shift, when, rows in ((-0.2, "before", self.before), (0.2, "after", self.after)):
                heights = [read(rows[name]) if name in rows else 0.0 for name in names]
                axes.bar([place + shift for place in places], heights, width=0.4, label=when)
            axes.set_yscale("symlog", linthresh=1e-12)  # a plain logarithm has no place for zeros
            axes.set_ylabel(label)
            axes.legend()
        for axes in (scale, norm):
            axes.set_xticks([])
        variance.set_xticks(list(places), names, rotation=90, fontsize=5)
        self._draw_trajectory(way)
        figure.savefig(path)
        return Path(path)

    def _draw_trajectory(self, axes: Any) -> None:
        drawn: list[tuple[str, Callable[[InitStep], float | None]]] = [
            ("loss", lambda step: step.loss),
            ("loss after a step", lambda step: step.lookahead_loss),
            ("gradient norm", lambda step: step.grad_norm),
            ("objective", lambda step: step.objective),
        ]
        for label, read in drawn:
            points = [(step.step, value) for step in self.trajectory if (value := read(step)) is not None and value > 0]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1e-6)
        axes.set_xlabel("iteration")
        if self.trajectory:
            axes.legend()

    def __repr__(self) -> str:
        moved = [value for name, value in self.scales.items() if name not in self.left_alone] or [1.0]
        return (
            f"InitResult({self.method}, {len(self.trajectory)} steps, {len(moved)} scales from {min(moved):.3g} to "
            f"{max(moved):.3g})"
        )
