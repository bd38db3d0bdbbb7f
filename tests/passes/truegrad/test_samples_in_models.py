"""Samples on their way through a model: joined and cut, written in place, recomputed; and ways that are refused by name."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.passes import TrueGrad
from tests.passes.truegrad.checks import check

N = 4


class Around(nn.Module):
    """A layer in front of a function of its output, and one behind it."""

    def __init__(self, function, width: int = 3) -> None:
        super().__init__()
        self.function, self.front, self.behind = function, nn.Linear(3, 3), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.function(self.front(x)))


def assigned(index, value):
    def function(x):
        y = x * 1
        y[index(x)] = value(x)
        return y

    return function


def rows_assigned(x):
    y = torch.zeros(x.shape[0], 7, 3, dtype=x.dtype)
    y[:, 1:6] = x
    return y


def loop(x):
    states, state = torch.zeros(x.shape[0], 5, 3, dtype=x.dtype), x[:, 0]
    for t in range(5):
        state = torch.tanh(state + x[:, t])
        states[:, t] = state
    return states


def positions_first(x):
    y = torch.zeros(5, x.shape[0], 3, dtype=x.dtype)
    y[1:4] = x.transpose(0, 1)[:3]
    return y.transpose(0, 1)


def through_a_view(x):
    y = x.clone()
    y.transpose(1, 2)[:, 0].mul_(2.0)
    y[..., 1] += x[..., 2]
    return y


IN_PLACE = {
    "element-wise": lambda x: (x * 1).add_(1).relu_(),
    "element-wise, in a row": lambda x: x.clone().clamp_(-0.5, 0.5).mul_(2).tanh_(),
    "positions": assigned(lambda x: (slice(None), slice(1, None)), lambda x: x[:, :-1].tanh()),
    "places by index": assigned(lambda x: (slice(None), torch.tensor([0, 2])), lambda x: x[:, 1:3]),
    "one place of each sample": assigned(lambda x: (torch.arange(x.shape[0]), x[:, :, 0].argmax(1)), lambda x: x[:, 0]),
    "a number through a mask": assigned(lambda x: x > 0, lambda x: 0.1),
    "zeros": rows_assigned,
    "step by step": loop,
    "positions first": positions_first,
    "view of a view": through_a_view,
    "copy_": lambda x: torch.empty_like(x).copy_(x.flip(1)),
    "masked_fill_": lambda x: x.clone().masked_fill_(x > 0, 0.1),
    "index_add_": lambda x: x.clone().index_add_(1, torch.tensor([0, 1]), x[:, :2]),
    "index_copy_": lambda x: x.new_zeros(x.shape).index_copy_(1, torch.tensor([4, 1, 0, 2, 3]), x),
    "scatter_": lambda x: x.clone().scatter_(1, x.argsort(1), x * 2),
    "cumsum_": lambda x: x.clone().cumsum_(1),
    "dropout_": lambda x: nn.functional.dropout(x * 1, 0.0, True, inplace=True),
}
JOINED = {
    "two views": lambda x: torch.stack(torch.tanh(torch.cat([x, x * 2])).chunk(2), 1).sum(1),
    "two views, reshaped": lambda x: torch.tanh(torch.cat([x, x * 2])).view(2, -1, 5, 3).sum(0),
    "two views, split": lambda x: sum(torch.tanh(torch.cat([x, x * 2])).split(x.shape[0])),
    "two views, the second": lambda x: torch.tanh(torch.cat([x, x * 2]))[x.shape[0] :],
    "repeated": lambda x: x.repeat(2, 1, 1).view(2, -1, 5, 3).sum(0),
    "each twice": lambda x: x.repeat_interleave(2, 0).view(-1, 2, 5, 3).sum(1),
}
REFUSED = {
    "flipped": (lambda x: x.flip(0), "flip works across samples"),
    "rolled": (lambda x: x.roll(1, 0), "roll works across samples"),
    "values through a mask": (lambda x: x.clone().masked_scatter(x > 0, x), r"through a mask.*torch\.where"),
    "views in different orders": (lambda x: torch.cat([x, x[torch.randperm(x.shape[0])]]), "joined end to end"),
    "queue": (lambda x: torch.cat([x, x.new_ones(2, 5, 3)]), "joined end to end"),
}


class TwoViews(nn.Module):
    """Contrastive learning: one encoder for both views, end to end, and a bias that both see."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.shift, self.base = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        both = torch.cat([first, second])
        encoded = self.norm(self.encoder(both)) * self.shift.exp()
        encoded = encoded @ (self.base + self.base.t())
        a, b = self.head(torch.tanh(encoded)).chunk(2)
        return a * b


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            checkpoint(lambda t: torch.tanh(self.shared(torch.tanh(self.shared(t)))), x, use_reentrant=False)
        )


@pytest.mark.parametrize("function", [*IN_PLACE.values(), *JOINED.values()], ids=[*IN_PLACE, *JOINED])
def test_against_the_loop(function):
    torch.manual_seed(2)
    check(Around(function), (torch.randn(N, 5, 3),))


def test_two_views_end_to_end():
    torch.manual_seed(2)
    check(TwoViews(), (torch.randn(N, 3), torch.randn(N, 3)))


def test_activation_checkpointing():
    torch.manual_seed(2)
    check(Checkpointed(), (torch.randn(N, 5, 3),))


@pytest.mark.parametrize(("function", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(function, why):
    model = graphopt.transform(Around(function), [TrueGrad()], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=rf"behind\.weight: .*{why}"):
        model(torch.randn(N, 5, 3))
