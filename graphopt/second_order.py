"""Compile a region so that its gradient can be differentiated again.

What AOTAutograd compiles is differentiable once. A region that shall be differentiated twice is cut into two functions first,

    forward(inputs) -> outputs, saved            backward(saved, tangents) -> gradients

each of plain operators, and each compiled as a function that is differentiable once. `_Region` joins them: it returns ``saved``
beside the outputs, as values with a gradient, so that the derivative of ``backward`` with respect to ``saved`` finds its way to
the inputs. No part runs twice: a gradient of a function of the gradient takes one forward, one backward, and one backward of
each.

There are two kinds of backward pass, and `gradients` says which one runs. Its own gives gradients of parameters as **values**:
``backward``. Every other one propagates to the scales of `graphopt.passes.GradInit`: the derivative of ``forward``.

A scale stands in the graph as ``graphopt.scale_parameter(weight, scale, probe)``, that is ``scale * weight + probe``. The probe
is zero and takes no memory; the gradient with respect to it is that of the scaled weight. Where a weight goes into an operator
that is linear in it, the product is not made: ``f(x, scale * w) = scale * f(x, w)``. The derivative with respect to the scale is
a sum over ``f(x, w)`` then, so that neither derivative of a matrix product has to be summed into a gradient of the weight in the
second pass: 4 matrix products instead of 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.aliasing import views, written_arguments
from graphopt.errors import UnsupportedError

aten = torch.ops.aten

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("scale_parameter(Tensor weight, Tensor scale, Tensor probe) -> Tensor")
_library.impl(
    "scale_parameter",
    lambda weight, scale, probe: scale_weight(weight.detach(), scale) + probe,
    "CompositeImplicitAutograd",
)
_library.define("stop_gradient(Tensor value) -> Tensor")
_library.impl("stop_gradient", lambda value: value.clone(), "CompositeExplicitAutograd")
SCALE_PARAMETER = torch.ops.graphopt.scale_parameter.default
_STOP = torch.ops.graphopt.stop_gradient.default

# Operators that are linear in a weight: where the weight and the other factor stand, and what is added to the product.
_LINEAR: dict[Any, tuple[int, int, int | None]] = {
    aten.linear.default: (1, 0, 2),
    aten.addmm.default: (2, 1, 0),
    aten.mm.default: (1, 0, None),
    aten.matmul.default: (1, 0, None),
    aten.embedding.default: (0, 1, None),
    aten.conv1d.default: (1, 0, 2),
    aten.conv2d.default: (1, 0, 2),
    aten.conv3d.default: (1, 0, 2),
}
_IN_CHANNELS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}  # axes behind that of a bias

# Derivatives of normalisations, and where they take what forward has computed beside its result: torch's second derivative with
# respect to the input covers the way through that as well.
_COVERED: dict[Any, tuple[int, ...]] = {
    aten.native_layer_norm_backward.default: (3, 4),
    aten.native_batch_norm_backward.default: (5, 6),
    aten.cudnn_batch_norm_backward.default: (5, 6),
    aten.miopen_batch_norm_backward.default: (5, 6),
}

# Operators whose derivatives have none in torch, as what has: decomposed by torch, or written out here.
_DECOMPOSED = (aten.native_group_norm_backward.default, aten.hardsigmoid_backward.default)
_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    aten.copy.default: lambda value, source, non_blocking=False: source.to(value.dtype).expand(value.shape).clone(),
}


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|`` as ``torch._weight_norm``, whose second derivative with respect to ``v`` is wrong in torch 2.13."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_COMPOSED: dict[Any, Callable[..., Any]] = {
    aten._weight_norm_interface.default: lambda v, g, dim=0: (
        weight_norm(v, g, dim),
        torch.norm_except_dim(v, 2, dim),
    ),
    aten._weight_norm.default: weight_norm,
}

_collecting = [0]  # how many calls of `gradients` run; the engine's threads for other devices must see it too


def scale_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """``scale * weight`` in the dtype of the weight."""
    scaled = weight * scale
    return scaled if scaled.dtype == weight.dtype else scaled.to(weight.dtype)


def gradients(loss: Tensor, inputs: Sequence[Any], *, create_graph: bool) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with respect to probes, through regions of this module and anything else.

    Args:
        loss: a scalar.
        inputs: probes, or other tensors.
        create_graph: whether the results can be differentiated once more, with respect to scales.

    Returns:
        A gradient for each input, or ``None`` where the loss does not depend on it.
    """
    _collecting[0] += 1
    try:
        return torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)
    finally:
        _collecting[0] -= 1


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Let torch take a kernel of attention that has a second derivative: the formula."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def compile_twice_differentiable(
    module: GraphModule,
    fake_inputs: Sequence[Any],
    compile_one: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """Compile a region whose gradient is to be differentiated.

    Args:
        module: the region, of operators before autograd; returns a list.
        fake_inputs: a fake value for each input; those that require a gradient are differentiated.
        compile_one: compiles a graph for inputs that look like the given ones, differentiable once.

    Returns:
        A function of the region's inputs.

    Raises:
        UnsupportedError: an operator has no derivative, or writes to an input.
    """
    if not any(isinstance(fake, Tensor) and fake.requires_grad for fake in fake_inputs):
        return compile_one(module, fake_inputs)
    scales = {node.args[1] for node in module.graph.find_nodes(op="call_function", target=SCALE_PARAMETER)}
    placeholders = module.graph.find_nodes(op="placeholder")
    is_scale = [node in scales for node in placeholders]
    joint, has_tangent = _joint(module, fake_inputs, is_scale)
    return _Program(joint, has_tangent, fake_inputs, compile_one)


class _Program:
    """A region's two compiled functions, and how values go from one to the other."""

    def __init__(
        self,
        joint: GraphModule,
        has_tangent: Sequence[bool],
        fake_inputs: Sequence[Any],
        compile_one: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]],
    ) -> None:
        num_outputs = len(has_tangent)
        forward, backward = _compat.min_cut_partition(joint, num_outputs)
        inputs = forward.graph.find_nodes(op="placeholder")
        (returned,) = forward.graph.find_nodes(op="output")
        results = list(returned.args[0])
        outputs, kept = results[:num_outputs], {node.name: node for node in results[num_outputs:]}
        taken = backward.graph.find_nodes(op="placeholder")
        saved = [kept[node.name] for node in taken if node.name in kept]  # sizes come first there, and last here
        computed = [node for node in dict.fromkeys(saved) if node not in inputs]
        returned.args = ([*outputs, *computed],)
        forward.recompile()

        self.num_outputs = num_outputs
        dependence = _Dependence(forward)
        with torch.enable_grad(), _fake_mode(fake_inputs), _compat.disable_autocast():
            dependence.run(*[_like(fake, requires_grad=_requires_grad(fake)) for fake in fake_inputs])
        differentiable = dependence.found
        self.is_differentiable = [isinstance(node, Node) and node in differentiable for node in (*outputs, *computed)]
        # Of the backward's inputs: what is saved, as (is it an input, position), and the tangents of some outputs.
        place = {node: (False, num_outputs + position) for position, node in enumerate(computed)}
        place |= {node: (True, position) for position, node in enumerate(inputs)}
        self.saved = [place[node] for node in saved]
        tangents = [node for node in taken if node.name not in kept]
        with_tangent = [position for position, has_it in enumerate(has_tangent) if has_it]
        self.tangents = [with_tangent[int(node.name.removeprefix("tangents_")) - 1] for node in tangents]
        self.tangent_likes = [cast(Tensor, node.meta["val"]) for node in tangents]
        (returned,) = backward.graph.find_nodes(op="output")
        found = list(pytree.tree_leaves(returned.args[0], is_leaf=lambda leaf: leaf is None))
        self.gradient_of = [position for position, node in enumerate(found) if node is not None]
        returned.args = ([node for node in found if node is not None],)
        backward.recompile()

        fake_saved = [_like(node.meta["val"], requires_grad=node in differentiable) for node in saved]
        fake_tangents = [_like(value, requires_grad=True) for value in self.tangent_likes]
        self.num_inputs = len(fake_inputs)
        with _explained():
            self.forward = compile_one(forward, list(fake_inputs))
            self.backward = compile_one(backward, [*fake_saved, *fake_tangents])

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the region; differentiable twice where gradients are enabled."""
        if not torch.is_grad_enabled() or not any(_requires_grad(value) for value in inputs):
            return list(self.forward(*inputs))[: self.num_outputs]
        return list(_Region.apply(self, *inputs))[: self.num_outputs]  # type: ignore[no-untyped-call]


class _Region(torch.autograd.Function):
    """Joins the two functions of a region, as the module's docstring says."""

    @staticmethod
    def forward(ctx: Any, program: _Program, *inputs: Any) -> tuple[Any, ...]:
        with torch.enable_grad():
            leaves = [
                value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
                for value in inputs
            ]
            results = program.forward(*leaves)
        ctx.program, ctx.leaves, ctx.results = program, leaves, results
        returned = [value.detach() if isinstance(value, Tensor) else value for value in results]
        pairs = list(zip(returned, program.is_differentiable, strict=True))
        ctx.mark_non_differentiable(*[value for value, is_it in pairs if not is_it and isinstance(value, Tensor)])
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(value, Tensor) for value in (*inputs, *returned)]
        ctx.others = [value for value in (*inputs, *returned) if not isinstance(value, Tensor)]
        ctx.save_for_backward(*[value for value in (*inputs, *returned) if isinstance(value, Tensor)])
        return tuple(returned)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        program: _Program = ctx.program
        found: list[Tensor | None] = [None] * program.num_inputs
        if _collecting[0]:
            tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
            values = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
            saved = [
                values[position if is_input else program.num_inputs + position] for is_input, position in program.saved
            ]
            tangents = [
                _arranged(cotangents[position], like)
                for position, like in zip(program.tangents, program.tangent_likes, strict=True)
            ]
            for position, grad in zip(program.gradient_of, program.backward(*saved, *tangents), strict=True):
                found[position] = grad
            return None, *found
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "a gradient with create_graph=True was asked of a model in GradInitWrapper by torch.autograd itself; ask "
                "ginit.gradients(loss) or ginit.grad_loss(loss), or wrap the model as it was before graphopt.transform"
            )
        pairs = [(result, grad) for result, grad in zip(ctx.results, cotangents, strict=True) if grad is not None]
        wanted = [position for position, leaf in enumerate(ctx.leaves) if _requires_grad(leaf)]
        grads = torch.autograd.grad(
            [result for result, _ in pairs],
            [ctx.leaves[position] for position in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
        for position, grad in zip(wanted, grads, strict=True):
            found[position] = grad
        return None, *found


class TwiceDifferentiable(Interpreter):
    """Runs a region as it stands, where torch's own derivatives of its operators can be differentiated again."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator, or what it is made of."""
        return super().call_function(_COMPOSED.get(target, target), args, kwargs)


class _Tracing(TwiceDifferentiable):
    """Runs a region for the trace of its first derivative: scales go behind products, and what has no gradient is marked."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._postponed = {
            node for node in module.graph.find_nodes(op="call_function", target=SCALE_PARAMETER) if _is_factor(node)
        }
        self._written = {
            node for user in module.graph.nodes for argument in written_arguments(user) for node in views(argument)
        }

    def run_node(self, n: Node) -> Any:
        if n in self._postponed:
            return self.map_nodes_to_values(n.args, n)
        result = super().run_node(n)
        if n in self._written:  # a copy would not be the memory that is written to
            return result
        if n.op == "call_function" and n.target in (aten.detach.default, aten.detach_.default):
            return _STOP(result.detach())
        if n.op == "call_function" and not torch.is_grad_enabled():
            return pytree.tree_map_only(Tensor, _stopped, result)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        where = _LINEAR.get(target)
        if where is None or not isinstance(args[where[0]], tuple):
            return super().call_function(target, args, kwargs)
        weight, scale, probe = args[where[0]]
        values = list(args)
        weight_at, factor_at, added_at = where
        added = values[added_at] if added_at is not None and added_at < len(values) else None
        values[weight_at] = _Probed.apply(weight, probe)  # type: ignore[no-untyped-call]
        if values[factor_at].is_floating_point():
            values[factor_at] = _ScaledLater.apply(values[factor_at], scale)  # type: ignore[no-untyped-call]
        if target is aten.addmm.default:
            target, values, added_at = aten.mm.default, values[1:], None
        if added is not None and added_at is not None:
            values[added_at] = None
        product = _Scaled.apply(super().call_function(target, tuple(values), kwargs), scale)  # type: ignore[no-untyped-call]
        if added is None:
            return product
        return product + added.view(-1, *(1,) * _IN_CHANNELS[target]) if target in _IN_CHANNELS else product + added


class _Scaled(torch.autograd.Function):
    """``scale * product``; the gradient of the product is left unscaled, for that of the weight."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, scale: Tensor) -> Tensor:
        return scale_weight(product, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScaledLater(torch.autograd.Function):
    """The other factor as it is; its gradient gets the scale that `_Scaled` left out."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scale_weight(grad, ctx.saved_tensors[0]), None


class _Probed(torch.autograd.Function):
    """The weight as it is; its gradient is that of the probe."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, probe: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def _is_factor(node: Node) -> bool:
    """Whether a scaled weight is used as a factor only, so that the scale may go behind the product."""
    for user in node.users:
        where = _LINEAR.get(user.target)
        if where is None or user.kwargs or user.args[where[0]] is not node:
            return False
        if sum(argument is node for argument in user.all_input_nodes) != 1 or user.args[where[1]] is node:
            return False
        if user.target is aten.embedding.default and any(user.args[3:]):  # scale_grad_by_freq, sparse
            return False
        if user.target is aten.matmul.default and node.meta["val"].ndim != 2:
            return False
    return bool(node.users)


@contextmanager
def _explained() -> Iterator[None]:
    """Say what can be done about an operator that is not differentiable twice."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, UnsupportedError | _compat.RestartAnalysis):
            raise
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(
            f"a part of the model cannot be differentiated twice in a compiled graph ({reason}). Learn its "
            "initialisation without compiling it: learn_init(..., compiler='eager'), or GradInitWrapper(graphopt.restore(model))"
        ) from error


def _joint(module: GraphModule, fake_inputs: Sequence[Any], is_scale: Sequence[bool]) -> tuple[GraphModule, list[bool]]:
    """The region together with its first derivative, of plain operators; and which outputs have a tangent."""
    interpreter = _Tracing(module)
    has_tangent: list[list[bool]] = []

    def run(*inputs: Any) -> list[Any]:
        outputs = list(interpreter.run(*inputs))
        has_tangent.append([_requires_grad(value) for value in outputs])
        seen = {value.untyped_storage()._cdata for value in inputs if isinstance(value, Tensor)}
        for position, value in enumerate(outputs):
            if isinstance(value, Tensor):
                if value._is_view() or value.untyped_storage()._cdata in seen:
                    outputs[position] = value = value.clone()
                seen.add(value.untyped_storage()._cdata)
        return outputs

    fakes = [
        _like(fake, requires_grad=False) if scaled else fake for fake, scaled in zip(fake_inputs, is_scale, strict=True)
    ]
    with differentiable_kernels(), _compat.disable_autocast(), torch.enable_grad(), _explained():
        joint = _compat.aot_export_joint(run, tuple(fakes), _DECOMPOSED, _WRITTEN_OUT)
    for node in list(joint.graph.nodes):
        if node.target is aten.detach.default:  # what autograd saves; the region's own are `_STOP` here
            node.replace_all_uses_with(node.args[0])
            joint.graph.erase_node(node)
    for node in joint.graph.find_nodes(op="call_function", target=_STOP):
        node.target = aten.detach.default
    for target, positions in _COVERED.items():
        for node in joint.graph.find_nodes(op="call_function", target=target):
            _detach_arguments(node, positions)
    joint.graph.eliminate_dead_code()
    joint.recompile()
    num_tangents = sum(node.name.startswith("tangents_") for node in joint.graph.find_nodes(op="placeholder"))
    assert num_tangents == sum(has_tangent[0])
    return joint, has_tangent[0]


def _detach_arguments(node: Node, positions: Sequence[int]) -> None:
    args = list(node.args)
    for position in positions:
        argument = args[position]
        if isinstance(argument, Node):
            with node.graph.inserting_before(node):
                args[position] = detached = node.graph.call_function(aten.detach.default, (argument,))
            detached.meta = dict(argument.meta)
    node.args = tuple(args)


class _Dependence(Interpreter):
    """Runs a graph without values, to see through which of its values torch lets gradients reach its inputs."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.found: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if _requires_grad(result):
            self.found.add(n)
        return result


def _fake_mode(values: Sequence[Any]) -> _compat.FakeTensorMode:
    return next(value.fake_mode for value in values if isinstance(value, _compat.FakeTensor))


def _stopped(value: Tensor) -> Tensor:
    return _STOP(value.detach()) if value.is_floating_point() else value


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _like(value: Any, *, requires_grad: bool) -> Any:
    """The same fake value as a leaf."""
    if not isinstance(value, Tensor):
        return value
    with torch.no_grad():
        leaf = value.detach()
    return leaf.requires_grad_(requires_grad and leaf.is_floating_point())


def _arranged(value: Tensor | None, like: Tensor) -> Tensor:
    """A tangent with the strides that it was compiled for; zeros where there is none."""
    shape, strides = [int(size) for size in like.shape], [int(stride) for stride in like.stride()]
    if value is None:
        return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device).zero_()
    if list(value.stride()) == strides:
        return value
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device).copy_(value)
