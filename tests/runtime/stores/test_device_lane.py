"""Copies to and from a device never meet the wrong values, whatever runs late.

The streams here are threads that sleep before each piece of work, and the device's memory is the host's. On a
machine with a GPU a test runs on its streams too.
"""

import functools
import queue
import random
import threading
import time

import pytest
import torch

from graphopt.runtime.stores import DiskStore, HostStore, buffers, store
from graphopt.runtime.stores.device_lane import DeviceLane

SHAPE = (3, 4096)
KEYS = [f"{index}" for index in range(5)]
GROUPS = [["0", "1"], ["2"], ["3", "1"], ["4", "0"]]  # some records are in two groups, as tied weights are


class Event:
    def __init__(self):
        self._passed = threading.Event()

    def synchronize(self):
        assert self._passed.wait(20)

    def query(self):
        return self._passed.is_set()

    def set(self):
        self._passed.set()


class Stream:
    """Does one thing after the other, some time later."""

    def __init__(self, delays):
        self._work, self._chance, self._delays = queue.SimpleQueue(), random.Random(0), delays
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            work = self._work.get()
            time.sleep(self._chance.choice(self._delays))
            work()

    def do(self, work):
        self._work.put(work)

    def wait_event(self, event):
        self.do(event.synchronize)

    def record_event(self):
        event = Event()
        self.do(event.set)
        return event


class LateLane(DeviceLane):
    """A device made of three such streams, of which one is slow."""

    slow = "compute"

    def __init__(self, device, meter):
        self.device, self._meter, self._lock, self._free = device, meter, threading.Lock(), []
        for name in ("compute", "_uploads", "_downloads"):
            setattr(self, name, Stream([0.002, 0.003] if name == self.slow else [0, 0, 0.0005]))

    def mark(self):
        return self.compute.record_event()

    def hold(self, event):
        self.compute.wait_event(event)

    def _allocate(self, nbytes):
        return torch.full((nbytes,), 77, dtype=torch.uint8)

    def _use(self, buffer):
        pass

    def _copy(self, stream, pairs, after):
        for event in after:
            stream.wait_event(event)
        for target, source in pairs:
            stream.do(lambda target=target, source=source: target.copy_(source))
        return stream.record_event()


@pytest.fixture(params=["compute", "_uploads", "_downloads"])
def late(request, monkeypatch):
    monkeypatch.setattr(LateLane, "slow", request.param)
    monkeypatch.setattr(store, "DeviceLane", LateLane)
    monkeypatch.setattr(buffers._PinnedMap, "pin", lambda self, address: None)


@pytest.fixture(params=["cpu", "disk"])
def made(request, tmp_path):
    with HostStore() if request.param == "cpu" else DiskStore(tmp_path / "store") as made:
        for key in KEYS:
            made.create(key, SHAPE, torch.float32)
        made.write({key: torch.zeros(SHAPE) for key in KEYS})
        yield made


def visit_on_device(made, groups, prefetch, work, device="cuda:0", *, write_back=True):
    """Have the device do ``work(key, tensor)`` with each record."""
    lane = made._lane(torch.device(device))
    for visit in made.visit(groups, prefetch=prefetch, device=device):
        for key, tensor in visit.tensors.items():
            if isinstance(lane, LateLane):
                lane.compute.do(lambda key=key, tensor=tensor: work(key, tensor))
            else:
                work(key, tensor)
        if write_back:
            visit.write_back(list(visit.tensors))


def add_one(key, tensor):
    tensor.add_(1)


def append_copy(seen, key, tensor):
    seen.append((key, tensor.clone()))


def check(made, device):
    """Steps of a model on the device, with an optimizer on the host."""
    expected = dict.fromkeys(KEYS, 0.0)
    chance, lane = random.Random(0), made._lane(torch.device(device))
    for _ in range(5):
        groups, prefetch = chance.sample(GROUPS, len(GROUPS)), chance.choice([0, 1, 2])
        made.trim()  # so that the same few buffers are used again soon
        seen = list[tuple[str, torch.Tensor]]()
        remember = functools.partial(append_copy, seen)
        visit_on_device(made, groups, prefetch, remember, device, write_back=False)
        forward = [(key, expected[key]) for group in groups for key in group]
        visit_on_device(made, groups, prefetch, add_one, device)
        for group in groups:
            for key in group:
                expected[key] += 1
        lane.mark().synchronize()
        assert [key for key, _ in seen] == [key for key, _ in forward]
        for (key, value), (_, number) in zip(seen, forward, strict=True):
            assert (value == number).all(), key
        if chance.random() < 0.5:  # the optimizer's turn
            for visit in made.visit([[key] for key in KEYS]):
                for key, tensor in visit.tensors.items():
                    assert (tensor == expected[key]).all()
                    tensor.mul_(2)
                    visit.write_back([key])
                    expected[key] *= 2
        else:
            key = chance.choice(KEYS)
            made.write({key: torch.full(SHAPE, 5.0)})
            expected[key] = 5.0
    for key in KEYS:
        assert (made.read(key) == expected[key]).all()


@pytest.mark.usefixtures("late")
def test_late_streams(made):
    check(made, "cuda:0")
    made.trim()
    made.reset_counters()
    visit_on_device(made, GROUPS, 2, add_one)
    made.flush()
    largest = max(sum(made.info(key).nbytes for key in group) for group in GROUPS)
    num_places = 2 if made.kind == "disk" else 1  # on the host and on the device
    assert made.peak_resident_bytes <= num_places * (1 + 2 + 1) * largest
    written = sum(made.info(key).nbytes for group in GROUPS for key in group)
    assert made.bytes_written == written
    assert made.bytes_read >= written  # what was written after it was prefetched comes twice


@pytest.mark.usefixtures("late")
def test_early_close_on_a_device(made):
    visits = made.visit(GROUPS, prefetch=3, device="cuda:0")
    next(visits)
    visits.close()
    made.trim()
    made.reset_counters()
    assert made.peak_resident_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_streams_of_a_gpu(kind, tmp_path):
    torch.cuda._sleep(1)
    with HostStore(device="cuda") if kind == "cpu" else DiskStore(tmp_path / "store") as made:
        for key in KEYS:
            made.create(key, SHAPE, torch.float32)
        made.write({key: torch.zeros(SHAPE, device="cuda") for key in KEYS})

        def late(key, tensor):
            torch.cuda._sleep(200_000)
            add_one(key, tensor)

        visit_on_device(made, GROUPS, 2, late, "cuda")
        assert [made.read(key)[0, 0].item() for key in KEYS] == [2, 2, 1, 1, 1]
        check(made, "cuda:0")
