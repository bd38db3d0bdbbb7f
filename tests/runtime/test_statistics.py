"""The life of a statistic in a training loop: it accumulates, is rescaled and cleared exactly as ``p.grad`` is."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.errors import GraphoptError, StaleAnnotation
from graphopt.runtime.statistics import Statistic


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def transformed(dtype=torch.float64):
    torch.manual_seed(1)
    return graphopt.transform(MLP().to(dtype), compiler="aot_eager")


def data(num=5, dtype=torch.float64):
    return torch.randn(num, 3, dtype=dtype)


def loss(model, x):
    return model(x).square().sum()


def squares(model):
    return [param.sum_grad_squared.clone() for param in model.parameters()]


def has_statistics(model):
    found = {find(param, SUM_GRAD_SQUARED) is not None for param in model.parameters()}
    assert len(found) == 1
    return found.pop()


def test_nothing_before_backward():
    model = transformed()
    for _ in range(2):
        output = loss(model, data())
        for param in model.parameters():
            assert not hasattr(param, "sum_grad_squared")
            with pytest.raises(AttributeError, match="no sum_grad_squared since the gradient was last cleared"):
                _ = param.sum_grad_squared
    output.backward()
    assert has_statistics(model)


def test_forward_without_backward(assert_exact):
    model, x = transformed(), data()
    loss(model, data(7))
    output = loss(model, x)
    loss(model, data(2))
    output.backward()
    assert_exact(model, loss, x)


def test_second_backward_without_step_accumulates(assert_exact):
    model, x, y = transformed(), data(5), data(3)
    loss(model, x).backward()
    loss(model, y).backward()
    assert_exact(model, loss, torch.cat([x, y]))


def test_two_forwards_then_backwards_in_the_other_order(assert_exact):
    model, x, y = transformed(), data(5), data(3)
    first, second = loss(model, x), loss(model, y)
    second.backward()
    assert_exact(model, loss, y)
    first.backward()
    assert_exact(model, loss, torch.cat([x, y]))


def test_two_forwards_in_one_backward(assert_exact):
    model, x, y = transformed(), data(5), data(3)
    (loss(model, x) + loss(model, y)).backward()
    assert_exact(model, loss, torch.cat([x, y]))


def test_backward_twice_through_one_graph():
    model, x = transformed(), data()
    with torch._functorch.config.patch(donated_buffer=False):  # torch.compile asks for it where a graph is kept
        output = loss(model, x)
        output.backward(retain_graph=True)
        once = squares(model)
        output.backward()
    assert [p.num_samples for p in model.parameters()] == [10] * 4
    torch.testing.assert_close(squares(model), [2 * value for value in once])


CLEAR = {
    "model": lambda model, optimizer: model.zero_grad(),
    "model, zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "by hand": lambda model, optimizer: [setattr(param, "grad", None) for param in model.parameters()],
}


@pytest.mark.parametrize("look_between", [True, False])
@pytest.mark.parametrize("zero_grad", CLEAR.values(), ids=CLEAR)
def test_zero_grad(zero_grad, look_between, assert_exact):
    model = transformed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for num in (5, 3, 4):
        x = data(num)
        loss(model, x).backward()
        assert_exact(model, loss, x)
        optimizer.step()
        zero_grad(model, optimizer)
        if look_between:
            assert not has_statistics(model)
    assert not has_statistics(model)


@pytest.mark.parametrize("zero_grad", CLEAR.values(), ids=CLEAR)
def test_zero_grad_between_forward_and_backward(zero_grad, assert_exact):
    model, x = transformed(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model, data(3)).backward()
    output = loss(model, x)
    zero_grad(model, optimizer)
    output.backward()
    assert_exact(model, loss, x)


def test_part_of_the_gradients_cleared(assert_exact):
    model, x = transformed(), data()
    loss(model, data(2)).backward()
    model.first.zero_grad()
    model.second.requires_grad_(False)
    model.second.zero_grad()
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_mean_loss_by_accumulation_and_division(assert_exact):
    model, batches = transformed(), [data(3) for _ in range(4)]
    for x in batches:
        loss(model, x).backward()
    for param in model.parameters():
        param.grad.div_(4)
    assert_exact(model, lambda m, x: loss(m, x) / 4, torch.cat(batches))


def test_accumulation_after_rescaling(assert_exact):
    model, x, y = transformed(), data(), data()
    loss(model, x).backward()
    for param in model.parameters():
        param.grad.mul_(0.5)
    loss(model, y).backward()
    weights = torch.tensor([0.5] * 5 + [1.0] * 5, dtype=torch.float64)
    assert_exact(model, lambda m, x, w: (w[:, None] * m(x).square()).sum(), torch.cat([x, y]), weights)


def test_grad_scaler(assert_exact):
    model, x = transformed(), data()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(loss(model, x)).backward()
        assert_exact(model, lambda m, x: scaler.get_scale() * loss(m, x), x)
        scaler.unscale_(optimizer)
        assert_exact(model, loss, x)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert_exact(model, lambda m, x, c=0.5 / (norm + 1e-6): c * loss(m, x), x, rtol=1e-5, atol=1e-9)
        scaler.step(optimizer)
        scaler.update()


def test_grad_scaler_that_overflows(assert_exact):
    model, x = transformed(torch.float32), data(dtype=torch.float32)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(1e9 * loss(model, x)).backward()
    scaler.step(optimizer)  # skips
    scaler.update()
    torch.testing.assert_close(dict(model.state_dict()), dict(before))
    optimizer.zero_grad()
    assert not has_statistics(model)
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_clip_grad_norm(assert_exact):
    model, x = transformed(), data()
    loss(model, x).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert_exact(model, lambda m, x: 1e-3 / (norm + 1e-6) * loss(m, x), x)


def test_clip_grad_value_is_refused():
    model = transformed()
    loss(model, data()).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-2)
    with pytest.raises(StaleAnnotation, match="clipping by value"):
        _ = model.first.weight.sum_grad_squared


def test_noise_before_the_second_backward_is_refused():
    model = transformed()
    loss(model, data()).backward()
    model.first.weight.grad.add_(torch.randn(4, 3))
    with pytest.raises(StaleAnnotation, match="not a rescaling"):
        loss(model, data()).backward()


def test_training_goes_on_after_a_refusal(assert_exact):
    model, x = transformed(), data()
    loss(model, data()).backward()
    model.first.weight.grad.add_(torch.randn(4, 3))
    with pytest.raises(StaleAnnotation, match="not a rescaling"):
        loss(model, x).backward()
    model.zero_grad()
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_backward_outside_graphopt_is_not_mistaken():
    model = transformed()
    loss(model, data()).backward()
    graphopt.restore(model)
    model.zero_grad()
    loss(model, data()).backward()
    with pytest.raises((GraphoptError, AttributeError)):
        _ = model.first.weight.sum_grad_squared


def test_autograd_grad_publishes_nothing(assert_exact):
    model, x, y = transformed(), data(), data(3)
    torch.autograd.grad(loss(model, y), list(model.parameters()))
    assert not has_statistics(model)
    assert all(param.grad is None for param in model.parameters())
    loss(model, x).backward()
    assert_exact(model, loss, x)
    torch.autograd.grad(loss(model, y), list(model.parameters()))
    assert_exact(model, loss, x)
    loss(model, y).backward()
    assert_exact(model, loss, torch.cat([x, y]))


def test_backward_for_some_inputs_only(assert_exact):
    model, x = transformed(), data()
    loss(model, x).backward(inputs=[model.first.weight])
    assert find(model.second.weight, SUM_GRAD_SQUARED) is None
    assert model.second.weight.grad is None
    model.zero_grad()
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_interrupted_backward(assert_exact):
    model, x = transformed(), data()

    def interrupt(_):
        raise KeyboardInterrupt

    broken = x.clone().requires_grad_()
    broken.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss(model, broken).backward()
    model.zero_grad()
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_backward_inside_autocast(assert_exact):
    model, x = transformed(torch.float32), data(dtype=torch.float32)
    output = loss(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        output.backward()  # its products are rounded to bfloat16, as in eager mode
    assert_exact(model, loss, x, rtol=0.1, atol=0.05)


def test_scaled_loss_gradient(assert_exact):
    model, x = transformed(), data()
    loss(model, x).backward(torch.tensor(3.0, dtype=torch.float64))
    assert_exact(model, lambda m, x: 3 * loss(m, x), x)


def test_moved_to_another_dtype(assert_exact):
    model = transformed(torch.float32)
    loss(model, data(dtype=torch.float32)).backward()
    model.zero_grad()
    model.double()
    x = data()
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_companion_costs_no_memory():
    for shape in ((1000, 1000), (3,), ()):
        companion = Statistic.of(nn.Parameter(torch.zeros(shape))).companion
        assert companion.shape == shape
        assert companion.untyped_storage().nbytes() == 4
        assert companion.is_leaf
    assert Statistic.of(nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))).companion.dtype == torch.float32
    assert Statistic.of(nn.Parameter(torch.zeros(3, dtype=torch.float64))).companion.dtype == torch.float64


def test_statistic_is_freed_by_the_next_forward():
    model = transformed()
    loss(model, data()).backward()
    references = [weakref.ref(param.sum_grad_squared) for param in model.parameters()]
    model.zero_grad()
    model(data())
    gc.collect()
    assert all(reference() is None for reference in references)


def test_parameters_and_models_die():
    model = transformed()
    loss(model, data()).backward()
    references = [weakref.ref(param) for param in model.parameters()]
    del model
    torch._dynamo.reset()
    gc.collect()
    assert all(reference() is None for reference in references)


def test_state_dict_and_optimizer_state_hold_no_statistic():
    model = transformed()
    optimizer = torch.optim.Adam(model.parameters())
    loss(model, data()).backward()
    optimizer.step()
    assert set(model.state_dict()) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_threads():
    """Two models trained in two threads do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    models, x = [transformed(), transformed()], data()
    for model in models:
        loss(model, x).backward()
        model.zero_grad()

    def train(model):
        for _ in range(20):
            model.zero_grad()
            loss(model, x).backward()
        return squares(model)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(train, models)
    torch.testing.assert_close(first, second)
