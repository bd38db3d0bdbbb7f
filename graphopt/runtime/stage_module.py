"""What one rank of a pipeline runs: consecutive layers of a model as a module, with the parameters that are theirs."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.errors import OptionError
from graphopt.runtime.bound_graph import BoundGraph


@dataclass(frozen=True)
class Own:
    """The stage's parameter or buffer of this name."""

    name: str


@dataclass(frozen=True)
class Argument:
    """A tensor among the model's arguments, such as ``ids`` or ``batch['mask']``."""

    path: str


@dataclass(frozen=True)
class Received:
    """What the stage before has sent at this position."""

    position: int


@dataclass(frozen=True)
class Computed:
    """What the stage's own graph returns at this position."""

    position: int


@dataclass(frozen=True)
class Fixed:
    """A size of the micro-batch, or a tensor that belongs to no module."""

    value: Any


Source = Own | Argument | Received | Computed | Fixed


@dataclass(frozen=True)
class Wire:
    """A tensor on its way from one stage to the next, or out of the last.

    Attributes:
        name: of its node in the graph.
        shape: at the size of the micro-batch.
        dtype: its dtype.
        requires_grad: whether its gradient travels back.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def example(self) -> Tensor:
        """A tensor that looks like it, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta").requires_grad_(self.requires_grad)

    @property
    def look(self) -> str:
        """Dtype and shape."""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"

    def __repr__(self) -> str:
        return f"{self.name} {self.look}"


@dataclass(frozen=True)
class StageLayout:
    """What a stage takes, does and gives.

    Attributes:
        index: number of the stage, from 0.
        num_stages: of the pipeline.
        layers: names of its layers and of what lies between them.
        sources: where the inputs of its graph come from.
        results: where what it returns comes from.
        received: what the stage before sends; nothing for the first.
        sent: what the next stage receives, or what the model returns.
        returns_one: whether it returns a tensor rather than a tuple of them.
        examples: the model's arguments for the first stage: a tensor for each that is one, or the value itself.
        is_training: the mode that the model was captured in.
        device: where it computes.
        signature: of the model's forward.
    """

    index: int
    num_stages: int
    layers: list[str]
    sources: list[Source]
    results: list[Source]
    received: list[Wire]
    sent: list[Wire]
    returns_one: bool
    examples: Mapping[str, Any]
    is_training: bool
    device: torch.device
    signature: inspect.Signature


class StageModule(nn.Module):
    """The module of a `torch.distributed.pipelining.PipelineStage`.

    Its parameters and buffers are those of the model that its layers use, under the names that they have in the model, so its
    ``state_dict()`` is a part of the model's. They are looked up at each call: ``load_state_dict(assign=True)``, ``to_empty``
    and ``fully_shard`` may replace them.
    """

    def __init__(
        self, layout: StageLayout, graph: BoundGraph, names: Mapping[str, Tensor], non_persistent: Container[str]
    ) -> None:
        super().__init__()
        self._layout, self._graph = layout, graph
        self._has_values = False
        homes: dict[int, tuple[nn.Module, str]] = {}
        self._ties: list[tuple[nn.Module, str, nn.Module, str]] = []
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        for name, tensor in names.items():
            home = _container(self, name)
            self._homes[name] = home
            if isinstance(tensor, nn.Parameter):
                home[0].register_parameter(home[1], tensor)
            else:
                home[0].register_buffer(home[1], tensor, persistent=name not in non_persistent)
            if id(tensor) in homes:
                self._ties.append((*homes[id(tensor)], *home))
            homes.setdefault(id(tensor), home)
        self.register_load_state_dict_post_hook(lambda module, _: module._renewed())  # type: ignore[no-untyped-call]
        self.train(layout.is_training)

    @property
    def layout(self) -> StageLayout:
        """What the stage takes, does and gives."""
        return self._layout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers on one micro-batch: of the model's arguments in the first stage, else of what the stage before has sent.

        Schedules hand keyword arguments to all stages of a rank; all but the first get from the stage before what they need of
        them, and ignore them.
        """
        layout = self._layout
        self._check_values()
        arguments = self._arguments(args, kwargs) if layout.index == 0 else self._check_received(args)

        def read(source: Source) -> Any:
            if isinstance(source, Own):
                return self._own(source.name)
            if isinstance(source, Argument):
                return arguments[source.path]
            if isinstance(source, Received):
                return args[source.position]
            return source.value if isinstance(source, Fixed) else computed[source.position]

        computed: Sequence[Any] = ()
        computed = self._graph(*[read(source) for source in layout.sources])
        results = [read(source) for source in layout.results]
        if not torch.is_grad_enabled():
            results = [value.detach() for value in results]  # graphs that were compiled for training require gradients
        if layout.index + 1 < layout.num_stages:
            return tuple(value.contiguous() for value in results)
        # PipelineStage detaches what the last stage returns in place, unless it is a view; a parameter would be frozen.
        kept = [
            value.view_as(value) if isinstance(source, Own) else value
            for source, value in zip(layout.results, results, strict=True)
        ]
        return kept[0] if layout.returns_one else tuple(kept)

    def train(self, mode: bool = True) -> StageModule:
        """Accept the mode that the model was in when it was cut.

        Raises:
            OptionError: the other mode. Dropout and normalisation are in the graph as they were then.
        """
        if mode != self._layout.is_training:
            now, wanted = ("training", "eval") if self._layout.is_training else ("eval", "train")
            raise OptionError(
                f"stage {self._layout.index} was cut out of a model in {now} mode, whose dropout and normalisation are in its "
                f"graph. Call graphopt.pipeline_stage again after model.{wanted}()"
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        """Where the stage stands, its layers, and what it receives and sends."""
        layout = self._layout
        lines = [f"stage {layout.index} of {layout.num_stages}: {', '.join(layout.layers)}"]
        lines += [f"receives {', '.join(map(repr, layout.received))}"] if layout.received else []
        return "\n".join([*lines, f"{'sends' if layout.index + 1 < layout.num_stages else 'returns'} {layout.sent}"])

    def _own(self, name: str) -> Tensor:
        module, own = self._homes[name]
        value = module._parameters[own] if own in module._parameters else module._buffers[own]
        assert value is not None
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> StageModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._renewed()
        return self

    def _renewed(self) -> None:
        """One tensor for all names of a tied parameter: ``to_empty`` and ``load_state_dict(assign=True)`` make several."""
        self._has_values = False
        for first, name, module, own in self._ties:
            if name in first._parameters:
                module._parameters[own] = first._parameters[name]
            else:
                module._buffers[own] = first._buffers[name]

    def _check_values(self) -> None:
        if self._has_values:
            return
        layout = self._layout
        if names := [name for name in self._homes if self._own(name).is_meta]:
            raise OptionError(
                f"stage {layout.index} has no values for {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}: they are "
                "on the meta device. Type: stage.submod.load_state_dict({name: ... for name in stage.submod.state_dict()}, "
                "assign=True); buffers that are not in a state_dict must be set by hand"
            )
        if names := [name for name in self._homes if self._own(name).device != layout.device]:
            raise OptionError(
                f"stage {layout.index} computes on {layout.device}, and {', '.join(names[:10])} "
                f"{'are' if len(names) > 1 else 'is'} on {self._own(names[0]).device}. Type: "
                f"stage.submod.to({str(layout.device)!r})"
            )
        self._has_values = True

    def _arguments(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The tensors among the model's arguments, which must look as they did when the model was cut."""
        found = flat_arguments(self._layout.signature.bind(*args, **kwargs).arguments)
        expected = self._layout.examples
        if set(found) != set(expected):
            raise OptionError(
                f"the model was cut for a call with {sorted(expected)} and the schedule calls it with {sorted(found)}. Give "
                "graphopt.pipeline_stage the arguments that schedule.step() will be given"
            )
        for path, example in expected.items():
            value = found[path]
            if isinstance(example, Tensor) and isinstance(value, Tensor):
                if example.shape == value.shape and example.dtype == value.dtype:
                    continue
                raise OptionError(
                    f"{path} of a micro-batch is {_look(value)}, and the model was cut for {_look(example)}. Give "
                    "graphopt.pipeline_stage one micro-batch as schedule.step() will cut it: all have one size, and what has no "
                    "samples needs _Replicate() in the schedule's args_chunk_spec or kwargs_chunk_spec"
                )
            if isinstance(example, Tensor) or isinstance(value, Tensor) or not _same(example, value):
                raise OptionError(
                    f"{path} is {_short(value)}, and the model was cut for {_short(example)}, which is part of its graph. Call "
                    "graphopt.pipeline_stage again with the other value"
                )
        return found

    def _check_received(self, args: Any) -> dict[str, Any]:
        layout = self._layout
        if len(args) != len(layout.received):
            raise OptionError(
                f"stage {layout.index} was called with {len(args)} tensors, and the stage before it sends "
                f"{len(layout.received)}. Give the model's arguments to schedule.step() on the rank of the first stage only"
            )
        return {}


def flat_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is inside the arguments of a call, by the words that lead to it."""
    leaves, _ = pytree.tree_flatten_with_path(dict(arguments))
    return {path[0].key + pytree.keystr(path[1:]): value for path, value in leaves}  # type: ignore[attr-defined]


def _container(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a name's tensor belongs in, made if there is none yet."""
    *path, own = name.split(".")
    for part in path:
        if part not in root._modules:
            root._modules[part] = nn.Module()
        root = root._modules[part]  # type: ignore[assignment]
    return root, own


def _same(first: Any, second: Any) -> bool:
    try:
        return first is second or bool(first == second)
    except Exception:
        return False


def _look(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _short(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)[:60]
