"""The ways to take one step of learning an initialisation: GradInit of graphopt, of the package ``gradinit``, and by hand.

Each function takes a ``Work`` and the branch that every step is to take, and returns a step. Two branches: the *constraint*,
where the norm of the gradient is lowered, which needs second derivatives; and the *look-ahead*, where the loss after a step of
the optimizer is lowered. A bound of 0 or of infinity forces the one or the other. Norms are those for Adam: the sum of all
absolute values. The step size of the scales is so small that hundreds of steps do the same work.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from benchmarks import workloads
from benchmarks.workloads import Batch

Step = Callable[[], object]

ETA, LEARNING_RATE = 1e-3, 1e-6
GAMMA = {"constraint": 0.0, "look_ahead": math.inf}
BATCHES_DRAWN = {"constraint": 1, "look_ahead": 2}  # by graphopt.learn_init, in a step


@dataclass
class Work:
    """A model and a batch of its data."""

    model: nn.Module
    batch: Batch

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Of a Hugging Face model, the mean over samples."""
        loss: Tensor = model(**batch).loss
        return loss


def bert(*, dtype: str = "float32", small_numbers: bool = False, **sizes: int) -> Work:
    """BERT for classification without dropout, with attention written out, since eager PyTorch cannot derive the fused one twice.

    Args:
        dtype: of the weights.
        small_numbers: instead of zeros, so that biases count, too.
        sizes: of ``workloads.bert``.
    """
    workload = workloads.make("bert", dropout=False, **sizes)
    model: Any = workload.model.to(getattr(torch, dtype))
    model.set_attn_implementation("eager")
    if small_numbers:
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    return Work(model, workload.batch)


# --- graphopt ---------------------------------------------------------------------------------------------------------


def learn_init(work: Work, branch: str, *, compiler: str = "inductor") -> Step:
    """``graphopt.learn_init``, stopped between two iterations."""
    import graphopt

    def learn(batches: Iterator[Batch]) -> None:
        graphopt.learn_init(
            work.model,
            work.loss,
            batches,
            eta=ETA,
            gamma=GAMMA[branch],
            lr=LEARNING_RATE,
            steps=1_000_000,
            compiler=compiler,
            progress=False,
        )

    return Turns(learn, work.batch, BATCHES_DRAWN[branch]).step


class Turns:
    """A loop over batches that goes on only when told to.

    It runs in a thread of its own, and waits whenever it asks for the first batch of an iteration.

    Args:
        loop: is given the batches.
        batch: every one of them.
        drawn: how many an iteration takes.
    """

    def __init__(self, loop: Callable[[Iterator[Batch]], object], batch: Batch, drawn: int) -> None:
        self._batch, self._drawn = batch, drawn
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)  # it never ends by itself

    def step(self) -> None:
        """One iteration; the first time also all that comes before."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, loop: Callable[[Iterator[Batch]], object]) -> None:
        try:
            loop(self._batches())
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def _batches(self) -> Iterator[Batch]:
        for _ in range(4):  # from which learn_init measures first; it then learns from the same
            yield self._batch
        while True:
            self._done.release()
            self._go.acquire()
            for _ in range(self._drawn):
                yield self._batch


def wrapper(work: Work, branch: str, *, compiler: str | None = "inductor") -> Step:
    """``graphopt.GradInitWrapper`` around a model that is compiled unless ``compiler`` is None, in the other package's loop."""
    import graphopt
    from graphopt.passes import GradInit, LayerToLayer

    if compiler is not None:
        graphopt.transform(work.model, [GradInit(), LayerToLayer()], compiler=compiler)
    return _loop(work, graphopt.GradInitWrapper(work.model), branch)


# --- others -----------------------------------------------------------------------------------------------------------


def johngull(work: Work, branch: str) -> Step:
    """The package ``gradinit``, in the loop of its README; it looks no step ahead: where the norm is small it lowers the loss."""
    from gradinit import GradInitWrapper

    return _loop(work, GradInitWrapper(work.model), branch)


def _loop(work: Work, wrapped: Any, branch: str) -> Step:
    optimizer = torch.optim.Adam(list(work.model.parameters()), lr=LEARNING_RATE)

    def step() -> None:
        loss = wrapped.grad_loss(work.loss(work.model, work.batch), norm=1, gamma=GAMMA[branch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wrapped.clamp_scales()

    return step


def by_hand(work: Work, branch: str, *, compiled: bool = False) -> Step:
    """The paper's algorithm with ``torch.func``, as its authors' code does it; compiled, each branch is one graph.

    Eagerly the gradient keeps its graph before the branch is known, as there. When compiled it is computed first, and again with
    its derivative where that is wanted; so the look-ahead step pays for no second derivatives.
    """
    algorithm = ByHand(work)
    if compiled:
        algorithm.gradient = torch.compile(algorithm.gradient)
        algorithm.norm = torch.compile(algorithm.norm, fullgraph=True)
    scales = {name: torch.ones((), dtype=weight.dtype) for name, weight in algorithm.weights.items()}
    optimizer = torch.optim.Adam(scales.values(), lr=LEARNING_RATE)

    def step() -> None:
        found = (algorithm.compiled if compiled else algorithm.eager)(scales, GAMMA[branch])
        for name, scale in scales.items():
            scale.grad = found[name]
        optimizer.step()
        with torch.no_grad():
            torch._foreach_clamp_min_(list(scales.values()), 0.01)

    return step


class ByHand:
    """Both branches, written for a model whose weights are given to it."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.weights = {name: parameter.detach() for name, parameter in work.model.named_parameters()}
        # One half of it is the first batch's first half, the other a new batch's second half; here all batches are the same.
        self.ahead = {name: torch.cat(tensor.chunk(2)) for name, tensor in work.batch.items()}
        self.gradient: Callable[..., Any] = grad_and_value(self._loss)
        self.norm: Callable[..., Any] = grad_and_value(self._norm)

    def _loss(self, weights: dict[str, Tensor], batch: Batch) -> Tensor:
        loss: Tensor = functional_call(self.work.model, weights, (), dict(batch)).loss
        return loss

    def _norm(self, scales: dict[str, Tensor], weights: dict[str, Tensor], batch: Batch) -> Tensor:
        scaled = {name: scales[name] * weight for name, weight in weights.items()}
        gradient, _ = grad_and_value(self._loss)(scaled, batch)
        return torch.stack([value.abs().sum() for value in gradient.values()]).sum()

    def eager(self, scales: dict[str, Tensor], gamma: float) -> dict[str, Tensor]:
        """The derivative of whichever objective it is with respect to the scales."""
        leaves = {name: scale.detach().requires_grad_() for name, scale in scales.items()}
        scaled = {name: leaves[name] * weight for name, weight in self.weights.items()}
        gradient = torch.autograd.grad(
            self._loss(scaled, self.work.batch), list(scaled.values()), create_graph=True, allow_unused=True
        )
        norm = torch.stack([value.abs().sum() for value in gradient if value is not None]).sum()
        if norm > gamma:
            objective = norm
        else:
            after = {
                name: weight if value is None else weight - ETA * value.detach().sign()
                for (name, weight), value in zip(scaled.items(), gradient, strict=True)
            }
            objective = self._loss(after, self.ahead) / ETA
        found = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
        return {name: torch.zeros(()) if value is None else value for name, value in zip(leaves, found, strict=True)}

    def compiled(self, scales: dict[str, Tensor], gamma: float) -> dict[str, Tensor]:
        """Likewise, from compiled parts."""
        if gamma == 0:  # both the gradient and its derivative are in the one graph
            found, _ = self.norm(scales, self.weights, self.work.batch)
            return dict(found)
        scaled = {name: scales[name] * weight for name, weight in self.weights.items()}
        gradient, _ = self.gradient(scaled, self.work.batch)
        norm = torch.stack([value.abs().sum() for value in gradient.values()]).sum()
        assert norm <= gamma
        after = {name: weight - ETA * gradient[name].sign() for name, weight in scaled.items()}
        gradient, _ = self.gradient(after, self.ahead)
        return {
            name: torch.dot(value.flatten(), self.weights[name].flatten()) / ETA for name, value in gradient.items()
        }
