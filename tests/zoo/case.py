"""One architecture of the zoo: how to build it, what to feed it, and what TrueGrad is expected to do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

NUM_SAMPLES = 3
VOCABULARY = 50

cases: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """A small model with a batch, and the expected outcome.

    Attributes:
        name: the builder's name.
        family: the heading under which it stands in the table.
        build: gives the model in train mode.
        batch: number of samples to the keyword arguments of ``forward``.
        outputs: what the model returns, to the tensors of which the loss is made.
        fallback: name patterns of the parameters that are exact with memory for one gradient per sample.
        refused: name patterns of the parameters that cannot be served, to words that the reason must have.
        unused: name patterns of the parameters that the loss does not depend on.
        graphs: number of captured graphs.
        sample_axis: the option of that name; also where the oracle cuts the batch.
        between: the option ``sample_axis_between_graphs``.
        output_axis: the axis of the outputs that counts samples.
        mixes: samples meet inside the model, so that the oracle is a copy of each parameter for each sample.
        dtype: float64 wherever the model can.
        dropout: the model draws random numbers: the oracle differentiates each sample's output in the model itself.
        slow: takes more than about ten seconds.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Any]]
    outputs: Callable[[Any], tuple[Tensor, ...]]
    fallback: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    graphs: int = 1
    sample_axis: Any = 0
    between: int | None = None
    output_axis: int = 0
    mixes: bool = False
    dtype: torch.dtype = torch.float64
    dropout: bool = False
    slow: bool = False

    def make(self, num: int = NUM_SAMPLES) -> tuple[nn.Module, dict[str, Any]]:
        """Model and batch, the same at every call."""
        torch.manual_seed(1)
        model = self.build().train()
        with torch.no_grad():  # initial weights can be so small that many gradients are nearly zero
            for param in model.parameters():
                param.add_(0.2 * torch.randn_like(param))
        batch = self.batch(num)
        return model.to(self.dtype), {key: self._cast(value) for key, value in batch.items()}

    def losses(self, output: Any) -> Tensor:
        """(N,): of each sample; differs from entry to entry."""
        return torch.stack([_smooth(value.to(self.dtype), self.output_axis) for value in self.outputs(output)]).sum(0)

    def loss(self, output: Any) -> Tensor:
        """Scalar: the sum over samples."""
        return self.losses(output).sum()

    def expected(self, names: Iterable[str]) -> dict[str, str]:
        """The status that each of these parameters must have.

        Raises:
            ValueError: a pattern that fits none of them, or a parameter that fits patterns of fallback and refused.
        """
        wanted = dict.fromkeys(names, "exact")
        others = ("exact", "fallback", "refused")
        for status in ("unused", "fallback", "refused"):  # what is unused needs no service, whatever else it fits
            for pattern in getattr(self, status):
                matching = [name for name in wanted if fnmatchcase(name, pattern) and wanted[name] in (status, *others)]
                if not matching or any(wanted[name] not in ("exact", status) for name in matching):
                    raise ValueError(f"{self.name}: {pattern!r} of {status!r} fits {matching or 'nothing'}")
                wanted.update(dict.fromkeys(matching, status))
        return wanted

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def case(family: str, batch: Callable[[int], dict[str, Any]], outputs: Any = None, **expected: Any) -> Any:
    """Register the decorated builder as a case."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = build.__name__
        if name in cases:
            raise ValueError(f"the zoo has two models called {name}")
        cases[name] = Case(name, family, build, batch, _reader(outputs), **expected)
        return build

    return register


def _reader(outputs: Any) -> Callable[[Any], tuple[Tensor, ...]]:
    """Names of the outputs to a function that picks them; by default the only or the usual one."""
    if callable(outputs):
        return outputs
    if outputs is not None:
        return lambda output: tuple(output[name] for name in outputs)
    return _usual


def _usual(output: Any) -> tuple[Tensor, ...]:
    if isinstance(output, Tensor):
        return (output,)
    return (output["logits"] if "logits" in output else output["last_hidden_state"],)


def _smooth(value: Tensor, axis: int) -> Tensor:
    """(N,): the gradient differs from entry to entry, and does not depend on where in the batch a sample stands."""
    rows = value.movedim(axis, 0).flatten(1)
    return (rows + 0.3 * torch.arange(rows.shape[1])).sin().sum(1)


# --- batches ---------------------------------------------------------------------------------------------------------------


def tokens(length: int = 6, *, mask: bool = False) -> Callable[[int], dict[str, Any]]:
    """Token numbers, with or without a padding mask."""

    def batch(num: int) -> dict[str, Any]:
        found: dict[str, Any] = {"input_ids": torch.randint(2, VOCABULARY, (num, length))}
        if mask:
            lengths = 2 + torch.arange(num) % (length - 1)
            found["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        return found

    return batch


def token_pairs(num: int) -> dict[str, Any]:
    """For an encoder and a decoder."""
    return {
        **tokens(6, mask=True)(num),
        "decoder_input_ids": torch.randint(2, VOCABULARY, (num, 5)),
    }


def images(size: int = 16, channels: int = 3, name: str = "pixel_values") -> Callable[[int], dict[str, Any]]:
    """Square images."""
    return lambda num: {name: torch.randn(num, channels, size, size)}


def rows(*shape: int, name: str = "x") -> Callable[[int], dict[str, Any]]:
    """One tensor of numbers for each sample."""
    return lambda num: {name: torch.randn(num, *shape)}
