"""What the TrueGrad modules share: the square that they average, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED
from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import larger
from graphopt.optim.core.context import Context, Settings
from graphopt.optim.core.module import Rule

Preconditioner = Literal["mean_square", "variance", "squared_mean"]


class PerSampleRule(Rule):
    """A rule that averages squares taken sample by sample.

    With g the gradient, s its ``SUM_GRAD_SQUARED`` and n its ``NUM_SAMPLES``, the square is n s, the mean of the squared
    per-sample gradients of a mean loss (``preconditioner="mean_square"``); ``max(n s - g², 0)``, their variance
    (``"variance"``); or g² (``"squared_mean"``). All three belong to the gradient, whatever the modules before this one have
    made of the update: those that rescale it (``ClipNorm``) rescale what is divided and not what divides.

    On the scale of n s see `graphopt.optim.TGAdamW`.
    """

    reads = (SUM_GRAD_SQUARED, NUM_SAMPLES)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise `OptionError` if there is no such preconditioner."""
        if settings["preconditioner"] not in get_args(Preconditioner):
            raise OptionError(
                f"{self.place}: preconditioner={settings['preconditioner']!r}; expected one of "
                f"{', '.join(map(repr, get_args(Preconditioner)))}"
            )

    def check_annotations(self, param: Tensor, notes: Mapping[str, Any], name_of: Callable[[Tensor], str]) -> None:
        """Raise `OptionError` if the statistic is not one of this parameter, or says nothing about a variance."""
        statistic, num_samples = notes[SUM_GRAD_SQUARED.name], notes[NUM_SAMPLES.name]
        if statistic.shape != param.shape or statistic.device != param.device:
            raise OptionError(
                f"{self.place}, {name_of(param)}: {SUM_GRAD_SQUARED.name} has shape {tuple(statistic.shape)} on "
                f"{statistic.device}, expected the parameter's shape on {param.device}. Nothing was changed"
            )
        if self.get_settings(param).preconditioner == "variance" and num_samples == 1:
            raise OptionError(
                f"{self.place}, {name_of(param)}: preconditioner='variance' needs the gradients of at least 2 samples and "
                "found 1. Accumulate micro-batches before the step, drop the last batch if it is of one sample "
                "(DataLoader(drop_last=True)), or pass preconditioner='mean_square'. Nothing was changed"
            )

    def square(self, settings: Settings, context: Context) -> Tensor:
        """What is averaged, like the parameter."""
        grad = context.grad
        if settings.preconditioner == "squared_mean":
            return grad * grad
        num_samples = context.read(NUM_SAMPLES)
        if isinstance(num_samples, Tensor):
            num_samples = num_samples.to(grad.dtype)
        mean_square: Tensor = context.read(SUM_GRAD_SQUARED).to(grad.dtype) * num_samples
        return mean_square if settings.preconditioner == "mean_square" else larger(mean_square - grad * grad, 0.0)
