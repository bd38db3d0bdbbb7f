"""Reports: what a person reads before and after a model has run."""

import pytest
import torch
from torch import nn

import graphopt
from graphopt.pipeline import Status


class Mixed(nn.Module):
    """One layer that can be served, and one that meets samples after they were reordered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).flip(0))


def rows_of(report: graphopt.Report) -> dict[str, Status]:
    return {row.name: row.status for row in report.coverage}


def test_explain_computes_nothing_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = graphopt.explain(model, torch.randint(0, 1000, (4, 6)))
    assert rows_of(report) == {name: Status.EXACT for name, _ in model.named_parameters()}
    assert report.num_covered == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert graphopt.records(model) == []


def test_explain_holds_no_copy_of_the_weights():
    model = nn.Linear(2000, 2000)
    seen = []
    original = torch.nn.functional.linear

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.inner.weight.untyped_storage().nbytes())
            return original(x, self.inner.weight)

    graphopt.explain(Spy(), torch.randn(3, 2000))
    assert seen
    assert max(seen) == 4


def test_explain_has_no_limit():
    """Dynamo stops recompiling one code object after eight times."""
    for width in range(2, 14):
        report = graphopt.explain(nn.Linear(width, 3), torch.randn(4, width))
        assert report.num_covered == 2


def test_explain_reports_what_cannot_be_served():
    report = graphopt.explain(Mixed(), torch.randn(4, 3))
    assert rows_of(report) == {
        "first.weight": Status.EXACT,
        "first.bias": Status.EXACT,
        "second.weight": Status.SKIPPED,
        "second.bias": Status.SKIPPED,
    }
    text = str(report)
    assert "Mixed: 2 of 4 parameters with sum_grad_squared, 1 graph" in text
    assert "flip works across samples" in text


def test_explain_uses_the_options_of_a_transformed_model():
    model = graphopt.transform(nn.Linear(3, 2), [graphopt.passes.TrueGrad(where="weight")], compiler="aot_eager")
    assert rows_of(graphopt.explain(model, torch.randn(4, 3))) == {"weight": Status.EXACT, "bias": Status.SKIPPED}


def test_report_of_a_model_that_ran_counts_and_groups_layers():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    wrapped = nn.ModuleDict({"layers": model})
    wrapped.forward = lambda x: model(x)  # type: ignore[method-assign]
    graphopt.transform(model, compiler="aot_eager")
    model(torch.randn(5, 4)).sum().backward()
    report = graphopt.Report.of(model)
    assert report.num_covered == 6
    assert report.extra_flops == sum(row.extra_flops for row in report.coverage) > 0
    assert report.extra_bytes >= 4 * sum(parameter.numel() for parameter in model.parameters())
    assert "graphopt.linear" in str(report)


def test_unused_parameters_are_named():
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.extra = nn.Parameter(torch.zeros(2))

    report = graphopt.explain(Unused(), torch.randn(4, 3))
    assert rows_of(report)["extra"] is Status.SKIPPED
    assert "no captured graph computes a gradient for it" in str(report)


def test_a_model_that_needs_values_says_what_to_do():
    class Branches(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.isnan().any().item():
                raise RuntimeError("not a number")
            raise RuntimeError("the zeros of explain end here")

    with pytest.raises(
        graphopt.errors.UnsupportedError, match=r"cannot be explained without running it .*Report\.of\(model\)"
    ):
        graphopt.explain(Branches(3, 2), torch.randn(4, 3))
