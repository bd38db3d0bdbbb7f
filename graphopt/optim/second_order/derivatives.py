"""Matrices of derivatives by automatic differentiation, and the errors of operators that have no second derivative."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ModuleError, NonFiniteError, UnsupportedError
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var

_NUM_ROWS = 256  # that are differentiated at once: each holds a copy of the gradients of all activations


def graph_of_loss(module: Module, var: Var, option: str, instead: str) -> Tensor:
    """The loss with its graph, from one evaluation of ``closure(False)``.

    Args:
        module: for errors.
        var: parameters and closure.
        option: which the user has chosen, as he has written it, for errors.
        instead: what he could write instead.

    Raises:
        ModuleError: the gradients of the closure are not those of its loss, or the loss has no graph.
    """
    check_graph(module, var, option, instead)
    loss: Tensor = var.evaluate(backward=False, with_graph=True)
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        raise ModuleError(
            f"{module.place}: {option}, but the loss of closure(False) does not require gradients; nothing "
            f"was changed. Take torch.no_grad() out of the closure, or use {instead}"
        )
    return loss


def check_graph(module: Module, var: Var, option: str, instead: str) -> None:
    """Raise `ModuleError` if the gradients of the closure are not those of its loss."""
    if not var.closure_has_graph:
        raise ModuleError(
            f"{module.place}: {option} behind a module that has replaced the closure by one with other gradients; "
            f"nothing was changed. Use {instead}, which evaluate those gradients"
        )


def check_twice_differentiable(module: Module, tensors: Sequence[Tensor], instead: str) -> None:
    """Raise `UnsupportedError` if there is an operator in the graph that can be differentiated once only.

    Autograd raises it for those of torch. What is behind a ``torch.autograd.Function`` that says so is left out of the
    graph, and taken for a constant without a word.
    """
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().endswith("::Error"):
            raise UnsupportedError(
                f"{module.place}: the loss cannot be differentiated so often (a function in it is marked with "
                f"@once_differentiable); nothing was changed. {instead}"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def gradients_with_graph(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients that can be differentiated again."""
    with torch.enable_grad():
        return torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)


@contextmanager
def second_derivatives(module: Module, instead: str) -> Iterator[None]:
    """Say what to do where an operator cannot be differentiated twice."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(
            f"{module.place}: the loss cannot be differentiated so often ({reason}); nothing was changed. {instead}"
        ) from error


def jacobian(outputs: Tensor, params: Sequence[Tensor], vectorize: bool = True, create_graph: bool = False) -> Tensor:
    """Derivatives of each element of a vector by each element of the parameters.

    Args:
        outputs: shape (m,).
        params: of n elements together.
        vectorize: compute many rows at once by ``vmap``. Operators without a rule for that are computed row by row.
        create_graph: whether the result can be differentiated.

    Returns:
        A matrix of shape (m, n).
    """
    size = sum(param.numel() for param in params)
    if not outputs.requires_grad or outputs.numel() == 0 or size == 0:
        return outputs.new_zeros(outputs.numel(), size)
    if vectorize:
        try:
            return _rows(outputs, params, _NUM_ROWS, create_graph)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operator that vmap does not know, or one that raises below, too
            pass
    return _rows(outputs, params, None, create_graph)


def _rows(outputs: Tensor, params: Sequence[Tensor], num_rows: int | None, create_graph: bool) -> Tensor:
    size = outputs.numel()
    blocks: list[Tensor] = []
    with torch.enable_grad():
        for first in range(0, size, num_rows or 1):
            count = min(num_rows or 1, size - first)
            weights = torch.zeros(count, size, dtype=outputs.dtype, device=outputs.device)
            weights[torch.arange(count), torch.arange(first, first + count)] = 1
            parts = torch.autograd.grad(
                outputs,
                params,
                grad_outputs=weights if num_rows else weights[0],
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=num_rows is not None,
            )
            blocks.append(
                torch.cat(
                    [
                        outputs.new_zeros(count, param.numel())
                        if part is None
                        else part.reshape(count, -1).to(outputs.dtype)
                        for part, param in zip(parts, params, strict=True)
                    ],
                    dim=1,
                )
            )
        return torch.cat(blocks)


def check_curvature(module: Module, curvature: Tensor, update: Tensor) -> None:
    """Raise if there is no curvature, or no finite one; products with the Hessian do as well as the Hessian itself."""
    if not bool(torch.isfinite(curvature).all()):
        raise NonFiniteError(
            f"{module.place}: the second derivatives of the loss hold NaN or infinities; nothing was changed. Start from "
            "parameters where they are finite (the root of 0 and norms of zeros have none)"
        )
    if not bool(curvature.any()) and bool(update.any()):
        raise ModuleError(
            f"{module.place}: the second derivatives of the loss are zero, as of a (piecewise) linear function, so that "
            "Newton's method has no step; nothing was changed. Use a module that needs gradients only, such as m.Adam() or "
            "m.BFGS()"
        )
