"""A process that is killed at any moment leaves its store at the last step that it committed."""

import os
import random
import shutil
import signal
import threading
import time
import warnings

import torch

from graphopt.runtime.stores import DiskStore

NUM_KILLS = 30
SIZES = {"a": 5, "b": 70_000, "c": 1_300_000, "d": 0, "e": 1}  # "c" has more than one piece


def value(key, step):
    return torch.arange(SIZES[key], dtype=torch.int64).mul_(ord(key)).add_(step)


def changed(key, step):
    """Not every step writes every record."""
    return (step + ord(key)) % 3 > 0


def last_change(key, step):
    return next((earlier for earlier in range(step, 0, -1) if changed(key, earlier)), None)


def train(path, acknowledge):
    """Write and commit until killed; tell each step after its commit."""
    store = DiskStore(path, verify=False)
    for key in SIZES:
        store.create(key, (SIZES[key],), torch.int64)
    store.create("grad", (1000,), torch.float32, durable=False)
    step = store.step
    while True:
        step += 1
        if step % 2 == 0:  # records come and go; the new one must not take the place of the old one yet
            store.delete([f"x{step - 2}"] if f"x{step - 2}" in store else [])
            store.create(f"x{step}", (3000,), torch.int64)
            store.write({f"x{step}": torch.full((3000,), step)})
        keys = [key for key in SIZES if changed(key, step)]
        store.write({key: value(key, step) - 1 for key in keys})  # written twice between commits
        store.write({"grad": torch.ones(1000)}, add=True)
        for visit in store.visit([[key] for key in keys]):
            for tensor in visit.tensors.values():
                tensor.add_(1)
            visit.write_back(list(visit.tensors))
        store.commit(step, {"step": step}, {"rng": torch.tensor([step])})
        os.write(acknowledge, step.to_bytes(4, "little"))


def run_and_kill(path, num_steps, seconds):
    """The last step that a training process told before it was killed; ``None`` if it told none.

    It is killed some time after it has told so many steps.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: threads and forks
        child = os.fork()
    if child == 0:
        try:
            train(path, writing)
        finally:
            os._exit(1)
    os.close(writing)
    told = b""
    while len(told) < 4 * num_steps:
        part = os.read(reading, 4)
        assert part, "it has failed: run it in this process to see why"
        told += part
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL  # it had not failed
    while part := os.read(reading, 1 << 16):
        told += part
    os.close(reading)
    return int.from_bytes(told[-4:], "little") if told else None


def check(path, told):
    with DiskStore(path) as store:
        step = store.step
        assert told is None or step in (told, told + 1)  # the commit after may have been done and not told
        if step == 0:
            return 0
        assert store.extra == {"step": step}
        assert store.small["rng"].item() == step
        for key in SIZES:
            since = last_change(key, step)
            assert store.is_written(key) == (since is not None)
            if since is not None:
                assert torch.equal(store.read(key), value(key, since)), (key, step)
        extra = step // 2 * 2
        assert sorted(key for key in store.keys() if key.startswith("x")) == ([f"x{extra}"] if extra else [])
        if extra:
            assert (store.read(f"x{extra}") == extra).all()
        assert "grad" not in store
        return step


def test_stopped_before_any_system_call(tmp_path, monkeypatch):
    """Every state that the folder has between two calls that change it, but for what a disk may lose in a power cut."""
    path, pictures, committed = tmp_path / "store", [], [0]
    lock = threading.Lock()

    def watch(name):
        real = getattr(os, name)

        def call(*args):
            with lock:  # of one thread at a time: its calls are the unit
                picture = tmp_path / f"{len(pictures)}"
                shutil.copytree(path, picture)
                pictures.append((picture, tuple(committed), name))
                return real(*args)

        monkeypatch.setattr(os, name, call)

    def number(key, step):
        return step * 10 + len(key)

    with DiskStore(path) as store:
        for name in ("pwritev", "fsync", "fdatasync", "replace", "posix_fallocate"):
            watch(name)
        for step in range(1, 6):
            before = [key for key in store.keys() if key.startswith("x")]
            store.delete(before)
            for key in ("a", "b", f"x{step}"):
                store.create(key, (600,), torch.int64)
            keys = [f"x{step}", "a" if step % 2 else "b"]
            store.write({key: torch.zeros(600, dtype=torch.int64) for key in keys})
            store.write({key: torch.full((600,), number(key, step)) for key in keys}, add=True)
            committed.append(step)
            store.commit(step, {"before": before})
            committed.pop(0)
    assert len(pictures) > 40
    for picture, steps, name in pictures:
        with DiskStore(picture) as store:
            step = store.step
            assert step in steps, (picture, name)
            assert [key for key in store.keys() if key.startswith("x")] == ([f"x{step}"] if step else [])
            for key in store.keys():
                if store.is_written(key):
                    last = step if key[0] == "x" or (key == "a") == step % 2 else step - 1
                    assert (store.read(key) == number(key, last)).all(), (key, step, name)
                else:
                    assert (key, step) == ("b", 1)


def test_killed_at_random(tmp_path):
    torch.zeros(100_000).add_(1)  # whatever torch starts lazily, before the forks
    chance = random.Random(7)
    steps = [0]
    for _ in range(NUM_KILLS):
        told = run_and_kill(tmp_path / "store", chance.randint(0, 2), chance.uniform(0.0, 0.04))
        assert told is None or told > steps[-1]
        steps.append(check(tmp_path / "store", told))
        assert steps[-1] >= steps[-2]
