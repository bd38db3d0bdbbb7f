"""The ways to get, beside the gradient, the sum over samples of the squared per-sample gradient.

Each function takes a workload and returns a ``Method``. After its ``backward`` every parameter has ``p.grad``, and
``p.sum_grad_squared``: with g_n sample n's contribution to ``p.grad``, the sum over
n of g_n squared. Peers are used the way their own documents do; where there is a choice, the fastest one is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.workloads import Batch, Workload


@dataclass(frozen=True)
class Method:
    """How a rival does forward, loss and backward.

    Args:
        backward: Leaves the gradient and, if the rival has it, the statistic on the parameters of ``workload.model``.
        clear: What the rival needs beside ``p.grad = None`` before the next step.
        has_statistic: Whether it claims to have the statistic.
    """

    backward: Callable[[], object]
    clear: Callable[[], object] = lambda: None
    has_statistic: bool = True


def eager(workload: Workload) -> Method:
    """PyTorch without a compiler; no statistic."""
    return Method(lambda: workload.loss().backward(), has_statistic=False)


def inductor(workload: Workload) -> Method:
    """``torch.compile``; no statistic."""
    compiled = torch.compile(workload.model)
    return Method(lambda: workload.loss(compiled).backward(), has_statistic=False)


def graphopt(workload: Workload, *, true_grad: bool = True, square_dtype: str | None = None) -> Method:
    """``graphopt.transform`` with the pass TrueGrad, or with no pass at all."""
    import graphopt as framework
    from graphopt import passes

    dtype = None if square_dtype is None else getattr(torch, square_dtype)
    framework.transform(workload.model, passes=[passes.TrueGrad(square_dtype=dtype)] if true_grad else [])
    return Method(lambda: workload.loss().backward(), has_statistic=true_grad)


def vmap_grad(workload: Workload, *, chunk: int, compiled: bool = False) -> Method:
    """``torch.func``: the gradients of ``chunk`` samples at a time, added and squared."""
    model, num_samples = workload.model, workload.num_samples

    def loss(parameters: dict[str, Tensor], sample: Batch) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, parameters, args, kwargs)

        one = {name: tensor.unsqueeze(0) for name, tensor in sample.items()}
        return workload.loss(call, one) / num_samples

    per_sample = vmap(grad(loss), in_dims=(None, 0), randomness="different")

    def sums(parameters: dict[str, Tensor], samples: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gradients = per_sample(parameters, samples)
        totals = {name: gradient.sum(0) for name, gradient in gradients.items()}
        return totals, {name: gradient.square().sum(0) for name, gradient in gradients.items()}

    if compiled:
        sums = torch.compile(sums)

    def backward() -> None:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for start in range(0, num_samples, chunk):
            part = {name: tensor[start : start + chunk] for name, tensor in workload.batch.items()}
            totals, squares = sums(parameters, part)
            for name, parameter in model.named_parameters():
                if start == 0:
                    parameter.grad, parameter.sum_grad_squared = totals[name], squares[name]
                else:
                    parameter.grad += totals[name]
                    parameter.sum_grad_squared += squares[name]

    return Method(backward, lambda: _forget(workload.model, "sum_grad_squared"))


def opacus(workload: Workload) -> Method:
    """Opacus' hooks, which store all per-sample gradients; their squares are added here."""
    from opacus.grad_sample import GradSampleModule

    tokens = workload.batch.get("input_ids")
    if (
        tokens is not None
    ):  # its hooks see samples on the first axis of each layer's input; BERT's own positions are one row
        workload.batch["position_ids"] = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
    # With "sum" a per-sample gradient is what the sample contributes to p.grad; "mean" multiplies it by the batch size.
    wrapped = GradSampleModule(workload.model, loss_reduction="sum", strict=False)

    def backward() -> None:
        workload.loss(wrapped).backward()
        for parameter in workload.model.parameters():
            if getattr(parameter, "grad_sample", None) is not None:
                parameter.sum_grad_squared = parameter.grad_sample.square().sum(0)
                parameter.grad_sample = None

    return Method(backward, lambda: _forget(workload.model, "sum_grad_squared"))


def backpack(workload: Workload) -> Method:
    """BackPACK's extension SumGradSquared; it needs to see the loss as a module, so it is for the MLP."""
    import backpack as package
    from backpack.extensions import SumGradSquared

    model, criterion = package.extend(workload.model), package.extend(nn.CrossEntropyLoss())

    def backward() -> None:
        loss = criterion(model(workload.batch["x"]), workload.batch["y"])
        with package.backpack(SumGradSquared()):
            loss.backward()

    return Method(backward, lambda: _forget(workload.model, "sum_grad_squared"))


def truegrad_patch_model(workload: Workload) -> Method:
    """The forerunner's ``patch_model``, which makes every parameter a TrueGradParameter."""
    from truegrad.utils import patch_model

    patch_model(workload.model)
    return Method(lambda: workload.loss().backward(), lambda: _forget(workload.model, "sum_grad_squared"))


def truegrad_nn(workload: Workload) -> Method:
    """The forerunner's own layers, with the weights of the workload's; for the MLP."""
    from truegrad.nn import Linear

    for name, layer in list(workload.model.named_children()):
        if isinstance(layer, nn.Linear):
            own = Linear(layer.in_features, layer.out_features)
            own.load_state_dict(layer.state_dict())
            setattr(workload.model, name, own)
    return Method(lambda: workload.loss().backward(), lambda: _forget(workload.model, "sum_grad_squared"))


def _forget(model: nn.Module, attribute: str) -> None:
    for parameter in model.parameters():
        if hasattr(parameter, attribute):
            delattr(parameter, attribute)
