"""For every class of `graphopt.nn.modules`: how to build it, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.oracle import Axes

N, T = 4, 5


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def total(output: Any) -> Tensor:
    """A loss of no special form over everything that a module returns."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return sum((1 + index) * _total(leaf) for index, leaf in enumerate(leaves))


def _total(leaf: Tensor) -> Tensor:
    return (leaf + 0.3 * torch.arange(leaf.shape[-1])).sin().sum() if leaf.ndim else leaf  # a loss is added up already


@dataclass(frozen=True)
class Case:
    """One way to call one class.

    Attributes:
        name: of the class.
        args: positional arguments of its constructor.
        batch: makes the arguments of a call with this many samples.
        axes: where they hold samples.
        kwargs: keyword arguments of its constructor.
        eval: samples meet in training (batch normalisation), or the module draws random numbers.
        one: makes a call without a batch, if the class knows such calls.
    """

    name: str
    args: tuple[Any, ...]
    batch: Callable[[int], tuple[Any, ...]]
    axes: Axes = 0
    kwargs: dict[str, Any] = field(default_factory=dict)
    eval: bool = False
    one: Callable[[], tuple[Any, ...]] | None = None

    def __str__(self) -> str:
        inputs = ",".join(
            "x".join(map(str, t.shape)) for t in pytree.tree_leaves(self.batch(N)) if isinstance(t, Tensor)
        )
        return f"{self.name}-{'-'.join(map(str, self.kwargs.values()))}-{inputs}"


def _cases() -> list[Case]:
    case = Case
    found = [
        case("Linear", (3, 2), lambda n: (rand(n, 3),), one=lambda: (rand(3),)),
        case("Linear", (3, 2), lambda n: (rand(n, T, 3),), kwargs={"bias": False}),
        case("Linear", (3, 2), lambda n: (rand(n, 2, T, 3),)),
        case("NonDynamicallyQuantizableLinear", (3, 2), lambda n: (rand(n, 3),)),
        case("Bilinear", (3, 2, 4), lambda n: (rand(n, 3), rand(n, 2)), one=lambda: (rand(3), rand(2))),
        case("Bilinear", (3, 2, 4), lambda n: (rand(n, T, 3), rand(n, T, 2)), kwargs={"bias": False}),
        case("Embedding", (7, 3), lambda n: (torch.randint(0, 7, (n, T)),), one=lambda: (torch.tensor(3),)),
        case("Embedding", (7, 3), lambda n: (torch.randint(0, 7, (n,)),), kwargs={"padding_idx": 1}),
        case("EmbeddingBag", (7, 3), lambda n: (torch.randint(0, 7, (n, T)),), kwargs={"mode": "sum"}),
        case("EmbeddingBag", (7, 3), lambda n: (torch.randint(0, 7, (n, T)),), kwargs={"mode": "mean"}),
        case("EmbeddingBag", (7, 3), lambda n: (torch.randint(0, 7, (n, T)),), kwargs={"mode": "max"}),
        case(
            "EmbeddingBag", (7, 3), lambda n: (torch.randint(0, 7, (n, T)), None, rand(n, T)),
            kwargs={"mode": "sum", "padding_idx": 2},
        ),
        case("PReLU", (3,), lambda n: (rand(n, 3, T),)),
        case("PReLU", (), lambda n: (rand(n, 3),), one=lambda: (rand(),)),
        case("LayerNorm", (3,), lambda n: (rand(n, T, 3),), one=lambda: (rand(3),)),
        case("LayerNorm", ([T, 3],), lambda n: (rand(n, T, 3),), kwargs={"bias": False}),
        case("LayerNorm", ([T, 1],), lambda n: (rand(n, T, 1),), one=lambda: (rand(T, 1),)),
        case("RMSNorm", (3,), lambda n: (rand(n, T, 3),), one=lambda: (rand(3),)),
        case("GroupNorm", (2, 4), lambda n: (rand(n, 4, T),)),
        case("GroupNorm", (2, 4), lambda n: (rand(n, 4),)),
        case("LSTM", (3, 4), lambda n: (rand(T, n, 3),), {0: 1}, one=lambda: (rand(T, 3),)),
        case("GRU", (3, 4), lambda n: (rand(T, n, 3),), {0: 1}, one=lambda: (rand(T, 3),)),
        case("GRU", (3, 4), lambda n: (rand(T, n, 3), rand(1, n, 4)), {0: 1, 1: 1}, one=lambda: (rand(T, 3), rand(1, 4))),
        case("RNN", (3, 4), lambda n: (rand(T, n, 3),), {0: 1}, one=lambda: (rand(T, 3),)),
        case("RNN", (3, 4), lambda n: (rand(n, T, 3),), kwargs={"batch_first": True}, one=lambda: (rand(T, 3),)),
        case(
            "LSTM", (3, 4), lambda n: (rand(n, T, 3), (rand(4, n, 4), rand(4, n, 4))), {0: 0, 1: 1},
            kwargs={"batch_first": True, "bidirectional": True, "num_layers": 2},
        ),
        case("LSTMCell", (3, 4), lambda n: (rand(n, 3),), one=lambda: (rand(3),)),
        case("LSTMCell", (3, 4), lambda n: (rand(n, 3), (rand(n, 4), rand(n, 4))), one=lambda: (rand(3), (rand(4), rand(4)))),
        case("GRUCell", (3, 4), lambda n: (rand(n, 3), rand(n, 4)), one=lambda: (rand(3), rand(4))),
        case("RNNCell", (3, 4), lambda n: (rand(n, 3),), kwargs={"nonlinearity": "relu"}, one=lambda: (rand(3),)),
    ]  # fmt: skip
    for axes in (1, 2, 3):
        space = (6, 5, 4)[:axes]

        def image(n: int, c: int = 4, space: tuple[int, ...] = space) -> tuple[Tensor]:
            return (rand(n, c, *space),)

        def single(c: int = 4, space: tuple[int, ...] = space) -> tuple[Tensor]:
            return (rand(c, *space),)

        for name in (f"Conv{axes}d", f"ConvTranspose{axes}d"):
            found.append(case(name, (4, 6, 3), image, one=single))
            options = {"stride": 2, "padding": 1, "groups": 2, "bias": False}
            found.append(case(name, (4, 6, 3), image, kwargs=options))
            found.append(case(f"Lazy{name}", (6, 3), image))
        found.append(case(f"Conv{axes}d", (4, 4, 3), image, kwargs={"padding": "same", "padding_mode": "circular"}))
        found.append(case(f"BatchNorm{axes}d", (4,), image, eval=True))
        found.append(case(f"LazyBatchNorm{axes}d", (), image, eval=True))
        found.append(case(f"InstanceNorm{axes}d", (4,), image, kwargs={"affine": True}, one=single))
        options = {"affine": True, "track_running_stats": True}
        found.append(case(f"InstanceNorm{axes}d", (4,), image, kwargs=options, eval=True))
        found.append(case(f"LazyInstanceNorm{axes}d", (), image, kwargs={"affine": True}))
        found.append(case(f"LayerNorm{axes}d", (4,), image, one=single))
    found += [
        case("BatchNorm1d", (4,), lambda n: (rand(n, 4),), eval=True),
        case("SyncBatchNorm", (4,), lambda n: (rand(n, 4, T),), eval=True),
        case("LazyLinear", (2,), lambda n: (rand(n, 3),)),
        *_attention(),
    ]
    if hasattr(nn, "LinearCrossEntropyLoss"):
        found.append(
            case(
                "LinearCrossEntropyLoss",
                (3, 5),
                lambda n: (rand(n, 3), torch.randint(0, 5, (n,))),
                kwargs={"reduction": "sum"},
            )
        )
    return found


def _attention() -> list[Case]:
    case, same = Case, {"dropout": 0.0}

    def itself(n: int) -> tuple[Tensor, ...]:
        return (rand(T, n, 4),) * 3

    def first(n: int) -> tuple[Tensor, ...]:
        return (rand(n, T, 4),) * 3

    def crossed(n: int) -> tuple[Any, ...]:
        return (
            rand(T, n, 4),
            rand(3, n, 6),
            rand(3, n, 5),
            torch.tensor([[False, True, False]] * n),
            True,
            rand(T, 3) > 1,
        )

    second = {0: 1, 1: 1, 2: 1}
    return [
        case("MultiheadAttention", (4, 2), itself, second, one=lambda: (rand(T, 4),) * 3),
        case("MultiheadAttention", (4, 2), first, kwargs={"batch_first": True, "bias": False}),
        case("MultiheadAttention", (4, 2), first, kwargs={"batch_first": True, "add_bias_kv": True}),
        case("MultiheadAttention", (4, 2), crossed, {**second, 3: 0, 5: None}, kwargs={"kdim": 6, "vdim": 5}),
        case("TransformerEncoderLayer", (4, 2, 6), lambda n: (rand(T, n, 4),), 1, kwargs=same, one=lambda: (rand(T, 4),)),
        case(
            "TransformerEncoderLayer", (4, 2, 6), lambda n: (rand(n, T, 4),),
            kwargs={**same, "batch_first": True, "norm_first": True, "activation": "gelu"},
        ),
        case("TransformerDecoderLayer", (4, 2, 6), lambda n: (rand(T, n, 4), rand(3, n, 4)), 1, kwargs=same),
        case("Transformer", (4, 2, 1, 1, 6), lambda n: (rand(n, T, 4), rand(n, 3, 4)), kwargs={**same, "batch_first": True}),
        case("TransformerEncoder", (), lambda n: (rand(T, n, 4),), 1, kwargs={"enable_nested_tensor": False}),
        case("TransformerDecoder", (), lambda n: (rand(T, n, 4), rand(3, n, 4)), 1),
    ]  # fmt: skip


CASES = _cases()
REFUSED = {"AdaptiveLogSoftmaxWithLoss"}  # tested by themselves


def build(case: Case, library: Any) -> nn.Module:
    """The module, of ``torch.nn`` or of ``graphopt.nn``."""
    torch.manual_seed(3)
    if case.name in ("TransformerEncoder", "TransformerDecoder"):
        layer = getattr(library, f"{case.name}Layer")(4, 2, 6, dropout=0.0)
        module = getattr(library, case.name)(layer, 2, **case.kwargs)
    elif hasattr(library, case.name):
        module = getattr(library, case.name)(*case.args, **case.kwargs)
    else:
        module = _plain(case)
    return module.double().train(not case.eval)


def _plain(case: Case) -> nn.Module:
    """What torch.nn has no public class for."""
    if case.name == "NonDynamicallyQuantizableLinear":
        return nn.Linear(*case.args)
    return _OverChannels(*case.args, num_positions=int(case.name[-2]))


class _OverChannels(nn.LayerNorm):
    def __init__(self, num_features: int, num_positions: int) -> None:
        super().__init__(num_features)
        self.num_positions = num_positions

    def forward(self, input: Tensor) -> Tensor:
        channels, shape = -1 - self.num_positions, [-1] + [1] * self.num_positions
        mean = input.mean(channels, keepdim=True)
        variance = (input - mean).square().mean(channels, keepdim=True)
        return (input - mean) / (variance + self.eps).sqrt() * self.weight.view(shape) + self.bias.view(shape)
