"""What the tests of TrueGrad share: capture a graph without compiling it, and compare a trained step with the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.capture import CapturedGraph, Input, InputKind, NamedTensors, describe_inputs, lower, mark_samples
from graphopt.passes import TrueGrad
from tests.models import double, smooth
from tests.oracle import Statistic, loop_over_samples


def capture(model: nn.Module, *inputs: Any, sample_axis: Any = 0) -> CapturedGraph:
    """The graph as passes get it, through Dynamo."""
    found = []

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        found.append(
            lower(graph_module, describe_inputs(graph_module, example_inputs, NamedTensors.of(model), sample_axis))
        )
        return graph_module.forward

    mark_samples(model.forward, inputs, {}, sample_axis)
    torch.compile(lambda *args: model(*args), backend=backend)(*inputs)
    (graph,) = found
    return graph


def trace(function: Callable[..., Any], *tensors: Tensor, axes: tuple[int | None, ...] = (0,)) -> CapturedGraph:
    """The graph of a function whose inputs hold samples on the given axes; much faster than Dynamo."""
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for position, (tensor, axis) in enumerate(zip(tensors, axes, strict=True)):
        sizes = [DimDynamic.DUCK if index == axis else DimDynamic.STATIC for index in range(tensor.ndim)]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = torch._dynamo.source.ConstantSource(f"x{position}")
        fakes.append(fake_mode.from_tensor(tensor, source=source, symbolic_context=context))
    with fake_mode:
        graph_module = make_fx(function, pre_dispatch=True)(*fakes)
    inputs = [
        Input(InputKind.CONSTANT if axis is None else InputKind.SAMPLES, f"x{position}", sample_axis=axis)
        for position, axis in enumerate(axes)
    ]
    return CapturedGraph(graph_module, inputs, fakes, fake_mode)


def train_step(
    model: nn.Module, inputs: tuple[Any, ...], loss: Any = smooth, reduction: str = "sum", axis: int = 0
) -> Tensor:
    """Forward and backward from cleared gradients; returns the model's output."""
    model.zero_grad()
    output = model(*inputs)
    weight = 1 / inputs[0].shape[axis] if reduction == "mean" else 1.0
    (weight * loss(output)).backward()
    return output.detach()


def assert_statistics(
    model: nn.Module, expected: dict[str, Statistic], num_samples: int, what: str = "", **tolerance: Any
) -> None:
    """Gradient, statistic and count of every trainable parameter."""
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    for name, param in model.named_parameters():
        if name not in expected:
            assert find(param, SUM_GRAD_SQUARED) is None, f"{what} {name}"
            continue
        for value, reference in (
            (param.grad, expected[name].grad),
            (find(param, SUM_GRAD_SQUARED), expected[name].sum_grad_squared),
        ):
            assert value is not None, f"{what} {name}"
            torch.testing.assert_close(
                value.to(reference.dtype), reference, **tolerance, msg=lambda text, n=name: f"{what} {n}: {text}"
            )
        assert find(param, NUM_SAMPLES) == num_samples, f"{what} {name}"


def check(
    module: nn.Module,
    inputs: tuple[Any, ...],
    *,
    axes: Any = 0,
    num_samples: int | None = None,
    loss: Any = smooth,
    compiler: str = "aot_eager",
    options: dict[str, Any] | None = None,
    **pass_options: Any,
) -> nn.Module:
    """One step in float64 against the loop over samples; returns the transformed model."""
    model, inputs = double(module, inputs)
    expected = loop_over_samples(model, inputs, loss, reduction="sum", axes=axes)
    reference = copy.deepcopy(model)
    plain = train_step(reference, inputs, loss)
    graphopt.transform(model, [TrueGrad(**pass_options)], compiler=compiler, options=options)
    output = train_step(model, inputs, loss)
    torch.testing.assert_close(output, plain, rtol=1e-10, atol=1e-12)
    axis = axes if isinstance(axes, int) else axes.get(0, 0)
    assert_statistics(model, expected, inputs[0].shape[axis] if num_samples is None else num_samples)
    return model
