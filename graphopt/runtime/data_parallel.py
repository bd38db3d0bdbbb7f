"""`DistributedDataParallel`: what ranks add up is what DDP adds up, and when DDP adds it up.

DDP averages gradients over W ranks, so sample n contributes g_n / W to ``p.grad``: the sum of squares of the joined batch is the
sum over ranks of the local ones divided by W², and ``num_samples`` is the sum over ranks. DDP does this in every backward pass
that follows a forward outside ``no_sync()``, for everything that ``p.grad`` has gathered since it was last averaged. So does this
module, right after DDP has finished:

* a hook on each parameter, as DDP has, tells that a pass produces gradients; two callbacks in a row (DDP queues one itself)
  wait for DDP to finish;
* one small collective tells every rank what all of them have: counts, and problems. It is made whatever happened, so a rank with
  a problem leaves nobody waiting, and all ranks learn of it;
* one collective for each dtype carries the statistics, in flat buckets.

A statistic that was reduced before (gradient accumulation over synchronised passes) is set aside while the next pass adds to
its companion, so that it is not reduced again.

Read in torch 2.13, and to be checked in others: ``DistributedDataParallel._active_ddp_module``, ``_module_parameters``,
``_comm_hooks``, ``_join_config``, ``_delay_all_reduce_params``, ``reducer._check_reducer_finalized``.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from graphopt import _compat
from graphopt.annotations import SUM_GRAD_SQUARED, Key
from graphopt.errors import StaleAnnotation, UnsupportedError
from graphopt.runtime.statistics import Statistic

# Communication hooks that average over all ranks, exactly or in lower precision: the statistic of the average stays what it is.
# A hook of PyTorch's with another name sends something else (a low rank approximation, or nothing to some ranks).
_AVERAGING_HOOKS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")
_HOOK_MODULE = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"

_SAME = 1e-6  # relative; averaged gradients are the same bits on all ranks

_replicas: WeakIdKeyDictionary = WeakIdKeyDictionary()  # DistributedDataParallel -> Replicas
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> Replicas


def enter_forward() -> None:
    """Called in each forward of a compiled model; notes that DDP will average the gradients that follow, if it will.

    Raises:
        UnsupportedError: DDP is set up in a way that the statistics cannot follow.
    """
    ddp = _active()
    if ddp is None or not torch.is_grad_enabled():
        return
    replicas = cast("Replicas | None", _replicas.get(ddp))
    if replicas is None:
        check(ddp)
        replicas = _replicas[ddp] = Replicas(ddp)
    replicas.enter_forward(ddp)


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a `DistributedDataParallel` runs; any other module itself."""
    ddp_class = _ddp_class()
    while ddp_class is not None and isinstance(model, ddp_class):
        model = model.module
    return model


def check(ddp: Any) -> None:
    """Raise `UnsupportedError` if statistics cannot follow what this `DistributedDataParallel` does with gradients."""
    problem, fix = None, ""
    if ddp._use_python_reducer:
        problem = "reduces in Python (torch._dynamo.config.optimize_ddp = 'python_reducer')"
        fix = "set torch._dynamo.config.optimize_ddp = False before you wrap the model"
    elif ddp.mixed_precision is not None:
        problem = "casts the parameters (mixed_precision=...)"
        fix = "leave mixed_precision out and run the model under torch.autocast"
    elif ddp._delay_all_reduce_params:
        problem = "delays the reduction of some parameters (delay_all_reduce_named_params=...)"
        fix = "leave that argument out"
    elif ddp._join_config.enable:
        problem = "runs inside its join() context, where ranks that have run out of batches take part in no statistic"
        fix = "give all ranks the same number of batches; batches may differ in size"
    elif any(hasattr(param, "_in_backward_optimizers") for param in ddp._module_parameters):
        problem = "runs the optimizer inside backward, so there is no p.grad that a statistic could stand beside"
        fix = "call optimizer.step() after backward()"
    else:
        for hook, _ in ddp._comm_hooks:
            if not _averages(hook):
                problem = (
                    f"has the communication hook {getattr(hook, '__qualname__', hook)}, which may not average gradients"
                )
                fix = f"use one of {', '.join(_AVERAGING_HOOKS)} of {_HOOK_MODULE}, or none"
    if problem is not None:
        raise UnsupportedError(
            f"the DistributedDataParallel around {type(ddp.module).__name__} {problem}; TrueGrad's statistics cannot follow "
            f"that. Instead: {fix}; or transform the model without TrueGrad: graphopt.transform(model, [])"
        )


class Replicas:
    """One `DistributedDataParallel`: when it averages, and the statistics that have to be reduced then."""

    def __init__(self, ddp: Any) -> None:
        self._ddp = weakref.ref(ddp)
        self._params = [weakref.ref(param) for param in ddp._module_parameters if param.requires_grad]
        self._group = ddp.process_group
        self._expects = False  # a forward has told DDP to average in the next backward pass that reaches it
        self._has_averaged = False
        self._tasks: set[int] = set()  # backward passes in which it does
        self._touched: set[int] = (
            set()
        )  # ids of parameters whose gradients this rank has added to since the last average
        reference, handles = weakref.ref(self), []
        for param in ddp._module_parameters:
            if param.requires_grad:
                _owners[param] = self
                handles.append(param.register_post_accumulate_grad_hook(lambda param: _accumulated(reference, param)))
        weakref.finalize(ddp, _remove, handles)

    def is_alive(self) -> bool:
        """Whether the `DistributedDataParallel` still exists."""
        return self._ddp() is not None

    def enter_forward(self, ddp: Any) -> None:
        """A forward of the `DistributedDataParallel` begins."""
        check(ddp)  # hooks and join() may have come since
        if ddp.require_backward_grad_sync:
            self._expects = True

    def averages_in(self, task: int) -> bool:
        """Whether this backward pass ends with averaged gradients."""
        return task in self._tasks

    def accumulated(self, param: Tensor) -> None:
        """Autograd has added to ``param.grad``."""
        self._touched.add(id(param))
        task = _compat.current_graph_task()
        if self._expects and task >= 0 and task not in self._tasks and not self._is_too_early():
            self._tasks.add(task)
            self._follow_gradients()
            # DDP queues its own callback later in the pass. By the time the first callback runs, all of them are queued.
            _compat.call_after_backward(lambda: _compat.call_after_backward(lambda: self._finish(task)))

    def _is_too_early(self) -> bool:
        """With ``static_graph``, DDP averages at the end of the first outermost pass, and cannot be asked whether it has."""
        ddp = self._ddp()
        return ddp is not None and ddp.static_graph and not self._has_averaged and _is_inside_checkpoint()

    def _follow_gradients(self) -> None:
        """DDP is about to write the gradients of parameters that this rank does not use, too: first look what became of them."""
        ddp = self._ddp()
        if ddp is not None and (ddp.find_unused_parameters or ddp.static_graph):
            for param in self._present():
                cast(ReplicatedStatistic, Statistic.of(param)).follow_gradient()

    def _present(self) -> list[Tensor]:
        return [param for reference in self._params if (param := reference()) is not None]

    def _finish(self, task: int) -> None:
        self._tasks.discard(task)
        ddp = self._ddp()
        if ddp is None or not self._expects or not _is_finished(ddp):
            return  # an inner pass of a reentrant checkpoint: DDP finishes with the outer one
        self._expects, self._has_averaged = False, True
        params = self._present()
        statistics = [cast(ReplicatedStatistic, Statistic.of(param)) for param in params]
        touched, self._touched = self._touched, set()
        _reduce(params, statistics, touched, self._group)


@final
class ReplicatedStatistic(Statistic):
    """The statistic of a parameter that `DistributedDataParallel` holds a copy of on every rank."""

    def __init__(self, param: Tensor) -> None:
        super().__init__(param)
        self._replicas = cast(Replicas, _owners[param])
        self._is_reduced = False  # the same on all ranks already
        self._reduced: Tensor | None = None  # what was reduced, while the companion gathers more
        self._num_reduced = 0
        self._scale_of_reduced = 1.0  # what this rank alone has done to it since
        self._waits = False

    def leave(self, task: int) -> None:
        """Publish, or leave that to the end of DDP's average."""
        if self._task == -1:  # DDP has finished within an inner pass, and this statistic was part of its average
            return
        param = self._param()
        if not self._count(param):
            if not self._waits:
                self._take_back()
            return
        if self._replicas.averages_in(task):
            self._waits = True
        elif param is not None:
            gathered = self.companion.grad
            assert gathered is not None
            value = gathered if self._reduced is None else gathered + self._reduced
            self._publish(param, value, self.num_samples + self._num_reduced)

    def companion_of(self, key: Key[Any], num_samples: int) -> Tensor:
        """The leaf that receives the sum of squares; of other statistics nothing is reduced."""
        if key is not SUM_GRAD_SQUARED:
            raise UnsupportedError(
                f"{key.name} is not reduced over the ranks of DistributedDataParallel. Leave it out: "
                "TrueGrad(statistics=('sum_grad_squared',)), or compute it on one process"
            )
        return super().companion_of(key, num_samples)

    def follow_gradient(self) -> None:
        """Bring what was published up to date, unless a running backward pass has done so already."""
        param = self._param()
        if param is not None and self._task == -1:
            self._begin(param)

    def gathered(self) -> _Gathered:
        """What this rank has to add to the average."""
        if self._task != -1:
            self._count(self._param())
        self._set_aside()
        return _Gathered(
            self.companion.grad,
            self.num_samples if self.companion.grad is not None else 0,
            self._problem,
            self._scale_of_reduced if self._reduced is not None else 1.0,
        )

    def put(self, total: Tensor, num_samples: int, problem: str | None) -> None:
        """Take over, and publish, what all ranks have gathered together."""
        param = self._param()
        self._waits = False
        if self._reduced is not None:
            self.companion.grad, self._reduced = self._reduced.add_(total), None
        elif self.companion.grad is not None:
            self.companion.grad.copy_(total)
        else:
            self.companion.grad = total.clone()
        self.num_samples = num_samples + self._num_reduced
        self._num_reduced, self._scale_of_reduced, self._is_reduced = 0, 1.0, True
        self._problem = problem
        if param is not None and param.grad is not None:
            self._publish(param, self.companion.grad, self.num_samples)

    def put_nothing(self) -> None:
        """No rank has gathered anything."""
        self._waits = False
        self._take_back()

    def _begin(self, param: Tensor) -> None:
        if self._waits:  # an inner pass of a reentrant checkpoint has ended, and DDP has not finished yet
            return
        try:
            super()._begin(param)
        except StaleAnnotation as error:
            self._problem = str(error)  # raising it inside backward would leave the other ranks waiting for this one
        self._set_aside()

    def _set_aside(self) -> None:
        """Keep what was reduced away from what is gathered now."""
        if self._is_reduced:
            self._reduced, self.companion.grad = self.companion.grad, None
            self._num_reduced, self.num_samples = self.num_samples, 0
            self._is_reduced = False

    def _take_back(self) -> None:
        """The pass has added nothing, so nothing needs to be set aside."""
        if self._reduced is not None and self.companion.grad is None:
            self.companion.grad, self._reduced = self._reduced, None
            self.num_samples, self._num_reduced = self._num_reduced, 0
            self._is_reduced = True

    def _rescale_parts(self, factor: Tensor) -> None:
        if self._reduced is not None and self.companion.grad is not None:  # what is published is their sum
            square = factor.square()
            self._reduced.mul_(square.to(self._reduced.dtype))
            self.companion.grad.mul_(square.to(self.companion.grad.dtype))
            self._scale_of_reduced *= float(factor)

    def _reset(self) -> None:
        super()._reset()
        self._is_reduced, self._reduced, self._num_reduced, self._scale_of_reduced = False, None, 0, 1.0
        self._waits = False


class _Gathered(NamedTuple):
    value: Tensor | None
    num_samples: int
    problem: str | None
    scale_of_reduced: float


# ----------------------------------------------------------------------------------------------------------------------
# Reduction


def _reduce(params: Sequence[Tensor], statistics: Sequence[ReplicatedStatistic], touched: set[int], group: Any) -> None:
    """Two rounds: what there is, then the statistics themselves."""
    world, device = group.size(), params[0].device
    gathered = [statistic.gathered() for statistic in statistics]
    facts = torch.tensor(
        [_describe(param, found, touched) for param, found in zip(params, gathered, strict=True)], dtype=torch.float64
    ).to(device)
    same = torch.stack([_fingerprint(param, found, device) for param, found in zip(params, gathered, strict=True)])
    extremes = torch.cat([same, -same], dim=1)
    works = [
        torch.distributed.all_reduce(facts, group=group, async_op=True),
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=group, async_op=True),
    ]
    for work in works:
        work.wait()
    highest, lowest = extremes[:, :2], -extremes[:, 2:]
    differs = (highest - lowest > _SAME * torch.maximum(highest.abs(), lowest.abs())).tolist()
    rows = [_Facts(*row) for row in facts.tolist()]
    present = [index for index, row in enumerate(rows) if row.has_value]
    totals = _sum_flat([(statistics[index].companion, gathered[index].value) for index in present], group)
    for index, value in zip(present, totals, strict=True):
        problem = gathered[index].problem or _problem(tuple(params[index].shape), rows[index], differs[index], world)
        statistics[index].put(value.div_(world * world), round(rows[index].num_samples), problem)
    for index, statistic in enumerate(statistics):
        if not rows[index].has_value:
            statistic.put_nothing()


class _Facts(NamedTuple):
    """What ranks tell each other of a parameter; summed over ranks."""

    has_value: float
    num_samples: float
    has_problem: float
    is_bare: float  # there is a gradient that no captured graph has computed


def _describe(param: Tensor, found: _Gathered, touched: set[int]) -> _Facts:
    return _Facts(
        float(found.value is not None),
        float(found.num_samples),
        float(found.problem is not None),
        float(found.value is None and id(param) in touched),
    )


def _fingerprint(param: Tensor, found: _Gathered, device: torch.device) -> Tensor:
    """What must be the same on all ranks: a few entries of the averaged gradient, and what was done to the last average."""
    checksum = torch.zeros((), dtype=torch.float64, device=device)
    if param.grad is not None:
        entries = param.grad.detach().reshape(-1) if param.grad.is_contiguous() else param.grad.detach().flatten()
        checksum = entries[:: max(1, entries.numel() // 64)].to(device, torch.float64).sum().nan_to_num(0.0, 0.0, 0.0)
    return torch.stack([checksum, torch.full_like(checksum, found.scale_of_reduced)])


def _problem(shape: tuple[int, ...], total: _Facts, differs: Sequence[bool], world: int) -> str | None:
    """Why the reduced statistic must not be used, the same decision on every rank; ``None`` if all is well."""
    if total.has_problem:
        return f"another rank has no valid statistic for a parameter of shape {shape}; the error of that rank says why"
    if total.is_bare:
        return (
            f"{round(total.is_bare)} of {world} ranks computed the gradient of a parameter of shape {shape} outside any captured "
            "graph, so the statistic lacks their samples. Let every rank run the model in the same way (TORCH_LOGS=recompiles "
            "shows a rank that has reached its limit of recompilations)"
        )
    if differs[0]:
        return (
            f"after backward the ranks hold different gradients of a parameter of shape {shape}, so DistributedDataParallel has "
            "not averaged them as it announced. Remove hooks that change gradients on one rank, and call backward() once for "
            "each forward outside no_sync()"
        )
    if differs[1]:
        return (
            f"ranks have rescaled the gradient of a parameter of shape {shape} differently between two averages. Rescale "
            "gradients (clip_grad_norm_, unscale_) after the backward pass that DistributedDataParallel averages in"
        )
    return None


def _sum_flat(parts: Sequence[tuple[Tensor, Tensor | None]], group: Any) -> list[Tensor]:
    """Sums over ranks, one collective for each dtype.

    Args:
        parts: for each statistic something of its shape, dtype and device, and the value; ``None`` counts as zero.
        group: the process group.

    Returns:
        The sums, in the same order; views of one buffer for each dtype.
    """
    buckets: defaultdict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, (like, _) in enumerate(parts):
        buckets[like.dtype, like.device].append(index)
    sums: dict[int, Tensor] = {}
    works = []
    for (dtype, device), indices in buckets.items():
        flat = torch.zeros(sum(parts[index][0].numel() for index in indices), dtype=dtype, device=device)
        pieces = flat.split([parts[index][0].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            like, value = parts[index]
            sums[index] = piece.view(like.shape)
            if value is not None:
                sums[index].copy_(value)
        works.append(torch.distributed.all_reduce(flat, group=group, async_op=True))
    for work in works:
        work.wait()
    return [sums[index] for index in range(len(parts))]


# ----------------------------------------------------------------------------------------------------------------------
# DistributedDataParallel as torch 2.13 has it


def _ddp_class() -> Any:
    module = sys.modules.get("torch.nn.parallel.distributed")
    return None if module is None else module.DistributedDataParallel


def _active() -> Any:
    ddp_class = _ddp_class()
    return None if ddp_class is None else ddp_class._active_ddp_module


def _is_finished(ddp: Any) -> bool:
    try:
        ddp.reducer._check_reducer_finalized()
    except RuntimeError:
        return False
    return True


def _is_inside_checkpoint() -> bool:
    """Whether this is a backward pass of a reentrant checkpoint, within the pass of the model."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _compat.reentrant_checkpoint_code():
            return True
        frame = cast(types.FrameType, frame.f_back)
    return False


def _averages(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == _HOOK_MODULE and getattr(hook, "__name__", None) in _AVERAGING_HOOKS


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _accumulated(reference: weakref.ref[Replicas], param: Tensor) -> None:
    replicas = reference()
    if replicas is not None and _owners.get(param) is replicas:
        replicas.accumulated(param)


def _kind(param: Tensor) -> type[Statistic] | None:
    owner = cast("Replicas | None", _owners.get(param)) if _owners else None
    return ReplicatedStatistic if owner is not None and owner.is_alive() else None


Statistic.kinds.append(_kind)
