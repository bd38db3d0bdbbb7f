"""A stored tensor does what the ordinary tensor with its value would do, in whatever asks it to."""

import copy
import io
import pickle

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import id_tensor_storage

from graphopt.errors import StoreError
from graphopt.runtime.stores import DiskStore, HostStore, StoredTensor

SHAPES = ((3, 4), (5,), (), (2, 3, 2))


@pytest.fixture(params=["cpu", "disk"])
def store(request, tmp_path):
    with HostStore() if request.param == "cpu" else DiskStore(tmp_path / "store") as made:
        yield made


def keep(store, value, key=None, **options):
    key = key or f"record {len(store.keys())}"
    store.create(key, value.shape, value.dtype)
    store.write({key: value})
    return StoredTensor(store, key, **options)


def husk(shape, dtype=torch.float32):
    """A parameter that has a shape and no memory."""
    param = nn.Parameter(torch.empty(0, dtype=dtype))
    param.data = torch.full((), torch.nan, dtype=dtype).expand(shape)
    return param


def gradients(store, dtype=torch.float32, scale=1.0):
    """The same gradients twice: of husks and in the store, and of ordinary parameters."""
    values = [torch.randn(shape).to(dtype) * scale for shape in SHAPES]
    husks, ordinary = [husk(shape, dtype) for shape in SHAPES], [nn.Parameter(value.clone()) for value in values]
    for param, twin, value in zip(husks, ordinary, values, strict=True):
        param.grad, twin.grad = keep(store, value), value.clone()
    return husks, ordinary


def assert_same_gradients(params, ordinary):
    for param, twin in zip(params, ordinary, strict=True):
        assert type(param.grad) is StoredTensor
        assert torch.equal(param.grad.load(), twin.grad)


FUNCTIONS = {
    "sum": lambda x: x.sum(),
    "norm": lambda x: x.norm(),
    "max of two": lambda x: x.max(dim=0).values,
    "item": lambda x: x.sum().item(),
    "matmul": lambda x: x @ x.T,
    "both sides": lambda x: x + x * 2,
    "with ordinary": lambda x: torch.ones(4) * x,
    "cat": lambda x: torch.cat([x, torch.zeros(1, 4), x]),
    "where": lambda x: torch.where(x > 0, x, -x),
    "comparison": lambda x: (x == x).all(),
    "isfinite": lambda x: torch.isfinite(x).all(),
    "reshape": lambda x: x.reshape(2, 6).sum(0),
    "flatten": lambda x: x.flatten()[3] + 0,
    "rows": lambda x: [row.sum() for row in x],
    "split": lambda x: [part + 1 for part in x.split([1, 2])],
    "unsafe view": lambda x: torch.ops.aten._unsafe_view(x, [12]),
    "bits": lambda x: x.view(torch.int32) + 0,
    "fancy index": lambda x: x[[2, 0], 1:3] * 1,
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "to dtype": lambda x: x.to(torch.bfloat16),
    "to device": lambda x: x.to("cpu"),
    "to same": lambda x: x.to(x),
    "cpu": lambda x: x.cpu(),
    "contiguous": lambda x: x.contiguous(),
    "contiguous view": lambda x: x.t().contiguous(),
    "clone": lambda x: x.clone(),
    "numpy": lambda x: torch.from_numpy(x.cpu().numpy()),
    "numpy at once": lambda x: torch.from_numpy(x.numpy().copy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "type": lambda x: x.type(torch.float64),
    "interpolate": lambda x: torch.lerp(x, x * 2, 0.5),
    "autograd": lambda x: torch.autograd.grad((w := torch.ones(3, 4, requires_grad=True)).mul(x).sum(), w)[0],
    "linear": lambda x: nn.functional.linear(torch.ones(2, 4), x),
    "out": lambda x: torch.add(x, 1, out=torch.empty(3, 4)),
    "vmap": lambda x: torch.func.vmap(lambda row: row.sum())(x.load() if isinstance(x, StoredTensor) else x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(store, name):
    value = torch.randn(3, 4)
    stored = keep(store, value)
    version = stored.version
    expected, found = FUNCTIONS[name](value), FUNCTIONS[name](stored)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for result in found if isinstance(found, list) else [found]:
        assert not isinstance(result, StoredTensor)
        if isinstance(result, torch.Tensor) and result.dtype.is_floating_point and not result.requires_grad:
            result.add_(1)  # is the caller's own
    assert torch.equal(stored.load(), value)
    assert stored.version == version


CHANGES = {
    "mul_": lambda x: x.mul_(2),
    "add_": lambda x: x.add_(torch.ones(3, 4), alpha=3),
    "operator": lambda x: x.__iadd__(1),
    "itself": lambda x: x.add_(x),
    "zero_": lambda x: x.zero_(),
    "fill_": lambda x: x.fill_(3),
    "fill_ tensor": lambda x: x.fill_(torch.tensor(3.0)),
    "copy_": lambda x: x.copy_(torch.arange(12.0).view(3, 4)),
    "copy_ broadcast, other dtype": lambda x: x.copy_(torch.arange(4)),
    "copy_ view": lambda x: x.t().copy_(torch.arange(12.0).view(4, 3)),
    "view": lambda x: x.view(-1).mul_(2),
    "row": lambda x: x[1].fill_(7),
    "view of a view": lambda x: x.t()[1:3].unsqueeze(0).mul_(-1),
    "part": lambda x: x.split(1)[2].add_(5),
    "detach": lambda x: x.detach().mul_(2),
    "data": lambda x: x.data.mul_(2),
    "set data": lambda x: setattr(x, "data", torch.ones(3, 4)),
    "set item": lambda x: x.__setitem__((slice(None), 1), 4.0),
    "set mask": lambda x: x.__setitem__(x > 0, 0.5),
    "masked_fill_": lambda x: x.masked_fill_(x < 0, 0),
    "out": lambda x: torch.add(torch.ones(3, 4), 1, out=x),
    "addcmul_": lambda x: x.addcmul_(x, x, value=0.5),
    "clamp_": lambda x: x.clamp_(-0.5, 0.5),
    "normal_": lambda x: x.normal_(generator=torch.Generator().manual_seed(0)),
    "random": lambda x: nn.init.xavier_uniform_(x, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place(store, name):
    value = torch.randn(3, 4)
    stored, seen = keep(store, value), []
    stored.on_change = lambda key, op: seen.append((key, op, store.read(key).equal(value)))
    version = stored.version
    expected = value.clone()
    CHANGES[name](expected)
    result = CHANGES[name](stored)
    assert torch.equal(stored.load(), expected)
    assert stored.version > version
    assert seen
    assert all(key == stored.key and op and before for key, op, before in seen[:1])  # before anything has changed
    assert result is None or isinstance(result, StoredTensor)


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "set data"])
def test_a_change_can_be_refused(store, name):
    def refuse(key, op):
        raise PermissionError(f"{op} must not change {key}")

    value = torch.randn(3, 4)
    stored = keep(store, value, "weight", on_change=refuse)
    with pytest.raises(PermissionError, match="must not change weight"):
        CHANGES[name](stored)
    assert torch.equal(stored.load(), value)


def test_a_list_is_refused_as_a_whole(store):
    def refuse(key, op):
        raise PermissionError(f"{op} must not change {key}")

    free, held = keep(store, torch.ones(3)), keep(store, torch.ones(3), on_change=refuse)
    with pytest.raises(PermissionError, match="_foreach_mul_"):
        torch._foreach_mul_([free, held], 2.0)
    assert free.sum() == held.sum() == 3


LISTS = {
    "norm": lambda x, y: torch._foreach_norm(x),
    "norm inf": lambda x, y: torch._foreach_norm(x, torch.inf),
    "add": lambda x, y: torch._foreach_add(x, y, alpha=2),
    "mul_ scalar": lambda x, y: torch._foreach_mul_(x, 2.0),
    "mul_ scalars": lambda x, y: torch._foreach_mul_(x, [1.0, 2.0, 3.0, 4.0]),
    "mul_ tensor": lambda x, y: torch._foreach_mul_(x, torch.tensor(0.5)),
    "div_ lists": lambda x, y: torch._foreach_div_(x, y),
    "lerp_": lambda x, y: torch._foreach_lerp_(x, y, 0.1),
    "addcmul_": lambda x, y: torch._foreach_addcmul_(x, y, y, 0.3),
    "addcdiv_ scalars": lambda x, y: torch._foreach_addcdiv_(x, y, y, [1.0, 2.0, 3.0, 4.0]),
    "addcdiv_ tensor of scalars": lambda x, y: torch._foreach_addcdiv_(x, y, y, torch.tensor([1.0, 2.0, 3.0, 4.0])),
    "sqrt": lambda x, y: torch._foreach_sqrt(torch._foreach_abs(x)),
    "zero_": lambda x, y: torch._foreach_zero_(x),
    "copy_": lambda x, y: torch._foreach_copy_(x, y),
    "maximum": lambda x, y: torch._foreach_maximum(x, y),
    "pow": lambda x, y: torch._foreach_pow(2.0, x),
    "unscale": lambda x, y: torch._amp_foreach_non_finite_check_and_unscale_(x, torch.zeros(1), torch.tensor([0.25])),
}


@pytest.mark.parametrize("which", ["first", "second", "both", "some"])
@pytest.mark.parametrize("name", LISTS)
def test_lists(store, name, which):
    first, second = [[torch.randn(shape) for shape in SHAPES] for _ in range(2)]
    stored = {"first": (4, 0), "second": (0, 4), "both": (4, 4), "some": (2, 3)}[which]
    kept = [
        [keep(store, value) if index < number else value.clone() for index, value in enumerate(values)]
        for values, number in zip((first, second), stored, strict=True)
    ]
    expected, found = LISTS[name](first, second), LISTS[name](*kept)
    if expected is None or (not name.endswith("_") and found is None):
        assert found is None
    else:
        for result, reference in zip(found, expected, strict=True):
            assert torch.equal(result, reference)
    for value, reference in zip(kept[0] + kept[1], first + second, strict=True):
        assert torch.equal(value.load() if isinstance(value, StoredTensor) else value, reference)


def test_found_inf(store):
    grads = [keep(store, torch.tensor(value)) for value in ([1.0, 2.0], [torch.inf, 1.0], [3.0, 3.0])]
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.tensor(0.5))
    assert found.item() == 1
    assert torch.equal(grads[2].load(), torch.tensor([1.5, 1.5]))


def test_one_value_in_memory(tmp_path):
    with DiskStore(tmp_path / "store") as store:
        grads = [keep(store, torch.ones(1 << 18)) for _ in range(10)]  # 1 MiB each
        store.flush()
        store.trim()
        store.reset_counters()
        assert [norm.item() for norm in torch._foreach_norm(grads)] == [512.0] * 10
        assert store.peak_resident_bytes <= 1 << 20
        torch._foreach_mul_(grads, 2.0)
        for grad in grads:
            grad.div_(4)
        store.flush()
        assert store.peak_resident_bytes <= 2 << 20  # and one that is being written
        assert all(grad[0].item() == 0.5 for grad in grads)


def test_nothing_is_loaded_without_need(store):
    stored = keep(store, torch.ones(3, 4), "weight")
    store.flush()
    store.reset_counters()
    assert repr(stored) == f"StoredTensor('weight', float32[3, 4], cpu, in {store.kind})"
    assert repr(stored[0]) == f"StoredTensor('weight', float32[4], cpu, in {store.kind}, view)"
    assert (stored.shape, stored.dtype, stored.device.type, stored.requires_grad) == (
        (3, 4),
        torch.float32,
        "cpu",
        False,
    )
    assert stored.is_contiguous()
    assert not stored.t().is_contiguous()
    assert stored.t().stride() == (1, 4)
    assert stored.detach().numel() == 12
    stored.untyped_storage().nbytes()
    stored.zero_()
    stored.copy_(torch.ones(3, 4))
    stored.fill_(2)
    assert store.bytes_read == 0


def test_a_record_without_a_value(store):
    store.create("grad", (3,), torch.float32, durable=False)
    stored = StoredTensor(store, "grad")
    with pytest.raises(StoreError, match="'grad' has no value"):
        stored.add_(1)
    with pytest.raises(StoreError, match="'grad' has no value"):
        stored.sum()
    stored.zero_()
    assert torch.equal(stored.add_(1).load(), torch.ones(3))
    store.delete(["grad"])
    with pytest.raises(StoreError, match="has no record 'grad'"):
        stored.sum()


def test_a_failing_operator_changes_nothing(store):
    stored = keep(store, torch.ones(3))
    version = stored.version
    with pytest.raises(RuntimeError, match="size"):
        stored.add_(torch.ones(4))
    assert (stored.version, stored.sum()) == (version, 3)


def test_the_shape_stays(store):
    stored = keep(store, torch.ones(3, 4))
    for change in (lambda: stored.t_(), lambda: stored.unsqueeze_(0), lambda: stored.resize_(2)):
        with pytest.raises(StoreError, match="would change the shape of StoredTensor"):
            change()
    with pytest.raises(StoreError, match=r"cannot become torch.float64\[3, 4\]"):
        stored.data = torch.ones(3, 4, dtype=torch.float64)


def test_wrappers_share_version_and_identity(store):
    first, other = keep(store, torch.ones(3), "a"), keep(store, torch.ones(3), "b")
    second = StoredTensor(store, "a")
    second.add_(1)
    assert first.version == second.version == first.detach().version
    assert id_tensor_storage(first) == id_tensor_storage(second) != id_tensor_storage(other)


# ------------------------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_clip_grad_norm(store, foreach, max_norm):
    params, ordinary = gradients(store)
    norm = nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(ordinary, max_norm, foreach=foreach))
    assert_same_gradients(params, ordinary)


@pytest.mark.parametrize("foreach", [None, False, True])
def test_clip_grad_value(store, foreach):
    params, ordinary = gradients(store)
    for each in (params, ordinary):
        nn.utils.clip_grad_value_(each, 0.3, foreach=foreach)
    assert_same_gradients(params, ordinary)


@pytest.mark.parametrize("bad", [None, torch.inf, torch.nan])
def test_grad_scaler(store, bad):
    params, ordinary = gradients(store, scale=256.0)
    found = []
    for each in (params, ordinary):
        if bad is not None:
            each[1].grad[2] = bad
        scaler, optimizer = torch.amp.GradScaler(device="cpu", init_scale=256.0), torch.optim.SGD(each, lr=0.1)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        found.append(scaler._found_inf_per_device(optimizer)[torch.device("cpu")].item())
    assert found == [float(bad is not None)] * 2
    assert_same_gradients(params[2:], ordinary[2:])


@pytest.mark.parametrize("foreach", [False, True])
def test_zero_grad(store, foreach):
    params, _ = gradients(store)
    optimizer = torch.optim.SGD(params, lr=0.1, foreach=foreach)
    optimizer.zero_grad(set_to_none=False)
    assert all(type(param.grad) is StoredTensor and not param.grad.load().any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True, "maximize": True}])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers(store, make, options):
    if make is torch.optim.SGD:
        options = {name: value for name, value in options.items() if name != "amsgrad"} | {"momentum": 0.9}
    values = [torch.randn(shape) for shape in SHAPES]
    params, ordinary = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    optimizers = [make(each, lr=0.1, weight_decay=0.1, **options) for each in (params, ordinary)]
    for _ in range(3):
        for param, twin in zip(params, ordinary, strict=True):
            twin.grad = torch.randn(twin.shape)
            param.grad = keep(store, twin.grad)
        for optimizer in optimizers:
            optimizer.step()
    for param, twin in zip(params, ordinary, strict=True):
        assert torch.equal(param, twin)


def test_state_in_the_store(store):
    """An optimizer's state may be stored too."""
    params, ordinary = ([nn.Parameter(torch.ones(3, 4))] for _ in range(2))
    optimizers = [torch.optim.AdamW(each, lr=0.1) for each in (params, ordinary)]
    for step in range(3):
        for each, optimizer in zip((params, ordinary), optimizers, strict=True):
            each[0].grad = torch.full((3, 4), 1.0 + step)
            optimizer.step()
        state = optimizers[0].state[params[0]]
        for name in ("exp_avg", "exp_avg_sq"):
            if step == 0:
                state[name] = keep(store, state[name], name)
    assert torch.equal(params[0], ordinary[0])
    saved = optimizers[0].state_dict()["state"][0]
    assert type(saved["exp_avg"]) is StoredTensor
    assert torch.equal(saved["exp_avg"].load(), optimizers[1].state_dict()["state"][0]["exp_avg"])


def test_backward_accumulates_into_the_record(store):
    param = nn.Parameter(torch.ones(3))
    param.grad = keep(store, torch.ones(3))
    (2 * param).sum().backward()
    assert type(param.grad) is StoredTensor
    assert torch.equal(param.grad.load(), torch.full((3,), 3.0))


def test_a_compiled_function_whose_parameter_has_a_stored_gradient(store):
    param = nn.Parameter(torch.ones(3))
    param.grad = keep(store, torch.ones(3))
    loss = torch.compile(lambda x: (param * x).sum(), backend="aot_eager")(torch.ones(3))
    loss.backward()
    assert torch.equal(param.grad.load(), torch.full((3,), 2.0))


# ----------------------------------------------------------------------------------------------------------------- saving


def test_torch_save(store):
    state = {"a": keep(store, torch.randn(3)), "view": keep(store, torch.arange(6.0))[2:4], "plain": torch.ones(2)}
    expected = {name: value.clone() for name, value in state.items()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for copied in (loaded, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        for name, value in copied.items():
            assert type(value) is torch.Tensor
            assert torch.equal(value, expected[name])
    twice = copy.deepcopy([state["a"], state["a"]])
    assert twice[0] is twice[1]


def test_safetensors(store, tmp_path):
    state = {name: keep(store, torch.randn(3, 4)) for name in "ab"}
    with pytest.raises(StoreError, match=r"has no memory that could be read; .contiguous\(\) or .cpu\(\) gives"):
        save_file(state, tmp_path / "a.safetensors")
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "a.safetensors")
    for name, value in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(value, state[name].load())


def test_shards(store):
    state = {f"{index}": keep(store, torch.randn(10, 10)) for index in range(5)}
    split = split_torch_state_dict_into_shards(state, max_shard_size=1000)  # 400 bytes each
    ordinary = split_torch_state_dict_into_shards({name: torch.ones(10, 10) for name in state}, max_shard_size=1000)
    assert split == ordinary
    tied = split_torch_state_dict_into_shards(state | {"tied": state["0"].detach()}, max_shard_size=1000)
    assert tied.metadata["total_size"] == 2000
    assert tied.tensor_to_filename["tied"] == tied.tensor_to_filename["0"]


def test_format(store):
    assert f"{keep(store, torch.tensor(1.5)):.3f}" == "1.500"
    assert f"{keep(store, torch.ones(2), 'a')}".startswith("StoredTensor('a'")
