"""How long a step of a streamed model takes: computing and moving bytes go on at once, and the longer of them counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graphopt.inspect.machine import Machine
from graphopt.inspect.stage_costs import GraphCosts
from graphopt.inspect.traffic import OptimizerCosts, Phase, Traffic, stages_of, trained


@dataclass(frozen=True)
class PhaseTime:
    """Seconds that a phase of a step computes and moves bytes.

    Attributes:
        phase: ``"forward"``, ``"backward"`` (with computing forward again), ``"optimizer"``; with ``eager`` the last two in one.
        compute: of these seconds, ``update`` are the optimizer's.
    """

    phase: str
    compute: float
    update: float
    transfer: float

    @property
    def bound(self) -> str:
        """``"compute"`` or ``"transfer"``, whichever takes longer; nothing if there is neither."""
        if not self.compute and not self.transfer:
            return ""
        return "compute" if self.compute >= self.transfer else "transfer"


@dataclass(frozen=True)
class Timing:
    """How long a step takes; its phases come one after the other."""

    phases: tuple[PhaseTime, ...]

    @property
    def compute(self) -> float:
        """Seconds of computing, with computing forward again."""
        return sum(phase.compute for phase in self.phases)

    @property
    def transfer(self) -> float:
        """Seconds of moving bytes."""
        return sum(phase.transfer for phase in self.phases)

    @property
    def bound(self) -> str:
        """``"compute"`` or ``"transfer"``, whichever takes longer."""
        return "compute" if self.compute >= self.transfer else "transfer"

    @property
    def seconds(self) -> float:
        """The longer of the two: no schedule is faster."""
        return max(self.compute, self.transfer)

    @property
    def seconds_by_phase(self) -> float:
        """The sum of each phase's longer one, since no phase hides what another moves."""
        return sum(max(phase.compute, phase.transfer) for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "phases": [{**asdict(phase), "bound": phase.bound} for phase in self.phases],
            "compute": self.compute,
            "transfer": self.transfer,
            "seconds": self.seconds,
            "seconds_by_phase": self.seconds_by_phase,
            "bound": self.bound,
        }


def timing_of(
    graphs: Sequence[GraphCosts], optimizer: OptimizerCosts, machine: Machine, traffic: Traffic, *, eager: bool
) -> Timing | None:
    """How long a step takes; ``None`` if a speed is not known.

    Args:
        graphs: in the order of forward.
        optimizer: what it keeps.
        machine: its speeds.
        traffic: what the step moves.
        eager: whether the optimizer works while backward runs.
    """
    stages = stages_of(graphs)
    forward = sum(stage.forward_flops for stage in stages)
    again = sum(stage.forward_flops + stage.backward_flops for stage in stages if stage.is_differentiated)
    touched = sum(
        3 * found.weight.nbytes  # the parameter is read and written, the gradient read
        + 2 * optimizer.num_states * optimizer.state_bytes(found.weight)
        + (found.statistic or 0)
        for found in trained(graphs).values()
    )
    parts: list[tuple[str, tuple[Phase, ...], int, int]] = [
        ("forward", ("forward",), forward, 0),
        ("backward", ("backward",), again, 0),
        ("optimizer", ("optimizer",), 0, touched),
    ]
    if eager:
        parts[1:] = [("backward and optimizer", ("backward", "optimizer"), again, touched)]
    found = []
    for name, phases, flops, nbytes in parts:
        compute = machine.compute(flops)
        read, written = (
            traffic.total(phases=phases, direction="read"),
            traffic.total(phases=phases, direction="written"),
        )
        transfer = machine.transfer(read, written)
        if compute is None or transfer is None:
            return None
        update = nbytes / machine.memory if machine.memory is not None else 0.0
        found.append(PhaseTime(name, compute + update, update, transfer))
    return Timing(tuple(found))


def hiding_rows(rows: float, timing: Timing, traffic: Traffic, machine: Machine) -> float | None:
    """Rows per visit at which computing takes as long as moving.

    Computing grows with the rows, and so do the values between layers; weights, gradients and the optimizer's tensors do not.

    Args:
        rows: those of the step that was timed.
        timing: of that step.
        traffic: of that step.
        machine: its speeds.

    Returns:
        Infinity if the values between layers take longer to move than to compute.
    """
    stash = machine.transfer(
        traffic.total(kind="stash", direction="read"), traffic.total(kind="stash", direction="written")
    )
    if not rows or stash is None:
        return None
    update = sum(phase.update for phase in timing.phases)
    slope = (timing.compute - update - stash) / rows
    return max(timing.transfer - stash - update, 0.0) / slope if slope > 0 else float("inf")
