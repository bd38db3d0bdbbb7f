"""Two processes that run the same function, each as one rank of a gloo group, within a limit of time.

The processes live as long as a test module, since importing torch takes longer than most tests; a test that fails by hanging
takes them with it. Every run has a process group of its own.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORLD = 2
_LIMIT = 120.0  # seconds for one run; collectives give up earlier, so that a rank that waits says for what
_COLLECTIVE_LIMIT = timedelta(seconds=60)


class Ranks:
    """``ranks(function, *args)`` calls ``function(rank, *args)`` in each process and raises what any of them raises."""

    def __init__(self, folder: str) -> None:
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []
        self._folder = folder
        self._runs = 0

    def __call__(self, function: Callable[..., Any], *args: Any, limit: float = _LIMIT) -> list[Any]:
        """What the function returned on each rank."""
        if not self._workers:
            self._start()
        self._runs += 1
        store = str(Path(self._folder) / f"store{self._runs}")
        for _, pipe in self._workers:
            pipe.send((function, args, store))
        answers, end = [], time.monotonic() + limit
        for rank, (process, pipe) in enumerate(self._workers):
            while not pipe.poll(0.1):
                if time.monotonic() > end or not process.is_alive():
                    self.stop()
                    what = "hangs" if process.is_alive() else "has died"
                    raise TimeoutError(f"rank {rank} {what} in {function.__name__}{args} after {limit:.0f} s at most")
            answers.append(pipe.recv())
        if errors := [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text is not None]:
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]

    def stop(self) -> None:
        """End the processes; the next run starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def running() -> Iterator[Ranks]:
    """The body of a fixture."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(folder)
        yield ranks
        ranks.stop()


def _serve(rank: int, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, store = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(rank, function, args, store))


def _run(rank: int, function: Callable[..., Any], args: tuple[Any, ...], store: str) -> tuple[str | None, Any]:
    import torch
    import torch.distributed as dist

    from graphopt.errors import UncapturedCall

    torch.manual_seed(0)
    torch._dynamo.reset()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=_COLLECTIVE_LIMIT
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UncapturedCall)
            return None, function(rank, *args)
    except BaseException:
        return traceback.format_exc(), None
    finally:
        dist.destroy_process_group()
