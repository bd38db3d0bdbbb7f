"""Different chains for different parameters and steps, against optimizers of their own for each."""

import copy
import io

import pytest
import torch
from torch import nn

from graphopt.errors import OptionError
from graphopt.optim import Modular, Module, m
from graphopt.optim.core.transform import apply_updates, chain
from tests.optim.catalogue import accepts
from tests.optim.training import largest_difference, make_params, set_gradients, train

SHAPES = [(4, 3), (3,), (5, 1, 2), (), (4, 3)]


def is_matrix(p):
    return p.ndim >= 2


def pair(p):
    """The parameters of two optimizers, one for matrices."""
    return [q for q in p if q.ndim >= 2], [q for q in p if q.ndim < 2]


def references(params, *makers):
    return [make(own) for make, own in zip(makers, pair(params), strict=True)]


def train_all(optimizers, params, steps=range(6)):
    for seed in steps:
        set_gradients(params, seed)
        for optimizer in optimizers:
            optimizer.step()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4).double()
        self.head = nn.Linear(4, 1).double()


@accepts("X13")
def test_split_equals_two_optimizers():
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular(params, m.Split(is_matrix, [m.HeavyBall(), m.LR(0.1)], [m.Adam(), m.LR(0.05)]))
    train(optimizer, params)
    expected = references(others, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adam(p, 0.05))
    train_all(expected, others, range(5))
    assert largest_difference(params, others) < 1e-13
    keys = {name for p in params for name in optimizer.state[p]}
    assert keys == {"step", "heavyball.momentum_buffer", "adam.exp_avg", "adam.exp_avg_sq"}
    assert "adam.exp_avg" not in optimizer.state[params[0]]


@accepts("X13")
@pytest.mark.parametrize("kind", ["predicate", "named", "module", "generator", "tensor", "several", "default"])
def test_filters(kind):
    """The body takes steps of 1, the rest of 2."""
    model = Model()
    filters = {
        "predicate": lambda p: p is model.body.weight or p is model.body.bias,
        "named": lambda name, p: name.startswith("body."),
        "module": model.body,
        "generator": model.body.parameters(),
        "tensor": [model.body.weight, model.body.bias],
        "several": [model.body.bias, lambda name, p: name == "body.weight"],
        "default": lambda p, names=("body",): any(p is q for n in names for q in getattr(model, n).parameters()),
    }
    optimizer = Modular(model, m.Split(filters[kind], m.Fill(1.0), m.Fill(2.0)))
    before = copy.deepcopy(model.state_dict())
    model.head(model.body(torch.ones(1, 3).double())).backward()
    optimizer.step()
    moved = {name: (before[name] - value).mean().item() for name, value in model.state_dict().items()}
    assert {name: round(value, 9) for name, value in moved.items()} == {
        "body.weight": 1,
        "body.bias": 1,
        "head.weight": 2,
        "head.bias": 2,
    }


@accepts("X+", "X13")
def test_one_side_passes_unchanged():
    for make in (lambda: m.Split(is_matrix, m.Zeros()), lambda: m.Masked(is_matrix, m.Mul(2.0), m.Zeros())):
        params = make_params(SHAPES)
        before = [p.detach().clone() for p in params]
        train(Modular(params, make(), m.LR(0.5)), params, [3])
        for p, b in zip(params, before, strict=True):
            assert torch.equal(b - p, 0 * b if p.ndim >= 2 else b - (b - 0.5 * p.grad))
    params = make_params(SHAPES)
    optimizer = Modular(params, m.Split(is_matrix, false=m.Adam()))
    train(optimizer, params, [0])
    assert "adam.exp_avg" not in optimizer.state[params[0]]


def test_nested_and_inside_of_operands():
    params, others = make_params(SHAPES), make_params(SHAPES)
    inner = m.Split(lambda p: p.ndim == 3, m.Mul(3.0), m.Mul(2.0))
    train(Modular(params, m.Add(m.Split(is_matrix, [m.Add(1.0), inner], m.Negate())), m.LR(0.1)), params, [1])
    set_gradients(others, 1)
    for q in others:
        factor = 3 if q.ndim == 3 else 2
        q.data -= 0.1 * (q.grad + (factor * (q.grad + 1) if q.ndim >= 2 else -q.grad))
    assert largest_difference(params, others) < 1e-14


@accepts("X+")
def test_freeze():
    """Frozen parameters keep no state; one that thaws starts as if it were new."""
    frozen = {0, 1}
    params, others = make_params(SHAPES), make_params(SHAPES)
    where = {id(p): i for i, p in enumerate(params)}
    optimizer = Modular(params, m.Freeze(lambda p: where[id(p)] in frozen), m.Adam(), m.LR(0.1))
    before = [p.detach().clone() for p in params]
    train(optimizer, params, range(3))
    assert torch.equal(params[0], before[0])
    assert not any(name.startswith("adam") for name in optimizer.state[params[0]])
    frozen -= {0}
    train(optimizer, params, range(3, 6))
    late, usual = torch.optim.Adam(others[:1], 0.1), torch.optim.Adam(others[2:], 0.1)
    train_all([usual], others, range(3))
    train_all([usual, late], others, range(3, 6))
    assert largest_difference(params, others) < 1e-13


def test_freeze_everything_and_inside_of_others():
    params = make_params(SHAPES)
    before = [p.detach().clone() for p in params]
    train(Modular(params, m.Freeze(lambda p: True), m.Adam(), m.ClipNorm(1.0, dim="global")), params)
    train(Modular(params, m.Split(is_matrix, m.Freeze(params), m.Mul(m.Freeze(params)))), params)
    assert largest_difference(params, before) == 0


@accepts("X13")
def test_alternate_runs_in_turn_with_counts_of_their_own():
    """Adam sees every other gradient, as if it were alone."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    train(Modular(params, m.Alternate([m.Adam(), m.LR(0.1)], m.Mul(0.5))), params, range(6))
    adam, sgd = torch.optim.Adam(others, 0.1), torch.optim.SGD(others, 0.5)
    for seed in range(6):
        train([adam, sgd][seed % 2], others, [seed])
    assert largest_difference(params, others) < 1e-13


def fills(number):
    return [m.Fill(float(10**index)) for index in range(number)]


@accepts("X13")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: m.Alternate(*fills(2)), [1, 10, 1, 10, 1]),
        (lambda: m.Alternate(*fills(3), steps=2), [1, 1, 10, 10, 100, 100, 1, 1]),
        (lambda: m.Alternate(*fills(2), steps=[1, 3]), [1, 10, 10, 10, 1, 10]),
        (lambda: m.Switch(*fills(2), steps=2), [1, 1, 10, 10, 10]),
        (lambda: m.Switch(*fills(3), steps=[1, 2]), [1, 10, 10, 100, 100]),
    ],
)
def test_turns(make, expected):
    p = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = Modular([p], make())
    moves = []
    for _ in expected:
        before = p.item()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        moves.append(before - p.item())
    assert moves == expected


def positions(make, grads):
    p = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = Modular([p], *make())
    seen = []
    for g in grads:
        p.grad = torch.tensor(float(g), dtype=torch.float64)
        optimizer.step()
        seen.append(p.item())
    return seen


@accepts("X11")
def test_gradient_accumulation_of_the_catalogue():
    assert positions(lambda: [m.GradientAccumulation(m.LR(1.0), 3)], range(1, 7)) == pytest.approx(
        [0, 0, -2, -2, -2, -7]
    )
    assert positions(lambda: [m.GradientAccumulation([], 2, mean=False)], range(1, 5)) == [0, -3, -3, -10]
    assert positions(lambda: [m.GradientAccumulation([], 1)], [1, 2]) == [-1, -3]


@accepts("X11")
@pytest.mark.parametrize("front", [[], [m.Mul]])
def test_gradient_accumulation_equals_large_batches(front):
    """Also for modules that compare with the gradient; those behind it do nothing in between."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    modules = lambda: [m.HeavyBall(), m.Cautious(), m.Adam(), m.LR(0.1)]  # noqa: E731
    factor = 2.0 if front else 1.0
    optimizer = Modular(params, *[f(2.0) for f in front], m.GradientAccumulation(modules(), 4), m.EMA(0.5))
    train(optimizer, params, range(8))
    expected = Modular(others, m.Mul(factor), *modules(), m.EMA(0.5))
    for start in (0, 4):
        sums = [torch.zeros_like(p) for p in others]
        for seed in range(start, start + 4):
            set_gradients(others, seed)
            sums = [s + p.grad for s, p in zip(sums, others, strict=True)]
        for p, s in zip(others, sums, strict=True):
            p.grad = s / 4
        expected.step()
    assert largest_difference(params, others) < 1e-13


def test_parameters_that_miss_a_gradient_act_when_it_is_their_time():
    p, q = (torch.zeros((), requires_grad=True) for _ in range(2))
    optimizer = Modular([p, q], m.GradientAccumulation([], 2))
    for grads in [(1, None), (1, 4), (1, 4)]:
        p.grad, q.grad = (None if g is None else torch.tensor(float(g)) for g in grads)
        optimizer.step()
    assert (p.item(), q.item()) == (-1, -4)


CHAINS = {
    "split": lambda: [m.Split(is_matrix, m.HeavyBall(), m.Adam()), m.LR(0.1)],
    "masked": lambda: [m.EMA(0.5), m.Masked(lambda name, p: "w" in name, m.Adam()), m.LR(0.1)],
    "freeze": lambda: [m.Freeze(lambda name, p: "0" in name), m.Adam(), m.LR(0.1)],
    "alternate": lambda: [m.Alternate(m.Adam(), [m.HeavyBall(), m.Mul(0.1)]), m.LR(0.1)],
    "switch": lambda: [m.Switch(m.HeavyBall(), m.Adam(), steps=3), m.LR(0.1)],
    "accumulation": lambda: [m.GradientAccumulation([m.Adam(), m.LR(0.1)], 3)],
    "averages": lambda: [m.MedianAveraging(3), m.AccumulateMaximum(), m.ClipNormGrowth(), m.LR(0.1)],
}


def named(params):
    return [(f"w{i}" if p.ndim >= 2 else f"b{i}", p) for i, p in enumerate(params)]


@pytest.mark.parametrize("way", [{}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_saved_and_loaded_and_copied(name, way):
    """Bitwise as if nothing had happened."""
    params = make_params(SHAPES)
    optimizer = Modular(named(params), *CHAINS[name](), **way)
    train(optimizer, params, range(4))
    others = make_params(SHAPES, seed=1)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    fresh = Modular(named(others), *CHAINS[name](), **way)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    copies, copied = copy.deepcopy((params, optimizer))
    train(optimizer, params, range(4, 9))
    train(fresh, others, range(4, 9))
    train(copied, copies, range(4, 9))
    assert largest_difference(params, others) == largest_difference(params, copies) == 0


@pytest.mark.parametrize("name", CHAINS)
def test_runs_of_rules_inside_are_run_as_outside(name):
    """All tensors at once, with one plan for all steps; after a reset, and with one gradient missing, too."""
    results = []
    for way in ({"foreach": False}, {"foreach": True}):
        params = make_params(SHAPES)
        optimizer = Modular(named(params), *CHAINS[name](), **way)
        train(optimizer, params, range(5))
        set_gradients(params, 5)
        params[2].grad = None
        optimizer.step()
        train(optimizer, params, range(6, 10))
        optimizer.reset()
        train(optimizer, params, range(10, 13))
        results.append(params)
    assert largest_difference(*results) < 1e-12


def test_plans_of_chains_inside_last():
    params = make_params(SHAPES)
    router = m.Alternate([m.Adam(), m.LR(0.1)], m.Split(is_matrix, m.HeavyBall(), m.EMA()))
    optimizer = Modular(params, router, foreach=True)
    train(optimizer, params, range(4))
    plans = [
        segment._plan
        for r in (router, router.children["module_1"][0])
        for s in r._segments.values()
        for segment in s
        if hasattr(segment, "_plan")
    ]
    assert len(plans) == 3
    before = [run for plan in plans for run in plan]
    train(optimizer, params, range(4, 8))
    assert all(a is b for a, b in zip(before, [run for plan in plans for run in plan], strict=True))


@pytest.mark.parametrize("name", sorted(set(CHAINS) - {"masked", "freeze"}))
def test_pure_functions_agree_and_change_nothing(name):
    params = make_params(SHAPES)
    pure = [p.detach().clone() for p in params]
    train(Modular(params, *CHAINS[name](), foreach=False), params, range(7))
    transform = chain(*CHAINS[name]())
    state = transform.init(pure)
    own = make_params(SHAPES)
    for seed in range(7):
        set_gradients(own, seed)
        grads = [p.grad.clone() for p in own]
        before = copy.deepcopy((grads, state, pure))
        updates, new = transform.update(grads, state, pure)
        for a, b in zip(
            torch.utils._pytree.tree_leaves((grads, state, pure)), torch.utils._pytree.tree_leaves(before), strict=True
        ):
            assert torch.equal(a, b)
        state, pure = new, apply_updates(pure, updates)
    assert largest_difference(params, pure) < 1e-13


def test_freeze_as_pure_functions():
    params = {"a": torch.ones(2), "b": torch.ones(2, 2)}
    transform = chain(m.Freeze(is_matrix), m.Adam())
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates["b"].tolist() == [[0, 0], [0, 0]]
    assert updates["a"].tolist() == pytest.approx([1, 1])


def test_complex_parameters_are_asked_for_as_they_are():
    asked = []
    p = torch.zeros(3, dtype=torch.complex128, requires_grad=True)
    optimizer = Modular([p], m.Split(lambda q: asked.append(q) or False, m.Zeros(), m.Adam()))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert asked[0] is p


def test_modules_that_move_the_parameters_themselves():
    class Mover(Module):
        def step(self, var):
            for p in var.params:
                p.sub_(7.0)
            var.skip_update = True
            return var

    p, q = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    p.grad, q.grad = torch.ones(2, 2), torch.ones(2)
    Modular([p, q], m.Split(is_matrix, Mover(), m.Mul(3.0))).step()
    assert (p.unique().tolist(), q.unique().tolist()) == ([-7], [-3])


def test_options_of_groups_reach_the_chains():
    p, q = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    p.grad, q.grad = torch.ones(2, 2), torch.ones(2)
    optimizer = Modular(
        [{"params": [p], "value": 5.0}, {"params": [q]}], m.Split(is_matrix, m.Fill(1.0), m.Negate()), m.LR(2.0)
    )
    optimizer.step()
    assert (p.unique().tolist(), q.unique().tolist()) == ([-10], [2])


def test_repr_is_one_line():
    assert repr(m.Split(is_matrix, m.Abs(), m.Sign())) == "Split(is_matrix, true=[Abs()], false=[Sign()])"
    assert repr(m.Alternate(m.Abs(), m.Sign())) == "Alternate([Abs()], [Sign()], steps=[1, 1])"
    assert repr(m.Freeze(is_matrix)) == "Freeze(is_matrix)"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: m.Split(is_matrix), r"Split without a chain; write Split\(filter, true, false\)"),
        (lambda: m.Split("bias", m.Adam()), "Split: filter='bias'; expected a function such as"),
        (lambda: m.Freeze(3), "Freeze: filter=3; expected a function such as"),
        (lambda: m.Masked(is_matrix), r"Masked\(filter\) without modules"),
        (lambda: m.Alternate(m.Adam()), r"Alternate: 1 chains; write Alternate\(first, second, ...\)"),
        (lambda: m.Alternate(m.Adam(), m.Sign(), steps=0), "Alternate: steps=0; expected a whole number"),
        (lambda: m.Switch(m.Adam(), m.Sign(), steps=[1, 2]), r"Switch: steps=\[1, 2\]; expected a whole number"),
        (lambda: m.GradientAccumulation(m.Adam(), 0), "GradientAccumulation: n=0; expected a whole number"),
        (lambda: m.Split(is_matrix, m.Adam), "Adam is a class; write Adam"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(OptionError, match=text):
        make()


def test_names_that_are_missing():
    params = make_params([(4, 3)])
    set_gradients(params, 0)
    before = params[0].detach().clone()
    with pytest.raises(
        OptionError, match=r"module 1 of 2, Split: the filter takes the name .* shape \(4, 3\) has none"
    ):
        Modular(params, m.Split(lambda name, p: True, m.Adam()), m.LR(0.1)).step()
    assert torch.equal(params[0], before)
