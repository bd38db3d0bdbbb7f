"""One call of a streamed graph: forward through all stages, and backward through them again.

Forward runs a stage for all micro-batches before the next, keeps what passes between stages (the stash), and nothing else.
Backward brings the stages in reverse, computes each micro-batch again from what was kept, with the same random numbers and the
same buffers, differentiates it, and adds the gradients up. Both passes call one and the same compiled function, so what they
compute agrees bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.annotations import SAMPLE_GRAD_NORM, Key
from graphopt.errors import StreamError
from graphopt.runtime.streaming.micro_batches import Cut, Values, evaluate, laid_out
from graphopt.runtime.streaming.random_states import random_state, set_random_state
from graphopt.runtime.streaming.stages import Argument, Companion, Constant, Parameter, Size, Stage, Value
from graphopt.runtime.streaming.stash import Stash

if TYPE_CHECKING:
    from graphopt.runtime.streaming.streamed_graph import StreamedGraph


class Run:
    """The state of one call between its forward and its backward."""

    def __init__(self, graph: StreamedGraph, args: Sequence[Any], keeps: bool) -> None:
        stream = graph.stream
        self.graph, self.stream, self.args, self.keeps = graph, stream, list(args), keeps
        self.cut = Cut(graph.read_sizes(args), graph.symbols, stream.options.microbatch_size)
        self.slots = {position: stream.slot_of(args[position]) for position in graph.parameters}
        self.stash = Stash(stream, self.cut, graph.rows) if keeps else None
        self._random_states: dict[tuple[int, int | None], list[Tensor]] = {}
        self._snapshots: dict[tuple[int, int | None, int], Tensor] = {}
        self._norms: dict[tuple[int, int | None], Tensor] = {}
        self._is_spent = False
        self._versions = {slot: stream.store.version(slot.key) for slot in self.slots.values()} if keeps else {}
        self._written = graph.written
        self._argument_versions = self._versions_of_arguments() if keeps else []

    # --------------------------------------------------------------------------------------------------------- forward

    def forward(self) -> list[Any]:
        """What the graph returns."""
        values = Values(self.cut, self.graph.rows)
        stages = self.graph.stages
        groups = [self._keys(stage) for stage in stages]
        with _compat.large_blocks_apart(), torch.no_grad(), closing(self.stream.visit(groups)) as visits:
            for number, (stage, tensors) in enumerate(zip(stages, visits, strict=True)):
                lent = {value.untyped_storage().data_ptr() for value in tensors.values()}
                for part in self.cut.parts(stage.is_whole):
                    self._remember(stage, part)
                    inputs = self._inputs(stage, part, tensors, values)
                    for name, value in zip(stage.outputs, stage.function(*inputs), strict=True):
                        values.put(name, part, _own(value, lent))
                    del inputs
                self._keep_inputs(stage, values)
                values.free(stage.last_uses)
                tensors.clear()
                self.stream.report("forward", number, len(stages))
        return [self._returned(source, values) for source in self.graph.returned]

    def _keep_inputs(self, stage: Stage, values: Values) -> None:
        if self.stash is None:
            return
        for name in dict.fromkeys(stage.values):
            self.stash.keep(name, values)

    def _returned(self, source: Any, values: Values) -> Any:
        if isinstance(source, Value):
            return values.get(source.name, None)
        if isinstance(source, Argument | Parameter):
            return self.args[source.position]
        if isinstance(source, Size):
            return evaluate(source.expression, self.cut.sizes)
        return source.value if isinstance(source, Constant) else source

    # -------------------------------------------------------------------------------------------------------- backward

    def backward(self, cotangents: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Send gradients to the store.

        Args:
            cotangents: gradients of what the graph returned, by the names of the values.

        Returns:
            Gradients of the graph's other inputs, by position.
        """
        if self._is_spent or self.stash is None:
            raise StreamError(
                "backward through a streamed model a second time: what its layers kept was freed by the first. Call the model "
                "again (retain_graph=True has no effect on it)"
            )
        self._is_spent = True
        self._check_unchanged()
        self.stream.begin_backward(self)
        grads = Values(self.cut, self.graph.rows)
        for name, value in cotangents.items():
            grads.add(name, None, value)
        of_arguments: dict[int, Tensor] = {}
        touched: dict[int, set[Key[Any]]] = {}
        stages = [stage for stage in reversed(self.graph.stages) if self.graph.matters(stage)]
        groups = [[*self._keys(stage), *self.stash.keys_of(stage.values)] for stage in stages]
        with _compat.large_blocks_apart(), closing(self.stream.visit(groups)) as visits:
            for number, (stage, tensors) in enumerate(zip(stages, visits, strict=True)):
                kept = self.stash.loaded(stage.values, tensors)
                leaves = self._leaves(stage, tensors)
                for part in self.cut.parts(stage.is_whole):
                    self._differentiate(stage, part, tensors, kept, leaves, grads, of_arguments)
                tensors.clear()
                del kept
                self._send(stage, leaves, touched)
                del leaves
                grads.free(stage.outputs)
                self.stash.free(stage, self.graph.stages)
                self.stream.report("backward", number, len(stages))
        self.stream.end_backward(self, touched, self._joined_norms())
        return of_arguments

    def num_samples(self, position: int) -> int:
        """How many samples met a parameter."""
        return evaluate(self.graph.num_samples[position], self.cut.sizes)

    def _leaves(self, stage: Stage, tensors: Mapping[str, Tensor]) -> dict[Any, Tensor]:
        """The tensors that collect gradients over all micro-batches of a stage."""
        leaves: dict[Any, Tensor] = {}
        for source in stage.sources:
            if isinstance(source, Parameter):
                slot = self.slots[source.position]
                value = tensors[slot.key].detach()
                leaves[source] = value.requires_grad_() if slot.param.requires_grad else value
            elif isinstance(source, Companion) and source.key is not SAMPLE_GRAD_NORM:
                param = self.slots[source.position].param
                dtype = torch.promote_types(param.dtype, torch.float32)
                leaves[source] = (
                    torch.zeros((), dtype=dtype, device=self.stream.device).expand(param.shape).requires_grad_()
                )
        return leaves

    def _differentiate(
        self,
        stage: Stage,
        part: int | None,
        tensors: Mapping[str, Tensor],
        kept: Values,
        leaves: Mapping[Any, Tensor],
        grads: Values,
        of_arguments: dict[int, Tensor],
    ) -> None:
        out_grads = [self._cotangent(grads, name, part) for name in stage.outputs]
        if all(grad is None for grad in out_grads):
            return
        with self._as_before(stage, part), torch.enable_grad():
            inputs = self._inputs(stage, part, tensors, kept, leaves, again=True)
            outputs = stage.function(*inputs)
        pairs = [
            (value, grad)
            for value, grad in zip(outputs, out_grads, strict=True)
            if grad is not None and isinstance(value, Tensor) and value.requires_grad
        ]
        del outputs
        torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
        del pairs
        for source, value in zip(stage.sources, inputs, strict=True):
            if not isinstance(source, Value | Argument) or not isinstance(value, Tensor) or value.grad is None:
                continue
            grad, value.grad = value.grad, None
            if isinstance(source, Value):
                grads.add(source.name, part, grad)
            else:
                self._add_to_argument(source, part, grad, of_arguments)

    def _cotangent(self, grads: Values, name: str, part: int | None) -> Tensor | None:
        grad = grads.get(name, part)
        if name not in self.graph.rows and part not in (None, 0):
            return None  # it was computed in every part, and counts once
        return grad

    def _add_to_argument(self, source: Argument, part: int | None, grad: Tensor, found: dict[int, Tensor]) -> None:
        argument = self.args[source.position]
        if source.position not in found:
            found[source.position] = torch.zeros_like(argument)
        rows = self.graph.rows.get(source.name)
        target = found[source.position]
        (target if rows is None else self.cut.narrow(target, rows, part)).add_(grad)

    def _send(self, stage: Stage, leaves: Mapping[Any, Tensor], touched: dict[int, set[Key[Any]]]) -> None:
        """Hand a stage's gradients to the stream."""
        found: dict[int, dict[Key[Any] | None, Tensor]] = {}
        for source, leaf in leaves.items():
            if leaf.grad is not None:
                found.setdefault(source.position, {})[source.key if isinstance(source, Companion) else None] = leaf.grad
                leaf.grad = None
        for position, values in found.items():
            touched.setdefault(position, set()).update(key for key in values if key is not None)
        self.stream.receive(self, stage, {self.slots[position]: values for position, values in found.items()})

    def _joined_norms(self) -> dict[int, Tensor]:
        """The squared norm of each sample's gradient, by the position of the parameter."""
        found: dict[int, list[Tensor]] = {}
        for (position, _), leaf in sorted(self._norms.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
            found.setdefault(position, []).append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        return {position: torch.cat(parts) for position, parts in found.items()}

    # ---------------------------------------------------------------------------------------------------------- inputs

    def _keys(self, stage: Stage) -> list[str]:
        return [self.slots[position].key for position in stage.parameters]

    def _inputs(
        self,
        stage: Stage,
        part: int | None,
        tensors: Mapping[str, Tensor],
        values: Values,
        leaves: Mapping[Any, Tensor] | None = None,
        again: bool = False,
    ) -> list[Any]:
        sizes = self.cut.sizes_of(part)
        inputs: list[Any] = []
        for position, (source, fake) in enumerate(zip(stage.sources, stage.fakes, strict=True)):
            if isinstance(source, Parameter):
                inputs.append(tensors[self.slots[source.position].key] if leaves is None else leaves[source])
            elif isinstance(source, Companion):
                inputs.append(self._companion(source, part, sizes, leaves))
            elif isinstance(source, Size):
                inputs.append(evaluate(source.expression, sizes))
            elif isinstance(source, Constant):
                inputs.append(source.value)
            else:
                value = (
                    self._argument(stage, source, part, again)
                    if isinstance(source, Argument)
                    else values.get(source.name, part)
                )
                if isinstance(value, Tensor) and isinstance(fake, Tensor):
                    own = value if isinstance(source, Argument) and source.is_written else laid_out(value, fake, sizes)
                    needs_grad = again and fake.requires_grad and self._needs_grad(source, position)
                    value = own.detach().requires_grad_() if needs_grad else own
                inputs.append(value)
        return inputs

    def _needs_grad(self, source: Argument | Value, position: int) -> bool:
        if isinstance(source, Value):
            return source.name in self.graph.differentiable
        return bool(self.args[source.position].requires_grad)

    def _argument(self, stage: Stage, source: Argument, part: int | None, again: bool) -> Any:
        if source.is_written and again:
            return self._snapshots[stage.index, part, source.position].clone()
        value = self.args[source.position]
        rows = self.graph.rows.get(source.name)
        if not isinstance(value, Tensor) or rows is None:
            return value
        return self.cut.narrow(value, rows, part)

    def _companion(
        self, source: Companion, part: int | None, sizes: Any, leaves: Mapping[Any, Tensor] | None
    ) -> Tensor:
        param = self.slots[source.position].param
        dtype = torch.promote_types(param.dtype, torch.float32)
        if leaves is not None and source in leaves:
            return leaves[source]
        if source.key is SAMPLE_GRAD_NORM:
            blank = torch.zeros((), dtype=dtype, device=self.stream.device).expand(evaluate(source.num_samples, sizes))
            if leaves is None:
                return blank
            return self._norms.setdefault((source.position, part), blank.requires_grad_())
        return torch.zeros((), dtype=dtype, device=self.stream.device).expand(param.shape)

    # ---------------------------------------------------------------------------------------------- what must not change

    def _versions_of_arguments(self) -> list[int]:
        """Counts of changes of the tensors that backward reads again."""
        return [
            value._version
            for position, value in enumerate(self.args)
            if isinstance(value, Tensor) and position not in self.slots and position not in self._written
        ]

    def _check_unchanged(self) -> None:
        """Backward computes layers again: raise `StreamError` if it would compute something else than forward has."""
        store = self.stream.store
        changed = next((slot for slot, version in self._versions.items() if store.version(slot.key) != version), None)
        if changed is not None:
            raise StreamError(
                f"{changed.name} was changed between forward and backward (optimizer.step(), load_state_dict()), and backward "
                "computes the layers again. Call backward() first"
            )
        if self._versions_of_arguments() != self._argument_versions:
            raise StreamError(
                "a tensor that the model was called with, or one of its buffers, was changed in place between forward and "
                "backward, and backward computes the layers again. Call backward() first, or change a copy"
            )

    def _remember(self, stage: Stage, part: int | None) -> None:
        """Keep the random state, and what the stage is about to write to."""
        if not self.keeps:
            return
        if stage.is_random:
            self._random_states[stage.index, part] = random_state(self.stream.device)
        for source in stage.sources:
            if isinstance(source, Argument) and source.is_written:
                value = self._argument(stage, source, part, again=False)
                self._snapshots[stage.index, part, source.position] = value.clone()

    @contextmanager
    def _as_before(self, stage: Stage, part: int | None) -> Iterator[None]:
        state = self._random_states.pop((stage.index, part), None)
        if state is None:
            yield
            return
        now = random_state(self.stream.device)
        set_random_state(self.stream.device, state)
        try:
            yield
        finally:
            set_random_state(self.stream.device, now)


def _own(value: Any, lent: set[int]) -> Any:
    """A value that may stay when the buffers of its stage are used again: parameters may be returned as views."""
    if isinstance(value, Tensor) and value._is_zerotensor():
        return torch.zeros(
            value.shape, dtype=value.dtype, device=value.device
        )  # those have no memory to be kept or stored
    if isinstance(value, Tensor) and value.numel() and value.untyped_storage().data_ptr() in lent:
        return value.clone()
    return value
