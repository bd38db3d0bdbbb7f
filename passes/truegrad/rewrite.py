"""Rewrite one graph: decide how each parameter is served, then do it.

A parameter is served by **closed forms** if it meets samples directly, or through views that do not overlap, in operators that
have one. Otherwise, if it is tied, computed with, or met in an operator without a closed form, it is **batched**: its gradient
goes through `ops.per_sample`, which receives one gradient for each sample. From there the derivative of whatever lies between
the parameter and the samples is applied to all of them at once.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.fx import Node

from graphopt import _compat
from graphopt.annotations import SAMPLE_GRAD_NORM, SUM_GRAD_SQUARED, SUM_POSITION_GRAD_SQUARED, Key
from graphopt.capture import CapturedGraph
from graphopt.inspect.location import describe, operator_name
from graphopt.passes.truegrad import (
    ops,  # noqa: F401  registers torch.ops.graphopt
    rules,  # noqa: F401  registers the rules
)
from graphopt.passes.truegrad._registry import ClosedForm, Declined, Refused, batched_rules, closed_rules
from graphopt.passes.truegrad.axes.reordering import is_permutation
from graphopt.passes.truegrad.collecting import collect_gradients
from graphopt.passes.truegrad.editor import OPERATOR_NAMES, Editor
from graphopt.passes.truegrad.rules.embedding import check as check_embedding
from graphopt.passes.truegrad.rules.tied_embedding import is_tied_embedding, rewrite_tied_embedding
from graphopt.passes.truegrad.sample_axis import Free, Layout, Layouts, Lost, SampleAxis, Size, is_pointwise, shape_of
from graphopt.passes.truegrad.uses import Use, Uses, overlap
from graphopt.pipeline import Coverage, Status

aten = torch.ops.aten

# Operators that accept an operand with a sample axis wherever they accept one that broadcasts over samples.
_BROADCASTING = frozenset(
    [
        aten.expand.default,
        aten.broadcast_to.default,
        aten.where.self,
        aten.scaled_dot_product_attention.default,
        aten.lerp.Tensor,
    ]
)

# Operators whose results have their features on the second axis.
_CHANNELS_SECOND = frozenset("conv1d conv2d conv3d convolution batch_norm group_norm instance_norm".split())

_SEVERAL_ORDERS = (
    "it meets the samples in several orders (reordered by an index), so its contributions cannot be added for each sample. "
    "Reorder the batch in front of the model, or bring the samples back with x[index.argsort()] before it is used again"
)
_NO_NORMS = (
    "it meets the samples in another order than they came in, so sample_grad_norm would be in that order. Reorder the batch in "
    "front of the model"
)
_NO_POSITIONS = (
    "squares of single positions (sum_position_grad_squared) are not defined for a parameter that is computed with before it "
    "meets samples, or used in several products"
)


def _weight_norm(direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
    others = [axis for axis in range(direction.dim()) if axis != dim]
    norm: Tensor = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    return direction * (length / norm)


# Operators without forward derivative, in terms of others that have one.
_DECOMPOSED: dict[Any, Any] = {aten._weight_norm.default: _weight_norm}


class Rewriter:
    """The state of one rewrite; what rules see of it is `_registry.Context`."""

    def __init__(
        self,
        graph: CapturedGraph,
        layouts: Layouts,
        uses: Uses,
        *,
        statistics: Sequence[Key[Any]] = (SUM_GRAD_SQUARED,),
        per_token: bool = False,
        square_dtype: torch.dtype | None = None,
        max_bytes: int = 2**27,
        collected: Iterable[Node] = (),
    ) -> None:
        self.graph = graph
        self.editor = Editor(graph)
        self.layouts = layouts
        self.uses = uses
        self.statistics = tuple(statistics)
        self.wanted = ",".join(OPERATOR_NAMES[key] for key in statistics)
        self.per_token = per_token
        self.square_dtype = square_dtype
        self.max_bytes = max_bytes
        self.collected = set(collected)  # parameters that only `collecting` can serve
        self.to_collect: set[Node] = set()  # parameters that turned out to be such
        self.coverage: dict[Node, Coverage] = {}
        self._closed: dict[Node, ClosedForm] = {}
        self._tangents: dict[Node, Node] = {}
        self._batched: dict[tuple[Node, Any], Node] = {}
        self._nums = {param: self._num_samples(found) for param, found in uses.of.items() if param not in uses.problems}

    # What rules ask ----------------------------------------------------------------------------------------------------------

    def layout(self, node: Any) -> Layout:
        """Where the samples are in a value; `Free` for anything that is not a node."""
        found = self.layouts.get(node, Free()) if isinstance(node, Node) else Free()
        return found if not isinstance(found, list) else Free()

    def sample_axis(self, node: Node) -> SampleAxis:
        """The layout of a value that has samples."""
        layout = self.layout(node)
        assert isinstance(layout, SampleAxis), describe(node)
        return layout

    def hint(self, size: Size) -> int:
        """The value that a size had when the graph was captured."""
        shape_env = self.graph.fake_mode.shape_env
        if shape_env is None or not getattr(size, "free_symbols", None):
            return int(cast(Any, size))
        return _compat.size_hint(shape_env, size)

    def companions(self, value: Node) -> list[Node]:
        """The companions of the parameter that ``value`` is a view of, through the same views, in the order of ``wanted``."""
        return [self._companion(value, key) for key in self.statistics]

    def _companion(self, value: Node, key: Key[Any]) -> Node:
        chain = (self.uses.selections if self.per_token else self.uses.views)[value]
        companion = self.editor.companion(chain.root, key, self._count(chain.root))
        return companion if key is SAMPLE_GRAD_NORM else self.editor.replay(chain.root, chain.steps, companion)

    def tangent(self, value: Node) -> Node:
        """(N, *value.shape): where the per-sample gradients of ``value`` arrive."""
        if SUM_POSITION_GRAD_SQUARED in self.statistics:
            raise _Unserved(_NO_POSITIONS)
        return self._tangent(value)

    def _tangent(self, value: Node) -> Node:
        if value not in self._tangents:
            with self.editor.after(value):
                self._tangents[value] = self._make_tangent(value)
        return self._tangents[value]

    def batched(self, value: Node, like: Node) -> Node:
        """``value`` with one row for each sample (or position), shaped so that it broadcasts against ``like``."""
        layout = self.sample_axis(like)
        editor, ndim = self.editor, like.meta["val"].ndim
        if self.per_token:
            sizes = [editor.size(size) for size in _sizes(like)]
            companion = self._companion(value, SUM_GRAD_SQUARED)
            return editor.call(torch.ops.graphopt.per_position.default, value, companion, sizes)
        missing = ndim - value.meta["val"].ndim
        shape: list[Any] = [1] * missing + [editor.size(size) for size in _sizes(value)]
        if shape[layout.axis] != 1:
            raise _Unserved(
                Refused(
                    f"its own axis of {shape[layout.axis]} rows lies where the samples are, so it fits one batch size only"
                )
            )
        own = editor.call(aten.reshape.default, editor.detached(value), shape) if missing else editor.detached(value)
        rows = list(editor.rows(layout))
        before, behind = shape[: layout.axis], shape[layout.axis + 1 :]
        tangent = self._tangent(value)
        tangent = editor.call(aten.reshape.default, tangent, [rows[1], *before, *behind])
        tangent = editor.call(aten.movedim.int, tangent, 0, layout.axis)
        if not layout.is_plain:
            tangent = editor.call(
                aten.unsqueeze.default, editor.call(aten.unsqueeze.default, tangent, layout.axis), layout.axis + 2
            )
            tangent = editor.call(aten.expand.default, tangent, [*before, *rows, *behind])
            total = editor.size(layout.outer * layout.num * layout.inner)
            tangent = editor.call(aten.reshape.default, tangent, [*before, total, *behind])
            own = editor.call(aten.expand.default, own, [*before, total, *behind])
        else:
            own = editor.call(aten.expand.default, own, [*before, rows[1], *behind])
        result = editor.call(torch.ops.graphopt.with_tangent.default, own, tangent)
        if SUM_POSITION_GRAD_SQUARED not in self.statistics:
            return result
        if value not in self.uses.views:
            raise _Unserved(_NO_POSITIONS)
        sizes = [editor.size(size) for size in _sizes(like)]
        companion = self._companion(value, SUM_POSITION_GRAD_SQUARED)
        squares = editor.call(torch.ops.graphopt.position_squares.default, companion, editor.detached(value), sizes)
        wide = editor.call(aten.expand.default, result, sizes)
        return editor.call(torch.ops.graphopt.with_tangent.default, wide, squares)

    def replace(self, old: Node, new: Node) -> None:
        """Let ``new`` take the place of ``old``; its samples lie where those of ``old`` did."""
        old.replace_all_uses_with(new)
        if old in self.layouts:
            self.layouts[new] = self.layouts[old]

    # The rewrite -------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve every parameter that can be served; the others are in ``uses.problems``. Returns the number of changes."""
        self._check_orders()
        tied, batched = self._plan()
        changed = 0
        for param in tied:
            for node in rewrite_tied_embedding(param, self.uses.of[param], self):
                self._closed.pop(node, None)
                self.editor.graph.erase_node(node)
                changed += 1
        for node, form in self._closed.items():
            if any(value in self._closed_values for value in form.values):
                with self.editor.before(node):
                    self.replace(node, form.emit())
                self.editor.graph.erase_node(node)
                changed += 1
        changed += self._batch(batched)
        return changed

    def _check_orders(self) -> None:
        """Parameters that meet samples in one order only; its indices are permutations, or are checked when the model runs."""
        needed: dict[Node, SampleAxis] = {}
        for param, found in self.uses.of.items():
            axes = [axis for use in found if isinstance(axis := self.layouts.get(use.node), SampleAxis)]
            orders = {axis.order or () for axis in axes}
            if len(orders) > 1:
                self.uses.problems.setdefault(param, _SEVERAL_ORDERS)
            elif orders != {()} and SAMPLE_GRAD_NORM in self.statistics:
                self.uses.problems.setdefault(param, _NO_NORMS)
            needed |= {token: axis for axis in axes for token in axis.order or ()}
        for token, axis in needed.items():
            if not is_permutation(token):
                with self.editor.after(token):
                    checked = self.editor.call(
                        torch.ops.graphopt.permutation.default, token, self.editor.size(axis.num), describe(token)
                    )
                for user in [user for user in token.users if user is not checked]:
                    user.replace_input_with(token, checked)
                self.layouts[checked] = self.layouts[token]

    def _plan(self) -> tuple[list[Node], set[Node]]:
        candidates = [param for param, found in self.uses.of.items() if found and param not in self.uses.problems]
        frontier = {use.node for param in candidates for use in self.uses.of[param]}
        for node in [node for node in self.editor.graph.nodes if node in frontier]:
            form = closed_rules[node.target](node, self) if node.target in closed_rules else Declined("no closed form")
            if isinstance(form, ClosedForm) and not any(
                self.uses.params[v] & self.uses.problems.keys() for v in form.values
            ):
                self._closed[node] = form
        tied = [p for p in candidates if len(self.uses.of[p]) > 1 and is_tied_embedding(p, self.uses.of[p], self)]
        batched = {param for param in candidates if param not in tied and not self._is_closed(param)}
        while spread := self._beside(
            batched, candidates
        ):  # an operator is rewritten for all its parameters, or for none
            tied = [param for param in tied if param not in spread]
            batched |= spread
        for node in list(self._closed):
            if any(self.uses.params[v] & batched for v in self._closed[node].values):
                del self._closed[node]
        closed = [param for param in candidates if param not in batched and param not in tied]
        self._closed_values = {use.value for param in closed for use in self.uses.of[param]}
        self._report(tied, closed, batched)
        return tied, batched

    def _is_closed(self, param: Node) -> bool:
        found = self.uses.of[param]
        chains = self.uses.selections if self.per_token else self.uses.views
        if not all(
            use.value in chains and use.node in self._closed and use.value in self._closed[use.node].values
            for use in found
        ):
            return False
        return self.per_token or not overlap([chains[use.value] for use in found])

    def _beside(self, batched: set[Node], candidates: list[Node]) -> set[Node]:
        """Parameters with a closed form that share an operator, or a value, with a batched one."""
        nodes = {use.node for param in batched for use in self.uses.of[param]}
        values = [value for value, params in self.uses.params.items() if params & batched]
        together = {p for value in values for p in self.uses.params[value]}
        return {
            p
            for p in candidates
            if p not in batched and (p in together or any(u.node in nodes for u in self.uses.of[p]))
        }

    def _batch(self, batched: set[Node]) -> int:
        """Rewrite the frontier of the batched parameters, one operator at a time."""
        frontier = defaultdict(set)
        for param in [
            param for param in self.uses.of if param in batched
        ]:  # in one order in every process: caches find it
            for use in self.uses.of[param]:
                frontier[use.node].add(param)
        order = [node for node in self.editor.graph.nodes if node in frontier]
        for together in self._connected(batched, frontier):
            nodes = [node for node in order if frontier[node] & together]
            if not self._collect(together, nodes):
                self._batch_in_memory(together, nodes, frontier)
        return len(frontier)

    def _connected(self, batched: set[Node], frontier: dict[Node, set[Node]]) -> list[set[Node]]:
        """Parameters that share an operator or a value belong together."""
        links = [*frontier.values(), *(set(params) & batched for params in self.uses.params.values())]
        groups: list[set[Node]] = [{param} for param in self.uses.of if param in batched]
        for link in links:
            touched = [group for group in groups if group & link]
            if len(touched) > 1:
                groups = [group for group in groups if group not in touched] + [set().union(*touched)]
        return groups

    def _batch_in_memory(self, together: set[Node], nodes: list[Node], frontier: dict[Node, set[Node]]) -> None:
        """Rewrite operators so that all per-sample gradients arrive at the same time."""
        failed: dict[Node, str] = {}
        for node in nodes:
            with self.editor.before(node):
                try:
                    new = self._batched_node(node)
                except _Unserved as problem:
                    new = problem.verdict
            if isinstance(new, Node) and not _alike(new, node):
                new = Declined(f"its batched form gives {_form(new)} instead of {_form(node)}")
            if isinstance(new, Declined):
                for param in frontier[node]:
                    failed.setdefault(param, f"{describe(node)}: {new.reason}")
                if not isinstance(new, Refused) and not (together & self.collected) and self._may_collect():
                    self.to_collect |= together
                continue
            self.replace(node, new)
            self.editor.graph.erase_node(node)
        self.uses.problems.update(failed)

    def _may_collect(self) -> bool:
        return not self.per_token and SUM_POSITION_GRAD_SQUARED not in self.statistics

    def _collect(self, together: set[Node], nodes: list[Node]) -> bool:
        """Serve parameters by `ops.collect`, if their per-sample gradients are too large or it is the only way."""
        size = sum(self.hint(self._nums[param]) * self._bytes(param) for param in together)
        forced = bool(together & self.collected)
        large = size > self.max_bytes and not any(self._is_lookup(param) for param in together)
        if not self._may_collect() or not (forced or large):
            return False
        params = [param for param in self.uses.of if param in together]
        problem = collect_gradients(params, nodes, self, self.max_bytes)
        if isinstance(problem, Declined):
            if forced:
                self.uses.problems.update(dict.fromkeys(together, problem.reason))
            return forced
        for param in params:
            row = self.coverage[param]
            reason = row.reason.replace("per_sample at", "per_sample in slices, at")
            size = min(row.extra_bytes, self.max_bytes)
            self.coverage[param] = replace(row, status=Status.FALLBACK, reason=reason, extra_bytes=size)
        return True

    def _batched_node(self, node: Node) -> Node | Declined:
        if node.target in batched_rules:
            result = batched_rules[node.target](node, self)
            if isinstance(result, Node | Refused) or self.per_token:
                return result
        if self._broadcasts(node):
            args = torch.fx.map_arg(node.args, lambda a: self.batched(a, node) if a in self.uses.params else a)
            kwargs = torch.fx.map_arg(node.kwargs, lambda a: self.batched(a, node) if a in self.uses.params else a)
            return self.editor.call(cast(Any, node.target), *args, **kwargs)
        if self.per_token:
            return Declined(f"there is no per-token rule for {operator_name(node)}")
        return self._through_vmap(node)

    def _broadcasts(self, node: Node) -> bool:
        return is_pointwise(node.target) or node.target in _BROADCASTING

    def _through_vmap(self, node: Node) -> Node | Declined:
        """Any operator: one call for each sample, batched by ``torch.func.vmap`` and traced into the graph."""
        layout = self.sample_axis(node)
        editor, num = self.editor, self.editor.size(layout.num)
        if not layout.is_plain:
            return Declined("samples are interleaved with other rows")
        arguments = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
        dims: list[int | None] = []
        operands: list[Node] = []
        for argument in arguments:
            own = self.layout(argument)
            if argument in self.uses.params:
                sizes = [editor.size(size) for size in _sizes(argument)]
                value = editor.call(aten.expand.default, editor.detached(argument), [num, *sizes])
                operands.append(editor.call(torch.ops.graphopt.with_tangent.default, value, self.tangent(argument)))
                dims.append(0)
            else:
                if isinstance(own, SampleAxis) and not own.is_plain:
                    return Declined("samples are interleaved with other rows")
                if isinstance(own, Lost):
                    return Declined("its other operand mixes samples")
                operands.append(argument)
                dims.append(own.axis if isinstance(own, SampleAxis) else None)
        axes = [own.axis if isinstance(own := self.layout(a), SampleAxis) else None for a in arguments]

        def one(*values: Any) -> Any:  # a batch of one
            batches = [v if axis is None else v.unsqueeze(axis) for v, axis in zip(values, axes, strict=True)]
            mapping = dict(zip(arguments, batches, strict=True))
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda a: mapping.get(a, a.meta["val"]))
            return cast(Any, node.target)(*args, **kwargs).squeeze(layout.axis)

        try:
            return cast(Node, editor.inline(vmap(one, tuple(dims), layout.axis, randomness="different"), *operands))
        except Exception as error:
            return Declined(f"torch.func.vmap cannot batch it ({type(error).__name__}: {str(error).splitlines()[0]})")

    def _make_tangent(self, value: Node) -> Node:
        editor = self.editor
        if value in self._nums:
            num = editor.size(self._nums[value])
            keys = [key for key in self.statistics if key is not SUM_POSITION_GRAD_SQUARED]
            companions = [self._companion(value, key) for key in keys]
            wanted = ",".join(OPERATOR_NAMES[key] for key in keys)
            return editor.call(torch.ops.graphopt.per_sample.default, value, companions, wanted, num)
        if (
            value.target is aten.embedding.default
            and value.args[0] in self._nums
            and len(cast(Node, value.args[0]).users) == 1
        ):
            return self._lookup_tangent(value)
        # One result of several is computed from what all are computed from.
        source, place = (
            (cast(Node, value.args[0]), value.args[1]) if value.target is operator.getitem else (value, None)
        )
        arguments = [a for a in source.all_input_nodes if isinstance(a.meta.get("val"), Tensor | list | tuple)]
        moving = [a for a in arguments if a in self.uses.params]
        tangents = [self._tangent(a) for a in moving]
        fixed = [editor.detached(a) for a in arguments]

        def one(primals: tuple[Any, ...], directions: tuple[Any, ...]) -> Any:
            def function(*values: Any) -> Any:
                mapping = dict(zip(arguments, primals, strict=True)) | dict(zip(moving, values, strict=True))
                args, kwargs = torch.fx.map_arg((source.args, source.kwargs), lambda a: mapping.get(a, a.meta["val"]))
                result = _DECOMPOSED.get(source.target, cast(Any, source.target))(*args, **kwargs)
                return result if place is None else result[place]

            start = tuple(primals[arguments.index(a)] for a in moving)
            return jvp(function, start, directions)[1]

        def all_samples(*values: Any) -> Any:
            primals, directions = values[: len(arguments)], values[len(arguments) :]
            return vmap(one, (None, 0))(primals, directions)

        try:
            return cast(Node, editor.inline(all_samples, *fixed, *tangents))
        except Exception as error:
            raise _Unserved(
                f"{describe(value)} has no derivative that torch.func can batch "
                f"({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error

    def _lookup_tangent(self, value: Node) -> Node:
        """Rows of a table that do not depend on samples (positions): look them up for each, and let the closed form square."""
        editor = self.editor
        checked = check_embedding(value)
        if isinstance(checked, Declined):
            raise _Unserved(checked.reason)
        table, indices, padding_idx = checked
        num = editor.size(self._nums[table])
        sizes = [editor.size(size) for size in _sizes(indices)]
        each = editor.call(aten.expand.default, indices, [num, *sizes])
        tail = (self.wanted, each, padding_idx, 0, 1, num, 1, False)
        return editor.call(torch.ops.graphopt.embedding.default, table, self.companions(table), *tail)

    # Bookkeeping -------------------------------------------------------------------------------------------------------------

    def _num_samples(self, found: list[Use]) -> Size:
        nums = set()
        for use in found:
            layouts = self.layouts.get(use.node)
            for layout in layouts if isinstance(layouts, list) else [layouts]:  # a list for several results
                if isinstance(layout, SampleAxis):
                    nums.add(layout.num)
        return nums.pop() if nums else cast(Size, 1)

    def _count(self, param: Node) -> Size:
        """How many samples, or positions, enter at each call."""
        if not self.per_token:
            return self._nums[param]
        use = self.uses.of[param][0]
        sizes = _sizes(use.node)
        own = cast(Tensor, use.value.meta["val"]).ndim
        leading = sizes[:-1] if use.node.target in closed_rules else sizes[: max(1, len(sizes) - own)]
        if cast(Any, use.node.target).overloadpacket.__name__ in _CHANNELS_SECOND:
            leading = [sizes[0], *sizes[2:]]
        total = cast(Size, 1)
        for size in leading:
            total = total * size
        return total

    def _report(self, tied: list[Node], closed: list[Node], batched: set[Node]) -> None:
        status = Status.PER_TOKEN if self.per_token else Status.EXACT
        for param in closed:
            forms = {use.node: self._closed[use.node] for use in self.uses.of[param]}
            reason = ", ".join(sorted({_short(node) for node in forms}))
            share = [len(form.values) for form in forms.values()]
            flops = sum(form.flops // count for form, count in zip(forms.values(), share, strict=True))
            self._row(param, status, reason, flops, max(form.bytes for form in forms.values()))
        for param in tied:
            self._row(param, status, "tied embedding", 4 * self._bytes(param), 2 * self._bytes(param))
        for param in [param for param in self.uses.of if param in batched]:
            names = ", ".join(sorted({_short(use.node) for use in self.uses.of[param]}))
            num = self.hint(self._nums[param])
            cheap = cast(Tensor, param.meta["val"]).ndim < 2 or self.per_token or self._is_lookup(param)
            size = num * self._bytes(param) if not self._is_lookup(param) else self._bytes(param)
            self._row(param, status if cheap else Status.FALLBACK, f"per_sample at {names}", size // 2, size)

    def _is_lookup(self, param: Node) -> bool:
        users = [user for user in param.users if user.target is aten.embedding.default]
        return len(param.users) == 1 and bool(users) and isinstance(self.layout(users[0]), Free)

    def _row(self, param: Node, status: Status, reason: str, flops: int, memory: int) -> None:
        value = cast(Tensor, param.meta["val"])
        name = self.graph.inputs[self.graph.placeholders.index(param)].name
        self.coverage[param] = Coverage(name, tuple(int(size) for size in value.shape), status, reason, flops, memory)

    def _bytes(self, param: Node) -> int:
        value = cast(Tensor, param.meta["val"])
        return int(value.numel()) * torch.promote_types(value.dtype, torch.float32).itemsize


class _Unserved(Exception):
    """A rule found out too late that it does not apply; caught by the rewriter."""

    def __init__(self, verdict: Declined | str) -> None:
        super().__init__()
        self.verdict = Declined(verdict) if isinstance(verdict, str) else verdict


def _alike(new: Node, old: Node) -> bool:
    """Whether a replacement has the shape and dtype of what it replaces."""
    a, b = new.meta["val"], old.meta["val"]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b)
    return a.dtype == b.dtype and shape_of(a) == shape_of(b)


def _form(node: Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype} {tuple(shape_of(value))}" if isinstance(value, Tensor) else type(value).__name__


def _sizes(node: Node) -> list[Size]:
    return shape_of(node.meta["val"])


def _short(node: Node) -> str:
    return operator_name(node).removeprefix("aten.").split(".")[0]
