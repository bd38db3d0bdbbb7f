"""Graphs that have no form that passes can read: refused with the operator, the line and the parameters, or run without."""

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.passes import TrueGrad
from graphopt.pipeline import Status


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(Doubled.apply(self.first(x)))


class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x):
        from torch._higher_order_ops.associative_scan import associative_scan

        return associative_scan(lambda a, b: a + b, self.first(x), 1, combine_mode="generic")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (OwnFunction, r"autograd\.Function.*Doubled\.apply"),
        (Scan, r"operator of higher order.*torch\.compiler\.disable"),
    ],
)
def test_the_error_names_the_operator_the_line_and_the_parameters(model, what):
    transformed = graphopt.transform(model(), compiler="aot_eager")
    with pytest.raises(
        UnsupportedError, match=rf"(?s)test_capture_refused\.py.*{what}|{what}.*first\.weight, first\.bias"
    ):
        transformed(torch.randn(4, 3))
    with pytest.raises(UnsupportedError, match=r"first\.weight, first\.bias"):
        transformed(torch.randn(4, 3))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_skipped_it_runs_as_it_is(compiler):
    torch.manual_seed(0)
    model, x = OwnFunction(), torch.randn(4, 3)
    model(x).sin().sum().backward()
    expected = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    graphopt.transform(model, [TrueGrad(unsupported="skip")], compiler=compiler)
    model(x).sin().sum().backward()
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad)
        assert graphopt.annotations.find(param, graphopt.annotations.SUM_GRAD_SQUARED) is None
    report = graphopt.Report.of(model)
    assert {row.status for row in report.coverage} == {Status.SKIPPED}
    assert str(report).count("autograd.Function") == 1  # one remark for all rows


def test_explained():
    report = graphopt.explain(OwnFunction(), torch.randn(4, 3))
    assert report.num_covered == 0
    assert "autograd.Function" in report.coverage[0].reason


class Broken(nn.Module):
    """Two equal layers behind graph breaks: one graph serves both."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        torch._dynamo.graph_break()
        return torch.tanh(self.inner(x))


def test_layers_that_share_a_graph_are_reported_each():
    model = graphopt.transform(Broken(), compiler="aot_eager")
    model(torch.randn(4, 3)).sum().backward()
    assert all(param.sum_grad_squared is not None for param in model.parameters())
    assert graphopt.Report.of(model).num_covered == 4
