"""``torch.compile(model, backend="graphopt")`` is the same road as `transform`."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.errors import OptionError, UnsupportedError
from graphopt.passes import TrueGrad


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(*shape):
    return torch.randn(*(shape or (5, 3)), dtype=torch.float64)


def loss(model, x):
    return model(x).square().sum()


def compiled(model, dynamic=None, fullgraph=False, **options):
    return torch.compile(
        model, backend="graphopt", dynamic=dynamic, fullgraph=fullgraph, options={"compiler": "aot_eager", **options}
    )


def test_entry_point_needs_no_import():
    script = "import sys, torch; print('graphopt' in torch.compiler.list_backends(), 'graphopt' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_statistics(dynamic, assert_exact):
    model = mlp()
    call = compiled(model, dynamic)
    for shape in ((5, 3), (3, 3), (4, 5, 3), (4, 4, 3), (1, 3)):
        x = data(*shape)
        model.zero_grad()
        torch.testing.assert_close(call(x), model(x))
        loss(call, x).backward()
        assert_exact(model, loss, x)
    assert graphopt.records(model)


def test_fullgraph_has_no_break(assert_exact):
    model, x = mlp(), data()
    loss(compiled(model, fullgraph=True), x).backward()
    assert_exact(model, loss, x)


def test_compiled_in_place(assert_exact):
    model, x = mlp(), data()
    model.compile(backend="graphopt", options={"compiler": "aot_eager"})
    wrapped = torch.compile(lambda x: model(x), backend="graphopt", options={"compiler": "aot_eager"})
    loss(wrapped, x).backward()
    assert_exact(model, loss, x)


def test_passes_by_name_and_object(assert_exact):
    for passes in (["truegrad"], [TrueGrad()], [TrueGrad(where="*weight")], []):
        torch._dynamo.reset()
        model, x = mlp(), data()
        loss(compiled(model, passes=passes), x).backward()
        assert (find(model[0].weight, SUM_GRAD_SQUARED) is not None) == bool(passes)


def test_loss_inside(assert_exact):
    model, x = mlp(), data()

    @torch.compile(backend="graphopt", options={"compiler": "aot_eager"})
    def step(x):
        return model(x).square().sum(-1)

    step(x).sum().backward()
    assert_exact(model, loss, x)


def test_unknown_option():
    with pytest.raises(Exception, match=r"unknown options \['max_autotun'\]") as caught:
        compiled(mlp(), max_autotun=True)(data())
    assert OptionError.__name__ in repr(caught.value) or isinstance(caught.value, OptionError)


def test_unknown_option_names_near_ones():
    with pytest.raises(OptionError, match="max_autotune"):
        graphopt.transform(mlp(), options={"max_autotun": True})


def test_errors_name_the_parameter():
    class Penalised(nn.Linear):
        def forward(self, x):
            return super().forward(x), self.weight.square().sum()

    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match="leaves the graph without having met samples"
    ) as caught:
        compiled(Penalised(3, 2))(torch.randn(4, 3))
    assert isinstance(caught.value.inner_exception, UnsupportedError)


def test_mode():
    """A mode sets Inductor's own settings, which the other compilers ignore."""
    from graphopt.transform import Setup, backend

    assert backend.__name__ == "backend"
    settings = torch._inductor.list_mode_options("max-autotune")
    assert dict(Setup.parse(settings).config) == {key.replace("-", "_"): value for key, value in settings.items()}
    with pytest.raises(RuntimeError, match="Unrecognized mode"):
        torch.compile(mlp(), backend="graphopt", mode="fastest")(data())


def test_copies_are_independent(assert_exact):
    model, x = mlp(), data()
    call = compiled(model)
    loss(call, x).backward()
    clone = copy.deepcopy(model)
    assert find(clone[0].weight, SUM_GRAD_SQUARED) is None
    assert_exact(model, loss, x)
