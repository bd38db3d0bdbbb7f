"""`learn_init` against the algorithm as the paper has it, written once more in plain PyTorch; and what it leaves as it was."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import graphopt
from graphopt.errors import InitError, MixedPrecisionInit, OptionError
from graphopt.initialization.rescale_adam import RescaleAdam


class Net(nn.Module):
    """Tied and frozen weights, zero biases, running statistics, dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.tied = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.norm, self.drop, self.last = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        nn.init.zeros_(self.last.bias)

    def forward(self, x):
        x = self.frozen(self.tied(self.first(x).tanh()).tanh())
        return self.last(self.drop(self.norm(x)))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.up = nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(4, 3, 2, bias=False)
        self.norm, self.drop, self.last = nn.BatchNorm2d(3), nn.Dropout2d(0.5), nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        x = self.drop(self.norm(self.up(F.gelu(self.first(x)))))
        return self.last(self.gain * x.tanh().mean((2, 3)))


def net(kind=Net):
    torch.manual_seed(0)
    return kind().double()


def batches(num=60, rows=8, shape=(6,)):
    torch.manual_seed(1)
    return [(torch.randn(rows, *shape, dtype=torch.float64), torch.randint(0, 3, (rows,))) for _ in range(num)]


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


# --- the oracle ---------------------------------------------------------------------------------------------------------------


def oracle(
    data, optimizer, steps, eta, gamma, lr, *, normalize=True, overlap="halves", accumulate=1, log=False, kind=Net
):
    """Scales and one row for each iteration, from nothing but autograd and arithmetic on Python's numbers."""
    model = net(kind).eval()
    model.norm.train()
    model.norm.track_running_stats = False
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    scales = dict.fromkeys(weights, 1.0)
    beta1, beta2, clip, eps = {"adam": (0.9, 0.98, math.inf, 1e-8), "sgd": (0.9, 0.999, 1.0, 1e-8)}[optimizer]
    moments = {n: {False: 0.0, True: 0.0} for n in weights}
    squares, counts = dict.fromkeys(weights, 0.0), {False: 0, True: 0}
    stream = iter(data)

    def mean_loss(values, parts):
        return sum(F.cross_entropy(functional_call(model, values, (x,), tie_weights=True), y) for x, y in parts) / len(
            parts
        )

    def join(one, other):
        return tuple(torch.cat(pair) for pair in zip(one, other, strict=True))

    rows = []
    for _ in range(steps):
        drawn = [next(stream) for _ in range(accumulate)]
        if overlap == "thirds":
            thirds = [
                [tuple(t[len(t) * k // 3 : len(t) * (k + 1) // 3] for t in batch) for k in range(3)] for batch in drawn
            ]
            batch, ahead = [join(a, b) for a, b, _ in thirds], [join(b, c) for _, b, c in thirds]
        else:
            batch, ahead = drawn, None
        leaves = {n: torch.tensor(s, dtype=torch.float64, requires_grad=True) for n, s in scales.items()}
        values = {n: leaves[n] * w for n, w in weights.items()}
        loss = mean_loss(values, batch)
        grads = dict(zip(values, torch.autograd.grad(loss, list(values.values()), create_graph=True), strict=True))
        flat = torch.cat([g.flatten() for g in grads.values()])
        norm = flat.abs().sum() if optimizer == "adam" else flat.square().sum().sqrt()
        constraint, after = norm.item() > gamma, None
        if constraint:
            objective = norm
        else:
            if ahead is None and overlap == "none":
                ahead = [next(stream) for _ in range(accumulate)]
            elif ahead is None and accumulate > 1:
                ahead = batch[: accumulate // 2] + [next(stream) for _ in range(accumulate // 2)]
            elif ahead is None:
                fresh = next(stream)
                ahead = [join([t[: len(t) // 2] for t in batch[0]], [t[len(t) // 2 :] for t in fresh])]
            step = {
                n: g.detach().sign() if optimizer == "adam" else g.detach() / (norm.item() if normalize else 1)
                for n, g in grads.items()
            }
            after = mean_loss({n: v - eta * step[n] for n, v in values.items()}, ahead)
            objective = after / eta
        slopes = dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))
        counts[constraint] += 1
        for n, w in weights.items():
            if not w.any():
                continue
            g = slopes[n].item() * scales[n] if log else max(-clip, min(clip, slopes[n].item()))
            moments[n][constraint] = beta1 * moments[n][constraint] + (1 - beta1) * g
            squares[n] = beta2 * squares[n] + (1 - beta2) * g * g
            root = math.sqrt(squares[n] / (1 - beta2 ** sum(counts.values())))
            change = lr * moments[n][constraint] / (1 - beta1 ** counts[constraint]) / (root + (1e-30 if log else eps))
            moved = scales[n] * math.exp(-change) if log else scales[n] - change
            scales[n] = max(moved, 0.0 if n.endswith("bias") else 0.01)
        rows.append((loss.item(), norm.item(), constraint, None if after is None else after.item()))
    return scales, rows


CASES = {
    "adam, constraint": {"optimizer": "adam", "gamma": 0.0},
    "adam, look-ahead": {"optimizer": "adam", "gamma": 1e9},
    "adam, both": {"optimizer": "adam", "gamma": 9.0},
    "sgd, constraint": {"optimizer": "sgd", "gamma": 0.0},
    "sgd, both": {"optimizer": "sgd", "gamma": 0.9},
    "sgd, plain step": {"optimizer": "sgd", "gamma": 1e9, "normalize_grad": False},
    "log space": {"optimizer": "sgd", "gamma": 0.9, "space": "log"},
    "thirds": {"optimizer": "adam", "gamma": 9.0, "overlap": "thirds"},
    "no overlap": {"optimizer": "sgd", "gamma": 0.9, "overlap": "none"},
    "accumulated": {"optimizer": "adam", "gamma": 9.0, "accumulate": 2},
    "accumulated, sgd": {"optimizer": "sgd", "gamma": 0.5, "accumulate": 4},
}
COMPILED = {"adam, both", "sgd, both", "accumulated"}
STEPS, LR, ETA = 8, 0.03, 0.05


@pytest.mark.parametrize(
    ("name", "compiler"), [*((name, "eager") for name in CASES), *((name, "aot_eager") for name in sorted(COMPILED))]
)
def test_as_the_paper_has_it(name, compiler):
    options = CASES[name]
    model = net()
    result = graphopt.learn_init(
        model, loss_fn, batches(), eta=ETA, lr=LR, steps=STEPS, compiler=compiler, progress=False, **options
    )
    names = {"normalize_grad": "normalize", "overlap": "overlap", "accumulate": "accumulate"}
    given = {names[key]: value for key, value in options.items() if key in names}
    scales, rows = oracle(
        batches(), options["optimizer"], STEPS, ETA, options["gamma"], LR, log=options.get("space") == "log", **given
    )
    assert result.scales == pytest.approx(scales, rel=1e-9)
    found = [(step.loss, step.grad_norm, step.is_constraint, step.lookahead_loss) for step in result.trajectory]
    assert [row[2] for row in found] == [row[2] for row in rows]
    if name.endswith("both"):
        assert 0 < sum(row[2] for row in rows) < STEPS
    for step, row in zip(found, rows, strict=True):
        assert step[:2] == pytest.approx(row[:2], rel=1e-9)
        assert (step[3] is None) == (row[3] is None)
        assert step[3] is None or step[3] == pytest.approx(row[3], rel=1e-9)
    for param, (n, w) in zip(model.parameters(), net().named_parameters(), strict=True):
        torch.testing.assert_close(param.detach(), w.detach() * result.scales.get(n, 1.0), rtol=1e-12, atol=0)
    assert set(result.scales) == {n for n, p in net().named_parameters() if p.requires_grad}
    assert result.left_alone == {"norm.bias": "all zero", "last.bias": "all zero"}


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_convolutions(compiler):
    data, model = batches(shape=(2, 4, 4)), net(Images)
    options = {"optimizer": "adam", "gamma": 3.0, "eta": ETA, "lr": LR, "steps": STEPS}
    result = graphopt.learn_init(model, loss_fn, data, compiler=compiler, progress=False, **options)
    scales, rows = oracle(data, kind=Images, **options)
    assert result.scales == pytest.approx(scales, rel=1e-9)
    assert 0 < result.num_constraint_steps == sum(row[2] for row in rows) < STEPS
    assert [step.loss for step in result.trajectory] == pytest.approx([row[0] for row in rows], rel=1e-9)


@pytest.mark.slow
def test_inductor():
    data = batches()
    found = graphopt.learn_init(net(), loss_fn, data, gamma=9.0, eta=ETA, lr=LR, steps=4, progress=False)
    scales, _ = oracle(data, "adam", 4, ETA, 9.0, LR)
    assert found.scales == pytest.approx(scales, rel=1e-7)


def test_one_moment_is_that_of_adam():
    leaf = nn.Parameter(torch.rand(5, dtype=torch.float64) + 0.5)
    adam = torch.optim.Adam([leaf], lr=0.01)
    ours = RescaleAdam(leaf.detach(), torch.ones(5, dtype=torch.bool), lr=0.01, min_scale=torch.zeros(5))
    for _ in range(20):
        leaf.grad = torch.randn(5, dtype=torch.float64)
        ours.step(leaf.grad, is_constraint=False)
        adam.step()
        torch.testing.assert_close(ours.scales, leaf.detach(), rtol=1e-12, atol=0)


def test_bounds_of_scales():
    ours = RescaleAdam(
        torch.ones(3),
        torch.tensor([True, True, False]),
        lr=1.0,
        min_scale=torch.tensor([0.01, 0.0, 0.0]),
        max_scale=1.5,
    )
    ours.step(torch.ones(3), is_constraint=True)
    torch.testing.assert_close(ours.scales, torch.tensor([0.01, 0.0, 1.0], dtype=torch.float64))
    for _ in range(3):
        ours.step(-torch.ones(3), is_constraint=False)
    assert ours.scales.tolist() == [1.5, 1.5, 1.0]


def deep(num_layers, width=16):
    torch.manual_seed(0)
    layers = [nn.Linear(64 if k == 0 else width, width) for k in range(num_layers)]
    return nn.Sequential(*itertools.chain(*((layer, nn.ReLU()) for layer in layers)), nn.Linear(width, 10))


def digits(num=40):
    torch.manual_seed(2)
    return [(torch.randn(32, 64), torch.randint(0, 10, (32,))) for _ in range(num)]


def test_the_loss_after_a_step_becomes_smaller():
    def after_a_step(model):
        losses = []
        for batch in digits(8):
            trained = copy.deepcopy(model)
            loss = loss_fn(trained, batch)
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in trained.parameters()]).norm()
            with torch.no_grad():
                for p in trained.parameters():
                    p.sub_(0.1 * p.grad / norm)
            losses.append(loss_fn(trained, batch).item())
        return sum(losses)

    model = deep(10)
    before = after_a_step(model)
    graphopt.learn_init(model, loss_fn, digits(), optimizer="sgd", steps=50, compiler="eager", progress=False)
    assert after_a_step(model) < before - 0.01


def test_he_start():
    torch.manual_seed(0)
    model = nn.ModuleList(
        [nn.Linear(8, 6), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), Conv1D(6, 8), nn.Embedding(5, 8)]
    )
    fan_ins = [8, 2 * 9, 4 * 9, 8, None]
    before = model[4].weight.detach().clone()

    def touch(model, batch):
        return sum((p * (batch.mean() + 1)).square().sum() for m in model for p in m.parameters(recurse=False))

    def loss(model, batch):
        parts = [model[0].weight, model[1].weight, model[2].weight, model[3].weight, model[4].weight]
        return sum(p.square().sum() for p in parts) * batch.mean()

    graphopt.learn_init(model, loss, [torch.ones(4)], start="he", lr=0.0, steps=1, compiler="eager", progress=False)
    for module, fan_in in zip(model, fan_ins, strict=True):
        if fan_in is not None:
            assert module.weight.detach().square().mean().sqrt().item() == pytest.approx(
                math.sqrt(2 / fan_in), rel=1e-5
            )
    assert torch.equal(model[4].weight, before)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state_of(model):
    parts = [
        (
            n,
            id(p),
            (p.requires_grad, p.data_ptr(), p.grad, p._post_accumulate_grad_hooks),
            p._version,
            p.detach().clone(),
        )
        for n, p in model.named_parameters(remove_duplicate=False)
    ]
    return (
        parts,
        [b.clone() for b in model.buffers()],
        [
            (
                type(m),
                m.training,
                getattr(m, "track_running_stats", None),
                set(vars(m)),
                [len(vars(m)[h]) for h in HOOKS],
            )
            for m in model.modules()
        ],
    )


def assert_same_state(model, before):
    after = state_of(model)
    for (*found, value), (*expected, former) in zip(after[0], before[0], strict=True):
        assert found == expected
        assert torch.equal(value, former), found[0]
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1], strict=True))
    assert after[2] == before[2]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_all_but_the_values_stays(compiler):
    model = net()
    model.drop.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches()
    loss_fn(model, data[0]).backward()
    (parts, buffers, modules), generator = state_of(model), torch.get_rng_state()
    graphopt.learn_init(model, loss_fn, data, lr=LR, steps=2, gamma=0.0, compiler=compiler, progress=False)
    assert torch.equal(torch.get_rng_state(), generator)
    after = state_of(model)
    assert [part[:3] for part in after[0]] == [part[:3] for part in parts]
    assert all(torch.equal(a, b) for a, b in zip(after[1], buffers, strict=True))
    assert after[2] == modules
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert not vars(model).keys() & {"_graphopt", "_graphopt_scales"}
    assert model.first.weight.init_scale.item() != 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_after_an_exception_the_model_is_as_it_was(compiler, error):
    model = graphopt.transform(net(), compiler="aot_eager") if compiler == "aot_eager" else net()
    before, calls = state_of(model), itertools.count()

    def failing(model, batch):
        if next(calls) == 12:  # in the middle of the iterations, with other values in the parameters
            raise error
        return loss_fn(model, batch)

    with pytest.raises(error):
        graphopt.learn_init(model, failing, batches(), lr=LR, steps=9, gamma=1e9, progress=False, compiler=compiler)
    assert_same_state(model, before)
    if compiler == "aot_eager":
        loss_fn(model, batches(1)[0]).backward()
        assert model.first.weight.sum_grad_squared.shape == (6, 6)


def test_a_transformed_model_stays_transformed():
    model = graphopt.transform(net(), compiler="aot_eager")
    result = graphopt.learn_init(model, loss_fn, batches(), lr=LR, eta=ETA, steps=STEPS, gamma=9.0, progress=False)
    scales, _ = oracle(batches(), "adam", STEPS, ETA, 9.0, LR)
    assert result.scales == pytest.approx(scales, rel=1e-9)
    loss_fn(model, batches(1)[0]).backward()
    assert model.first.weight.sum_grad_squared.shape == (6, 6)
    with pytest.raises(OptionError, match="transformed with compiler='aot_eager'"):
        graphopt.learn_init(model, loss_fn, batches(), compiler="inductor")


def test_batches_that_end():
    model = net()
    before = state_of(model)
    with pytest.raises(OptionError, match=r"batches ended after 6\. The model was not changed.*a list, a DataLoader"):
        graphopt.learn_init(model, loss_fn, iter(batches(6)), steps=9, gamma=1e9, compiler="eager", progress=False)
    assert_same_state(model, before)
    graphopt.learn_init(model, loss_fn, batches(6), steps=9, gamma=1e9, compiler="eager", progress=False)


@pytest.mark.parametrize("at", [7, 9])
def test_the_last_step_may_not_end_in_nan(at):
    """Of two iterations with four losses between them, the losses after a step are numbers 7 and 9."""
    model, calls = net(), itertools.count(1)
    before = state_of(model)
    with pytest.raises(
        InitError, match=rf"iteration {at - 7 >> 1}: the loss after a step.*, nan, .*first\.weight.*Lower eta"
    ):
        graphopt.learn_init(
            model,
            lambda model, batch: loss_fn(model, batch) * (math.nan if next(calls) == at else 1),
            batches(),
            steps=2,
            gamma=1e9,
            compiler="eager",
            progress=False,
        )
    assert_same_state(model, before)


def test_second_derivatives_that_are_not_finite():
    def bent(model, batch):
        loss = loss_fn(model, batch)
        return loss + (loss - loss.detach()).abs().pow(1.5)

    model = net()
    before = state_of(model)
    with pytest.raises(
        InitError, match=r"iteration 0: the norm of the gradient has no finite derivative.*A larger gamma"
    ):
        graphopt.learn_init(model, bent, batches(), steps=1, gamma=0.0, compiler="eager", progress=False)
    assert_same_state(model, before)


def test_a_start_that_moves_what_has_no_gradient():
    model = net()
    model.add_module("unused", nn.Linear(6, 6).double())
    options = {"steps": 1, "compiler": "eager", "progress": False}
    result = graphopt.learn_init(copy.deepcopy(model), loss_fn, batches(), **options)
    unused = dict.fromkeys(["unused.weight", "unused.bias"], "no gradient reaches it")
    assert unused.items() <= result.left_alone.items()
    result = graphopt.learn_init(model, loss_fn, batches(), start="he", **options)
    assert result.scales["unused.weight"] != 1
    assert "unused.weight" not in result.left_alone


def test_gradients_that_underflow_are_named():
    model = deep(60)
    before = state_of(model)
    with pytest.raises(InitError, match=r"gradients underflow.*0\.weight.*start='he'.*space='log'"):
        graphopt.learn_init(model, loss_fn, digits(), optimizer="sgd", compiler="eager")
    assert_same_state(model, before)
    options = {"optimizer": "sgd", "steps": 3, "compiler": "eager", "progress": False}
    graphopt.learn_init(deep(60), loss_fn, digits(), start="he", **options)
    result = graphopt.learn_init(deep(30), loss_fn, digits(), space="log", lr=0.1, **options)
    assert result.scales["0.weight"] != 1


def test_branches_that_start_as_nothing_are_not_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
            nn.init.zeros_(self.outer.weight)

        def forward(self, x):
            return x + self.outer(self.inner(x).relu())

    torch.manual_seed(0)
    model = nn.Sequential(Branch(), nn.Linear(6, 3)).double()
    result = graphopt.learn_init(model, loss_fn, batches(), steps=2, compiler="eager", progress=False)
    assert result.left_alone["0.outer.weight"] == "all zero"


def scaled_by(factor):
    return lambda model, batch: loss_fn(model, batch) * factor


REFUSED = {
    "method": ({"method": "magic"}, "method='magic'"),
    "optimizer": ({"optimizer": "lion"}, "optimizer='lion'"),
    "start": ({"start": "xavier"}, "start='xavier'"),
    "space": ({"space": "cube"}, "space='cube'"),
    "overlap": ({"overlap": "all"}, "overlap='all'"),
    "eta": ({"eta": -1.0}, "eta=-1.0"),
    "no eta": ({"eta": 0}, "eta=0.*divided by the length"),
    "a word": ({"eta": "small"}, "eta='small'.*it is a number"),
    "gamma": ({"gamma": math.nan}, "gamma=nan"),
    "lr": ({"lr": -0.1}, "lr=-0.1"),
    "clip": ({"clip": -1}, "clip=-1"),
    "min_scale": ({"min_scale": -0.01}, "min_scale=-0.01"),
    "max_scale": ({"max_scale": -1.0}, "max_scale=-1.0"),
    "bounds": ({"min_scale": 2.0, "max_scale": 1.0}, "min_scale=2.0, max_scale=1.0.*no scale lies between"),
    "steps": ({"steps": 0}, "steps=0"),
    "half a step": ({"steps": 1.5}, "steps=1.5.*it is an int"),
    "yes": ({"accumulate": True}, "accumulate=True"),
    "accumulate": ({"accumulate": 3}, "their number is even"),
    "compiler": ({"compiler": "tvm"}, "compiler='tvm' is unknown"),
    "of another method": (
        {"method": "metainit", "gamma": 1.0},
        r"gamma=1\.0, method='metainit'\): the option has no effect there",
    ),
    "of another method still": (
        {"method": "lsuv", "steps": 3},
        r"steps=3, method='lsuv'\): the option has no effect there",
    ),
    "clip in log space": ({"space": "log", "clip": 1.0}, r"clip=1\.0, space='log'\): the option has no effect there"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_mean_nothing(name):
    options, text = REFUSED[name]
    with pytest.raises(OptionError, match=text):
        graphopt.learn_init(net(), loss_fn, batches(), **options)


MODELS = {
    "a function": (torch.tanh, "for a torch.nn.Module, not for "),
    "no parameter": (nn.Tanh(), "Tanh has no trainable parameter"),
    "compiled": (torch.compile(nn.Linear(1, 1)), "torch.compile's modules are differentiable once"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_models_that_have_no_scales(name, compiler):
    model, text = MODELS[name]
    with pytest.raises(OptionError, match=text):
        graphopt.learn_init(model, loss_fn, batches(), compiler=compiler)


LOSSES = {
    "nan": (scaled_by(math.nan), InitError, "the loss is nan before anything is learned"),
    "infinite": (
        lambda m, b: loss_fn(m, b) + m(b[0]).mul(0).abs().sqrt().sum(),
        InitError,
        r"the gradient is not finite in first\.weight.*start='he'",
    ),
    "vector": (lambda m, b: m(b[0]), OptionError, r"returned a tensor of shape \(8, 3\)"),
    "output": (lambda m, b: [loss_fn(m, b)], OptionError, "returned list; it returns a scalar loss"),
    "no_grad": (torch.no_grad()(loss_fn), OptionError, "has no gradient"),
    "not a function": (3, OptionError, "loss_fn is int"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_mean_nothing(name):
    function, error, text = LOSSES[name]
    model = net()
    before = state_of(model)
    with pytest.raises(error, match=text):
        graphopt.learn_init(model, function, batches(), steps=2, compiler="eager", progress=False)
    assert_same_state(model, before)


def test_autocast_warns():
    def half(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch[0].float())
        return F.cross_entropy(output.float(), batch[1])

    with pytest.warns(MixedPrecisionInit, match="works worse in mixed precision"):
        graphopt.learn_init(net().float(), half, batches(), steps=2, gamma=0.0, compiler="eager", progress=False)


@pytest.mark.filterwarnings("ignore::graphopt.errors.MixedPrecisionInit")
def test_autocast_around_everything():
    """Casts of weights are kept as long as autocast is on, and each loss is that of other weights."""

    def loss(model, batch):
        return loss_fn(model, (batch[0].float(), batch[1]))

    def inside(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    options = {"steps": 4, "gamma": 1e9, "lr": LR, "compiler": "eager", "progress": False}
    expected = graphopt.learn_init(net().float(), inside, batches(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = graphopt.learn_init(net().float(), loss, batches(), **options)
    assert found.scales == expected.scales
    assert [step.lookahead_loss for step in found.trajectory] == [s.lookahead_loss for s in expected.trajectory]


@pytest.mark.parametrize(("method", "shown"), [("gradinit", "/3"), ("metainit", "/3"), ("lsuv", "0it")])
def test_progress(capsys, method, shown):
    steps = None if method == "lsuv" else 3
    graphopt.learn_init(net(), loss_fn, batches(), steps=steps, method=method, compiler="eager")
    found = capsys.readouterr().err
    assert method in found
    assert shown in found


@pytest.mark.parametrize("method", ["gradinit", "metainit", "lsuv"])
def test_a_picture_of_each_method(method, tmp_path):
    steps = None if method == "lsuv" else 3
    result = graphopt.learn_init(
        net(), loss_fn, batches(), method=method, steps=steps, compiler="eager", progress=False
    )
    assert result.plot(tmp_path / "init.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in result.plot(tmp_path / "init.svg").read_text()[:2000]
    assert repr(result).startswith(f"InitResult({method}, {len(result.trajectory)} steps, ")
    assert len(repr(result)) < 120
    assert result.seconds > 0
    assert result.num_constraint_steps == 0
    assert set(result.before) == set(result.after) == set(result.scales)
    assert all(row.weight_norm > 0 for name, row in result.after.items() if not name.endswith("bias"))
    weight = net().first.weight.detach()
    assert result.before["first.weight"].weight_norm == pytest.approx(weight.norm().item())
