"""Optimizer in backward: each parameter makes its step as soon as its gradient is there, and the gradient is dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graphopt import _compat
from graphopt.errors import ClosureError, OptionError, UnsupportedError
from graphopt.optim.core.modular import Modular
from graphopt.optim.core.module import Rule
from graphopt.runtime.stores.stored_tensor import StoredTensor

if TYPE_CHECKING:
    from graphopt.optim.core.naming import Named

_MAX_NAMES = 10


def fuse_into_backward(model: nn.Module, *modules: Any, **flags: Any) -> Modular:
    """Let ``loss.backward()`` make the optimizer's step: a parameter moves as soon as its gradient is complete.

    The gradient is dropped right after, so that the gradients of all parameters never exist at once (where autograd makes
    them one after another: a model that is compiled into one graph makes all of them in one call). A training loop stays as
    it is: ``loss.backward(); optimizer.step(); scheduler.step()``, where ``step()`` only ends the iteration. It counts the
    step, and makes hooks, schedules and learning rate schedulers work as ever. What a step computes is what it computes
    otherwise; with ``foreach=False``, which computes one tensor at a time, bit for bit.

    What is not possible, and raised where it can be seen:

    * modules that look at several tensors at once, or evaluate the closure; ``step(closure)``;
    * modules that read statistics of TrueGrad: they are published when backward has ended, and by then the gradient is gone;
    * gradient accumulation: the second ``backward()`` before ``step()`` raises when it reaches the first parameter that has
      moved already. (Losses over different parameters may have a ``backward()`` each.) The same goes for a parameter that
      reentrant checkpoints use in several segments;
    * ``DistributedDataParallel``, which averages gradients after they are used here.

    What cannot be seen, and is up to you: there are no gradients after backward, so `torch.nn.utils.clip_grad_norm_` has
    nothing to clip (put ``m.ClipValue`` or another module into the chain), ``GradScaler`` nothing to unscale (its
    ``step`` fails with an assertion, and the parameters have moved by scaled gradients), and a batch with NaN cannot be
    skipped as a whole: an error in the middle of backward leaves the parameters that came before it moved. Hooks of yours on
    the same parameters run before the step if they were registered before.

    Copies of the optimizer (``deepcopy``, pickle) are ordinary optimizers, without hooks. ``optimizer.in_backward.remove()``
    makes this one ordinary again.

    Args:
        model: its parameters are to be trained.
        *modules: the chain, as in `Modular`; or one `Modular` over parameters of the model. After ``add_param_group``, or
            when more parameters require gradients, call it again with that optimizer.
        **flags: options of `Modular`.

    Returns:
        The optimizer.

    Raises:
        OptionError: something else than modules or one `Modular`, or an optimizer of another model.
        UnsupportedError: the chain, an option or the model does not allow it.

    Example:
        >>> from graphopt.optim import fuse_into_backward, m
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = fuse_into_backward(model, m.LR(0.1))
        >>> model(torch.tensor([[2.0]])).sum().backward()
        >>> model.weight.data, model.weight.grad
        (tensor([[0.8000]]), None)
        >>> optimizer.step()  # the iteration ends
    """
    _check_model(model)
    optimizer = _optimizer_of(model, modules, flags)
    _check_chain(optimizer)
    if optimizer.in_backward is None:
        optimizer.in_backward = BackwardSteps(optimizer)
    optimizer.in_backward.watch()
    return optimizer


class BackwardSteps:
    """The hooks of an optimizer in backward, and how far the iteration has come.

    Args:
        optimizer: makes the steps.
    """

    def __init__(self, optimizer: Modular) -> None:
        self._optimizer = optimizer
        self._handles: dict[int, RemovableHandle] = {}  # by id of the parameter, which the optimizer keeps alive
        self._moved: set[int] = set()  # ids of the parameters that have moved in this iteration
        self._lock = threading.RLock()  # autograd runs the hooks of each device in a thread of its own

    def watch(self) -> None:
        """Give hooks to the parameters that require gradients and have none."""
        for param in self._params():
            if param.requires_grad and id(param) not in self._handles:
                self._handles[id(param)] = param.register_post_accumulate_grad_hook(self._move)

    def remove(self) -> None:
        """Take back all hooks: the optimizer is an ordinary one again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._optimizer.in_backward = None
        if self._moved:
            self._end()

    def end(self, closure: Callable[..., Any] | None) -> None:
        """End the iteration; what ``optimizer.step()`` does.

        Raises:
            ClosureError: there is a closure.
            UnsupportedError: a parameter has a gradient, which backward would have dropped.
        """
        if closure is not None:
            raise ClosureError(
                "this optimizer steps in backward, so step(closure) would come too late; write loss.backward() and then "
                "optimizer.step(), or optimizer.in_backward.remove() first"
            )
        if self._optimizer._is_asked_for_state():  # torch.distributed.checkpoint sets p.grad by hand
            with torch.no_grad():
                self._optimizer._make_state()
            return
        left = [param for param in self._params() if param.grad is not None]
        if left:
            name = self._optimizer.param_table.describe
            names = "; ".join(map(name, left[:_MAX_NAMES])) + ("; ..." if len(left) > _MAX_NAMES else "")
            raise UnsupportedError(
                f"this optimizer steps in backward, but {len(left)} of its parameters have a gradient that no backward pass "
                f"since fuse_into_backward has used: {names}. Call fuse_into_backward(model, optimizer) again after "
                "add_param_group() or requires_grad_(), and set no p.grad by hand; p.grad = None drops what is there"
            )
        self._end()

    @property
    def progress(self) -> str:
        """How far the running backward pass has come, for an error."""
        return (
            f"{len(self._moved)} of {len(self._handles)} parameters have moved in this iteration, the others have not; "
            "optimizer.step() ends it so"
        )

    def _begin(self) -> None:
        groups = self._optimizer.param_groups
        if any(group["maximize"] != groups[0]["maximize"] for group in groups):
            raise OptionError("maximize differs between parameter groups; make two optimizers")
        self._optimizer._run_schedules()

    def _end(self) -> None:
        self._moved.clear()
        self._optimizer._end_step()

    @_compat.disable_dynamo
    def _move(self, param: Tensor) -> None:
        """The gradient of a parameter is complete."""
        optimizer = self._optimizer
        with self._lock:
            try:
                if optimizer.param_table.group(param)["frozen"]:
                    return
                if id(param) in self._moved:
                    raise UnsupportedError(
                        f"{optimizer.param_table.describe(param)}: a second gradient arrives before optimizer.step(), but "
                        f"the first has moved it already ({self.progress}). An optimizer in backward cannot accumulate "
                        "gradients over several backward passes, nor over reentrant checkpoints that share a parameter "
                        "(use_reentrant=False): call optimizer.step() after each backward(), or leave fuse_into_backward out"
                    )
                if not self._moved:
                    self._begin()
                optimizer.step_parameter(param)
                self._moved.add(id(param))
            finally:
                param.grad = None

    def _params(self) -> list[Tensor]:
        return [param for group in self._optimizer.param_groups for param in group["params"]]


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise UnsupportedError(
                f"{name or 'the model'} is a DistributedDataParallel, which averages gradients after an optimizer in backward "
                "has used them; call optimizer.step() after backward(), or shard the model with fully_shard"
            )


def _optimizer_of(model: nn.Module, modules: tuple[Any, ...], flags: dict[str, Any]) -> Modular:
    found = next((module for module in modules if isinstance(module, torch.optim.Optimizer)), None)
    if found is None:
        return Modular(model, *modules, **flags)
    if not isinstance(found, Modular) or len(modules) > 1 or flags:
        raise OptionError(
            f"fuse_into_backward(model, ...): pass modules, such as m.Adam(), m.LR(1e-3), or one graphopt.optim.Modular and "
            f"nothing else; found {', '.join(type(module).__name__ for module in modules)} and the options {sorted(flags)}"
        )
    own = {id(param) for param in model.parameters()}
    foreign = [param for group in found.param_groups for param in group["params"] if id(param) not in own]
    if foreign:
        names = "; ".join(map(found.param_table.describe, foreign[:_MAX_NAMES]))
        raise OptionError(f"fuse_into_backward(model, optimizer): the optimizer's {names} belongs to another model")
    return found


def _check_chain(optimizer: Modular) -> None:
    """Raise `UnsupportedError` if parameters cannot step one after another during backward."""
    for entry in optimizer._named:
        if (problem := _problem(entry)) is not None:
            raise UnsupportedError(
                f"{entry.place}: {problem}, which an optimizer in backward cannot offer; call optimizer.step() after backward() "
                "instead"
            )
    if optimizer.defaults["differentiable"]:
        raise UnsupportedError("differentiable=True: an optimizer in backward cannot be differentiated through")
    for group in optimizer.param_groups:
        for param in group["params"]:
            if isinstance(param, StoredTensor):
                raise UnsupportedError(
                    f"{optimizer.param_table.describe(param)} lives in a store (LayerToLayer), from where a step fetches it; "
                    "call optimizer.step() after backward()"
                )


def _problem(entry: Named) -> str | None:
    module = entry.module
    if module.needs_closure:
        return "it evaluates the loss by a closure"
    if module.reads:
        return f"it reads {', '.join(key.name for key in module.reads)}, published when backward has ended"
    if not isinstance(module, Rule) or type(module).step is not Rule.step:
        return "it is a Module with a step of its own, and may look at all parameters together"
    if module.measures:
        return "it must know all gradients together"
    return None
