"""Programs as calls of torch's ``_foreach`` functions: each operator once for all tensors, without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from graphopt.optim.core.flat.program import Program

aten = torch.ops.aten

_FOREACH: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch._foreach_add,
    aten.add.Scalar: torch._foreach_add,
    aten.sub.Tensor: torch._foreach_sub,
    aten.mul.Tensor: torch._foreach_mul,
    aten.mul.Scalar: torch._foreach_mul,
    aten.div.Tensor: torch._foreach_div,
    aten.div.Scalar: torch._foreach_div,
    aten.lerp.Tensor: torch._foreach_lerp,
    aten.lerp.Scalar: torch._foreach_lerp,
    aten.maximum.default: torch._foreach_maximum,
    aten.minimum.default: torch._foreach_minimum,
    aten.sqrt.default: torch._foreach_sqrt,
    aten.abs.default: torch._foreach_abs,
    aten.neg.default: torch._foreach_neg,
    aten.sign.default: torch._foreach_sign,
    aten.exp.default: torch._foreach_exp,
    aten.reciprocal.default: torch._foreach_reciprocal,
}
_WITH_NUMBER: dict[Any, Callable[..., Any]] = {
    aten.maximum.default: torch._foreach_clamp_min,
    aten.minimum.default: torch._foreach_clamp_max,
}
_TAKE_TENSORS = (aten.mul.Tensor, aten.div.Tensor)  # (with `add` it waits for the device)


class Foreach(Interpreter):
    """Runs the body of a program on lists of tensors.

    A value is a list with one tensor for each tensor, or a number that is the same for all.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.body)
        self._program = program

    def __call__(self, row: Tensor, *elements: Sequence[Tensor]) -> None:
        """Run it and write to the targets.

        Args:
            row: the numbers; on the host they become arguments of the calls.
            *elements: for each element the list of its tensors.
        """
        outputs: list[Any] = super().run(row, *[list(element) for element in elements])
        for target, output in zip(self._program.targets, outputs, strict=True):
            olds = list(elements[target])
            news = output if isinstance(output, list) else [output] * len(olds)
            torch._foreach_copy_(olds, [new.expand(old.shape) for new, old in zip(news, olds, strict=True)])

    def run_node(self, n: Node) -> Any:
        """Run one operator for all tensors."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        lists = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, list)]
        if not lists:
            return n.target(*args, **kwargs)  # type: ignore[operator]
        call = None if kwargs or not isinstance(args[0], list) else _call(n.target, args[0][0].dtype, args[1:])
        if call is not None:
            return list(call[0](args[0], *call[1]))
        return [
            n.target(  # type: ignore[operator]
                *[_item(arg, index) for arg in args], **{key: _item(arg, index) for key, arg in kwargs.items()}
            )
            for index in range(len(lists[0]))
        ]


def _call(target: Any, dtype: torch.dtype, others: Sequence[Any]) -> tuple[Callable[..., Any], list[Any]] | None:
    """The ``_foreach`` function for an operator whose first argument is a list, and its other arguments."""
    others = [arg.item() if isinstance(arg, Tensor) and arg.device.type == "cpu" else arg for arg in others]
    is_device_number = any(isinstance(arg, Tensor) for arg in others)
    if is_device_number:
        # (there a number of float64 would widen the tensors)
        return (_FOREACH[target], [arg.to(dtype) for arg in others]) if target in _TAKE_TENSORS else None
    if others and not isinstance(others[0], list) and target in _WITH_NUMBER:
        return _WITH_NUMBER[target], others
    function = _FOREACH.get(target)
    return None if function is None else (function, others)


def _item(arg: Any, index: int) -> Any:
    return arg[index] if isinstance(arg, list) else arg
