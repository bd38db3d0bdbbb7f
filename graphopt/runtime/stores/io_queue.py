"""The few threads that read and write, and the order that they keep.

Reads have their threads and writes have theirs, so that a long row of writes does not hold up what is loaded next. Each job
waits for those before it that touch the same record, unless both only read. That cannot deadlock: a job waits only for
jobs that were submitted earlier, and each group of threads takes its jobs in the order of their submission, so the earliest
unfinished job is running and waits for none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

Job = Callable[[], None]


@dataclass
class Traffic:
    """The unfinished jobs of one record."""

    reads: list[Future[None]] = field(default_factory=list)
    writes: list[Future[None]] = field(default_factory=list)

    def prune(self) -> None:
        """Forget what is finished."""
        self.reads = [future for future in self.reads if not future.done()]
        self.writes = [future for future in self.writes if not future.done()]


class IOQueue:
    """Threads that start with the first job, so that a process may fork before.

    Submissions must come one at a time: the caller holds a lock.
    """

    def __init__(self, *, num_readers: int = 2, num_writers: int = 2) -> None:
        self._readers = ThreadPoolExecutor(num_readers, "graphopt-read")
        self._writers = ThreadPoolExecutor(num_writers, "graphopt-write")
        self.uploads: Executor = ThreadPoolExecutor(1, "graphopt-upload")

    def read(self, job: Job, records: Iterable[Traffic]) -> Future[None]:
        """Run a job once all earlier writes of the records are done."""
        records = list(records)
        for record in records:
            record.prune()
        future = self._readers.submit(_run, job, [before for record in records for before in record.writes])
        for record in records:
            record.reads.append(future)
        return future

    def writing(self, records: Iterable[Traffic]) -> Writing:
        """Begin a write of several jobs, which wait for all that came before but not for each other."""
        return Writing(self._writers, list(records))

    def close(self) -> None:
        """Finish all jobs and end the threads."""
        for executor in (self._readers, self._writers, self.uploads):
            executor.shutdown(wait=True)


class Writing:
    """One write of several jobs."""

    def __init__(self, executor: Executor, records: Sequence[Traffic]) -> None:
        self._executor = executor
        self._before: dict[int, list[Future[None]]] = {}
        for record in records:
            record.prune()
            self._before[id(record)] = [*record.reads, *record.writes]

    def submit(self, job: Job, records: Iterable[Traffic]) -> Future[None]:
        """Add a job that touches these records; each of them was named when the write began."""
        records = list(records)
        before = [future for record in records for future in self._before[id(record)]]
        future = self._executor.submit(_run, job, before)
        for record in records:
            record.writes.append(future)
        return future


def outcome(future: Future[Any]) -> BaseException | None:
    """Wait for a future, whatever comes of it."""
    try:
        return future.exception()
    except CancelledError as error:
        return error


def drop(futures: Iterable[Future[Any]]) -> None:
    """Cancel the jobs that have not begun and wait for the others."""
    for future in [future for future in futures if not future.cancel()]:
        outcome(future)


def wait_for(futures: Iterable[Future[Any]]) -> None:
    """Wait for all jobs, then raise what the first of them that failed has raised."""
    errors = [outcome(future) for future in futures]
    for error in errors:
        if error is not None:
            raise error


def when_done(futures: Sequence[Future[Any]], function: Callable[[], None]) -> None:
    """Call a function once, when all jobs are done; at once if they are."""
    left = itertools.count(len(futures), -1)
    waiting = [function]  # emptied by the call: a future keeps its callbacks, and with them what the function refers to
    for future in futures:
        future.add_done_callback(lambda _: waiting.pop()() if next(left) == 1 else None)
    if not futures:
        function()


def _run(job: Job, before: Sequence[Future[None]]) -> None:
    for future in before:
        outcome(future)
    job()
