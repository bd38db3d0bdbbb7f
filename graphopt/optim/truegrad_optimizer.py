"""What all optimizers that read TrueGrad's statistic share: reading and clearing it, and loading their state."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from graphopt import annotations
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED
from graphopt.errors import MissingAnnotation, OptionError, StaleAnnotation, UnsupportedError

_MAX_NAMES = 10

_MISSING = """\
{optimizer}.step(): {num_missing} of {num_params} parameters with a gradient have no {key}: {names}.
It is provided by {provider}, and exists between backward() and the zero_grad() that follows.
Nothing was changed. Either
  - call graphopt.transform(model) before training; graphopt.records(model) says what the pass skipped, and why; or
  - pass default_to_baseline=True: AdamW for the parameters that lack the statistic; or
  - put these parameters into a group with enforce_baseline=True."""


class Gradient(NamedTuple):
    """A parameter that has a gradient, and what its update needs to know."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    statistic: Tensor | None  # SUM_GRAD_SQUARED; None: take the baseline step
    num_samples: int


class TrueGradOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose groups have the options ``default_to_baseline`` and ``enforce_baseline``.

    A subclass calls `_gradients` at the start of ``step`` and changes no parameter before it has returned. Its state
    for a parameter is `counts`, and tensors of the parameter's shape in `state_dtype`.
    """

    counts: ClassVar[frozenset[str]] = frozenset({"step", "num_statistics"})

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
        self._check_options({**self.defaults, **param_group})
        if not isinstance(param_group["params"], (Tensor, set)):  # torch has an error of its own for sets
            param_group["params"] = list(param_group["params"])
        for param in _tensors(param_group["params"]):
            if isinstance(param, Tensor) and param.is_complex():
                raise UnsupportedError(
                    f"{type(self).__name__}: a parameter of shape {tuple(param.shape)} is complex ({param.dtype}), but "
                    "squares of per-sample gradients are defined for real ones. Make torch.view_as_real(param) the "
                    "parameter"
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

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise `OptionError` if an option of the group is not valid."""
        name = type(self).__name__
        if group["differentiable"]:
            raise OptionError(
                f"{name}: differentiable=True is not supported, the update is made in place. Use a step of "
                "graphopt.optim.functional, or torch.optim.AdamW(differentiable=True)"
            )
        if group["capturable"]:
            raise OptionError(
                f"{name}: capturable=True is not supported. Each step pairs gradients with their statistics in Python, "
                "which a replayed CUDA graph would leave out. Capture forward and backward only"
            )
        if group["fused"] and group["foreach"]:
            raise OptionError(f"{name}: fused=True and foreach=True exclude each other; pass one of them")

    def _gradients(self) -> list[Gradient]:
        """Every parameter that has a gradient, with its statistic.

        Raises:
            MissingAnnotation: parameters have no statistic, in groups that need one; the text names them.
            StaleAnnotation: a gradient was changed in a way that is not a rescaling.
            UnsupportedError: a gradient is sparse.
        """
        gradients, missing = [], []
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise UnsupportedError(
                        f"{type(self).__name__}.step(): the gradient of {self._name(param)} is sparse ({grad.layout}), "
                        "and there are no per-sample squares of those. Build the layer with sparse=False, or give this "
                        "parameter to torch.optim.SparseAdam"
                    )
                statistic, num_samples = None, 1
                if not group["enforce_baseline"]:
                    statistic, num_samples = self._statistic(param)
                    if statistic is None and not group["default_to_baseline"]:
                        # torch.distributed.checkpoint makes a step with zero gradients before there is any statistic.
                        if grad.any():
                            missing.append(param)
                        statistic = grad.to(state_dtype(param))
                gradients.append(Gradient(group, param, grad, statistic, num_samples))
        if missing:
            names = "; ".join(self._name(param) for param in missing[:_MAX_NAMES])
            raise MissingAnnotation(
                _MISSING.format(
                    optimizer=type(self).__name__,
                    num_missing=len(missing),
                    num_params=len(gradients),
                    key=SUM_GRAD_SQUARED.name,
                    names=names + ("; ..." if len(missing) > _MAX_NAMES else ""),
                    provider=SUM_GRAD_SQUARED.provider,
                )
            )
        return gradients

    def _statistic(self, param: Tensor) -> tuple[Tensor | None, int]:
        try:
            statistic = annotations.find(param, SUM_GRAD_SQUARED)
        except StaleAnnotation as error:
            raise StaleAnnotation(f"{type(self).__name__}.step(), {self._name(param)}: {error}") from error
        if statistic is None:
            return None, 1
        if statistic.shape != param.shape or statistic.device != param.device:
            raise OptionError(
                f"{type(self).__name__}.step(), {self._name(param)}: {SUM_GRAD_SQUARED.name} has shape "
                f"{tuple(statistic.shape)} on {statistic.device}, expected the parameter's shape on {param.device}"
            )
        num_samples = annotations.find(param, NUM_SAMPLES)
        return statistic, num_samples or 1  # one that was assigned by hand (BackPACK) has no count, and stands as it is

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
                if name in self.counts:
                    self.state[param][name] = new_count(float(value))
                elif isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device, state_dtype(param), copy=True)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of moments: the parameter's, at least float32."""
    return torch.promote_types(param.dtype, torch.float32)


def new_count(value: float = 0.0) -> Tensor:
    """A count in the state: shape (), float32, on the CPU, like torch's ``step``."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _tensors(params: Iterable[Any]) -> Iterator[Any]:
    """The tensors of a group: one tensor, tensors, or pairs of a name and a tensor."""
    for entry in [params] if isinstance(params, Tensor) else params:
        yield entry[1] if isinstance(entry, tuple) else entry
