"""Models that nobody wrote: a few random layers, one after the other, on a value of shape (samples, positions, features).

Each layer keeps every sample apart and lets each parameter meet samples in its own way. `layers` is what hypothesis draws from;
a layer is a module from (N, T, D) to (N, T', D').
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume, reject
from hypothesis import strategies as st
from torch import Tensor, nn


class Apply(nn.Module):
    """A function of a value and of parameters."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.params = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.params)


class Residual(nn.Module):
    """x + tanh(f(x)), where shapes allow it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        return x + y if x.shape == y.shape else y


class Twice(nn.Module):
    """One layer, two uses."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        return self.inner(y) if y.shape == x.shape else y


class Model(nn.Module):
    """The layers in a row, with something smooth between them."""

    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.tanh(step(x)) + 0.1
        return x.flatten(1)


def _ids(x: Tensor, num: int) -> Tensor:
    """Numbers from 0 that depend on the sample."""
    return (x.detach().sum(-1) * 7).floor().long() % num


def _attention(x: Tensor, qkv: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = F.linear(x, qkv).chunk(3, dim=-1)
    return (q @ k.transpose(1, 2) * temperature).softmax(-1) @ v


def _fused_attention(x: Tensor, query: Tensor, bias: Tensor) -> Tensor:
    q = F.linear(x, query).unsqueeze(1)
    return F.scaled_dot_product_attention(q, x.unsqueeze(1), x.unsqueeze(1), attn_mask=bias).squeeze(1)


def _writes_in_place(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = x.clone()
    y[:, :1] = x[:, :1] * scale
    y.add_(shift)
    return y


def _experts(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("ntd,ntde->nte", x, weight[_ids(x, weight.shape[0])])


def _gated(x: Tensor, gate: Tensor, other: Tensor) -> Tensor:
    return torch.where(x > 0, x * gate.sigmoid(), other)


def _class_token(x: Tensor, token: Tensor) -> Tensor:
    return torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)


def _normalised(x: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    return F.linear(x, length * direction / direction.norm(dim=1, keepdim=True))


def _convolution(width: int, out: int, groups: int) -> nn.Module:
    return nn.Conv1d(width * groups, out * groups, 2, padding=1, groups=groups)


class Channels(nn.Module):
    """A layer that wants (N, D, T)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.transpose(1, 2))
        return y.transpose(1, 2)


class First(nn.Module):
    """The outputs of a recurrent layer, without its state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)[0]
        return output


# name -> (positions, features, another width) -> the layer
LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": lambda t, d, e: nn.Linear(d, e),
    "linear without bias": lambda t, d, e: nn.Linear(d, e, bias=False),
    "over positions": lambda t, d, e: Channels(nn.Linear(t, e)),
    "flattened": lambda t, d, e: Apply(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view(*x.shape[:2], -1), (d, e), (e,)),
    "positions first": lambda t, d, e: Apply(lambda x, w: (x.transpose(0, 1).flatten(0, 1) @ w).view(x.shape[1], x.shape[0], -1).transpose(0, 1), (d, e)),
    "einsum": lambda t, d, e: Apply(lambda x, w: torch.einsum("ntd,de->nte", x, w), (d, e)),
    "einsum by position": lambda t, d, e: Apply(lambda x, w: torch.einsum("ntd,tde->nte", x, w), (t, d, e)),
    "two in one einsum": lambda t, d, e: Apply(lambda x, a, b: torch.einsum("ntd,dk,ke->nte", x, a, b), (d, 2), (2, e)),
    "layer norm": lambda t, d, e: nn.LayerNorm(d),
    "layer norm of all": lambda t, d, e: nn.LayerNorm([t, d]),
    "rms norm": lambda t, d, e: nn.RMSNorm(d),
    "group norm": lambda t, d, e: Channels(nn.GroupNorm(1, d)),
    "scale": lambda t, d, e: Apply(lambda x, s: x * s, (d,)),
    "shift by position": lambda t, d, e: Apply(lambda x, s: x + s, (t, d)),
    "temperature": lambda t, d, e: Apply(lambda x, s: x / (1 + s * s), ()),
    "division": lambda t, d, e: Apply(lambda x, s: s / (2 + x), (1, d)),
    "low rank": lambda t, d, e: Apply(lambda x, w, a, b: F.linear(x, w + a @ b), (e, d), (e, 2), (2, d)),
    "weight norm": lambda t, d, e: Apply(_normalised, (e, d), (e, 1)),
    "squared weight": lambda t, d, e: Apply(lambda x, w: F.linear(x, w.square().cumsum(0)), (e, d)),
    "table": lambda t, d, e: Apply(lambda x, w: x + F.embedding(_ids(x, 5), w), (5, d)),
    "table by index": lambda t, d, e: Apply(lambda x, w: x * w[_ids(x, 5)], (5, d)),
    "table of positions": lambda t, d, e: Apply(lambda x, w: x + F.embedding(torch.arange(x.shape[1]), w), (6 + t, d)),
    "tied table": lambda t, d, e: Apply(lambda x, w: F.linear(x + F.embedding(_ids(x, 5), w), w), (5, d)),
    "experts": lambda t, d, e: Apply(_experts, (3, d, e)),
    "attention": lambda t, d, e: Apply(_attention, (3 * d, d), ()),
    "fused attention": lambda t, d, e: Apply(_fused_attention, (d, d), (t, t)),
    "gate": lambda t, d, e: Apply(_gated, (d,), ()),
    "class token": lambda t, d, e: Apply(_class_token, (1, 1, d)),
    "in place": lambda t, d, e: Apply(_writes_in_place, (d,), (t, d)),
    "convolution": lambda t, d, e: Channels(_convolution(d, e, 1)),
    "depthwise": lambda t, d, e: Channels(_convolution(1, 2, d)),
    "transposed convolution": lambda t, d, e: Channels(nn.ConvTranspose1d(d, e, 2, stride=2)),
    "prelu": lambda t, d, e: Channels(nn.PReLU(d)),
    "bilinear": lambda t, d, e: Apply(lambda x, w, b: F.bilinear(x, x.flip(1), w, b), (e, d, d), (e,)),
    "lstm": lambda t, d, e: First(nn.LSTM(d, e, batch_first=True)),
    "gru": lambda t, d, e: First(nn.GRU(d, e, batch_first=True, bidirectional=True)),
    "multi-head attention": lambda t, d, e: Apply(_multi_head, (3 * d, d), (3 * d,), (d, d), (d,)),
    "pooled": lambda t, d, e: Apply(lambda x, w: F.linear(x.mean(1, keepdim=True), w), (e, d)),
    "two roads": lambda t, d, e: Apply(lambda x, w: F.linear(x, w) * F.linear(x.flip(1), w), (e, d)),
    "mixed by itself": lambda t, d, e: Apply(lambda x, w: x @ (w @ w.t()).softmax(-1), (d, d)),
}  # fmt: skip


def _multi_head(x: Tensor, w: Tensor, b: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
    y, _ = F.multi_head_attention_forward(
        *[x.transpose(0, 1)] * 3, x.shape[-1], 1, w, b, None, None, False, 0.0, out, out_bias, need_weights=False
    )
    return y.transpose(0, 1)


@st.composite
def layers(draw: Any) -> tuple[list[str], Model, Tensor]:
    """Names of the layers, the model in float64, and a batch."""
    num, positions, width = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    names = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(num, positions, width, dtype=torch.float64)
    steps: list[nn.Module] = []
    value = x[:1].float()  # for its shape; one sample, as the loop over samples will see it
    for name in names:
        layer = LAYERS[name](value.shape[1], value.shape[2], draw(st.integers(1, 4)))
        wrap = draw(st.sampled_from([None, None, Residual, Twice]))
        if name in _FREEZABLE and draw(st.booleans()):
            next(layer.parameters()).requires_grad_(False)
        layer = layer if wrap is None else wrap(layer)
        try:
            with torch.no_grad():
                value = layer(value)
        except ValueError:  # one value cannot be normalised
            reject()
        steps.append(layer)
    assume(any(param.requires_grad for step in steps for param in step.parameters()))
    return names, Model(steps).double(), x


_FREEZABLE = ("linear", "low rank", "einsum", "convolution", "layer norm", "gate")
