"""Any sequence of operations on a disk store has the effect that it has on a dictionary."""

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graphopt.runtime.stores import DiskStore

KEYS = st.sampled_from("abcdef")
SIZES = {"a": 3, "b": 5000, "c": 1, "d": 0, "e": 600_000, "f": 1024}  # "e" has two pieces
SCRATCH = "cf"


class History(RuleBasedStateMachine):
    """``live`` is what the store must hold, ``committed`` what it must hold after a crash."""

    @initialize()
    def open(self):
        self.path = Path(tempfile.mkdtemp(prefix="graphopt-history-"))
        self.store = DiskStore(self.path)
        self.live, self.committed, self.step = {}, {}, 0  # key -> number, or None without a value

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.path)

    def tensor(self, key, number):
        return torch.full((SIZES[key],), number, dtype=torch.int64)

    @rule(keys=st.sets(KEYS))
    def create(self, keys):
        for key in sorted(keys):
            self.store.create(key, (SIZES[key],), torch.int64, durable=key not in SCRATCH)
            self.live.setdefault(key, None)

    @rule(data=st.data(), number=st.integers(0, 1 << 40), add=st.booleans())
    def write(self, data, number, add):
        keys = data.draw(st.sets(st.sampled_from(sorted(self.live)))) if self.live else set()
        self.store.write({key: self.tensor(key, number) for key in keys}, add=add)
        for key in keys:
            self.live[key] = number + (self.live[key] or 0 if add else 0)

    @rule(keys=st.sets(KEYS))
    def clear(self, keys):
        keys &= set(self.live)
        self.store.clear(keys)
        self.live |= dict.fromkeys(keys)

    @rule(keys=st.sets(KEYS, max_size=2))
    def delete(self, keys):
        keys &= set(self.live)
        self.store.delete(keys)
        for key in keys:
            del self.live[key]

    @rule(data=st.data(), prefetch=st.integers(0, 3), stop=st.integers(0, 8))
    def visit(self, data, prefetch, stop):
        written = sorted(key for key, number in self.live.items() if number is not None)
        if not written:
            return
        groups = data.draw(st.lists(st.lists(st.sampled_from(written), max_size=3), max_size=6))
        visits = self.store.visit(groups, prefetch=prefetch)
        for position, visit in enumerate(visits):
            assert set(visit.tensors) == set(groups[position])
            for key, tensor in visit.tensors.items():
                assert torch.equal(tensor, self.tensor(key, self.live[key])), key
            for key in groups[position][:2]:
                visit.tensors[key].add_(1)
                self.live[key] += 1
            visit.write_back(groups[position][:2])
            if position == stop:
                break
        visits.close()

    @rule()
    def commit(self):
        self.step += 1
        self.store.commit(self.step, {"step": self.step})
        self.committed = {key: number for key, number in self.live.items() if key not in SCRATCH}

    @rule()
    def rollback(self):
        self.store.rollback()
        scratch = {key: number for key, number in self.live.items() if key in SCRATCH}
        self.live = dict.fromkeys(self.live) | scratch | self.committed

    @rule(verify=st.booleans())
    def reopen(self, verify):
        self.store.close()
        self.store = DiskStore(self.path, create=False, verify=verify)
        assert self.store.extra == ({"step": self.step} if self.step else {})
        self.live = dict(self.committed)

    @rule()
    def flush(self):
        self.store.flush()

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def same(self):
        assert set(self.store.keys()) == set(self.live)
        for key, number in self.live.items():
            assert self.store.is_written(key) == (number is not None), key
            if number is not None:
                assert torch.equal(self.store.read(key), self.tensor(key, number)), key


History.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)
test_history = History.TestCase
