"""Functions of the user, ranges, printing, and modules that forget."""

import pytest
import torch

from graphopt.errors import ModuleError, OptionError
from graphopt.optim import Modular, m
from graphopt.optim.core.transform import chain
from tests.optim.catalogue import accepts
from tests.optim.outputs import SHAPES, assert_equal_steps, make_tensors, outputs, pure_outputs
from tests.optim.problems import booth, in_plane

FUNCTIONS = {
    "list": lambda: m.UnaryLambda(lambda updates: [u.tanh() for u in updates]),
    "list in place": lambda: m.UnaryLambda(lambda updates: [u.tanh_() for u in updates]),
    "each": lambda: m.UnaryParameterwiseLambda(torch.tanh),
    "name": lambda: m.CustomUnaryOperation("tanh"),
}


@accepts("X6")
@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions(make):
    grads = [make_tensors(seed, [*SHAPES, (0, 2)]) for seed in range(2)]
    expected = [[g.tanh() for g in step] for step in grads]
    assert_equal_steps(outputs(lambda: [make()], grads), expected, atol=0)
    assert_equal_steps(pure_outputs(lambda: [make()], grads), expected, atol=0)
    assert "lambda" in repr(make()) or "tanh" in repr(make())


def test_functions_see_shapes():
    grads = [make_tensors(1)]
    for make in (
        lambda: m.UnaryParameterwiseLambda(lambda u: u.cumsum(0) if u.dim() else u),
        lambda: m.UnaryLambda(lambda us: [u.cumsum(0) if u.dim() else u for u in us]),
    ):
        assert_equal_steps(
            outputs(lambda make=make: [make()], grads), [[g.cumsum(0) if g.dim() else g for g in grads[0]]]
        )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: m.UnaryLambda(lambda updates: updates[:1]),
            "UnaryLambda: fn returned 1 tensors; expected a list of 2",
        ),
        (lambda: m.UnaryLambda(lambda updates: None), "fn returned NoneType; expected a list of 2"),
        (
            lambda: m.UnaryLambda(lambda us: [u.sum() for u in us]),
            r"tensor of shape \(\) for an update of shape \(3,\)",
        ),
        (lambda: m.UnaryParameterwiseLambda(lambda u: 1.0), r"fn returned 1.0 for an update of shape \(3,\)"),
        (lambda: m.CustomUnaryOperation("sum"), r"sum\(\) returned a tensor of shape \(\)"),
    ],
)
def test_what_functions_must_not_return(make, text):
    params = [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)]
    optimizer = Modular(params, make())
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ModuleError, match=text):
        optimizer.step()
    assert not any(p.any() for p in params)


def test_no_functions():
    for make, text in [
        (lambda: m.UnaryLambda(3), "UnaryLambda: fn=3; expected a function"),
        (lambda: m.UnaryParameterwiseLambda("tanh"), "UnaryParameterwiseLambda: fn='tanh'; expected a function"),
        (lambda: m.CustomUnaryOperation("tan h"), "CustomUnaryOperation: name='tan h'; expected that of a method"),
        (lambda: m.CustomUnaryOperation("tanh_"), "'tanh_' writes to the tensor; write 'tanh'"),
        (lambda: m.Rescale(1.0, 0.0), "Rescale: min=1.0 is above max=0.0; exchange them"),
    ]:
        with pytest.raises(OptionError, match=text):
            make()


@accepts("X6")
def test_rescale():
    grads = [[*make_tensors(1, [(3, 2), (4,), (2, 2)]), torch.zeros(0, dtype=torch.float64)]]
    for tensorwise in (False, True):
        for found in (
            outputs(lambda tensorwise=tensorwise: [m.Rescale(-2, 3, tensorwise)], grads),
            pure_outputs(lambda tensorwise=tensorwise: [m.Rescale(-2, 3, tensorwise)], grads),
        ):
            groups = grads[0][:3] if tensorwise else [torch.cat([g.flatten() for g in grads[0]])]
            news = found[0][:3] if tensorwise else [torch.cat([u.flatten() for u in found[0]])]
            for old, new in zip(groups, news, strict=True):
                expected = (old - old.min()) / (old.max() - old.min()) * 5 - 2
                torch.testing.assert_close(new, expected)
    constant = [[torch.full((3,), 7.0, dtype=torch.float64)]]
    assert outputs(lambda: [m.Rescale(-2, 3)], constant)[0][0].tolist() == [-2] * 3


@accepts("X7")
def test_update_to_none():
    """The next module starts from the gradient; also where the optimizer goes up, and in pure functions."""
    grads = [make_tensors(1)]
    assert_equal_steps(outputs(lambda: [m.Mul(3.0), m.UpdateToNone(), m.Mul(2.0)], grads), [[2 * g for g in grads[0]]])
    assert_equal_steps(pure_outputs(lambda: [m.Mul(3.0), m.UpdateToNone()], grads), grads)
    up = outputs(lambda: [m.Mul(3.0), m.UpdateToNone()], grads, maximize=True)
    assert_equal_steps(up, [[-g for g in grads[0]]])
    params = [torch.ones(2)]
    updates, _ = (t := chain(m.UpdateToNone(), m.LR(0.5))).update([torch.ones(2)], t.init(params), params)
    assert updates[0].tolist() == [0.5, 0.5]


@accepts("X7")
def test_grad_to_none():
    """The closure is asked again; without one it is the same gradient, also where the optimizer goes up."""

    class Moves(m.Identity):
        needs_closure = True

        def step(self, var):
            for p in var.params:
                p.add_(1.0)
            return var

    problem, other = in_plane(booth), in_plane(booth)
    Modular(problem.params, m.Mul(0.0), Moves(), m.GradToNone(), m.Add(m.Grad())).step(problem.closure)
    other.params[0].data += 1.0
    other.closure()
    assert problem.calls == [True, True]
    torch.testing.assert_close(problem.vector, other.vector - other.params[0].grad)
    grads = [make_tensors(1)]
    for maximize in (False, True):
        make = lambda: [m.Mul(0.0), m.GradToNone(), m.Add(m.Grad())]  # noqa: E731
        sign = -1 if maximize else 1
        assert_equal_steps(outputs(make, grads, maximize=maximize), [[sign * g for g in grads[0]]])


@accepts("X14")
def test_printing(capsys):
    lines = []
    param = torch.zeros(2, requires_grad=True)
    param.grad = torch.tensor([1.0, 2.0])
    modules = [m.Mul(2.0), m.PrintUpdate("u = ", lines.append), m.PrintShape(print_fn=lines.append), m.PrintShape()]
    Modular([param], *modules).step()
    assert lines == ["u = [tensor([2., 4.])]", "shapes = [(2,)]"]
    assert capsys.readouterr().out == "shapes = [(2,)]\n"
    assert param.tolist() == [-2, -4]
    assert repr(modules[1]) == "PrintUpdate('u = ')"
