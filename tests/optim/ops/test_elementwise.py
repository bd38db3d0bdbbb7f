"""Operations against one-line expressions of torch: u is the update, g the gradient, p the parameter, k a module's (2u)."""

import inspect

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from graphopt.optim.ops import accumulate, binary, graft, gram_schmidt, multi, sources, unary
from graphopt.optim.ops import reduce as reductions
from tests.optim.catalogue import accepts
from tests.optim.outputs import Noise, assert_equal_steps, make_tensors, noise_like, on_numbers, outputs, pure_outputs
from tests.optim.training import largest_difference, make_params, train

WAYS = [{"foreach": False}, {"foreach": True}]
K = lambda: m.Mul(2.0)  # noqa: E731

OPERATIONS = {
    "Add number": (lambda: m.Add(1.5, 2.0), lambda u, g, p: u + 3.0),
    "Add module": (lambda: m.Add(K()), lambda u, g, p: 3 * u),
    "Sub number": (lambda: m.Sub(1.5), lambda u, g, p: u - 1.5),
    "Sub list": (lambda: m.Sub([K(), K()], 0.5), lambda u, g, p: -u),
    "RSub number": (lambda: m.RSub(1.5), lambda u, g, p: 1.5 - u),
    "RSub module": (lambda: m.RSub(K()), lambda u, g, p: u),
    "Mul number": (lambda: m.Mul(-1.5), lambda u, g, p: -1.5 * u),
    "Mul module": (lambda: m.Mul(m.Grad()), lambda u, g, p: u * g),
    "Div number": (lambda: m.Div(3.0), lambda u, g, p: u / 3),
    "Div module": (lambda: m.Div(m.Grad()), lambda u, g, p: u / g),
    "RDiv number": (lambda: m.RDiv(3.0), lambda u, g, p: 3 / u),
    "RDiv module": (lambda: m.RDiv(m.Grad()), lambda u, g, p: g / u),
    "Pow number": (lambda: m.Pow(2.0), lambda u, g, p: u**2),
    "Pow module": (lambda: [m.Abs(), m.Pow(m.Grad())], lambda u, g, p: u.abs() ** g),
    "RPow number": (lambda: m.RPow(3.0), lambda u, g, p: 3**u),
    "RPow module": (lambda: m.RPow([m.Grad(), m.Abs()]), lambda u, g, p: g.abs() ** u),
    "Lerp number": (lambda: m.Lerp(2.0, 0.25), lambda u, g, p: 0.75 * u + 0.5),
    "Lerp module": (lambda: m.Lerp(m.Grad(), 0.25), lambda u, g, p: 0.75 * u + 0.25 * g),
    "Maximum number": (lambda: m.Maximum(0.1), lambda u, g, p: u.clamp(min=0.1)),
    "Maximum module": (lambda: m.Maximum(m.Grad()), lambda u, g, p: torch.maximum(u, g)),
    "Minimum number": (lambda: m.Minimum(0.1), lambda u, g, p: u.clamp(max=0.1)),
    "Minimum module": (lambda: m.Minimum(m.Grad()), lambda u, g, p: torch.minimum(u, g)),
    "CopySign number": (lambda: m.CopySign(-2.0), lambda u, g, p: -u.abs()),
    "CopySign module": (lambda: m.CopySign(m.Grad()), lambda u, g, p: u.abs() * g.sign()),
    "RCopySign number": (lambda: m.RCopySign(-2.0), lambda u, g, p: 2 * u.sign()),
    "RCopySign module": (lambda: m.CopyMagnitude(m.Grad()), lambda u, g, p: g.abs() * u.sign()),
    "Clip numbers": (lambda: m.Clip(-0.5, 1.0), lambda u, g, p: u.clamp(-0.5, 1.0)),
    "Clip one": (lambda: m.Clip(max=0.2), lambda u, g, p: u.clamp(max=0.2)),
    "Clip modules": (
        lambda: m.Clip([m.Grad(), m.Abs(), m.Negate()], [m.Grad(), m.Abs()]),
        lambda u, g, p: torch.minimum(torch.maximum(u, -g.abs()), g.abs()),
    ),
    "MirroredClip number": (lambda: m.MirroredClip(0.5), lambda u, g, p: u.clamp(-0.5, 0.5)),
    "MirroredClip module": (lambda: m.MirroredClip([m.Grad(), m.Abs()]), lambda u, g, p: u.clamp(-g.abs(), g.abs())),
    "Threshold above": (lambda: m.Threshold(0.1, -3.0, True), lambda u, g, p: torch.where(u > 0.1, u, -3.0)),
    "Threshold below": (lambda: m.Threshold(m.Grad(), K(), False), lambda u, g, p: torch.where(u < g, u, 2 * u)),
    "SubModules": (lambda: m.SubModules(m.Grad(), K(), 0.5), lambda u, g, p: g - u),
    "SubModules number": (lambda: m.SubModules(1.0, K()), lambda u, g, p: 1 - 2 * u),
    "DivModules": (lambda: m.DivModules(m.Grad(), K()), lambda u, g, p: g / (2 * u)),
    "PowModules": (lambda: m.PowModules(m.Grad(), 2), lambda u, g, p: g**2),
    "PowModules module": (lambda: m.PowModules([m.Grad(), m.Abs()], K()), lambda u, g, p: g.abs() ** (2 * u)),
    "LerpModules": (lambda: m.LerpModules(m.Grad(), K(), 0.25), lambda u, g, p: 0.75 * g + 0.5 * u),
    "ClipModules": (lambda: m.ClipModules(m.Grad(), -0.2, K()), lambda u, g, p: g.clamp(min=-0.2).minimum(2 * u)),
    "Where": (lambda: m.Where(m.Maximum(0.0), m.Grad(), 7.0), lambda u, g, p: torch.where(u > 0, g, 7.0)),
    "Sum": (lambda: m.Sum(m.Grad(), K(), 1.0), lambda u, g, p: g + 2 * u + 1),
    "Mean": (lambda: m.Mean(m.Grad(), [K(), K()]), lambda u, g, p: (g + 4 * u) / 2),
    "Mean of one": (lambda: m.Mean(m.Identity(), m.Identity()), lambda u, g, p: u),
    "Prod": (lambda: m.Prod(m.Grad(), 3.0, K()), lambda u, g, p: 6 * g * u),
    "MaximumModules": (lambda: m.MaximumModules(m.Grad(), K(), 0.1), lambda u, g, p: g.maximum(2 * u).clamp(min=0.1)),
    "MinimumModules": (lambda: m.MinimumModules(m.Grad(), K(), 0.1), lambda u, g, p: g.minimum(2 * u).clamp(max=0.1)),
    "Median odd": (
        lambda: m.Median(m.Grad(), K(), 0.1, m.Params(), -0.3),
        lambda u, g, p: torch.stack(torch.broadcast_tensors(g, 2 * u, g * 0 + 0.1, p, g * 0 - 0.3)).median(0).values,
    ),
    "Median even": (
        lambda: m.Median(m.Grad(), K(), 0.1, m.Params()),
        lambda u, g, p: torch.stack([g, 2 * u, g * 0 + 0.1, p]).quantile(0.5, dim=0),
    ),
    "WeightedSum": (lambda: m.WeightedSum(m.Grad(), K(), 1.0, weights=[3, 0.5, 2]), lambda u, g, p: 3 * g + u + 2),
    "WeightedMean": (lambda: m.WeightedMean(m.Grad(), K(), weights=[3, 1]), lambda u, g, p: (3 * g + 2 * u) / 4),
    "Abs": (m.Abs, lambda u, g, p: u.abs()),
    "Sign": (m.Sign, lambda u, g, p: u.sign()),
    "Exp": (m.Exp, lambda u, g, p: u.exp()),
    "Sqrt": (lambda: [m.Abs(), m.Sqrt()], lambda u, g, p: u.abs().sqrt()),
    "Reciprocal": (lambda: m.Reciprocal(0.5), lambda u, g, p: 1 / (u + 0.5)),
    "Negate": (m.Negate, lambda u, g, p: -u),
    "NanToNum": (
        lambda: [m.Mul(float("1e300")), m.Mul(1e300), m.Add(m.Negate()), m.NanToNum(4.0)],
        lambda u, g, p: torch.full_like(u, 4.0),
    ),
    "NanToNum infinities": (
        lambda: [m.Mul(1e300), m.Mul(1e300), m.NanToNum(4.0, 5.0, 6.0)],
        lambda u, g, p: torch.where(u > 0, 5.0, 6.0).to(u),
    ),
    "Relative": (lambda: m.Relative(0.3), lambda u, g, p: u * p.abs().clamp(min=0.3)),
    "Identity": (m.Identity, lambda u, g, p: u),
    "NoOp": (m.NoOp, lambda u, g, p: u),
    "Update": (m.Update, lambda u, g, p: u),
    "Clone": (m.Clone, lambda u, g, p: u),
    "Grad": (m.Grad, lambda u, g, p: g),
    "Params": (m.Params, lambda u, g, p: p),
    "Zeros": (m.Zeros, lambda u, g, p: torch.zeros_like(u)),
    "Ones": (m.Ones, lambda u, g, p: torch.ones_like(u)),
    "Fill": (lambda: m.Fill(-2.5), lambda u, g, p: torch.full_like(u, -2.5)),
    "GradSign": (m.GradSign, lambda u, g, p: u.abs() * g.sign()),
    "UpdateSign": (m.UpdateSign, lambda u, g, p: g.abs() * u.sign()),
    "Graft": (lambda: m.Graft(m.Grad()), lambda u, g, p: u * g.norm() / u.norm()),
    "Graft half": (
        lambda: m.Graft(m.Grad(), strength=0.5),
        lambda u, g, p: u * (g.norm() + u.norm()) / (2 * u.norm()),
    ),
    "Graft ord": (lambda: m.Graft(m.Grad(), ord=1), lambda u, g, p: u * g.abs().sum() / u.abs().sum()),
    "GraftToUpdate": (lambda: m.GraftToUpdate(m.Grad()), lambda u, g, p: g * u.norm() / g.norm()),
    "RGraft": (lambda: m.RGraft(m.Grad()), lambda u, g, p: g * u.norm() / g.norm()),
    "GraftInputToOutput": (lambda: m.GraftInputToOutput(m.Grad()), lambda u, g, p: u * g.norm() / u.norm()),
    "GraftOutputToInput": (lambda: m.GraftOutputToInput(m.Grad()), lambda u, g, p: g * u.norm() / g.norm()),
    "GraftModules": (lambda: m.GraftModules(m.Params(), K()), lambda u, g, p: p * 2 * u.norm() / p.norm()),
    "GraftToGrad": (lambda: m.GraftToGrad(True), lambda u, g, p: u * g.norm() / u.norm()),
    "GraftGradToUpdate": (lambda: m.GraftGradToUpdate(True), lambda u, g, p: g * u.norm() / g.norm()),
    "GraftToParams": (lambda: m.GraftToParams(True), lambda u, g, p: u * p.norm() / u.norm()),
    "GramSchimdt": (lambda: m.GramSchimdt(m.Grad()), lambda u, g, p: u - g * (g * u).sum() / (g * g).sum()),
    "GramSchimdt zero": (lambda: m.GramSchimdt(m.Zeros()), lambda u, g, p: u),
}


def as_list(modules):
    return modules if isinstance(modules, list) else [modules]


@accepts("X1", "X2", "X3", "X4", "X5", "X6", "X7", "X10")
@pytest.mark.parametrize("name", OPERATIONS)
def test_equals_one_line(name):
    """One by one, many at once, and as pure functions; operands are not written to."""
    make, expected = OPERATIONS[name]
    grads, params = [make_tensors(1), make_tensors(2)], make_tensors(3)
    wanted = [
        [
            expected(g + noise_like(g, 77 + i), g, p).expand_as(g)
            for i, (g, p) in enumerate(zip(step, params, strict=True))
        ]
        for step in grads
    ]
    for way in WAYS:
        assert_equal_steps(outputs(lambda: [Noise(), *as_list(make())], grads, params, **way), wanted)
    assert_equal_steps(pure_outputs(lambda: [Noise(), *as_list(make())], grads, params), wanted)


def test_every_operation_is_in_the_table():
    public = set()
    for module in (binary, unary, sources, multi, reductions, graft, gram_schmidt):
        public |= {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__ and name[0] != "_"
        }
    tested = {name.split()[0] for name in OPERATIONS}
    assert public - {"Reduction", "CopyMagnitude"} == tested
    assert all(hasattr(m, name) for name in tested)


@accepts("X1")
def test_what_undoes_itself():
    """Exactly, for numbers with few digits."""
    grads = [[torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)]]
    for make in (lambda: [m.Add(1), m.Sub(1)], lambda: [m.Mul(-1), m.Mul(-1)]):
        assert_equal_steps(outputs(make, grads), grads, atol=0)


@accepts("X4")
def test_powers_of_the_catalogue():
    assert on_numbers(lambda: [m.PowModules(m.Grad(), 2)], [3]) == [9]


@accepts("X2")
@pytest.mark.parametrize("tensorwise", [True, False])
def test_graft_modules_are_graft_behind_the_direction(tensorwise):
    """Bitwise."""
    grads = [make_tensors(seed) for seed in range(4)]
    one = outputs(lambda: [m.GraftModules(m.Adam(), m.HeavyBall(), tensorwise)], grads, foreach=False)
    two = outputs(lambda: [m.Adam(), m.Graft([m.Grad(), m.HeavyBall()], tensorwise)], grads, foreach=False)
    assert_equal_steps(one, two, atol=0)


@accepts("X2")
@pytest.mark.parametrize("tensorwise", [True, False])
def test_graft_modules_on_lbfgs(tensorwise):
    """Bitwise."""
    grads = [make_tensors(seed) for seed in range(4)]
    one = outputs(lambda: [m.GraftModules(m.LBFGS(), m.RMSprop(), tensorwise)], grads)
    two = outputs(lambda: [m.LBFGS(), m.Graft([m.Grad(), m.RMSprop()], tensorwise)], grads)
    assert_equal_steps(one, two, atol=0)


def test_one_norm_of_all_tensors():
    grads = [make_tensors(1)]
    (out,) = outputs(lambda: [m.Mul(3.0), m.GraftToGrad()], grads)
    assert_equal_steps([out], grads)
    (out,) = outputs(lambda: [m.Pow(3.0), m.GraftToGrad()], grads)
    flat, cubes = torch.cat([g.flatten() for g in grads[0]]), [g**3 for g in grads[0]]
    length = torch.cat([c.flatten() for c in cubes]).norm()
    assert_equal_steps([out], [[c * flat.norm() / length for c in cubes]])


@accepts("X3")
def test_gram_schmidt_of_the_catalogue():
    grads = [[torch.tensor([3.0, 4.0], dtype=torch.float64)]]
    (out,) = outputs(lambda: [m.GramSchimdt(m.Ones())], grads)
    assert out[0].tolist() == [-0.5, 0.5]


@accepts("X8")
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (m.AccumulateSum, [-2, 1, 2, -3]),
        (m.AccumulateMean, [-2, 0.5, 2 / 3, -0.75]),
        (m.AccumulateProduct, [-2, -6, -6, 30]),
        (m.AccumulateMaximum, [-2, 3, 3, 3]),
        (m.AccumulateMinimum, [-2, -2, -2, -5]),
    ],
)
def test_accumulate(module, expected):
    assert on_numbers(lambda: [module()], [-2, 3, 1, -5]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (m.AccumulateSum, [-2, 2, 2, -4]),
        (m.AccumulateMean, [-2, 1, 2 / 3, -1]),
        (m.AccumulateProduct, [-2, -3, -1.5, 3.75]),
        (m.AccumulateMaximum, [-2, 3, 1.5, 0.75]),
        (m.AccumulateMinimum, [-2, -1, -0.5, -5]),
    ],
)
def test_accumulate_with_decay(module, expected):
    assert on_numbers(lambda: [module(0.5)], [-2, 3, 1, -5]) == pytest.approx(expected)


def test_accumulators_are_all_tested():
    public = {n for n, v in vars(accumulate).items() if inspect.isclass(v) and n.startswith("Accumulate")}
    assert len(public) == 5


@accepts("X8")
def test_division_by_an_accumulated_sum_is_adagrad():
    params, others = make_params(), make_params()
    train(Modular(params, m.Div([m.Pow(2), m.AccumulateSum(), m.Sqrt(), m.Add(1e-10)]), m.LR(0.1)), params, range(10))
    train(torch.optim.Adagrad(others, 0.1), others, range(10))
    assert largest_difference(params, others) < 1e-12


def test_numbers_may_be_schedules_and_options_of_groups():
    assert on_numbers(lambda: [m.Mul(lambda step: step + 1.0)], [1, 1, 1]) == [1, 2, 3]
    assert on_numbers(lambda: [m.Prod(m.Identity(), lambda step: 2.0 - step)], [1, 1, 1]) == [2, 1, 0]
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    optimizer = Modular([{"params": [p]}, {"params": [q], "add.other": 5.0}], m.Add(1.0), m.Mul(2.0))
    p.grad = q.grad = torch.zeros(2)
    optimizer.step()
    assert (p[0].item(), q[0].item()) == (-2.0, -10.0)


def test_numbers_do_not_widen_what_has_no_axes():
    """The count of steps is a number in float64, as tensors of shape () in float32 are numbers, too."""
    grads = [[torch.ones(()), torch.ones(2)]]
    for seen in (outputs(lambda: [m.HeavyBall(), m.Debias2()], grads), pure_outputs(lambda: [m.HeavyBall()], grads)):
        assert {update.dtype for update in seen[0]} == {torch.float32}


def test_what_follows_may_write_to_the_update():
    """Neither the gradient nor the parameter is the update itself."""

    class InPlace(Noise):
        def step(self, var):
            for update in var.get_update():
                update.zero_()
            return var

    for module in (m.Grad, m.Params, m.Clone, m.Identity):
        (p,) = [torch.ones(3, requires_grad=True)]
        p.grad = torch.ones(3)
        Modular([p], module(), InPlace(), foreach=False).step()
        assert p.tolist() == p.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: m.Add(None), "Add: other=None; expected a number, a module or a list of modules"),
        (lambda: m.Add("1"), "Add: other='1'; expected a number in"),
        (lambda: m.Mul(m.Sign), r"Mul\(other=...\): Sign is a class; write Sign\(\)"),
        (lambda: m.Clip(), r"Clip\(\) without a limit; write Clip\(min, max\)"),
        (lambda: m.Clip(2.0, 1.0), "Clip: min=2.0 is above max=1.0"),
        (lambda: m.MirroredClip(-1.0), "MirroredClip: value=-1.0; expected a number in"),
        (lambda: m.Threshold(1.0, 0.0, 1.0), "Threshold: update_above=1.0; expected True or False"),
        (lambda: m.ClipModules(m.Grad()), r"ClipModules\(input\) without a limit"),
        (lambda: m.Sum(), r"Sum\(\) without inputs"),
        (lambda: m.WeightedSum(m.Grad(), weights=[1, 2]), "WeightedSum: 2 weights for 1 inputs"),
        (lambda: m.WeightedMean(m.Grad(), 1.0, weights=[1, -1]), "sum up to 0; WeightedSum does not divide"),
        (lambda: m.Graft(m.Grad(), ord=0), "Graft: ord=0; expected a number above 0"),
        (lambda: m.AccumulateSum(1.0), "AccumulateSum: decay=1.0; expected a number in"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(OptionError, match=text):
        make()
