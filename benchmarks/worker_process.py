"""Outside a rival's process: start it, ask it, watch its memory, end it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks import memory
from benchmarks.machine import ROOT

LOG_LINES_IN_ERROR = 12
WATCH_SECONDS = 0.1  # between two readings of the process tree's memory while it compiles


class WorkerFailure(Exception):
    """A rival could not be built, run or checked. ``details`` has the traceback or the end of its log."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class WorkerProcess:
    """A rival's process.

    Args:
        command: What to start.
        variables: Environment variables on top of the current ones.
        log: File for whatever the process and its libraries print.
    """

    def __init__(self, command: Sequence[str], *, variables: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._buffer = b""
        self.started = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                bufsize=0,
                start_new_session=True,  # so that compilers it started end with it
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"WorkerProcess(pid={self.process_id})"

    @property
    def process_id(self) -> int:
        return self._process.pid

    def ask(self, request: str, *, limit: float, **content: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Args:
            request: What to do, a method of ``worker.Worker``.
            limit: Seconds after which the process is ended and the rival counts as failed.
            content: The request's arguments.

        Raises:
            WorkerFailure: The rival raised, died, or took too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"request": request, **content}).encode() + b"\n")
        except OSError as error:
            raise self._death(request) from error
        reply: dict[str, Any] = json.loads(self._read_line(request, limit))
        if not reply.pop("ok"):
            raise WorkerFailure(f"{reply['error']} (while asked to {request})", reply["traceback"])
        return reply

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._process.stdin is not None:
            self._process.stdin.close()  # the worker's loop ends with its input
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read_line(self, request: str, limit: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit
        while b"\n" not in self._buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._process.stdout], [], [], remaining)[0]:
                self._process.kill()
                raise WorkerFailure(f"no answer within {limit:.0f} s (while asked to {request})", self._end_of_log())
            received = self._process.stdout.read(65536)
            if not received:
                raise self._death(request)
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _death(self, request: str) -> WorkerFailure:
        status = self._process.wait()
        reason = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return WorkerFailure(f"the process ended with {reason} (while asked to {request})", self._end_of_log())

    def _end_of_log(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERROR:])


class TreeWatch:
    """Samples the memory of a process and its children, compilers included: ``with TreeWatch(pid) as watch: ...``."""

    def __init__(self, process_id: int) -> None:
        self.peak_bytes = 0
        self._process_id = process_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(WATCH_SECONDS):
            self.peak_bytes = max(self.peak_bytes, memory.tree_resident_bytes(self._process_id))
