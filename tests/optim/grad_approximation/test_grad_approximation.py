"""Gradients from values of the loss: exact on polynomials, unbiased on average, and without a trace in the parameters."""

import re

import pytest
import torch

from graphopt.errors import ClosureError, ModuleError, NonFiniteError, OptionError
from graphopt.optim import GradApproximator, Modular, m
from graphopt.optim.core.transform import Step, chain
from tests.optim.catalogue import accepts
from tests.optim.examples import with_rate
from tests.optim.problems import Problem, booth, in_plane, rosenbrock, steps_until

DEGREE_AND_CALLS = {  # of the polynomials that are exact; evaluations for three elements
    "forward2": (1, 4),
    "backward2": (1, 4),
    "central2": (2, 6),
    "forward3": (2, 7),
    "backward3": (2, 7),
    "central4": (4, 12),
}


def estimate(problem, module):
    """The gradients that a module hands on."""
    lr = m.LR(1.0)
    before = [p.detach().clone() for p in problem.params]
    Modular(problem.params, module, lr).step(problem.closure)
    found = [b - p.detach() for b, p in zip(before, problem.params, strict=True)]
    with torch.no_grad():
        for p, b in zip(problem.params, before, strict=True):
            p.copy_(b)
    return found


def polynomial(degree):
    return lambda a, b: sum((i + 1.0) * a.sum() ** i + (i - 2.0) * b.sum() ** i for i in range(1, degree + 1))


@accepts("G1")
@pytest.mark.parametrize("formula", DEGREE_AND_CALLS)
def test_fdm_is_exact_on_polynomials_of_its_degree_and_of_no_higher_one(formula):
    degree, num_calls = DEGREE_AND_CALLS[formula]
    for tested, is_exact in ((degree, True), (degree + 1, False)):
        problem = Problem(polynomial(tested), [0.3, -0.7], [[0.9]])
        grads = torch.autograd.grad(problem.loss_of(*problem.params), problem.params)
        found = estimate(problem, m.FDM(h=1e-2, formula=formula))
        error = max(float((a - b).abs().max()) for a, b in zip(found, grads, strict=True))
        assert (error < 1e-10) == is_exact
        assert problem.calls == [False] * num_calls


@accepts("G2", "G4")
@pytest.mark.parametrize("distribution", ["gaussian", "uniform", "sphere", "rademacher"])
def test_random_differences_of_a_linear_function_are_its_gradient_on_average(distribution):
    slope_a, slope_b = torch.tensor([1.0, -2.0], dtype=torch.float64), 3.0
    samples = 4000
    problem = Problem(lambda a, b: a @ slope_a + b * slope_b, [0.0, 0.0], 0.0)
    (found_a, found_b) = estimate(
        problem, m.RandomizedFDM(h=0.1, n_samples=samples, formula="central2", distribution=distribution, seed=0)
    )
    # The variance of one sample's element is at most that of the normal distribution, ‖g‖² + g².
    errors = torch.cat([found_a - slope_a, (found_b - slope_b).reshape(1)])
    assert float(errors.abs().max()) < 4 * ((14 + 9) / samples) ** 0.5
    assert set(problem.calls) == {False}
    assert len(problem.calls) == 2 * samples


@accepts("G2")
def test_each_parameter_has_its_own_step():
    problem = Problem(lambda a, b: 2 * a + 5 * b, 1.0, 1.0)
    _, b = problem.params
    module = m.RandomizedFDM(n_samples=3000, seed=1, h=1e-2)
    module.set_param_groups([{"params": b, "h": 0.5}])
    found = estimate(problem, module)
    assert float(found[0]) == pytest.approx(2, abs=1e-9 + 4 * 5 * 50 / 3000**0.5)  # noise of b's step, 50 times as long
    assert float(found[1]) == pytest.approx(5, abs=4 * 2 / 50 / 3000**0.5)
    seen = set()
    problem = Problem(lambda a, b: seen.add((round(a.item(), 6), round(b.item(), 6))) or a + b, 1.0, 1.0)
    module = m.SPSA(seed=1, h=1e-2).set_param_groups([{"params": problem.params[1], "h": 0.5}])
    estimate(problem, module)
    assert all(abs(abs(x - 1) - 1e-2) < 1e-5 and abs(abs(y - 1) - 0.5) < 1e-5 for x, y in seen)


@accepts("G3", "G6", "G4")
def test_spsa_is_randomized_fdm_and_smoothing_has_the_mean_of_the_slope():
    first, second = (estimate(in_plane(rosenbrock), cls(n_samples=3, seed=5)) for cls in (m.SPSA, m.RandomizedFDM))
    assert torch.equal(first[0], second[0])
    problem = Problem(lambda x: x**2, 1.5)
    found = float(estimate(problem, m.GaussianSmoothing(n_samples=2000, seed=0))[0])
    assert found == pytest.approx(3.0, abs=3 * 3 * 2**0.5 / 2000**0.5)  # z² has variance 2


@accepts("G8")
def test_updates_are_in_the_span_of_directions_which_turns_slowly_with_beta():
    """A new direction is old ones, and ``1 - beta`` times a fresh one, here of length √n."""
    problem = Problem(lambda x: (x**2).sum(), [1.0] * 6)
    optimizer = Modular(problem.params, m.RandomizedFDM(n_samples=2, beta=0.99, seed=0), m.LR(0.01))
    before = None
    for _ in range(4):
        start = problem.vector
        optimizer.step(problem.closure)
        z = optimizer.state[problem.params[0]]["randomizedfdm.directions"].clone()
        assert float(outside(z, problem.vector - start).norm()) < 1e-10 * float((problem.vector - start).norm())
        if before is not None:
            assert all(float(outside(before, row).norm()) <= 0.01 * 6**0.5 * (1 + 1e-9) for row in z)
            assert not torch.equal(before, z)
        before = z


def outside(rows, vector):
    """The part of a vector that is not in the span of others."""
    return vector - rows.T @ torch.linalg.lstsq(rows.T, vector[:, None]).solution[:, 0]


@accepts("G8")
def test_directions_that_turn_slowly_keep_a_covariance_of_one():
    """Averages of random numbers are shorter than these; estimates would be shorter as the square of that."""
    size, beta = 20_000, 0.9
    seen = []
    param = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = Modular([param], m.RDSA(beta=beta, seed=0, formula="forward2"), m.LR(0.0))
    for _ in range(12):
        optimizer.step(lambda backward=True: seen.append(param.detach() / 1e-3) or param.sum())
    moved = [z for z in seen if bool(z.any())]
    variances = [1.0]
    for _ in range(11):
        variances.append(beta**2 * variances[-1] + (1 - beta) ** 2)
    for index, z in enumerate(moved):
        assert float(z.square().mean()) == pytest.approx(1, abs=5 * (2 / size) ** 0.5)
        if index:
            similarity = beta * (variances[index - 1] / variances[index]) ** 0.5
            assert float((z * moved[index - 1]).mean()) == pytest.approx(similarity, abs=5 * (2 / size) ** 0.5)
    assert len(moved) == 12


@accepts("G3", "G4")
@pytest.mark.parametrize(("kind", "distribution"), [(m.SPSA, "rademacher"), (m.RDSA, "gaussian")])
def test_by_their_names_and_by_their_distributions(kind, distribution):
    runs = []
    for module in (kind(n_samples=2, seed=3), m.RandomizedFDM(n_samples=2, distribution=distribution, seed=3)):
        problem = in_plane(booth)
        optimizer = Modular(problem.params, module, m.LR(0.01))
        for _ in range(5):
            optimizer.step(problem.closure)
        runs.append(problem.vector)
    assert torch.equal(*runs)


def test_parameters_come_back_bit_for_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(5, generator=generator).to(dtype)
        param = start.clone().requires_grad_()
        modules = [
            m.FDM(),
            m.SPSA(seed=0),
            m.GaussianSmoothing(n_samples=3, seed=0),
            m.MeZO(seed=0),
            m.MeZO(seed=0, perturb="params"),
            m.MeZO(seed=0, lr=0.0),
            m.ForwardGradient(seed=0),
        ]
        for module in modules:
            optimizer = Modular([param], with_rate([module], 0.0))
            for _ in range(20):
                optimizer.step(lambda backward=True, param=param: (param.float() ** 2).sum())
            assert torch.equal(param.detach(), start)


def test_an_error_in_the_closure_leaves_the_parameters():
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    calls = []

    def closure(backward=True):
        calls.append(backward)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return (param**2).sum()

    optimizer = Modular([param], m.FDM())
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert param.tolist() == [1.0, 2.0]
    assert float(optimizer.state[param]["step"]) == 0


@pytest.mark.parametrize("target", ["closure", "grad", "update"])
def test_a_subclass_of_ten_lines(target):
    class OfSphere(GradApproximator):
        def approximate(self, closure, params, loss, var):
            loss = closure(False)
            for p in params:
                p.zero_()  # whatever it does to them
            return [torch.tensor([2.0, 4.0]) for _ in params], loss, None

    param = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = Modular([param], OfSphere(target=target), m.LR(0.25))
    loss = optimizer.step(lambda backward=True: (param**2).sum())
    assert loss.item() == 5
    assert param.tolist() == [0.5, 1.0]


def test_a_subclass_drives_the_parameters_and_leaves_no_trace_in_them():
    """Over 300 steps; adding and subtracting again drifts by 1e-4 in float32."""

    class Shaken(GradApproximator):
        def approximate(self, closure, params, loss, var):
            estimates = [2 * p for p in params]
            for p in params:
                p += 0.3 * torch.randn_like(p)
            return estimates, None, closure(False)

    param = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    start = param.detach().clone()
    optimizer = Modular([param], Shaken(), m.LR(0.0))
    for step in range(300 + 40):
        if step == 300:
            assert torch.equal(param, start)
            optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step(lambda backward=True: (param**2).sum())
    assert float(param.detach().norm()) < 0.01


def test_before_the_first_estimate_of_a_step_a_hook_is_called_once():
    calls = []

    class Noted(GradApproximator):
        def pre_step(self, var):
            calls.append("step")

        def approximate(self, closure, params, loss, var):
            calls.append("estimate")
            (p,) = params
            value = closure(False)
            return [torch.tensor([2.0, 8.0], dtype=p.dtype) * p], value, None

    problem = Problem(lambda p: p[0] ** 2 + 4 * p[1] ** 2, [1.0, 2.0])
    optimizer = Modular(problem.params, Noted(), m.NewtonCG(hvp_method="central"), m.StrongWolfe())
    for _ in range(2):
        calls.clear()
        optimizer.step(problem.closure)
        assert calls[0] == "step"
        assert calls.count("step") == 1
        assert calls.count("estimate") > 2
    assert problem.loss < 1e-12
    assert set(problem.calls) == {False}


def test_step_returns_the_estimate_where_the_loss_is_not_evaluated():
    problem = in_plane(booth)
    loss = Modular(problem.params, m.FDM(h=1e-3), m.LR(0.0)).step(problem.closure)
    assert loss == pytest.approx(problem.loss, rel=1e-5)


def test_everything_behind_works_on_the_approximation():
    problem = in_plane(rosenbrock)
    optimizer = Modular(problem.params, m.FDM(formula="central4"), m.NewtonCG(hvp_method="forward"), m.StrongWolfe())
    assert steps_until(problem, optimizer, 1e-6, 25) <= 25
    assert set(problem.calls) == {False}


def test_the_zeroth_order_example_of_seed_003():
    torch.manual_seed(0)
    problem = in_plane(rosenbrock)
    optimizer = Modular(
        problem.params,
        m.GaussianSmoothing(h=0.01, n_samples=10),
        m.NewtonCG(hvp_method="forward"),
        m.AdaptiveBacktracking(),
    )
    assert steps_until(problem, optimizer, 170 / 50, 100) <= 100
    assert set(problem.calls) == {False}


@accepts("G2")
def test_the_same_seed_is_the_same_run_also_after_loading():
    def run(num_steps, saved_at=None):
        problem = in_plane(booth)
        optimizer = Modular(problem.params, m.SPSA(n_samples=2, beta=0.5, seed=3), m.LR(0.01))
        for step in range(num_steps):
            if step == saved_at:
                state = optimizer.state_dict()
                optimizer = Modular(problem.params, m.SPSA(n_samples=2, beta=0.5, seed=3), m.LR(0.01))
                optimizer.load_state_dict(state)
            optimizer.step(problem.closure)
        return problem.vector

    assert torch.equal(run(6), run(6))
    assert torch.equal(run(6), run(6, saved_at=3))


def test_as_a_pure_function():
    transform = chain(m.GaussianSmoothing(n_samples=20, h=0.01, seed=0), m.LR(0.01))
    params = {"w": torch.tensor([3.0, -2.0], dtype=torch.float64)}
    before = params["w"].clone()
    state = transform.init(params)
    step = Step(loss_fn=lambda tree: (tree["w"] ** 2).sum())
    first, after = transform.update({"w": torch.zeros(2, dtype=torch.float64)}, state, params, step=step)
    again, _ = transform.update({"w": torch.zeros(2, dtype=torch.float64)}, state, params, step=step)
    second, _ = transform.update({"w": torch.zeros(2, dtype=torch.float64)}, after, params, step=step)
    assert torch.equal(first["w"], again["w"])
    assert not torch.equal(first["w"], second["w"])  # other directions in the next step
    assert torch.equal(params["w"], before)
    assert params["w"].grad is None
    assert not params["w"].requires_grad
    problem = Problem(lambda w: (w**2).sum(), [3.0, -2.0])
    Modular(problem.params, m.GaussianSmoothing(n_samples=20, h=0.01, seed=0), m.LR(0.01)).step(problem.closure)
    assert torch.equal(before - first["w"], problem.vector)


# -- bad input


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: m.FDM(h=0.0), r"FDM: h=0\.0; expected a number in \(0, inf\)"),
        (lambda: m.FDM(formula="central3"), r"FDM: formula='central3'; expected one of forward2, "),
        (lambda: m.FDM(target="params"), r"FDM: target='params'; expected one of closure, grad, update"),
        (lambda: m.SPSA(n_samples=0), r"SPSA: n_samples=0; expected an integer of at least 1"),
        (lambda: m.RandomizedFDM(distribution="normal"), r"distribution='normal'; expected one of gaussian, "),
        (lambda: m.RandomizedFDM(beta=2.0), r"beta=2\.0; expected a number in \[0, 1\]"),
    ],
)
def test_bad_options(make, text):
    with pytest.raises(OptionError, match=text):
        make()


def test_settings_of_one_kind_of_all():
    problem = Problem(lambda a, b: a + b, 1.0, 1.0)
    a, b = problem.params
    optimizer = Modular([{"params": [a]}, {"params": [b], "n_samples": 3}], m.SPSA())
    with pytest.raises(OptionError, match="n_samples is 1 for one parameter and 3 for another"):
        optimizer.step(problem.closure)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("module", [m.FDM, m.SPSA, lambda: m.FDM(target="grad"), lambda: m.FDM(formula="forward2")])
def test_a_loss_that_is_not_finite(module, bad):
    problem = Problem(lambda x: (x * bad).sum(), [1.0, 2.0])
    optimizer = Modular(problem.params, module(), m.LR(0.1))
    with pytest.raises(NonFiniteError, match=r"module 1 of 2, \w+: the loss is (nan|inf).*nothing was changed"):
        optimizer.step(problem.closure)
    assert problem.vector.tolist() == [1.0, 2.0]


def test_after_a_loss_that_is_not_finite_the_next_step_is_made():
    problem = Problem(lambda x: (x * problem.factor).sum(), [1.0, 2.0])
    problem.factor = float("nan")
    optimizer = Modular(problem.params, m.FDM(), m.LR(0.1))
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="FDM: the loss is nan"):
            optimizer.step(problem.closure)
    problem.factor = 1.0
    optimizer.step(problem.closure)
    assert problem.vector.tolist() == pytest.approx([0.9, 1.9])


def test_a_rule_in_front_is_in_vain():
    with pytest.raises(
        OptionError, match="FDM makes an update of its own, so that module 1 of 2, ClipValue would be in vain"
    ):
        Modular([torch.zeros(1, requires_grad=True)], m.ClipValue(), m.FDM())


def test_a_subclass_that_calls_for_gradients():
    class Wrong(GradApproximator):
        def approximate(self, closure, params, loss, var):
            return [torch.zeros_like(p) for p in params], closure(True), None

    problem = in_plane(booth)
    with pytest.raises(ModuleError, match=r"call closure\(False\) in approximate"):
        Modular(problem.params, Wrong()).step(problem.closure)


def test_closures_that_cannot_be_used():
    param = torch.tensor([1.0], requires_grad=True)
    optimizer = Modular([param], m.FDM())
    with pytest.raises(ClosureError, match=r"module 1 of 1, FDM calls closure\(False\).*def closure\(backward=True\):"):
        _matching_lines(optimizer, lambda: param.sum())
    with pytest.raises(ClosureError, match="FDM: the closure returned None; expected the loss"):
        optimizer.step(lambda backward=True: None)
    with pytest.raises(ClosureError, match=re.escape("returned a tensor of shape (2,), torch.float32")):
        optimizer.step(lambda backward=True: param.expand(2))
    with pytest.raises(ClosureError, match=r"FDM evaluates the loss, so step\(\) needs a closure"):
        optimizer.step()

    def with_error(backward=True):
        raise TypeError("of the user")

    with pytest.raises(TypeError, match="of the user"):
        optimizer.step(with_error)
    assert param.tolist() == [1.0]


def _matching_lines(optimizer, closure):
    """Raise with the text on one line."""
    try:
        optimizer.step(closure)
    except ClosureError as error:
        raise ClosureError(str(error).replace("\n", " ")) from None
