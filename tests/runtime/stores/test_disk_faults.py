"""A disk that is full, a kernel that moves less than it was asked for, a file system without direct I/O."""

import errno
import os

import pytest
import torch

from graphopt.errors import StoreError
from graphopt.runtime.stores import DiskStore
from tests.runtime.stores.model_state import SHAPES, contents, fill

# ------------------------------------------------------------------------------------------------------------- full disk


class FullDisk:
    """Makes system calls fail as if the disk were full."""

    def __init__(self, monkeypatch):
        self.full = False
        for name in ("pwritev", "posix_fallocate", "fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call):
        def checked(*args):
            if self.full == call.__name__:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args)

        return checked


@pytest.fixture
def disk(monkeypatch):
    return FullDisk(monkeypatch)


def test_disk_full_while_writing(committed, disk):
    with DiskStore(committed) as store:
        store.create("grad", (10,), torch.float32, durable=False)
        disk.full = "pwritev"
        fill(store, 2, ["large", "small"])
        store.write({"grad": torch.ones(10)})
        full = r"writing '\w+'.* failed: No space left on device; the disk is full: free space on it, then rollback\(\)"
        for use in (
            store.flush,
            lambda: store.commit(2, {}),
            lambda: store.read("small"),
            lambda: next(store.visit([["large"]])),
        ):
            with pytest.raises(StoreError, match=full):
                use()
        with pytest.raises(StoreError, match=full):
            store.write({"grad": torch.ones(10)}, add=True)
        assert store.step == 1
        disk.full = False
        store.rollback()
        assert contents(store) == {key: [1.0] for key in SHAPES}
        fill(store, 3, ["small"])
        store.commit(3, {})
    with DiskStore(committed) as store:
        assert contents(store) == {"large": [1.0], "small": [3.0], "scalar": [1.0]}


def test_what_failed_may_be_written_again(committed, disk):
    with DiskStore(committed) as store:
        disk.full = "pwritev"
        fill(store, 2, ["small"])
        for visit in store.visit([["large"]]):
            visit.tensors["large"].fill_(2)
            visit.write_back(["large"])
        with pytest.raises(StoreError, match="disk is full"):
            store.flush()
        disk.full = False
        fill(store, 2)
        store.commit(2, {})
        assert contents(store) == {key: [2.0] for key in SHAPES}


def test_disk_full_while_reserving(committed, disk):
    with DiskStore(committed) as store:
        store.create("huge", (5_000_000,), torch.float64)
        disk.full = "posix_fallocate"
        with pytest.raises(StoreError, match=r"reserving 0.09\d* GB in all failed: No space left"):
            store.write({"huge": torch.ones(5_000_000, dtype=torch.float64)})
        assert not store.is_written("huge")
        store.delete(["huge"])
        fill(store, 2)
        store.commit(2, {})
        assert contents(store) == {key: [2.0] for key in SHAPES}


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_disk_full_while_committing(committed, disk, call):
    with DiskStore(committed) as store:
        fill(store, 2)
        disk.full = call
        with pytest.raises(StoreError, match=r"the commit of step 2 failed: No space left on device"):
            store.commit(2, {"a": 1})
        assert (store.step, store.extra) == (1, {"epoch": 2})
        assert not (committed / "manifest.json.new").exists()
        disk.full = False
        store.rollback()
        assert contents(store) == {key: [1.0] for key in SHAPES}
        fill(store, 3)
        store.commit(3, {})
    with DiskStore(committed) as store:
        assert contents(store) == {key: [3.0] for key in SHAPES}


def test_a_commit_of_which_nobody_knows(committed, monkeypatch):
    """The manifest is replaced but its folder cannot be synchronised: which of the two a power cut leaves is open."""
    real = os.fsync

    def fail_on_folders(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with DiskStore(committed) as store:
        fill(store, 2)
        monkeypatch.setattr(os, "fsync", fail_on_folders)
        with pytest.raises(StoreError, match="the commit of step 2 may not survive a power cut"):
            store.commit(2, {})
        with pytest.raises(
            StoreError, match="the last commit, of step 2, was cut short; close the store and open it again"
        ):
            store.write({"small": torch.ones(7)})
    with DiskStore(committed) as store:
        assert contents(store) == {key: [2.0] for key in SHAPES}


# ------------------------------------------------------------------------------------------------------------ direct I/O


@pytest.mark.parametrize("refused", ["open", "preadv"])
def test_without_direct_io(path, monkeypatch, refused):
    real_open, real_preadv = os.open, os.preadv
    direct = set()

    def open_(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = real_open(path, flags, *args, **kwargs)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def preadv(fd, *args):
        if fd in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_preadv(fd, *args)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    with DiskStore(path) as store:
        assert not store.direct
        assert "through the page cache" in repr(store)
        fill(store, 1)
        for visit in store.visit([["large"], ["small", "scalar"]]):
            for key, tensor in visit.tensors.items():
                tensor.add_(1)
                visit.write_back([key])
        store.commit(1, {})
        assert contents(store) == {key: [2.0] for key in SHAPES}
    with DiskStore(path) as store:
        assert contents(store) == {key: [2.0] for key in SHAPES}


def test_short_transfers(path, monkeypatch):
    """The kernel may move less than it was asked for."""
    real_preadv, real_pwritev = os.preadv, os.pwritev

    def preadv(fd, parts, offset):
        assert offset % 4096 == 0  # direct I/O starts at blocks, of up to so many bytes
        moved = real_preadv(fd, [parts[0][:8192]], offset)
        return moved - 512 if moved == 8192 else moved

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: real_pwritev(fd, [parts[0][:12288]], offset))
    value = torch.randn(30_000)
    with DiskStore(path) as store:
        store.create("a", value.shape, value.dtype)
        store.write({"a": value})
        assert torch.equal(store.read("a"), value)
        store.commit(1, {})
    with DiskStore(path) as store:
        assert torch.equal(store.read("a"), value)


def test_nothing_but_values_goes_to_the_disk(path):
    """Buffers are used again; what was in them stays in memory."""
    with DiskStore(path) as store:
        store.create("secret", (1024,), torch.uint8, durable=False)
        store.write({"secret": torch.full((1024,), 0x5A, dtype=torch.uint8)})
        store.flush()
        store.create("public", (5,), torch.uint8)
        store.write({"public": torch.ones(5, dtype=torch.uint8)})
        store.commit(1, {})
    assert (path / "data-0.bin").read_bytes() == b"\x01" * 5 + b"\0" * 4091
