"""What TrueGrad does with a case: the expected statistics by the oracle, the outcome, the error."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import SampleAxisError, UncapturedParameter, UnsupportedError
from graphopt.passes import TrueGrad
from graphopt.pipeline import Status
from tests.oracle import Statistic, from_losses, split_samples
from tests.zoo.case import NUM_SAMPLES as NUM
from tests.zoo.case import Case
from tests.zoo.own_rows import own_rows


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        statuses: by name, of every trainable parameter: ``exact``, ``fallback``, ``refused``, ``unused`` or ``wrong``.
        error: the largest relative error of a statistic, over parameters that are exact or fallback.
        worst: the parameter with that error.
        graphs: number of captured graphs.
        reasons: by name, why a parameter is refused.
        refusal: the text of the error, where there is one.
        model: the transformed model; not there if it could not be run at all.
    """

    statuses: dict[str, str]
    error: float
    worst: str
    graphs: int
    reasons: dict[str, str]
    refusal: str = ""
    model: nn.Module | None = field(default=None, repr=False)

    def names(self, status: str) -> set[str]:
        """Parameters with this status."""
        return {name for name, own in self.statuses.items() if own == status}


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that is allowed."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def run(case: Case, compiler: str) -> Outcome:
    """Transform, train one step, and compare with the oracle."""
    plain, batch = case.make()
    model, refusal = transformed(case, plain, batch, compiler)
    trainable = [name for name, param in plain.named_parameters() if param.requires_grad]
    if model is None:
        return Outcome(dict.fromkeys(trainable, "refused"), 0.0, "", 0, dict.fromkeys(trainable, refusal), refusal)
    expected = expected_statistics(case, plain, batch, model)
    step(case, model, batch)
    report = graphopt.Report.of(model)
    rows = {row.name: row for row in report.coverage}
    scale = max(value.sum_grad_squared.abs().max().item() for value in expected.values())
    statuses, reasons, errors = {}, {}, {"": 0.0}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        statistic, row = find(param, SUM_GRAD_SQUARED), rows[name]
        if name not in expected and statistic is not None and statistic.any():
            statuses[name] = "wrong"
        elif name not in expected and f" {name}: " not in refusal:
            statuses[name] = "unused"
        elif statistic is None or name not in expected:
            assert row.status is Status.SKIPPED, f"{name} has no statistic, but a row that says {row.status}"
            statuses[name], reasons[name] = "refused", row.reason
        else:
            errors[name] = relative_error(statistic, expected[name].sum_grad_squared, scale)
            right = errors[name] <= tolerance(case.dtype) and find(param, NUM_SAMPLES) == NUM  # false for NaN
            statuses[name] = _status(row.status) if right else "wrong"
        if name in expected:
            _check_gradient(name, param, expected[name].grad, scale)
    worst = max(errors, key=lambda name: errors[name])
    return Outcome(statuses, errors[worst], worst, len(report.records), reasons, refusal, model)


def transformed(case: Case, plain: nn.Module, batch: dict[str, Any], compiler: str) -> tuple[nn.Module | None, str]:
    """A transformed copy that has run once, and the text of the error if parameters had to be skipped for it.

    No copy, where the error comes also if parameters may be skipped.
    """
    refusal = ""
    for unsupported in ("error", "skip"):
        model = copy.deepcopy(plain)
        options = {"sample_axis": case.sample_axis, "sample_axis_between_graphs": case.between}
        graphopt.transform(model, [TrueGrad(unsupported=unsupported)], compiler=compiler, options=options)
        try:
            step(case, model, batch)
        except (UnsupportedError, SampleAxisError) as error:
            refusal = str(error)
            torch._dynamo.reset()
        else:
            _restore_buffers(model, plain)
            return model, refusal
    return None, refusal


def step(case: Case, model: nn.Module, batch: dict[str, Any]) -> None:
    """Forward and backward from cleared gradients."""
    model.zero_grad()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncapturedParameter)  # the report says so too
        case.loss(model(**batch)).backward()


def expected_statistics(case: Case, plain: nn.Module, batch: dict[str, Any], model: nn.Module) -> dict[str, Statistic]:
    """By the oracle that fits the case; neither model is changed."""
    if case.mixes:
        return own_rows(copy.deepcopy(plain), batch, case.loss, NUM)
    if case.dropout:
        return _one_at_a_time(case, model, batch)
    own = copy.deepcopy(plain)

    def losses() -> Iterator[Tensor]:
        for _, one in split_samples((), batch, case.sample_axis):
            _restore_buffers(own, plain)  # power iterations and the like start from the same state for each sample
            yield case.loss(own(**one))

    return from_losses(own, losses())


def _status(status: Status) -> str:
    """A graph that two layers share is reported for the first only: the other's statistic is there, and exact."""
    return (Status.EXACT if status is Status.SKIPPED else status).value


def relative_error(value: Tensor, expected: Tensor, scale: float = 1.0) -> float:
    """Of a statistic, by norms; ``scale`` is the model's largest, beside which squares of rounding errors count as zero."""
    floor = (100 * torch.finfo(expected.dtype).eps) ** 2 * scale / tolerance(expected.dtype)
    return (value.to(expected.dtype) - expected).norm().item() / max(expected.norm().item(), floor)


def _restore_buffers(model: nn.Module, source: nn.Module) -> None:
    with torch.no_grad():
        for buffer, original in zip(model.buffers(), source.buffers(), strict=True):
            buffer.copy_(original)


def _check_gradient(name: str, param: nn.Parameter, expected: Tensor, scale: float) -> None:
    assert param.grad is not None, f"{name} has no gradient"
    torch.testing.assert_close(
        param.grad,
        expected,
        rtol=10 * tolerance(expected.dtype),
        atol=100 * torch.finfo(expected.dtype).eps * scale**0.5,
        msg=lambda text: f"{name}.grad: {text}",
    )


def _one_at_a_time(case: Case, model: nn.Module, batch: dict[str, Any]) -> dict[str, Statistic]:
    """Ordinary gradients of the transformed model, where one seed gives the same random numbers at every call."""
    found: dict[str, Statistic] = {}
    for n in range(NUM):
        model.zero_grad()
        torch.manual_seed(5)
        case.losses(model(**batch))[n].backward()
        for name, param in model.named_parameters():
            if param.grad is not None:
                grad = param.grad.detach()
                before = found.get(name, Statistic(torch.zeros_like(grad), torch.zeros_like(grad)))
                found[name] = Statistic(before.grad + grad, before.sum_grad_squared + grad.square())
    return found
