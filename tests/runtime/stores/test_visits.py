"""The window that moves over a disk store: how much is in memory, what runs beside the caller, what an early end leaves."""

import threading
import time
from contextlib import closing

import pytest
import torch

from graphopt.errors import StoreError
from graphopt.runtime.stores import DiskStore
from graphopt.runtime.stores.direct_io import DataFile

SHAPE, NBYTES = (3, 1 << 18), 3 << 20  # of one record
GROUPS = [[f"{index}.weight", f"{index}.bias"] for index in range(12)]
GROUP_BYTES = NBYTES + 4096  # the bias takes a page


class Gate:
    """Lets reads and writes of files through one by one, and counts them."""

    def __init__(self, monkeypatch):
        self.read_offsets, self.write_offsets = [], []
        self.reads, self.writes = threading.Event(), threading.Event()
        self.reads.set(), self.writes.set()
        self.most_at_once, self._running, self._changed = 0, 0, threading.Condition()
        monkeypatch.setattr(DataFile, "read_into", self._wrap(DataFile.read_into, self.reads, self.read_offsets))
        monkeypatch.setattr(DataFile, "write_from", self._wrap(DataFile.write_from, self.writes, self.write_offsets))

    def _wrap(self, call, gate, offsets):
        def gated(file, memory, offset):
            with self._changed:
                self._running += 1
                self._changed.notify_all()
            try:
                assert gate.wait(20)
                call(file, memory, offset)
            finally:
                with self._changed:
                    self._running -= 1
                    offsets.append(offset)
                    self._changed.notify_all()

        return gated

    def wait_for(self, condition):
        with self._changed:
            assert self._changed.wait_for(condition, 20)

    @property
    def idle(self):
        return self._running == 0


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


@pytest.fixture
def store(tmp_path):
    with DiskStore(tmp_path / "store") as made:
        for weight, bias in GROUPS:
            made.create(weight, SHAPE, torch.float32)
            made.create(bias, (5,), torch.float32)
        for index, group in enumerate(GROUPS):
            made.write({key: torch.full(made.info(key).shape, float(index)) for key in group})
        made.commit(1, {})
        made.trim()
        made.reset_counters()
        yield made


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("change", [False, True])
def test_memory_is_bounded(store, prefetch, change):
    for _ in range(2):
        for visit in store.visit(GROUPS, prefetch=prefetch):
            if change:
                visit.tensors[next(iter(visit.tensors))].add_(1)
                visit.write_back(list(visit.tensors))
    store.flush()
    num_groups = 1 + prefetch + change
    assert store.peak_resident_bytes <= num_groups * GROUP_BYTES
    assert store.bytes_read == 2 * len(GROUPS) * GROUP_BYTES
    assert store.bytes_written == (2 * len(GROUPS) * GROUP_BYTES if change else 0)
    for index, group in enumerate(GROUPS):
        assert (store.read(group[0]) == index + 2 * change).all()


def test_memory_is_bounded_over_many_short_visits(store, gate):
    """As when an operator runs over stored tensors one by one, faster than the disk writes."""
    gate.writes.clear()
    threading.Timer(0.2, gate.writes.set).start()
    for group in GROUPS:
        for visit in store.visit([group], prefetch=0):
            visit.write_back(group)
    store.flush()
    assert store.peak_resident_bytes <= 2 * GROUP_BYTES


def test_memory_of_writes_is_bounded(tmp_path):
    with DiskStore(tmp_path / "store", max_pending_bytes=16 << 20) as store:
        value = torch.ones(4 << 20)  # 16 MiB
        for index in range(6):
            store.create(f"{index}", value.shape, value.dtype, durable=False)
            store.write({f"{index}": value})
        for index in range(6):
            store.write({f"{index}": value}, add=True)
        store.flush()
        assert store.peak_resident_bytes <= 16 << 20
        assert store.bytes_written == 12 * value.nbytes
        assert (store.read("3") == 2).all()
        store.trim()
        store.reset_counters()
        assert store.peak_resident_bytes == 0


def test_groups_of_different_sizes_share_memory(tmp_path):
    sizes = [9, 1, 1, 1, 1, 1, 1, 9]
    with DiskStore(tmp_path / "store") as store:
        for index, size in enumerate(sizes):
            store.create(f"{index}", (size << 18,), torch.float32)
            store.write({f"{index}": torch.full((size << 18,), float(index))})
        store.flush()
        store.trim()
        store.reset_counters()
        for _ in range(3):
            for visit in store.visit([[f"{index}"] for index in range(len(sizes))]):
                ((key, tensor),) = visit.tensors.items()
                assert (tensor == float(key)).all()
        assert store.peak_resident_bytes <= (9 + 1 + 1) << 20


def test_neighbours_are_read_with_one_call(tmp_path, gate):
    with DiskStore(tmp_path / "store") as store:
        keys = [f"{index}" for index in range(40)]
        for key in keys:
            store.create(key, (1000,), torch.float32)
        store.write({key: torch.full((1000,), float(key)) for key in reversed(keys)})
        store.flush()
        assert len(gate.write_offsets) == 1
        for visit in store.visit([keys[::2] + keys[1::2]]):
            assert len(gate.read_offsets) == 1
            assert list(visit.tensors) == keys[::2] + keys[1::2]
            assert all((tensor == float(key)).all() for key, tensor in visit.tensors.items())


def test_prefetch_runs_ahead(store, gate):
    """While the caller has a group, the next ones are read without being asked for, and no more than those."""
    with closing(store.visit(GROUPS, prefetch=2)) as visits:
        next(visits)
        gate.wait_for(lambda: len(gate.read_offsets) == 3)
        time.sleep(0.05)  # a fourth would not wait for anything
        assert len(gate.read_offsets) == 3
        next(visits)
        gate.wait_for(lambda: len(gate.read_offsets) == 4)


def test_the_caller_does_not_wait_for_prefetches(store, gate):
    with closing(store.visit(GROUPS, prefetch=1)) as visits:
        next(visits)
        gate.wait_for(lambda: len(gate.read_offsets) == 2)
        gate.reads.clear()
        visit = next(visits)  # was read already; the third is being read
        assert (visit.tensors["1.weight"] == 1).all()
        assert len(gate.read_offsets) == 2
        gate.reads.set()


def test_write_back_runs_beside_the_next_group(store, gate):
    with closing(store.visit(GROUPS, prefetch=1)) as visits:
        visit = next(visits)
        gate.writes.clear()
        visit.tensors["0.weight"].fill_(7)
        visit.write_back(GROUPS[0])
        assert (next(visits).tensors["1.weight"] == 1).all()
        assert gate.write_offsets == []
        gate.writes.set()
    assert (store.read("0.weight") == 7).all()


def test_the_buffer_is_not_used_again_before_it_is_written(store, gate):
    for visit in store.visit(GROUPS, prefetch=1):
        index = float(next(iter(visit.tensors)).split(".")[0])
        visit.tensors[f"{index:.0f}.weight"].fill_(index + 100)
        visit.write_back(list(visit.tensors))
        gate.writes.clear()
        threading.Timer(0.01, gate.writes.set).start()
    for index, group in enumerate(GROUPS):
        assert (store.read(group[0]) == index + 100).all()


@pytest.mark.parametrize("written", [False, True])
def test_early_close(store, gate, written):
    visits = store.visit(GROUPS, prefetch=3)
    visit = next(visits)
    gate.wait_for(lambda: len(gate.read_offsets) == 4)
    gate.reads.clear()
    next(visits)  # the fifth is being read
    gate.wait_for(lambda: not gate.idle)
    if written:
        visit = next(visits)
        gate.writes.clear()
        visit.tensors["2.weight"].fill_(9)
        visit.write_back(["2.weight"])
        threading.Timer(0.1, gate.writes.set).start()
    threading.Timer(0.05, gate.reads.set).start()
    visits.close()
    assert gate.idle
    num_reads, num_writes = len(gate.read_offsets), len(gate.write_offsets)
    time.sleep(0.05)
    assert (len(gate.read_offsets), len(gate.write_offsets)) == (num_reads, num_writes)
    if written:
        assert (store.read("2.weight") == 9).all()
    store.trim()
    store.reset_counters()
    assert store.peak_resident_bytes == 0  # everything has come back


def test_a_failed_read_comes_in_its_turn(store, monkeypatch):
    real = DataFile.read_into
    bad = store._records["2.weight"].offset

    def read(file, memory, offset):
        if offset == bad:
            raise OSError(5, "Input/output error")
        real(file, memory, offset)

    monkeypatch.setattr(DataFile, "read_into", read)
    seen = []
    visits = store.visit(GROUPS, prefetch=3)
    failure = r"reading '2.weight', '2.bias' failed: Input/output error; the disk may be faulty"
    with pytest.raises(StoreError, match=failure):
        seen.extend(list(visit.tensors) for visit in visits)
    assert seen == GROUPS[:2]
    store.trim()
    store.reset_counters()
    assert store.peak_resident_bytes == 0


def test_a_read_waits_for_the_write_before_it(store, gate):
    gate.writes.clear()
    store.write({"0.bias": torch.full((5,), 3.0)})
    results = []
    reader = threading.Thread(target=lambda: results.append(store.read("0.bias")))
    reader.start()
    time.sleep(0.05)
    assert results == []
    gate.writes.set()
    reader.join()
    assert torch.equal(results[0], torch.full((5,), 3.0))


def test_a_write_waits_for_the_read_before_it(store, gate):
    """Both concern the pending place of a record, which is written again between two commits."""
    store.write({"0.bias": torch.full((5,), 3.0)})
    store.flush()
    gate.reads.clear()
    num_writes = len(gate.write_offsets)
    results = []
    reader = threading.Thread(target=lambda: results.append(store.read("0.bias")))
    reader.start()
    gate.wait_for(lambda: not gate.idle)
    store.write({"0.bias": torch.full((5,), 4.0)})
    time.sleep(0.05)
    assert len(gate.write_offsets) == num_writes
    gate.reads.set()
    reader.join()
    assert torch.equal(results[0], torch.full((5,), 3.0))
    assert torch.equal(store.read("0.bias"), torch.full((5,), 4.0))


def test_a_write_waits_for_the_write_before_it(store, gate):
    gate.writes.clear()
    for value in (3.0, 4.0):
        store.write({"0.bias": torch.full((5,), value)})
        gate.wait_for(lambda: not gate.idle)
    time.sleep(0.05)
    assert gate._running == 1
    gate.writes.set()
    assert torch.equal(store.read("0.bias"), torch.full((5,), 4.0))


def test_a_write_that_fails_late_does_not_concern_the_next(store, monkeypatch):
    real, failed, going_on = DataFile.write_from, [], threading.Event()

    def fail_once(file, memory, offset):
        if not failed:
            failed.append(offset)
            assert going_on.wait(20)
            raise OSError(28, "No space left on device")
        real(file, memory, offset)

    monkeypatch.setattr(DataFile, "write_from", fail_once)
    for value in (3.0, 4.0):
        store.write({"0.bias": torch.full((5,), value)})
    going_on.set()
    store.flush()
    assert failed
    assert torch.equal(store.read("0.bias"), torch.full((5,), 4.0))


def test_deleted_while_it_is_visited(store):
    with closing(store.visit(GROUPS[:2])) as visits:
        visit = next(visits)
        store.delete(["0.bias", "1.bias"])
        with pytest.raises(StoreError, match=r"'0.bias' was deleted"):
            visit.write_back(["0.bias"])
        with pytest.raises(StoreError, match=r"has no record '1.bias'"):
            next(visits)


def test_closing_the_store_during_a_visit(store):
    visits = store.visit(GROUPS)
    visit = next(visits)
    visit.tensors["0.weight"].fill_(5)
    visit.write_back(["0.weight"])
    store.close()
    with pytest.raises(StoreError, match="the store is closed"):
        next(visits)
