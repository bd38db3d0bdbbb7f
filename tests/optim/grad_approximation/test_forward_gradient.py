"""Forward gradients: exact derivatives along random directions, without a graph."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from graphopt.errors import ModuleError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim import Modular, m
from graphopt.optim.core.transform import Step, apply_updates, chain
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, booth, in_plane, rosenbrock


@accepts("G7")
@pytest.mark.parametrize("num_tensors", [1, 2])
@pytest.mark.parametrize("other", ["central", "forward"])
def test_differences_and_automatic_differentiation_agree(other, num_tensors):
    """Central ones are exact on quadratics."""
    vectors = []
    for jvp in ("autograd", other):
        problem = in_plane(booth, num_tensors)
        module = m.ForwardGradient(jvp=jvp, seed=0, n_samples=2, h=1e-3 if other == "central" else 1e-8)
        optimizer = Modular(problem.params, module, m.LR(0.01))
        losses = [optimizer.step(problem.closure) for _ in range(20)]
        assert losses[0] == pytest.approx(float(booth(0.0, -8.0)), rel=1e-4)
        vectors.append(problem.vector)
        assert set(problem.calls) == {False}
    assert torch.allclose(*vectors, rtol=0, atol=1e-6 if other == "central" else 1e-4)


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 5, bias=False))
    model[4].weight = model[0].weight  # tied
    return model.double(), torch.randint(0, 5, (6,))


def called(model, tokens):
    return model(tokens)


def called_by_func(model, tokens):
    return functional_call(model, dict(model.named_parameters()), (tokens,), tie_weights=False)


def mapped_by_func(model, tokens):
    return torch.vmap(lambda token: model(token[None])[0])(tokens)


@accepts("G7")
@pytest.mark.parametrize("call", [called, called_by_func, mapped_by_func])
def test_the_estimate_of_a_model_is_the_derivative_along_signs(call):
    """One direction of signs: ``z ⟨g, z⟩ = s ⟨g, s⟩`` with s the signs of the estimate."""
    model, tokens = model_and_data()
    params = list(model.parameters())
    loss = F.cross_entropy(model(tokens), tokens)
    grads = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])
    before = [p.detach().clone() for p in params]
    graphs = []

    def closure(backward=True):
        loss = F.cross_entropy(call(model, tokens), tokens)
        graphs.append(loss.requires_grad or backward)
        return loss

    returned = Modular(model, m.ForwardGradient(distribution="rademacher"), m.LR(0.0)).step(closure)
    found = torch.cat([p.grad.reshape(-1) for p in params])
    assert torch.allclose(found, found.sign() * (grads @ found.sign()), rtol=1e-10)
    assert torch.allclose(returned, loss, rtol=1e-12)
    assert graphs == [False]
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    with torch.no_grad():
        assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in params)


@accepts("G7")
def test_it_is_the_gradient_on_average():
    samples = 2000
    problem = Problem(lambda a, b: torch.sin(a).sum() + a[0] * b**2, [0.3, -0.7], 0.9)
    grads = torch.autograd.grad(problem.loss_of(*problem.params), problem.params)
    grad = torch.cat([g.reshape(-1) for g in grads])
    before = problem.vector
    Modular(problem.params, m.ForwardGradient(samples, seed=0), m.LR(1.0)).step(problem.closure)
    error = before - problem.vector - grad
    assert float(error.abs().max()) < 4 * float((grad @ grad + grad.square().max()) / samples) ** 0.5


def test_directions_of_a_half_precision_model_are_those_of_its_tangents():
    param = torch.tensor([1.0, 2.0, -0.5], dtype=torch.bfloat16, requires_grad=True)
    Modular([param], m.ForwardGradient(seed=0), m.LR(0.0)).step(lambda backward: (param.float() * 3).sum())
    z = torch.randn(3, generator=generator_of_the_first_step()).bfloat16().float()
    assert torch.equal(param.grad, (z * float(z.sum() * 3)).bfloat16())


def generator_of_the_first_step():
    from graphopt.optim.grad_approximation.random_directions import generators

    return generators([torch.zeros(())], 0, 1, 0, 0)[torch.device("cpu")]


def test_the_same_seed_and_a_file_and_a_pure_function():
    def run(saved_at=None):
        problem = in_plane(rosenbrock, 2)
        optimizer = Modular(problem.params, m.ForwardGradient(seed=1, beta=0.5), m.LR(1e-4))
        for step in range(4):
            if step == saved_at:
                state = optimizer.state_dict()
                optimizer = Modular(problem.params, m.ForwardGradient(seed=1, beta=0.5), m.LR(1e-4))
                optimizer.load_state_dict(state)
            optimizer.step(problem.closure)
        return problem.vector

    assert torch.equal(run(), run())
    assert torch.equal(run(), run(saved_at=2))
    transform = chain(m.ForwardGradient(seed=1, beta=0.5), m.LR(1e-4))
    params = [torch.tensor(value, dtype=torch.float64) for value in (-1.1, 2.5)]
    state = transform.init(params)
    for _ in range(4):
        updates, state = transform.update(params, state, params, step=Step(loss_fn=lambda tree: rosenbrock(*tree)))
        params = apply_updates(params, updates)
    assert torch.equal(torch.stack(params), run())


# -- bad input


class WithoutForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda p: p.sum().item(), ModuleError, "loss carries no forward-mode derivative.*use jvp='central'"),
        (lambda p: p.detach().sum(), ModuleError, "detached from the parameters"),
        (lambda p: p.sum() * torch.nan, NonFiniteError, "ForwardGradient: the loss is nan"),
        (lambda p: WithoutForward.apply(p).sum(), UnsupportedError, "must implement the jvp.*Use jvp='central'"),
        (
            lambda p: F.embedding_bag(torch.tensor([[0, 1]]), p[:, None]).sum(),
            UnsupportedError,
            r"no forward-mode derivative\. Trying to use forward AD with _embedding_bag that does not support it",
        ),
    ],
)
def test_losses_without_a_derivative(loss, error, text):
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = Modular([param], m.ForwardGradient(), m.LR(0.1))
    with pytest.raises(error, match=text):
        optimizer.step(lambda backward=True: loss(param))
    assert param.tolist() == [1.0, 2.0]
    assert float(optimizer.state[param]["step"]) == 0
    Modular([param], m.ForwardGradient(jvp="central"), m.LR(0.1)).step(lambda backward=True: (param**2).sum())
    assert param.tolist() != [1.0, 2.0]


def test_an_error_of_the_user_is_not_explained():
    param = torch.tensor([1.0], requires_grad=True)

    def closure(backward):
        raise NotImplementedError("mine")

    with pytest.raises(NotImplementedError, match="mine"):
        Modular([param], m.ForwardGradient()).step(closure)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"jvp": "exact"}, "ForwardGradient: jvp='exact'; expected one of autograd, forward, central"),
        ({"n_samples": 0}, "n_samples=0; expected an integer of at least 1"),
        ({"h": 0.0}, r"h=0\.0; expected a number in \(0, inf\)"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(OptionError, match=text):
        m.ForwardGradient(**options)
