"""What modules that evaluate the loss share: its value as a number, parameters that are put back, settings of all tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import ClosureError, OptionError
from graphopt.optim.core.vectors import copies

if TYPE_CHECKING:
    from graphopt.optim.core.module import Module

RIGHT_CLOSURE = """\
def closure(backward=True):
    loss = loss_function(model(inputs), targets)
    if backward:
        optimizer.zero_grad()
        loss.backward()
    return loss"""


def check_loss(loss: Any, place: str) -> None:
    """Raise `ClosureError` if a closure returned something else than one real number."""
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and not loss.is_complex():
            return
        got = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}"
    elif isinstance(loss, (int, float)):
        return
    else:
        got = repr(loss)
    raise ClosureError(
        f"{place}: the closure returned {got}; expected the loss, one real number. Write\n{RIGHT_CLOSURE}"
    )


def number(loss: Any) -> float:
    """The loss as a Python number."""
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


@contextmanager
def restored(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put the parameters back when the block ends, bit for bit; yields copies of them.

    (Subtracting what was added leaves a rounding error, which adds up over steps.)
    """
    before = copies(params)
    try:
        yield before
    finally:
        with torch.no_grad():
            if params:
                torch._foreach_copy_(list(params), before)


def common(module: Module, params: Sequence[Tensor], name: str) -> Any:
    """A hyper-parameter that must be the same for all parameters, since the module treats them as one.

    Raises:
        OptionError: it is not.
    """
    values = [module.get_settings(param)[name] for param in (params[:1] if module.has_one_choice else params)]
    for value in values:
        if value is not values[0] and value != values[0]:
            raise OptionError(
                f"{module.place}: {name} is {values[0]!r} for one parameter and {value!r} for another, but the module treats "
                "all parameters as one; give all groups the same value"
            )
    return values[0]
