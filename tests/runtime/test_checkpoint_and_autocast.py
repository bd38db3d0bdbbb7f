"""Activation checkpointing changes no statistic; under autocast it is float32, and that of a loop over samples under autocast."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from tests.oracle import from_losses


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.second(self.first(self.norm(x)).tanh())


class Net(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.table.weight
        self.reentrant = reentrant

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def net(reentrant=None):
    torch.manual_seed(1)
    return Net(reentrant)


def total(output):
    return (output.float() * torch.arange(1, 8)).sin().sum()


def batch(num):
    return torch.randint(7, (num, 5))


# --- activation checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    model, ids = graphopt.transform(net(reentrant).double(), compiler="aot_eager"), batch(3)
    plain = net().double()

    def loss(model, ids):
        return (model(ids) * torch.arange(1, 8)).sin().sum()

    loss(model, ids).backward()
    reference = from_losses(plain, (loss(plain, row[None]) for row in ids))
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, reference[name].grad, rtol=1e-10, atol=1e-13)
        value = find(param, SUM_GRAD_SQUARED)
        torch.testing.assert_close(value, reference[name].sum_grad_squared, rtol=1e-10, atol=1e-13)
        assert find(param, NUM_SAMPLES) == 3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # transformers 5.23
@pytest.mark.parametrize("reentrant", [False, True])
def test_huggingface_gradient_checkpointing(reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).double().train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    graphopt.transform(model, compiler="aot_eager")
    ids = torch.randint(17, (3, 4))
    (model(ids).logits * torch.arange(17)).sin().sum().backward()
    reference = from_losses(plain, ((plain(row[None]).logits * torch.arange(17)).sin().sum() for row in ids))
    assert set(reference) == {name for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            find(param, SUM_GRAD_SQUARED), reference[name].sum_grad_squared, rtol=1e-8, atol=1e-12, msg=name
        )
        assert find(param, NUM_SAMPLES) == 3


# --- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reentrant", [None, False])
def test_autocast(reentrant, compiler):
    """Against a loop over samples under the same autocast.

    Tolerance: the same products are rounded to bfloat16 on both sides, a relative error of up to u = 2**-9 each, but sums are
    added up in another order before, so that a result near the middle between two numbers may go either way: two sides differ by
    up to 2u for each product. From the loss back to the first layer a value passes through 3 products per block and the head,
    forward and backward, 14 in all, with independent errors: 2u * sqrt(14) of the largest entry of the parameter's gradient.
    The square doubles it: 4 * sqrt(14) * 2**-9 = 0.03.
    """
    model, plain, ids = graphopt.transform(net(reentrant), compiler=compiler), net(), batch(6)
    exact = copy.deepcopy(plain).double()

    with torch.autocast("cpu", torch.bfloat16):
        loss = total(model(ids))
    loss.backward()

    def sample_losses():
        for row in ids:
            with torch.autocast("cpu", torch.bfloat16):
                loss = total(plain(row[None]))
            yield loss

    reference = from_losses(plain, sample_losses())
    truth = from_losses(exact, ((exact(row[None]) * torch.arange(1, 8)).sin().sum() for row in ids))
    for name, param in model.named_parameters():
        value = find(param, SUM_GRAD_SQUARED)
        assert value.dtype == torch.float32
        assert find(param, NUM_SAMPLES) == 6
        wanted = reference[name].sum_grad_squared
        torch.testing.assert_close(
            value, wanted, rtol=0, atol=0.03 * float(wanted.max()), msg=lambda t, n=name: f"{n}: {t}"
        )
        error = (value.double() - truth[name].sum_grad_squared).abs().max() / truth[name].sum_grad_squared.max()
        assert error > 1e-4, f"{name}: autocast had no effect"


def test_scaled_loss_under_autocast():
    """GradScaler: a power of two changes no rounding, so the pair is scaled exactly, and unscaled exactly."""
    model, ids = graphopt.transform(net(), compiler="aot_eager"), batch(6)
    optimizer = graphopt.optim.TGAdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def run(scale):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = total(model(ids))
        scale(loss).backward()

    run(lambda loss: loss)
    before = [(param.grad.clone(), find(param, SUM_GRAD_SQUARED).clone()) for param in model.parameters()]
    run(scaler.scale)
    for param, (grad, statistic) in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(param.grad, grad * 2**12, rtol=0, atol=0)
        torch.testing.assert_close(find(param, SUM_GRAD_SQUARED), statistic * 2**24, rtol=0, atol=0)
    scaler.unscale_(optimizer)
    for param, (grad, statistic) in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=0, atol=0)
        torch.testing.assert_close(find(param, SUM_GRAD_SQUARED), statistic, rtol=1e-6, atol=0)
    scaler.step(optimizer)
    scaler.update()
