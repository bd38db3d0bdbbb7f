"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import average, choose, debias, larger, root, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.core.renamed import renamed


class RMSpropState(NamedTuple):
    """The average of powers, like the parameter, at least float32."""

    square_avg: Tensor


class CenteredState(NamedTuple):
    """The average of powers, and that of updates."""

    square_avg: Tensor
    grad_avg: Tensor


class AMSState(NamedTuple):
    """The average of powers, and the largest so far."""

    square_avg: Tensor
    max_square_avg: Tensor


class CenteredAMSState(NamedTuple):
    """The average of powers, that of updates, and the largest variance so far."""

    square_avg: Tensor
    grad_avg: Tensor
    max_square_avg: Tensor


_STATES: dict[tuple[bool, bool], type[tuple[Any, ...]]] = {
    (False, False): RMSpropState,
    (True, False): CenteredState,
    (False, True): AMSState,
    (True, True): CenteredAMSState,
}


@renamed(debias="debiased")
class RMSprop(Rule):
    """The update, divided by the root of the average of its squares.

    ``v = smoothing v + (1 - smoothing) |u|^pow``, update ``inner(u) / (v^(1/pow) + eps)``.

    Args:
        smoothing: of the averages; ``alpha`` of `torch.optim.RMSprop`.
        eps: added to the denominator; in units of the gradient.
        centered: divide by the standard deviation: the square of the average of updates is subtracted from ``v``.
        debiased: divide ``v`` by ``1 - smoothing^t``.
        amsgrad: divide by the largest ``v`` so far.
        pow: the power that is averaged.
        init: where ``v`` starts, at ``"zeros"`` or at the power of the first ``"update"``; the average of updates at zeros.
        inner: modules that make of the update what is divided; with an average, and ``debiased``, this is nearly `Adam`.

    Raises:
        OptionError: a number is out of range, or options contradict each other.

    Reference: Tieleman, Hinton, "Lecture 6.5: rmsprop", COURSERA: Neural Networks for Machine Learning, 2012. Graves,
    "Generating sequences with recurrent neural networks", arXiv:1308.0850, 2013, equations 38 to 40, for ``centered``.
    """

    bounds = numbers(smoothing=DECAY, eps=NON_NEGATIVE)

    def __init__(
        self,
        smoothing: Number = 0.99,
        eps: Number = 1e-8,
        *,
        centered: bool = False,
        debiased: bool = False,
        amsgrad: bool = False,
        pow: float = 2.0,
        init: Literal["zeros", "update"] = "zeros",
        inner: Any = None,
    ) -> None:
        super().__init__(
            {
                "smoothing": smoothing,
                "eps": eps,
                "centered": centered,
                "debiased": debiased,
                "amsgrad": amsgrad,
                "pow": pow,
                "init": init,
            },
            **({} if inner is None else {"inner": inner}),
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what contradicts."""
        if not settings["pow"] > 0:
            raise OptionError(f"{self.place}: pow={settings['pow']!r}; expected a positive number")
        if settings["init"] not in ("zeros", "update"):
            raise OptionError(f"{self.place}: init={settings['init']!r}; expected 'zeros' or 'update'")
        if settings["debiased"] and settings["init"] == "update":
            raise OptionError(
                f"{self.place}: debiased=True corrects an average for starting at zero, but with init='update' it does not; "
                "write init='zeros', or debiased=False"
            )
        if settings["centered"] and settings["pow"] != 2:
            raise OptionError(f"{self.place}: centered=True with pow={settings['pow']!r}; a variance needs pow=2")

    def state_type(self, settings: Settings) -> type[tuple[Any, ...]]:
        """With ``centered`` and ``amsgrad`` there is one more tensor each."""
        return _STATES[settings.centered, settings.amsgrad]

    def init(self, param: Tensor, settings: Settings) -> tuple[Tensor, ...]:
        """Zeros."""
        fields = getattr(self.state_type(settings), "_fields")  # noqa: B009
        return _state(settings, {name: zeros(param) for name in fields})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        smoothing, power = settings.smoothing, settings.pow
        square = update * update if power == 2 else update.abs() ** power
        square_avg = average(state.square_avg, square, smoothing)
        if settings.init == "update":
            square_avg = choose(context.count == 1, square, square_avg)
        news = {"square_avg": square_avg}
        divisor = square_avg
        if settings.centered:
            news["grad_avg"] = average(state.grad_avg, update, smoothing)
            divisor = larger(square_avg - news["grad_avg"] * news["grad_avg"], 0.0)  # rounding may make it negative
        if settings.amsgrad:
            divisor = news["max_square_avg"] = divisor.maximum(state.max_square_avg)
        if power == 2:
            # The root of the number, once, instead of the number into each element.
            scale: Number = root(debias(smoothing, context.count)) if settings.debiased else 1.0
            divisor = divisor.sqrt() / scale
        else:
            scale = debias(smoothing, context.count) if settings.debiased else 1.0
            divisor = (divisor / scale) ** (1 / power)
        return context.operands.get("inner", update) / (divisor + settings.eps), _state(settings, news)


def _state(settings: Settings, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    kind: Any = _STATES[settings.centered, settings.amsgrad]
    state: tuple[Tensor, ...] = kind(**tensors)
    return state
