"""What holds for every store: records, values, order of reads and writes, counters, errors."""

import gc
import threading

import pytest
import torch

from graphopt.errors import GraphoptError, OptionError, StoreError
from graphopt.runtime.stores import DiskStore, HostStore, TensorInfo

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
)
SHAPES = ((), (1,), (0,), (3, 0, 2), (7,), (33, 65), (1024,), (1025,))


@pytest.fixture(params=["cpu", "disk"])
def store(request, tmp_path):
    with HostStore() if request.param == "cpu" else DiskStore(tmp_path / "store") as made:
        yield made


def values(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


def put(store, key, value, **options):
    store.create(key, value.shape, value.dtype, **options)
    store.write({key: value})


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape(store, dtype, durable):
    expected = {f"{shape}": values(shape, dtype, seed) for seed, shape in enumerate(SHAPES)}
    for key, value in expected.items():
        store.create(key, value.shape, dtype, durable=durable)
        assert store.info(key) == TensorInfo(value.shape, dtype, durable)
        assert store.info(key).nbytes == value.nbytes
        assert not store.is_written(key)
    store.write(expected)
    for key, value in expected.items():
        assert torch.equal(store.read(key), value)
    (visit,) = store.visit([list(expected)])
    assert visit.tensors == {}  # it is over
    for visit in store.visit([[key] for key in expected]):
        for key, tensor in visit.tensors.items():
            assert torch.equal(tensor, expected[key])
            if dtype is not torch.bool:
                tensor.add_(1)
            visit.write_back([key])
    for key, value in expected.items():
        assert torch.equal(store.read(key), value if dtype is torch.bool else value + 1)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[::2, 1:],
        lambda x: x[0].expand(5, -1),
        lambda x: torch.nn.Parameter(x),
        lambda x: x.permute(1, 0).unsqueeze(1),
        lambda x: torch.complex(x, x + 1).conj(),
        lambda x: torch.complex(x, x + 1).conj().imag,
    ],
)
def test_values_of_any_strides(store, view):
    value = view(values((6, 9), torch.float32))
    put(store, "a", value)
    assert torch.equal(store.read("a"), value)


def test_a_value_of_many_pieces(store):
    value = torch.arange(3 * (1 << 20) + 1000, dtype=torch.int32)  # 12 MiB and a bit: pieces of 4 MiB
    put(store, "small", torch.ones(3))
    put(store, "large", value)
    assert torch.equal(store.read("large"), value)
    store.write({"large": value}, add=True)
    assert torch.equal(store.read("large"), 2 * value)
    for visit in store.visit([["large", "small"]]):
        visit.tensors["large"].neg_()
        visit.write_back(["large"])
    assert torch.equal(store.read("large"), -2 * value)
    assert torch.equal(store.read("small"), torch.ones(3))


def test_the_caller_may_reuse_what_it_wrote(store):
    value = torch.zeros(300_000)
    store.create("a", value.shape, value.dtype)
    for step in range(20):
        value.fill_(step)
        store.write({"a": value})
        value.fill_(-1)
    assert torch.equal(store.read("a"), torch.full((300_000,), 19.0))


@pytest.mark.parametrize("durable", [True, False])
def test_adding(store, durable):
    store.create("a", (5,), torch.float32, durable=durable)
    for expected in (1.0, 2.0, 3.0):
        store.write({"a": torch.ones(5)}, add=True)
        assert torch.equal(store.read("a"), torch.full((5,), expected))
    store.clear(["a"])
    assert not store.is_written("a")
    with pytest.raises(StoreError, match="'a' has no value, since it was never written or was cleared"):
        store.read("a")
    store.write({"a": torch.full((5,), 7.0)}, add=True)
    assert torch.equal(store.read("a"), torch.full((5,), 7.0))


def test_adding_to_some(store):
    """Neighbours on disk go out in one call, whether they are added to or not."""
    for key in "abc":
        store.create(key, (3,), torch.bfloat16, durable=False)
    store.write({"b": torch.ones(3).bfloat16()})
    store.write({key: torch.full((3,), 2.0).bfloat16() for key in "abc"}, add=True)
    assert [store.read(key)[0].item() for key in "abc"] == [2.0, 3.0, 2.0]


def test_reads_follow_writes(store):
    keys = [f"{index}" for index in range(6)]
    for key in keys:
        store.create(key, (50_000,), torch.int64, durable=key < "3")
    for step in range(15):
        store.write({key: torch.full((50_000,), step) for key in keys})
        for visit in store.visit([[key] for key in keys], prefetch=3):
            for key, tensor in visit.tensors.items():
                assert (tensor == step).all()
                tensor.add_(1000)
                visit.write_back([key])
        for key in keys:
            assert (store.read(key) == step + 1000).all()


def test_threads_write_and_read_at_once(store):
    errors = []

    def work(name):
        try:
            for step in range(30):
                store.write({name: torch.full((5000,), float(step))})
                assert (store.read(name) == step).all()
                for visit in store.visit([[name], ["shared"]]):
                    assert len(visit.tensors) == 1
        except BaseException as error:
            errors.append(error)

    put(store, "shared", torch.zeros(1000))
    names = ["a", "b", "c"]
    for name in names:
        store.create(name, (5000,), torch.float32)
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_record_that_was_prefetched_and_then_written(store):
    put(store, "tied", torch.zeros(1000))
    put(store, "other", torch.zeros(1000))
    for position, visit in enumerate(store.visit([["tied"], ["other", "tied"], ["tied"]], prefetch=2)):
        assert (visit.tensors["tied"] == position).all()
        visit.tensors["tied"].add_(1)
        visit.write_back(["tied"])
    for position, visit in enumerate(store.visit([["other"], ["tied"]])):
        if position == 0:
            store.write({"tied": torch.full((1000,), 9.0)})
        else:
            assert (visit.tensors["tied"] == 9).all()


def test_a_value_that_comes_after_its_prefetch(store):
    put(store, "a", torch.zeros(3))
    store.create("b", (3,), torch.float32)
    for visit in store.visit([["a"], ["b"]]):
        if "a" in visit.tensors:
            store.write({"b": torch.ones(3)})
        else:
            assert torch.equal(visit.tensors["b"], torch.ones(3))
    store.clear(["b"])
    seen = []
    with pytest.raises(StoreError, match="'b' has no value"):  # not before its turn
        seen.extend(list(visit.tensors) for visit in store.visit([["a"], ["b"]]))


def test_versions_count_changes(store):
    put(store, "a", torch.zeros(3))
    before = store.version("a")
    store.write({"a": torch.ones(3)})
    store.read("a")
    assert len(list(store.visit([["a"]]))) == 1
    assert store.version("a") == before + 1
    for visit in store.visit([["a"]]):
        visit.write_back(["a"])
    store.clear(["a"])
    assert store.version("a") == before + 3


def test_records_come_and_go(store):
    for key in "abc":
        put(store, key, values((100,), torch.float32, ord(key)))
    assert store.keys() == ["a", "b", "c"]
    assert len({store.storage_id(key) for key in "abc"}) == 3
    store.delete(["b", "b"])
    assert "b" not in store
    assert "a" in store
    put(store, "b", torch.arange(5))
    assert torch.equal(store.read("b"), torch.arange(5))
    assert torch.equal(store.read("c"), values((100,), torch.float32, ord("c")))


def test_records_that_finalizers_delete(store):
    """On another thread, while this one holds the store."""
    for key in "abc":
        put(store, key, torch.ones(3))
    with store._lock:
        thread = threading.Thread(target=store.delete_later, args=(["a", "b", "missing"],))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    store.flush()
    assert store.keys() == ["c"]


def test_creating_again(store):
    store.create("a", (2, 3), torch.float32)
    store.create("a", [2, 3], torch.float32)
    for change in ({"shape": (3, 2)}, {"dtype": torch.float64}, {"durable": False}):
        arguments = {"shape": (2, 3), "dtype": torch.float32, "durable": True} | change
        with pytest.raises(
            StoreError, match=r"'a' exists as float32\[2, 3\], durable and cannot be created as .*; delete"
        ):
            store.create("a", arguments["shape"], arguments["dtype"], durable=arguments["durable"])


def test_nothing_is_written_if_one_value_is_wrong(store):
    put(store, "a", torch.zeros(3))
    store.create("b", (3,), torch.float32)
    for wrong in (torch.ones(4), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(
            StoreError, match=r"'b' is float32\[3\], durable; the value to be written is float(32|64)\[\d\]"
        ):
            store.write({"a": torch.ones(3), "b": wrong})
    with pytest.raises(StoreError, match="has no record 'c'"):
        store.write({"a": torch.ones(3), "c": torch.ones(3)})
    assert torch.equal(store.read("a"), torch.zeros(3))


def test_wrong_visits(store):
    put(store, "a", torch.zeros(3))
    with pytest.raises(StoreError, match="has no record 'missing'; create"):
        store.visit([["a"], ["missing"]])
    with pytest.raises(OptionError, match="prefetch=-1"):
        store.visit([["a"]], prefetch=-1)
    with pytest.raises(OptionError, match="'cpu' or 'cuda'"):
        store.visit([["a"]], device="meta")
    visits = store.visit([["a"], []])
    visit = next(visits)
    with pytest.raises(StoreError, match="'b' is not of the group"):
        visit.write_back(["b"])
    assert next(visits).tensors == {}
    with pytest.raises(StoreError, match="this visit is over"):
        visit.write_back(["a"])
    assert list(store.visit([])) == []


def test_an_error_in_the_callers_loop(store):
    for key in "abcd":
        put(store, key, torch.zeros(2000))

    def fail():
        for visit in store.visit([["a"], ["b"], ["c"], ["d"]], prefetch=2):
            visit.tensors["a"].fill_(1)
            visit.write_back(["a"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (store.read("a") == 1).all()
    for visit in store.visit([["a"], ["b"], ["c"], ["d"]]):
        for key, tensor in visit.tensors.items():
            assert (tensor == (key == "a")).all()


def test_updates_in_place_do_not_disturb_autograd(store):
    """As in a layer whose counter of batches is visited together with its weight."""
    put(store, "weight", torch.ones(3))
    put(store, "counter", torch.zeros(()))
    for visit in store.visit([["weight", "counter"]]):
        x = torch.ones(3, requires_grad=True)
        loss = (x * visit.tensors["weight"]).sum()
        visit.tensors["counter"].add_(1)
        loss.backward()
        assert torch.equal(x.grad, torch.ones(3))


def test_commit_remembers(store):
    assert (store.step, store.extra, store.small) == (0, {}, {})
    state = torch.get_rng_state()
    store.commit(3, {"lr": 0.1, "nested": [1, {"a": None}], 5: "x"}, {"rng": state, "empty": torch.empty(0, 2)})
    assert store.step == 3
    assert store.extra == {"lr": 0.1, "nested": [1, {"a": None}], "5": "x"}
    assert torch.equal(store.small["rng"], state)
    assert store.small["empty"].shape == (0, 2)
    with pytest.raises(StoreError, match=r"commit\(extra=...\), where tensors go into small=, must be JSON: Object"):
        store.commit(4, {"a": torch.ones(2)})
    assert store.step == 3


def test_a_closed_store(store):
    put(store, "a", torch.zeros(3))
    visits = store.visit([["a"]])
    store.close()
    store.close()
    for use in (
        lambda: store.read("a"),
        lambda: store.write({"a": torch.zeros(3)}),
        lambda: store.create("b", (), torch.int8),
        lambda: store.info("a"),
        lambda: store.visit([["a"]]),
        lambda: next(visits),
        lambda: store.commit(1, {}),
        lambda: store.flush(),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(StoreError, match="the store is closed"):
            use()
    assert "closed" in repr(store)
    assert issubclass(StoreError, (GraphoptError, RuntimeError))


def test_repr_fits_on_a_line(store):
    put(store, "a", torch.zeros(3))
    assert "\n" not in repr(store)
    assert "1 records" in repr(store)
    assert store.kind in ("cpu", "disk")
    assert repr(next(store.visit([["a"]]))) == "Visit(a)"


def test_a_host_store_gives_the_tensors_themselves():
    with HostStore() as store:
        put(store, "a", torch.zeros(3))
        for visit in store.visit([["a"]]):
            visit.tensors["a"].add_(1)
        assert torch.equal(store.read("a"), torch.ones(3))
        assert store.peak_resident_bytes == 0
        with pytest.raises(StoreError, match="keeps no earlier values"):
            store.rollback()


def test_a_store_that_was_forgotten_leaves_no_thread(tmp_path):
    store = DiskStore(tmp_path / "store")
    put(store, "a", torch.zeros(3))
    store.flush()
    del store
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("graphopt-"):
            thread.join(10)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("graphopt-")]
    DiskStore(tmp_path / "store").close()  # and no lock
