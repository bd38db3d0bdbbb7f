"""What means nothing is refused: the text names the module, its place and the fix, and nothing has changed."""

import copy
import inspect
import itertools
import math
import re

import pytest
import torch
from torch import nn

from graphopt.annotations import SUM_GRAD_SQUARED
from graphopt.errors import (
    ClosureError,
    GraphoptError,
    MissingAnnotation,
    ModuleError,
    NonFiniteError,
    OptionError,
    UnsupportedError,
)
from graphopt.optim import Modular, Module, Rule, m
from tests.optim.training import make_params, set_gradients, snapshot, train

SHAPES = [(4, 3), (5,), ()]
WAYS = [{"foreach": False}, {"foreach": True}, {}]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


def chain():
    return m.ClipValue(2.0), m.Adam(), m.NormalizeByEMA(), m.WeightDecay(0.1), m.LR(0.05)


class Unchanged:
    """``with Unchanged(optimizer): ...``: parameters, state and options are afterwards what they were, bit for bit."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def look(self):
        optimizer = self.optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = [p.detach() for p in params]
        tensors += [v for p in params for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
        names = [sorted(optimizer.state.get(p, {})) for p in params]
        options = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
        return tensors, names, options

    def __enter__(self):
        tensors, names, options = self.look()
        self.before = [tensor.clone() for tensor in tensors], names, copy.deepcopy(options)

    def __exit__(self, *_):
        (old, *before), (new, *now) = self.before, self.look()
        assert before == now
        for a, b in zip(old, new, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------
# Hyper-parameters


def numeric_settings():
    """Each numeric hyper-parameter of each public module."""
    for name, cls in vars(m).items():
        if isinstance(cls, type) and issubclass(cls, Module):
            for setting in cls.bounds:
                yield pytest.param(cls, setting, id=f"{name}.{setting}")


def build(cls, **options):
    """An instance, with `LR` or a number for what has no default."""
    given = {**NEEDED.get(cls.__name__, {}), **options}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is not inspect.Parameter.empty or name in given:
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return cls(m.LR(0.5), m.LR(0.5), **given)
        given[name] = REQUIRED[name] if name in REQUIRED else 0.5 if name in cls.bounds else m.LR(0.5)
    return cls(**given)


# Arguments without a default that are neither numbers nor modules.
NEEDED = {name: {"min": -1.0, "max": 1.0} for name in ("Clip", "ClipModules")}
NEEDED["GridLineSearch"] = {"num": 4}
NEEDED["GaussianHomotopy"] = {"n_samples": 2}
NEEDED["MeZO"] = {"lr": 0.5}  # without it, the option of a group belongs to a module that follows
NEEDED |= {"NystromPCG": {"sketch_size": 2}, "NystromSketchAndSolve": {"rank": 2}}
REQUIRED = {"filter": lambda param: True, "update_above": True, "metric": "l2"}


def bad_values(bounds):
    """Just outside, beyond, and no numbers at all."""
    values = [math.nan, "much", True, torch.zeros(2)]
    if math.isfinite(bounds.low):
        values += [bounds.low - 1e-3] + [bounds.low] * (not bounds.includes_low)
    if math.isfinite(bounds.high):
        values += [bounds.high + 1e-3] + [bounds.high] * (not bounds.includes_high)
    if not bounds.includes_low:
        values.append(-math.inf)
    return values


@pytest.mark.parametrize(("cls", "name"), list(numeric_settings()))
def test_numbers_out_of_range(cls, name):
    """In the call, in a group, and for single parameters."""
    bounds = cls.bounds[name]
    for value in bad_values(bounds):
        text = re.escape(f"{name}={value!r}; expected a number in {bounds}")
        with pytest.raises(OptionError, match=rf"{cls.__name__}: {text}"):
            build(cls, **{name: value})
        params = make_params(SHAPES)
        module = build(cls)
        others = [] if module.must_be_last else [m.ClipValue(2.0), m.Adam()]
        optimizer = Modular(params[:1], module, *others)
        (entry,) = [entry for entry in optimizer._named if entry.module is module]
        key = entry.keys[name]
        text = re.escape(f"{entry.place}: {key}={value!r} in a parameter group; expected a number in {bounds}")
        with Unchanged(optimizer), pytest.raises(OptionError, match=text):
            optimizer.add_param_group({"params": params[1:], key: value})
        assert len(optimizer.param_groups) == 1
        text = re.escape(f"{entry.place}: {name}={value!r}; expected a number in {bounds}")
        with Unchanged(optimizer), pytest.raises(OptionError, match=text):
            module.set_param_groups([{"params": params[0], name: value}])
        assert not module.overridden


@pytest.mark.parametrize(("cls", "name"), list(numeric_settings()))
def test_numbers_at_the_ends_of_their_range(cls, name):
    bounds = cls.bounds[name]
    for end, is_in in ((bounds.low, bounds.includes_low), (bounds.high, bounds.includes_high)):
        if is_in:
            assert build(cls, **{name: end}).defaults[name] == end


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("betas", "no module has the option 'betas' of the parameter group; write 'beta1' and 'beta2'"),
        ("weight_decays", "write 'weight_decay'"),
        ("beta_1", "write 'beta1'"),
        ("max_iter", None),
        ("initial_lr", None),
        ("name", None),
    ],
)
def test_options_of_a_group_that_nobody_reads(option, text):
    """Those that are almost the name of one are mistakes; others may be notes of somebody else, as in torch."""
    params = make_params(SHAPES)
    optimizer = Modular(params[:1], chain())
    if text is None:
        optimizer.add_param_group({"params": params[1:], option: 0.5})
    else:
        with pytest.raises(OptionError, match=text):
            optimizer.add_param_group({"params": params[1:], option: 0.5})


def test_a_hyper_parameter_that_is_not_there():
    optimizer = Modular(make_params(SHAPES), chain())
    with pytest.raises(
        OptionError, match=r"module 2 of 5, Adam: no hyper-parameter 'beta3'; there are \['alpha', .*'beta1"
    ):
        optimizer.modules[1].set_param_groups([{"params": make_params(SHAPES), "beta3": 0.5}])


# ----------------------------------------------------------------------------------------------------------------------
# Chains

CHAINS = {
    "none": ((), "without modules; pass at least one, such as Modular(params, m.Adam(), m.LR(1e-3))"),
    "a class": ((m.Adam, m.LR(0.1)), "Modular(params, ...): Adam is a class; write Adam()"),
    "a class in a list": (([m.ClipValue()], [[m.LR]]), "LR is a class; write LR()"),
    "a number": (
        (m.Adam(), 0.1),
        "Modular(params, ...): 0.1 is not a module of graphopt.optim.m, nor a list of modules",
    ),
    "an optimizer": ((torch.optim.Adam,), "is not a module of graphopt.optim.m"),
}


@pytest.mark.parametrize(("modules", "text"), CHAINS.values(), ids=CHAINS)
def test_what_is_no_chain(modules, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        Modular(make_params(SHAPES), *modules)


class Own(Module):
    replaces_update = True

    def step(self, var):
        var.update = [torch.ones_like(p) for p in var.params]
        return var


def test_modules_that_contradict_each_other():
    text = (
        "module 3 of 4, Own makes an update of its own, so that module 2 of 4, Adam would be in vain; "
        "put Own first, and Adam behind it"
    )

    class Looks(Module):
        def step(self, var):
            return var

    with pytest.raises(OptionError, match=re.escape(text)):
        Modular(make_params(SHAPES), Looks(), m.Adam(), Own(), m.LR(0.1))
    Modular(make_params(SHAPES), Looks(), Own(), m.Adam(), m.LR(0.1))


def test_a_module_outside_of_any_optimizer():
    for use in (lambda module: module.state, lambda module: module.global_state, lambda module: module.reset()):
        with pytest.raises(
            ModuleError, match=r"Adam belongs to no optimizer yet; .*once it is in a Modular\(params, ...\)"
        ):
            use(m.Adam())


FLAGS = {
    "foreach and fused": ({"foreach": True, "fused": True}, "foreach=True and fused=True; choose one"),
    "differentiable and fused": (
        {"differentiable": True, "fused": True},
        "differentiable=True and fused=True; only single tensors can be differentiated through",
    ),
    "differentiable and foreach": ({"differentiable": True, "foreach": True}, "differentiable=True and foreach=True"),
    "capturable and fused": (
        {"capturable": True, "fused": True},
        "compiled kernels take their numbers from the host. Use foreach=True",
    ),
}


@pytest.mark.parametrize(("flags", "text"), FLAGS.values(), ids=FLAGS)
def test_flags_that_contradict_each_other(flags, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        Modular(make_params(SHAPES), *chain(), **flags)


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable", "differentiable", "maximize"])
def test_flags_of_a_group(flag):
    params = make_params(SHAPES)
    optimizer = Modular(params[:1], *chain())
    default = optimizer.defaults[flag]
    text = f"{flag}=True in a parameter group, but {default} in the optimizer; it is an option of the whole optimizer"
    with Unchanged(optimizer), pytest.raises(OptionError, match=text):
        optimizer.add_param_group({"params": params[1:], flag: True})
    optimizer.add_param_group({"params": params[1:], flag: default})


def test_maximize_of_one_group_set_by_hand():
    params = make_params(SHAPES)
    optimizer = Modular([{"params": params[:1]}, {"params": params[1:]}], *chain())
    optimizer.param_groups[1]["maximize"] = True
    set_gradients(params, 0)
    with (
        Unchanged(optimizer),
        pytest.raises(OptionError, match=r"maximize differs.*two optimizers, one of them with maximize"),
    ):
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------------------
# Steps


class Search(Module):
    needs_closure = True

    def step(self, var):
        var.get_loss()
        return var


def test_a_closure_that_is_missing():
    params = make_params(SHAPES)
    optimizer = Modular(params, m.LR(0.1), Search())
    set_gradients(params, 0)
    text = r"module 2 of 2, Search evaluates the loss, so step\(\) needs a closure; write optimizer.step\(closure\) with def cl"
    with Unchanged(optimizer), pytest.raises(ClosureError, match=text):
        optimizer.step()
    inside = Modular(params, Nested([Search()]))
    with Unchanged(inside), pytest.raises(ClosureError, match=r"module 1 of 1 in inner= of Nested, Search evaluates"):
        inside.step()


class Nested(Module):
    def __init__(self, inner):
        super().__init__({}, inner=inner)


def test_maximize_with_a_closure():
    optimizer = Modular(make_params(SHAPES), Search(), maximize=True)
    with pytest.raises(OptionError, match="return the negative loss from it instead"):
        optimizer.step(lambda backward=True: torch.zeros(()))


@every_way
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("check", [None, True])
def test_gradients_that_are_not_finite(check, value, way):
    """Of the first step and of a later one."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = Modular(model, *chain(), error_if_nonfinite=check, **way)
    params = list(model.parameters())
    for seed in range(2):
        set_gradients(params, seed)
        params[3].grad[0] = value
        text = r"module 1 of 5, ClipValue: the gradient of parameter '1.bias', shape \(1,\) holds NaN or infinities; nothing"
        with Unchanged(optimizer), pytest.raises(NonFiniteError, match=text):
            optimizer.step()
        train(optimizer, params, [seed])


@every_way
def test_gradients_that_are_not_finite_pass_as_in_torch(way):
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizers = Modular(params, m.Adam(), m.LR(0.1), error_if_nonfinite=False, **way), torch.optim.Adam(others, 0.1)
    for own, optimizer in zip((params, others), optimizers, strict=True):
        set_gradients(own, 0)
        own[1].grad[0] = math.nan
        optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


def test_a_large_model_is_not_read_twice_unasked():
    """Without the option, only small ones on a CPU are looked through."""
    (p,) = [nn.Parameter(torch.zeros(2**20 + 1))]
    optimizer = Modular([p], m.LR(0.1), foreach=False)
    p.grad = torch.zeros_like(p)
    p.grad[7] = math.nan
    optimizer.step()
    assert p[7].isnan()
    optimizer.error_if_nonfinite = True
    with pytest.raises(NonFiniteError):
        optimizer.step()


def test_finite_gradients_whose_sum_is_not():
    params = make_params([(2,), (2,)], torch.float32)
    optimizer = Modular(params, *chain(), foreach=False)
    for p in params:
        p.grad = torch.full((2,), 3e38)
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_sparse_gradients(dtype):
    params = [nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(4, 2, dtype=dtype))]
    optimizer = Modular([{"params": params[:1]}, {"params": params[1:]}], *chain())
    params[0].grad = torch.ones(4, 2)
    params[1].grad = torch.ones(4, 2, dtype=dtype).to_sparse()
    text = (
        r"parameter 0 of group 1, shape \(4, 2\): its gradient is sparse \(torch.sparse_coo\), which no module reads. "
        r"Build the embedding with sparse=False, or give this parameter to torch.optim.SparseAdam"
    )
    with Unchanged(optimizer), pytest.raises(UnsupportedError, match=text):
        optimizer.step()


class Statistic(Rule):
    reads = (SUM_GRAD_SQUARED,)

    def update(self, update, state, settings, context):
        return update / (context.read(SUM_GRAD_SQUARED).sqrt() + 1), state


@every_way
def test_a_missing_annotation_names_the_pass(way):
    """And the parameters, with the place of the module that reads it."""
    model = nn.Linear(3, 2).double()
    params = list(model.parameters())
    optimizer = Modular(model, m.ClipValue(), Statistic(), m.LR(0.1), **way)
    set_gradients(params, 0)
    optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.zero_grad()
    set_gradients(params[:1], 0)
    params[1].grad = torch.ones_like(params[1])
    text = (
        r"module 2 of 3, Statistic needs sum_grad_squared of its parameters, but 1 of 2 with a gradient have none: "
        r"parameter 'bias', shape \(2,\)\.\nIt is provided by .*TrueGrad.*Nothing was changed\.\nCall graphopt.transform\(model\)"
    )
    with Unchanged(optimizer), pytest.raises(MissingAnnotation, match=text):
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------------------
# States


def saved(params, *modules):
    optimizer = Modular(params, *modules)
    train(optimizer, [p for group in optimizer.param_groups for p in group["params"]], range(2))
    return optimizer.state_dict()


def of_torch():
    params = make_params(SHAPES)
    optimizer = torch.optim.AdamW(params)
    train(optimizer, params)
    return optimizer.state_dict()


def without(state_dict, name):
    for state in state_dict["state"].values():
        del state[name]
    return state_dict


STATES = {
    "another chain": (
        lambda: saved(make_params(SHAPES), m.ClipValue(), m.WeightDecay(), m.LR()),
        r"saved by the chain \[clipvalue,weightdecay,lr\], but this optimizer is \[clipvalue,adam,.*\]; they differ at module 2: "
        r"weightdecay there, adam here. Build the same chain, then load; nothing was changed",
    ),
    "a longer chain": (
        lambda: saved(make_params(SHAPES), *chain(), m.ClipValue()),
        r"differ at module 6: clipvalue_2 there, none here",
    ),
    "a shorter chain": (
        lambda: saved(make_params(SHAPES), *chain()[:-1]),
        r"differ at module 5: none there, lr here",
    ),
    "torch's AdamW": (
        of_torch,
        r"was not saved by Modular: no group names its modules.*Load it into an optimizer of the class that saved it; nothing",
    ),
    "other shapes": (
        lambda: saved(make_params([(4, 3), (6,), ()]), *chain()),
        r"of another model: module 2 of 5, Adam expects exp_avg of shape \(5,\) for parameter 1 of group 0, shape \(5,\), and "
        r"found shape \(6,\). Load it into the model that it was saved with; nothing was changed",
    ),
    "another number of parameters": (
        lambda: saved(make_params(SHAPES[:2]), *chain()),
        r"of another model: its groups hold \[2\] parameters, those of this optimizer \[3\]. Give the optimizer the same",
    ),
    "other groups": (
        lambda: saved([{"params": make_params(SHAPES[:1])}, {"params": make_params(SHAPES[1:])}], *chain()),
        r"groups hold \[1, 2\] parameters, those of this optimizer \[3\]",
    ),
    "a part of the state": (
        lambda: without(saved(make_params(SHAPES), *chain()), "adam.exp_avg_sq"),
        r"Adam expects exp_avg_sq of shape \(4, 3\) for parameter 0 of group 0, shape \(4, 3\), and found nothing",
    ),
}


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize(("state_dict", "text"), STATES.values(), ids=STATES)
def test_states_of_others(state_dict, text, num_steps):
    params = make_params(SHAPES)
    optimizer = Modular(params, *chain())
    train(optimizer, params, range(num_steps))
    with Unchanged(optimizer), pytest.raises(ModuleError, match=text):
        optimizer.load_state_dict(state_dict())
    before = snapshot(params)
    train(optimizer, params, [5])
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("given", [{}, {"model": {}, "optimizer": {}}])
def test_what_is_no_state(given):
    optimizer = Modular(make_params(SHAPES), chain())
    text = rf"was given a dictionary with {re.escape(str(sorted(given)))}, .*'state' and 'param_groups'; pass that entry of the"
    with Unchanged(optimizer), pytest.raises(ModuleError, match=text):
        optimizer.load_state_dict(given)


def test_a_state_of_another_order_of_modules():
    params = make_params(SHAPES)
    optimizer = Modular(params, m.WeightDecay(), m.Adam(), m.LR())
    with pytest.raises(ModuleError, match="differ at module 1: adam there, weightdecay here"):
        optimizer.load_state_dict(saved(params, m.Adam(), m.WeightDecay(), m.LR()))


def test_every_error_is_ours():
    """Each is both a GraphoptError and the built-in that fits."""
    for error, builtin in {
        OptionError: ValueError,
        ModuleError: RuntimeError,
        ClosureError: RuntimeError,
        NonFiniteError: FloatingPointError,
        UnsupportedError: NotImplementedError,
        MissingAnnotation: LookupError,
    }.items():
        assert issubclass(error, (GraphoptError, builtin)), error
        assert issubclass(error, GraphoptError), error


def test_the_order_of_two_modules_is_free():
    """No order of modules without a closure is refused."""
    for order in itertools.permutations(range(3)):
        params = make_params(SHAPES)
        modules = [m.ClipValue(), m.Adam(), m.WeightDecay()]
        train(Modular(params, *[modules[index] for index in order]), params, [0])


def test_modules_of_an_optimizer_that_was_refused_are_free():
    params, modules = make_params(SHAPES), chain()
    with pytest.raises(OptionError):
        Modular([{"params": params, "lr": -1.0}], *modules)
    with pytest.raises(TypeError):
        Modular([1, 2], *modules)
    Modular(params, *modules)


@pytest.mark.parametrize("make", [m.ASGD, m.Prodigy, m.ScheduleFree, lambda: m.MeZO(lr=0.1)])
def test_what_must_be_last_is_followed_by_nothing(make):
    with pytest.raises(OptionError, match=r"module 1 of 2, \w+ must be the last one.*LR behind it"):
        Modular(make_params(SHAPES), make(), m.LR(0.1))
    Modular(make_params(SHAPES), make())
