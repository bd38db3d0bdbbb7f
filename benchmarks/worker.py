"""Inside a rival's process: build its task, and run it when told.

Requests and replies are lines of JSON on the standard input and output; ``worker_process.py`` holds the other end. A
rival that brings a command of its own must answer the same requests, the public methods of ``Worker``.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from benchmarks import machine

PACKAGES = (
    "torch",
    "graphopt",
    "transformers",
    "opacus",
    "backpack-for-pytorch",
    "truegrad",
    "layer-to-layer-pytorch",
    "gradinit",
    "torchzero",
    "heavyball",
    "scikit-learn",
)


@dataclass(frozen=True)
class Task:
    """What a rival's ``build`` returns.

    Args:
        step: The work that is timed; it is called again and again and must do the same work each time.
        metrics: Read once after the last step: anything else worth recording about the rival.
    """

    step: Callable[[], object]
    metrics: Callable[[], Mapping[str, Any]] = field(default=dict)


class Worker:
    """Answers the requests of the harness about one rival."""

    def __init__(self) -> None:
        self.task: Task | None = None

    def build(self, target: str, options: dict[str, Any], threads: int | None, seed: int) -> dict[str, Any]:
        """Call the rival's ``build``."""
        _prepare(threads, seed)
        start = time.perf_counter()
        self.task = _resolve(target)(**options)
        return {"seconds": time.perf_counter() - start}

    def warm_up(self, steps: int) -> dict[str, Any]:
        """Take the first steps; the very first one pays for compilation."""
        return {"seconds": [self._timed(1) for _ in range(steps)]}

    def settle(self) -> dict[str, Any]:
        """Take a step and return freed memory to the system: what stays resident is what the rival really holds.

        The step brings back what the system has taken from the process while the others had their turns.
        """
        self._timed(1)
        gc.collect()
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            pass  # not glibc: figures then include what its allocator keeps
        return {}

    def time(self, steps: int) -> dict[str, Any]:
        """Mean seconds of a step, after one that is not counted: it fetches memory anew after ``settle``."""
        self._timed(1)
        return {"seconds": self._timed(steps) / steps, **_device_memory()}

    def check(self, target: str, options: dict[str, Any], threads: int | None, seed: int) -> dict[str, Any]:
        """Call the rival's check of its numbers."""
        _prepare(threads, seed)
        return {"check": _resolve(target)(**options)}

    def describe(self) -> dict[str, Any]:
        """The rival's own metrics, what torch's compiler counted, and the versions of the packages in use."""
        metrics = dict(self.task.metrics()) if self.task else {}
        return {"metrics": metrics, "compiler": _compiler_counters(), "versions": machine.versions(*PACKAGES)}

    def _timed(self, steps: int) -> float:
        assert self.task is not None, "build comes first"
        _synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.task.step()
        _synchronize()
        return time.perf_counter() - start


def main() -> None:
    """Serve requests until the standard input ends."""
    # From a checkout the folder graphopt/ must not hide an installed graphopt, which also has graphopt.passes.
    root = str(machine.ROOT)
    sys.path[:] = [*(path for path in sys.path if path not in ("", root)), root]
    requests, replies = _take_over_standard_streams()
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        try:
            reply = {"ok": True, **getattr(worker, request.pop("request"))(**request)}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reply = {"ok": False, "error": f"{type(error).__name__}: {lines[0]}", "traceback": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _take_over_standard_streams() -> tuple[IO[str], IO[str]]:
    """Keep the pipes for the harness alone: what libraries print goes to the log, and nothing can read requests."""
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, replies


def _prepare(threads: int | None, seed: int) -> None:
    random.seed(seed)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(seed)


def _resolve(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device_memory() -> dict[str, int]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"device_bytes": peak}


def _compiler_counters() -> dict[str, Any]:
    """Graphs, recompiles and cache hits so far; empty if nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return {}
    import torch._functorch.config

    counters = dynamo.counters
    stats, inductor, aot = counters["stats"], counters["inductor"], counters["aot_autograd"]
    return {
        "graphs": stats.get("unique_graphs", 0),
        "graph_breaks": sum(counters["graph_break"].values()),
        "fxgraph_cache_hit": inductor.get("fxgraph_cache_hit", 0),
        "fxgraph_cache_miss": inductor.get("fxgraph_cache_miss", 0),
        "fxgraph_cache_bypass": inductor.get("fxgraph_cache_bypass", 0),
        "autograd_cache_hit": aot.get("autograd_cache_hit", 0),
        "autograd_cache_miss": aot.get("autograd_cache_miss", 0),
        "autograd_cache_bypass": aot.get("autograd_cache_bypass", 0),
        "autograd_cache_enabled": torch._functorch.config.enable_autograd_cache,
    }


if __name__ == "__main__":
    main()
