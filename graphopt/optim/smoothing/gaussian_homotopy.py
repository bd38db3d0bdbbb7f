"""Minimisation of a function that is smoothed less and less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import state_dtype, zeros
from graphopt.optim.core.bounds import FRACTION, NON_NEGATIVE, numbers
from graphopt.optim.core.closures import common, restored
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.random_directions import draw, generators


class GaussianHomotopy(Module):
    """Let all modules that follow minimise ``mean_i f(θ + σ z_i)``, z normal, and make σ smaller when they come to rest.

    The z stay the same as long as σ does, so that it is one function: line searches and quasi-Newton methods work on it. The
    level ends when no element has moved by more than ``tol`` in a step, or after ``max_steps``: ``σ ← decay σ``, with new z.

    The loss that the step returns is that of the smoothed function.

    Cost: ``n_samples`` evaluations of the closure for each one that a module asks for; z are made anew each time. State: the
    parameters of the step before.

    Args:
        n_samples: the number of z.
        init_sigma: the first σ, in units of the parameters.
        tol: the longest move of an element that ends a level, in units of the parameters.
        decay: what σ is multiplied by.
        max_steps: the most steps of a level; ``None`` for no limit.
        clear_state: let all other modules forget what they learned, and start counting steps anew, when a level ends.
        seed: of z; ``None`` takes torch's global generator.

    Raises:
        OptionError: an option is not valid.

    Reference: Mobahi, Fisher, "A Theoretical Analysis of Optimization by Gaussian Continuation", AAAI 2015;
    sampled as by Iwakiri et al., "Single Loop Gaussian Homotopy Method for Non-convex Optimization", arXiv:2203.05717, 2022.
    """

    needs_closure = True
    replaces_update = True
    bounds = numbers(init_sigma=NON_NEGATIVE, tol=NON_NEGATIVE, decay=FRACTION)

    def __init__(
        self,
        n_samples: int,
        init_sigma: Number,
        tol: Number = 1e-4,
        decay: Number = 0.5,
        max_steps: int | None = None,
        clear_state: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            {
                "n_samples": n_samples,
                "init_sigma": init_sigma,
                "tol": tol,
                "decay": decay,
                "max_steps": max_steps,
                "clear_state": clear_state,
                "seed": seed,
            }
        )
        self._counts: dict[tuple[int, float], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_counts": {}}

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Counts."""
        for name in ("n_samples", "max_steps"):
            value = settings[name]
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not (is_count or (value is None and name == "max_steps")):
                raise OptionError(f"{self.place}: {name}={value!r}; expected an integer of at least 1")

    def step(self, var: Var) -> Var:
        """Choose the level, and replace the closure."""
        self._choose_level(var)
        self._count_from_start_of_level(var)
        level = self.global_state
        sigma, path = level["sigma"], (level["seed"], level["level"])
        original, params = var.clone(clone_update=False), var.params
        num = common(self, params, "n_samples")

        def smoothed(backward: bool = True) -> Any:
            sums = [zeros(param) for param in params] if backward else []
            losses = []
            with torch.no_grad(), restored(params) as starts:
                for sample in range(num):
                    noise = draw(params, "gaussian", generators(params, *path, sample))
                    for param, start, z in zip(params, starts, noise, strict=True):
                        param.copy_(start + sigma * z)
                    loss = original.evaluate(backward)
                    losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
                    for total, grad in zip(sums, original.read_grads() if backward else [], strict=True):
                        total.add_(grad, alpha=1 / num)
            for param, total in zip(params if backward else [], sums, strict=True):
                param.grad = total.to(param.dtype)
            return sum(losses) / num

        var.replace_closure(smoothed)
        return var

    def _choose_level(self, var: Var) -> None:
        """Go on at the present level, or begin the next one."""
        level, params = self.global_state, var.params
        max_steps = common(self, params, "max_steps")
        if "sigma" not in level:
            level["level"], level["num_steps"] = 0, 0
            level["sigma"] = float(common(self, params, "init_sigma"))
            level["seed"] = self._new_seed(var)
        elif (max_steps is not None and level["num_steps"] >= max_steps) or self._is_at_rest(var):
            level["level"], level["num_steps"] = level["level"] + 1, 0
            level["sigma"] *= float(common(self, params, "decay"))
            level["seed"] = self._new_seed(var)
            if common(self, params, "clear_state"):
                self._let_others_forget(var)
        level["num_steps"] += 1
        for param in params:
            self.state[param]["prev_param"] = param.detach().to(state_dtype(param), copy=True)

    def _new_seed(self, var: Var) -> int:
        seed: int | None = common(self, var.params, "seed")
        return int(torch.randint(2**62, ())) if seed is None else seed

    def _is_at_rest(self, var: Var) -> bool:
        tol = float(common(self, var.params, "tol"))
        for param in var.params:
            before = self.state[param].get("prev_param")
            if before is None:
                return False  # it was added meanwhile
            if param.numel() and float((param.detach() - before).abs().max()) > tol:
                return False
        return True

    def _let_others_forget(self, var: Var) -> None:
        binding = self._bound
        own = (f"{binding.path}.", f"{binding.path}/")
        for entry in binding.store.entries.values():
            # (Behind the last colon stands the module, in front of it the projections that it is in.)
            for name in [name for name in entry if name != "step" and not name.rpartition(":")[2].startswith(own)]:
                del entry[name]
        if var.counts is not None:
            for param, count in zip(var.params, var.counts, strict=True):
                self.state[param]["steps_before"] = float(count) - 1
        binding.on_change()

    def _count_from_start_of_level(self, var: Var) -> None:
        """Give the modules that follow counts of steps that fit what they know; the same tensors in each step."""
        if var.counts is None:
            return
        counts: dict[tuple[int, float], Tensor] = {}
        own = []
        for param, count in zip(var.params, var.counts, strict=True):
            before = self.state[param].get("steps_before", 0.0)
            key = id(count), before
            if before and key not in counts:
                counts[key] = self._counts.get(key, torch.empty_like(count)).copy_(count - before)
            own.append(counts[key] if before else count)
        var.counts, self._counts = own, counts
