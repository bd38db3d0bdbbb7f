"""A disk store across processes: commits, rollbacks, and every way in which a folder can be unusable."""

import errno
import json
import os
import subprocess
import sys
import warnings
import zlib

import pytest
import torch

from graphopt.errors import StoreError
from graphopt.runtime.stores import DiskStore
from tests.runtime.stores.model_state import PIECE, SHAPES, contents, fill


def test_reopened(committed):
    with DiskStore(committed, create=False) as store:
        assert (store.step, store.extra) == (1, {"epoch": 2})
        assert torch.equal(store.small["rng"], torch.arange(5, dtype=torch.uint8))
        assert contents(store) == {key: [1.0] for key in SHAPES}
        assert store.signature == {"layers": 2, "sizes": [3, 4]}
        assert store.bytes_read > 0
        fill(store, 2, ["large"])
        store.commit(2, {})
        fill(store, 3)
        store.flush()  # is no commit
    with DiskStore(committed) as store:
        assert contents(store) == {"large": [2.0], "small": [1.0], "scalar": [1.0]}
        assert store.step == 2


def test_scratch_records_do_not_survive(committed):
    with DiskStore(committed) as store:
        store.create("grad", (1000,), torch.float32, durable=False)
        store.write({"grad": torch.ones(1000)})
        store.commit(2, {})
        assert sorted(os.listdir(committed)) == ["data-0.bin", "data-1.bin", "lock", "manifest.json"]
    with DiskStore(committed) as store:
        assert "grad" not in store


def test_rollback(committed):
    with DiskStore(committed) as store:
        store.create("grad", (10,), torch.float32, durable=False)
        fill(store, 2, ["large", "small"])
        store.write({"grad": torch.ones(10)})
        store.clear(["scalar"])
        store.create("new", (3,), torch.int64)
        store.write({"new": torch.ones(3, dtype=torch.int64)})
        versions = {key: store.version(key) for key in store.keys()}
        store.rollback()
        assert contents(store) == {"large": [1.0], "small": [1.0], "scalar": [1.0], "grad": [1.0]}
        assert not store.is_written("new")
        assert {key for key in store.keys() if store.version(key) != versions[key]} == {
            "large",
            "small",
            "scalar",
            "new",
        }


@pytest.mark.parametrize("reopened", [False, True])
def test_rollback_brings_deleted_records_back(path, committed, reopened):
    with DiskStore(committed if reopened else path.with_name("other")) as store:
        if not reopened:
            fill(store, 1)
            store.commit(1, {})
        store.delete(["large", "scalar"])
        store.create("large", (5,), torch.int8)
        store.write({"large": torch.ones(5, dtype=torch.int8)})
        store.create("other", SHAPES["large"], torch.float32)  # must not take the place of what was deleted
        store.write({"other": torch.zeros(SHAPES["large"])})
        store.rollback()
        assert contents(store) == {key: [1.0] for key in SHAPES}
        assert store.info("large").dtype == torch.float32
        store.delete(["large"])
        store.commit(2, {})
    with DiskStore(store.path) as store:
        assert contents(store) == {"small": [1.0], "scalar": [1.0]}


def test_the_space_of_deleted_records_is_used_again(path):
    with DiskStore(path) as store:
        fill(store, 1)
        store.commit(1, {})
        size = (path / "data-0.bin").stat().st_size
        for step in range(4):
            store.delete(["large"])
            store.commit(step, {})
            fill(store, 2, ["large"])
            store.commit(step, {})
        assert (path / "data-0.bin").stat().st_size <= size + PIECE
        assert contents(store) == {"large": [2.0], "small": [1.0], "scalar": [1.0]}


def test_cleared_and_unwritten_records_survive_as_such(committed):
    with DiskStore(committed) as store:
        store.clear(["small"])
        store.create("never", (2,), torch.float32)
        store.commit(2, {})
    with DiskStore(committed) as store:
        assert contents(store) == {"large": [1.0], "scalar": [1.0]}
        assert set(store.keys()) == {*SHAPES, "never"}
        fill(store, 3, ["small"])
        assert contents(store)["small"] == [3.0]


def test_create_says_whether_the_store_is_new(committed, tmp_path):
    with pytest.raises(StoreError, match="holds a store already; create=None opens it"):
        DiskStore(committed, create=True)
    with pytest.raises(StoreError, match="holds no store; create=None or True makes one"):
        DiskStore(tmp_path / "nothing", create=False)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"is no store, and not empty \('thesis.tex' is in it\)"):
        DiskStore(tmp_path / "home")
    with pytest.raises(StoreError, match=r"opening the store failed: Not a directory$"):
        DiskStore(tmp_path / "home" / "thesis.tex")
    with pytest.raises(StoreError, match=r"signature=...\) must be JSON"):
        DiskStore(tmp_path / "new", signature={"dtype": torch.float32})
    DiskStore(tmp_path / "deep" / "down", create=True).close()


def test_making_that_was_interrupted(path):
    path.mkdir()
    for name in ("lock", "data-0.bin", "scratch.bin", "manifest.json.new"):
        (path / name).write_bytes(b"x" * 10)
    with DiskStore(path) as store:
        fill(store, 1)
        store.commit(1, {})
        assert contents(store) == {key: [1.0] for key in SHAPES}


# ---------------------------------------------------------------------------------------------------------------- damage


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reseal(content):
    text = json.dumps(content["body"], sort_keys=True, separators=(",", ":"))
    content["checksum"] = f"{zlib.crc32(text.encode()):08x}"


@pytest.mark.parametrize(("key", "offset"), [("large", 0), ("large", PIECE + 17), ("small", 3)])
def test_a_changed_byte(committed, key, offset):
    entry = json.loads((committed / "manifest.json").read_text())["body"]["records"][key]
    with open(committed / f"data-{entry['live']}.bin", "r+b") as file:
        file.seek(entry["offset"] + offset)
        byte = file.read(1)
        file.seek(entry["offset"] + offset)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(
        StoreError,
        match=rf"{committed} is damaged: the value of '{key}' is not what was committed at step 1; restore the folder "
        "from a copy, or start anew in another folder",
    ):
        DiskStore(committed)
    DiskStore(committed, verify=False).close()  # and the failed one holds no lock


def test_a_truncated_file(committed):
    os.truncate(committed / "data-0.bin", 4096)
    for verify in (True, False):
        with pytest.raises(
            StoreError, match=r"data-0.bin is damaged: it ends at byte 4096, and .*'small'.* lie behind; restore"
        ):
            DiskStore(committed, verify=verify)


def test_a_file_that_is_truncated_while_it_is_open(committed):
    with DiskStore(committed) as store:
        os.truncate(committed / "data-0.bin", 4096)
        with pytest.raises(StoreError, match=r"data-0.bin: reading 'large' failed: the file ends before byte"):
            store.read("large")
        with pytest.raises(StoreError, match="reading 'small', 'scalar' failed"):
            next(store.visit([["small", "scalar"]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["body"].update(step=7),
            "is damaged: its checksum is not that of its contents; restore",
        ),
        (
            lambda content: content.pop("body"),
            r"is damaged: it is no manifest of a store \(KeyError\('body'\)\); restore",
        ),
        (
            lambda content: (content.update(format=2), content["body"].update(graphopt="9.9")),
            r"has format 2, written by graphopt 9.9; graphopt \S+ reads format 1: install the version that wrote it",
        ),
        (
            lambda content: (content["body"]["records"]["small"].update(dtype="float1"), reseal(content)),
            "has no dtype 'float1'",
        ),
    ],
)
def test_an_edited_manifest(committed, change, message):
    edit(committed / "manifest.json", change)
    with pytest.raises(StoreError, match=message):
        DiskStore(committed)


def test_a_manifest_that_is_cut_off(committed):
    text = (committed / "manifest.json").read_text()
    (committed / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match=r"manifest.json is damaged: it is no manifest of a store"):
        DiskStore(committed)


def test_another_signature(committed):
    DiskStore(committed, signature={"sizes": (3, 4), "layers": 2}).close()
    with pytest.raises(
        StoreError,
        match=r"belongs to another model: signature\['layers'\] is 2 in the store, 3 given; signature\['sizes'\]\[1\] is 4 in "
        r"the store, 5 given; signature\['head'\] is given, not stored. Build that model",
    ):
        DiskStore(committed, signature={"layers": 3, "sizes": [3, 5], "head": True})
    with pytest.raises(StoreError, match=r"is stored, not given.*; and more"):
        DiskStore(committed, signature={f"{index}": index for index in range(9)})


# ------------------------------------------------------------------------------------------------------------- processes


def test_in_use_by_this_process(committed):
    with (
        DiskStore(committed),
        pytest.raises(StoreError, match="is in use by this process: a store is open in one place"),
    ):
        DiskStore(committed)
    DiskStore(committed).close()


def test_in_use_by_another_process(committed):
    hold = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); fcntl.flock(fd, fcntl.LOCK_EX);"
        "os.ftruncate(fd, 0); os.pwrite(fd, str(os.getpid()).encode(), 0); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(committed / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(StoreError, match=rf"is in use by the process with pid {process.pid}: .*; close it there"):
            DiskStore(committed)
        process.stdin.close()
    DiskStore(committed).close()


def test_after_a_fork(committed):
    """A worker of a data loader: it cannot use the store, does the parent no harm, and does not hold the lock."""
    store = DiskStore(committed)
    fill(store, 2)
    ready, done = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: threads and forks
        child = os.fork()
    if child == 0:
        try:
            store.read("small")
        except StoreError as error:
            assert f"was opened by process {os.getppid()}" in str(error)
            store.close()
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            os._exit(0)
        os._exit(1)
    assert os.read(ready[0], 1) == b"x"
    store.commit(2, {})
    store.close()
    with DiskStore(committed) as again:
        assert contents(again) == {key: [2.0] for key in SHAPES}
    os.write(done[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for end in (*ready, *done):
        os.close(end)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_is_read_only(committed, monkeypatch, code):
    """Tests may run as root, whom no mode stops."""
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_RDWR and str(committed) in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        StoreError,
        match=f"{committed}: opening the store failed: {os.strerror(code)}; a store needs a folder that it may",
    ):
        DiskStore(committed)
