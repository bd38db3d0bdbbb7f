"""How modules read annotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from graphopt import annotations as noted
from graphopt.annotations import (
    GRAD_SNR,
    GRAD_VARIANCE,
    NUM_SAMPLES,
    SUM_GRAD_SQUARED,
    SUM_POSITION_GRAD_SQUARED,
    Key,
)
from graphopt.errors import MissingAnnotation
from graphopt.optim.core.arithmetic import zeros
from graphopt.optim.core.module import Module, walk
from graphopt.optim.core.var import Var

_MAX_NAMES = 10

_MISSING = """\
{place} needs {key} of its parameters, but {num_missing} of {num_params} with a gradient have none: {names}.
It is provided by {provider}, and exists between backward() and the zero_grad() that follows. Nothing was changed.
Call graphopt.transform(model) before training; graphopt.records(model) says what the pass skipped, and why. m.Split gives
parameters without it to other modules."""

_ZERO_WITH_GRADIENT = {key.name for key in (SUM_GRAD_SQUARED, SUM_POSITION_GRAD_SQUARED, GRAD_VARIANCE, GRAD_SNR)}


def check_notes(modules: Sequence[Module], var: Var, indices: Sequence[int], name: Callable[[Tensor], str]) -> None:
    """Check that modules will find what they read.

    Args:
        modules: a chain.
        var: the step.
        indices: numbers of the parameters that the chain sees.
        name: a parameter for an error.

    Raises:
        MissingAnnotation: parameters lack an annotation; the text names module, parameters and pass.
    """
    for module in modules:
        for key in module.reads:
            _check_note(module, key, var, indices, name)
        if type(module).check_annotations is not Module.check_annotations:
            for index in indices:
                module.check_annotations(var.params[index], var.notes_of(index, module.reads), name)
        for child, chain in module.children.items():
            if any(below.reads for below in walk(chain)):
                seen = set(module.params_for(child, var))
                check_notes(chain, var, [index for index in indices if index in seen], name)


def _check_note(module: Module, key: Key[Any], var: Var, indices: Sequence[int], name: Callable[[Tensor], str]) -> None:
    missing = []
    for index in indices:
        try:
            var.notes_of(index, [key])
        except MissingAnnotation:
            missing.append(var.params[index])
    if missing:
        names = "; ".join(map(name, missing[:_MAX_NAMES]))
        more = f"; and {len(missing) - _MAX_NAMES} more" if len(missing) > _MAX_NAMES else ""
        raise MissingAnnotation(
            _MISSING.format(
                place=module.place,
                key=key.name,
                num_missing=len(missing),
                num_params=len(indices),
                names=names + more,
                provider=key.provider,
            )
        )


def read_note(param: Tensor, key: Key[Any]) -> Any:
    """The annotation of a parameter; where the gradient is zero everywhere and nothing is published, zero, as it must be.

    (``torch.distributed.checkpoint`` makes a step with zero gradients before there is any statistic, and so does
    ``zero_grad(set_to_none=False)`` for a parameter that a batch does not reach.)

    Raises:
        MissingAnnotation: there is none, and the gradient is not zero.
        StaleAnnotation: it no longer belongs to the gradient.
    """
    value = noted.find(param, key)
    if value is None and param.grad is not None:
        if key.name in _ZERO_WITH_GRADIENT and not param.grad.any():
            return zeros(param)
        if key.name == NUM_SAMPLES.name and not param.grad.any():
            return 0
    return noted.get(param, key) if value is None else value
