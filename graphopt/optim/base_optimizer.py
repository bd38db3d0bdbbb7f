"""What all optimizers of this folder share: closures, checks, clearing of statistics, and state that survives a file."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt import _compat, annotations
from graphopt.errors import OptionError, UnsupportedError
from graphopt.optim.weight_decay import WeightDecay, WeightDecayChain


class BaseOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose state keeps at least float32, and whose weight decay can be chosen.

    A subclass implements `_update_all`. Its state for a parameter is counts (`is_count`) and tensors in `state_dtype`.
    """

    # What is not an option of a group, but must be pickled and copied with the optimizer.
    _attributes: ClassVar[tuple[str, ...]] = ("weight_decay_cls",)
    _why_not_complex: ClassVar[str]

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], weight_decay_cls: WeightDecayChain | WeightDecay | None
    ) -> None:
        self.weight_decay_cls = _as_chain(type(self).__name__, weight_decay_cls)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._attributes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("weight_decay_cls", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and the gradients; called once, with gradients enabled.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            MissingAnnotation: parameters have no statistic; the text names them. Nothing was changed.
            StaleAnnotation: a gradient no longer belongs to its statistic. Nothing was changed.
            UnsupportedError: a gradient is sparse. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as torch does, and the statistics that belong to them."""
        super().zero_grad(set_to_none)
        annotations.clear(chain.from_iterable(group["params"] for group in self.param_groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not name take the defaults.

        Raises:
            OptionError: an option of the group is not valid.
            UnsupportedError: a parameter is complex.
        """
        name = type(self).__name__
        if "weight_decay_cls" in param_group:
            raise OptionError(
                f"{name}: weight_decay_cls is an option of the whole optimizer, not of a group (it cannot be saved with "
                "the group). Make one optimizer for each kind of decay, or set the group's weight_decay to 0"
            )
        self._check_options({**self.defaults, **param_group})
        if not isinstance(param_group["params"], (Tensor, set)):  # torch has an error of its own for sets
            param_group["params"] = list(param_group["params"])
        for param in _tensors(param_group["params"]):
            if isinstance(param, Tensor) and param.is_complex():
                raise UnsupportedError(
                    f"{name}: a parameter of shape {tuple(param.shape)} is complex ({param.dtype}), but "
                    f"{self._why_not_complex}. Make torch.view_as_real(param) the parameter"
                )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned. Tensors are copied, and moments keep at least float32.

        (torch casts loaded state to the parameter's dtype: a bfloat16 parameter would get bfloat16 moments.)
        """
        loaded: dict[str, Any] = {}
        before = self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(final))
        after = self.register_load_state_dict_post_hook(lambda _: self._restore_dtypes(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def check(self) -> None:
        """Raise what ``step`` would raise before it changes anything; without an error this does nothing."""

    @abstractmethod
    def _update_all(self) -> None:
        """Make one step; change no parameter and no state where it raises."""

    @_compat.disable_dynamo  # annotations are read in Python, and kernels are compiled here
    def _update(self) -> None:
        self._update_all()

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise `OptionError` if an option of the group is not valid."""
        name, lr = type(self).__name__, group["lr"]
        if (isinstance(lr, Tensor) and lr.numel() != 1) or not float(lr) >= 0.0:
            raise OptionError(f"{name}: lr={lr}; expected a number or a one-element tensor, at least 0")
        for option in ("eps", "weight_decay"):
            if option in group and not float(group[option]) >= 0.0:
                raise OptionError(f"{name}: {option}={group[option]}; expected a number, at least 0")

    def _name(self, param: Tensor) -> str:
        """The parameter for an error: its name, if ``named_parameters`` gave one, else its place; and its shape."""
        for group_index, group in enumerate(self.param_groups):
            for index, candidate in enumerate(group["params"]):
                if candidate is param:
                    names = group.get("param_names")
                    place = f"parameter {names[index]!r}" if names else f"parameter {index} of group {group_index}"
                    return f"{place}, shape {tuple(param.shape)}"
        raise AssertionError("the parameter belongs to no group")

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for identifier, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(identifier, {}).items():
                if is_count(name):
                    self.state[param][name] = new_count(float(value))
                elif isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device, state_dtype(param), copy=True)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of moments: the parameter's, at least float32."""
    return torch.promote_types(param.dtype, torch.float32)


def new_count(value: float = 0.0) -> Tensor:
    """A count in the state: shape (), float32, on the CPU, like torch's ``step``."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def is_count(name: str) -> bool:
    """Whether an entry of the state is a count: those are named ``step``, ``..._step`` or ``num_...``."""
    return name == "step" or name.endswith("_step") or name.startswith("num_")


def _as_chain(optimizer: str, weight_decay_cls: object) -> WeightDecayChain | None:
    if weight_decay_cls is None or isinstance(weight_decay_cls, WeightDecayChain):
        return weight_decay_cls
    if isinstance(weight_decay_cls, WeightDecay):
        return WeightDecayChain(weight_decay_cls)
    raise OptionError(
        f"{optimizer}: weight_decay_cls={weight_decay_cls!r}; expected an instance, as in "
        "weight_decay_cls=WeightDecayChain(WeightDecayToInit()), or None for plain L2 decay"
    )


def _tensors(params: Iterable[Any]) -> Iterator[Any]:
    """The tensors of a group: one tensor, tensors, or pairs of a name and a tensor."""
    for entry in [params] if isinstance(params, Tensor) else params:
        yield entry[1] if isinstance(entry, tuple) else entry
