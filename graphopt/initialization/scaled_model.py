"""A model with scales as it is called: eagerly, in graphs of `graphopt.transform`, or by several processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from graphopt import _compat
from graphopt.errors import OptionError, StreamError
from graphopt.initialization.scales import Scales
from graphopt.passes import GradInit, LayerToLayer
from graphopt.pipeline import Pass
from graphopt.runtime import data_parallel, fully_sharded
from graphopt.transform import HANDLE, handle_of

MIXED_PRECISION = (
    "GradInit works worse in mixed precision: second derivatives lose digits. Learn the initialisation in full precision, and "
    "train in mixed precision afterwards"
)


class ScaledModel:
    """Scales on a model, until `detach`.

    Args:
        model: a module, also a transformed one, or one in ``DistributedDataParallel``.
        in_graphs: whether a transformed model is called in graphs; else as it was written.

    Attributes:
        model: the module itself.
        scales: see there.
        group: the processes that share the model, if there are several.

    Raises:
        OptionError: this kind of model cannot be scaled.
        StreamError: its layers are streamed from a store.
    """

    def __init__(self, model: nn.Module, *, in_graphs: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"an initialisation is learned for a torch.nn.Module, not for {type(model).__name__}")
        inner = data_parallel.unwrap(model)
        _check(inner)
        self.scales = Scales(inner)
        self.model = inner
        self.group: Any = None
        self._hooks: list[RemovableHandle] = []
        self._ddp: DistributedDataParallel | None = None
        if isinstance(model, DistributedDataParallel):
            self._ddp, self._synchronised = model, model.require_backward_grad_sync
            model.require_backward_grad_sync = False  # its reducer waits for gradients of the parameters
            if dist.get_world_size(model.process_group) > 1:
                self.group = model.process_group
        self._task: int | None = None  # the backward pass at whose end gradients are averaged
        if self.group is not None:
            self._hooks = [
                scale.register_post_accumulate_grad_hook(self._average_later) for scale in self.scales.scales
            ]
        self._handle = handle_of(inner)
        if self._handle is not None:
            self._scaled = self._in_graph(GradInit(awake=True)) if in_graphs else self._eagerly
            self._unscaled = self._in_graph() if in_graphs else self._eagerly
            self._handle.detour = self._scaled

    @property
    def is_attached(self) -> bool:
        """Whether the model has its scales still."""
        return self.scales.is_attached

    @property
    def saw_autocast(self) -> bool:
        """Whether the model was called under autocast."""
        return self.scales.saw_autocast

    @contextmanager
    def unscaled(self) -> Iterator[None]:
        """Within, the model computes with its parameters as they are, compiled as for ordinary training."""
        with self.scales.as_written():
            if self._handle is not None:
                self._handle.detour = self._unscaled
            try:
                yield
            finally:
                if self._handle is not None:
                    self._handle.detour = self._scaled

    def average(self, values: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
            values.div_(dist.get_world_size(self.group))
        return values

    def average_each(self, values: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor | None]:
        """The means over all processes of what any of them has, in place; who has nothing counts as zero.

        Args:
            values: one for each of ``likes``, or ``None``.
            likes: of the same shapes on all processes.
        """
        if self.group is None:
            return list(values)
        has_it = torch.tensor([float(value is not None) for value in values], device=likes[0].device)
        return [
            self.average(torch.zeros_like(like) if value is None else value) if is_anywhere else None
            for value, like, is_anywhere in zip(values, likes, self.average(has_it).tolist(), strict=True)
        ]

    def detach(self, *, fold: bool) -> None:
        """Give the model back; ``fold`` as in `Scales.detach`."""
        if not self.is_attached:
            return
        self.scales.detach(fold=fold)
        for hook in self._hooks:
            hook.remove()
        if self._handle is not None:
            self._handle.detour = None
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = self._synchronised

    def _average_later(self, scale: Tensor) -> None:
        """Average all at once when backward has ended: processes may use other scales, or in another order."""
        task = _compat.current_graph_task()
        if task != self._task:
            self._task = task
            _compat.call_after_backward(self._average_gradients)

    def _average_gradients(self) -> None:
        scales, kind = self.scales.scales, functools.reduce(torch.promote_types, (s.dtype for s in self.scales.scales))
        device = scales[0].device
        grads = [torch.zeros_like(scale) if scale.grad is None else scale.grad for scale in scales]
        together = self.average(torch.stack([grad.detach().to(device, kind) for grad in grads]))
        for scale, grad, value in zip(scales, grads, together, strict=True):
            grad.copy_(value)
            if scale.grad is None and bool(value):
                scale.grad = grad

    def _in_graph(self, *passes: Pass) -> Callable[..., Any]:
        """A compiled call of the model with these passes, layers compiled once as the model's own passes say."""
        assert self._handle is not None
        regions = [item for item in self._handle.setup.passes if isinstance(item, LayerToLayer)]
        compiled = self._handle.compile_detour(self.model, [*passes, *regions])
        scales = self.scales

        def call(*args: Any, **kwargs: Any) -> Any:
            scales.note_autocast()
            with scales.as_written():
                return compiled(*args, **kwargs)

        return call

    def _eagerly(self, *args: Any, **kwargs: Any) -> Any:
        return self.model._call_impl(*args, **kwargs)


def _check(model: nn.Module) -> None:
    kind = type(model).__name__
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise OptionError(
            "torch.compile's modules are differentiable once, and GradInit differentiates twice: wrap the module itself "
            "(model._orig_mod) and call that inside the block, or use graphopt.transform(model) instead of torch.compile"
        )
    parts = list(model.named_modules())[1:]
    if transformed := [name for name, module in parts if HANDLE in vars(module)]:
        raise OptionError(
            f"{transformed[0]} of {kind} is transformed by itself, and its graphs would not know of the scales: "
            f"graphopt.restore(model.get_submodule({transformed[0]!r})) first, or graphopt.transform the whole model"
        )
    if compiled := [name for name, module in model.named_modules() if _is_compiled(module)]:
        raise OptionError(
            f"{compiled[0] or 'all'} of {kind} is compiled by torch.compile, and so is differentiable once, while GradInit "
            "differentiates twice: compile it after the initialisation is learned, or use graphopt.transform(model) instead"
        )
    if fully_sharded.is_sharded(model):
        raise OptionError(f"{kind} is sharded: learn its initialisation before fully_shard(model)")
    handle = vars(model).get(HANDLE)
    if handle is not None and getattr(handle, "stream", None) is not None:
        raise StreamError(
            f"the layers of {kind} are streamed from a store, layer by layer, and GradInit needs all of them at once: learn "
            "the initialisation of a smaller model, or before graphopt.transform(model, [LayerToLayer(store=...)])"
        )


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made it, or it was changed by ``module.compile()``."""
    return isinstance(module, torch._dynamo.OptimizedModule) or (
        vars(module).get("_compiled_call_impl") is not None and HANDLE not in vars(module)
    )
