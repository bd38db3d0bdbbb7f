"""`TrueGradParameter`: the type that parameters with a statistic appear to have.

Nothing about the parameters themselves changes (their class decides how Dynamo, DDP and optimizers treat them), so membership is
a question that ``isinstance`` asks a table: which modules serve this parameter, and do they still?
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

Serves = Callable[[nn.Module], bool]

_owners: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # parameter -> [(weak reference to a module, whether it still serves)]


def enlist(param: nn.Parameter, module: nn.Module, still_serves: Serves) -> None:
    """Let ``isinstance(param, TrueGradParameter)`` hold as long as ``module`` lives and ``still_serves(module)``."""
    owners = [entry for entry in _owners.get(param, ()) if _is_alive(entry)]
    _owners[param] = [*owners, (weakref.ref(module), still_serves)]


def is_enlisted(param: Any, still_serves: Serves) -> bool:
    """Whether a module that was enlisted with this function serves the parameter."""
    return any(entry[1] is still_serves and _is_alive(entry) for entry in _owners.get(param, ()))


class _ByTable(type(nn.Parameter)):  # type: ignore[misc]  # torch's own metaclass, which has no stub
    """Instances are looked up."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, nn.Parameter) and any(_is_alive(entry) for entry in _owners.get(instance, ()))

    def __repr__(cls) -> str:
        return "graphopt.nn.TrueGradParameter"


class TrueGradParameter(nn.Parameter, metaclass=_ByTable):
    """What parameters of the modules in `graphopt.nn.modules`, and of patched models, are instances of.

    Such a parameter carries ``sum_grad_squared`` and ``num_samples`` after ``backward()``. Its real class stays
    ``torch.nn.Parameter``: it becomes a `TrueGradParameter` by being used in such a module, not by being built as one.

        >>> import torch, graphopt
        >>> layer, plain = graphopt.nn.Linear(2, 3), torch.nn.Linear(2, 3)
        >>> isinstance(layer.weight, graphopt.nn.TrueGradParameter)
        True
        >>> isinstance(plain.weight, graphopt.nn.TrueGradParameter)
        False
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> TrueGradParameter:
        """Refuse: what gives a parameter its statistic is the module that uses it.

        Raises:
            TypeError: always, with what to type instead.
        """
        raise TypeError(
            "a TrueGradParameter cannot be built: the statistic comes from the module that uses the parameter. Use "
            "torch.nn.Parameter in a model that graphopt.patch_model(model) or graphopt.transform(model) prepares, or a module "
            "of graphopt.nn"
        )


def _is_alive(entry: tuple[weakref.ref[nn.Module], Serves]) -> bool:
    module, still_serves = entry[0](), entry[1]
    return module is not None and still_serves(module)
