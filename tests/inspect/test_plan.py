"""Plans: what they say before anything runs is what stores count, files take and optimizers keep when it does."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.errors import OptionError, StoreError, UnsupportedError
from graphopt.inspect import machine, traffic
from graphopt.inspect.plan import Plan
from graphopt.passes import LayerToLayer, TrueGrad

OPTIMIZERS = {
    "adadelta": torch.optim.Adadelta,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "sgd_momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "tgadamw": graphopt.optim.TGAdamW,
    "tglaprop": graphopt.optim.TGLaProp,
    "tgrmsprop": graphopt.optim.TGRMSProp,
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Language(nn.Module):
    """A small language model without attention: tokens in, loss out."""

    def __init__(self, width: int = 32, depth: int = 2, vocabulary: int = 100, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Perceptron(nn.Sequential):
    """Equal layers of one matrix each, so that products can be counted by hand."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def tokens(batch: int = 5, length: int = 8) -> torch.Tensor:
    return torch.randint(0, 100, (batch, length))


def unmeasured(options: LayerToLayer, model: nn.Module, *args, **kwargs) -> Plan:
    return options.plan(model, *args, measure=False, **kwargs)


def options_for(tmp_path, store: str, **options) -> LayerToLayer:
    return LayerToLayer(store=store, store_path=tmp_path / "store" if store == "disk" else None, **options)


def on_meta(make, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return make(*args, **kwargs)


# ----------------------------------------------------------------------------------------------------- against a real step


@pytest.mark.parametrize(
    ("store", "options", "model", "optimizer"),
    [
        ("disk", {}, {}, "adamw"),
        ("disk", {"microbatch_size": 2}, {"tied": True}, "tgadamw"),
        ("disk", {"microbatch_size": 2, "eager": True}, {}, "adamw"),
        ("disk", {"eager": True, "stash": "cpu"}, {"tied": True}, "sgd_momentum"),
        ("cpu", {"microbatch_size": 3}, {"tied": True}, "tgadamw"),
        ("cpu", {"eager": True}, {"tied": True}, "adamw"),
    ],
)
def test_bytes_are_those_that_the_store_counts(tmp_path, store, options, model, optimizer):
    model, ids = Language(**model), tokens()
    if model.head.weight is not model.embed.weight:
        model.embed.requires_grad_(False)
    chosen = options_for(tmp_path, store, **options)
    plan = unmeasured(chosen, model, ids, labels=ids, optimizer=optimizer)
    graphopt.transform(model, [*([TrueGrad()] if optimizer.startswith("tg") else []), chosen], compiler="eager")
    stepper = OPTIMIZERS[optimizer](model.parameters(), lr=1e-3)
    stream = graphopt.stream(model)
    for _ in range(3):  # the first makes the optimizer's state, the second is the first that eager can be
        stream.store.reset_counters()
        model(ids, labels=ids).backward()
        stepper.step()
        stepper.zero_grad()
        stream.store.flush()
    assert plan.moved.read == pytest.approx(stream.store.bytes_read, rel=0.02)
    assert plan.moved.written == pytest.approx(stream.store.bytes_written, rel=0.02)
    least, most = plan.buffer_bytes
    if store == "disk":
        assert (
            0.5 * least <= stream.store.peak_resident_bytes <= 2 * most
        )  # a pool hands out buffers of up to twice the size
        files = sum((tmp_path / "store" / name).stat().st_size for name in ("data-0.bin", "data-1.bin"))
        durable = plan.disk["parameters, twice"] + plan.disk["the optimizer's tensors, twice"]
        assert durable == pytest.approx(files, rel=0.05)
    else:
        assert (least, most) == (0, 0)
        assert plan.disk == {}
        held = sum(stream.store.info(key).nbytes for key in stream.store.keys() if not key.startswith("stash"))
        names = ("parameters", "gradients", "statistics", "the optimizer's tensors")
        if not chosen.eager:  # which needs no room for gradients behind the first step
            assert sum(plan.host_peak.parts.get(name, 0) for name in names) == held
    stream.close()


def test_graphs_behind_a_break_are_added_up(tmp_path):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Perceptron(16, 2), Perceptron(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x = Broken(), torch.randn(6, 16)
    chosen = options_for(tmp_path, "disk")
    plan = unmeasured(chosen, model, x, optimizer="sgd")
    assert len(plan.stages) == 4
    graphopt.transform(model, [chosen], compiler="eager")
    optimizer, store = torch.optim.SGD(model.parameters(), lr=1e-3), graphopt.stream(model).store
    store.reset_counters()
    model(x).sum().backward()
    optimizer.step()
    store.flush()
    assert (plan.moved.read, plan.moved.written) == (store.bytes_read, store.bytes_written)
    graphopt.stream(model).close()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_keep_what_the_table_says(name, dtype):
    model = nn.Linear(5, 6).to(dtype)
    if name.startswith("tg"):
        graphopt.patch_model(model)
    model(torch.randn(4, 5, dtype=dtype)).sum().backward()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-3)
    optimizer.step()
    kept = [value for value in optimizer.state[model.weight].values() if torch.is_tensor(value) and value.numel() > 1]
    weight = traffic.Weight("weight", 30, model.weight.nbytes, dtype, True)
    costs = traffic.OPTIMIZERS[name]
    assert [value.nbytes for value in kept] == [costs.state_bytes(weight)] * costs.num_states
    assert costs.reads_statistics == name.startswith("tg")


def test_the_table_of_optimizers_is_tested_whole():
    assert set(traffic.OPTIMIZERS) == set(OPTIMIZERS)


# ---------------------------------------------------------------------------------------------------- against closed forms


def test_flops_are_two_for_each_weight_and_row():
    plan = unmeasured(LayerToLayer(store="cpu"), Perceptron(16, 3), torch.randn(8, 16))
    assert plan.num_samples == 8
    assert [stage.flops_per_sample for stage in plan.stages] == [2 * 16 * 16] * 3
    assert plan.rows_per_visit == 8
    plan = unmeasured(LayerToLayer(store="cpu"), Perceptron(16, 3), torch.randn(8, 5, 16), optimizer="tgadamw")
    assert [stage.flops_per_sample for stage in plan.stages] == [2 * 16 * 16 * 5] * 3  # in graphopt's own operators too


def test_flops_of_attention():
    class Attention(nn.Module):
        def forward(self, query: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, query, query)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False)])
            self.attention = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(self.layers[0](x))

    plan = unmeasured(
        LayerToLayer(store="cpu"), Model(), torch.randn(2, 3, 6, 8), bandwidth=1.0, flops=1.0, optimizer="sgd"
    )
    linear, products = 2 * 8 * 8 * 18, 2 * 3 * 6 * 6 * 8
    assert sum(stage.flops_per_sample for stage in plan.stages) == linear + 2 * products
    assert plan.rows_per_visit == 36  # without those of attention, which make fewer rows hide the same bytes
    assert plan.hidden_from == pytest.approx(36 * 8 * 8 * 4 / plan.timing.phases[0].compute)
    # Forward again; one product for the gradient of the matrix, whose input needs none; five for that of attention.
    assert plan.timing.phases[1].compute == 2 * (linear + 2 * products + linear + 5 * products)


def test_rows_that_hide_the_transfer():
    speeds = {"bandwidth": 1e9, "flops": 1e11, "optimizer": "sgd"}
    plan = unmeasured(LayerToLayer(store="cpu", device="cuda"), Perceptron(16, 4), torch.randn(8, 16), **speeds)
    assert plan.hidden_from == pytest.approx(1e11 * 4 / (2 * 1e9))
    half = unmeasured(
        LayerToLayer(store="cpu", device="cuda"), Perceptron(16, 4).bfloat16(), torch.randn(8, 16).bfloat16(), **speeds
    )
    assert half.hidden_from == pytest.approx(100)
    pair = {**speeds, "bandwidth": (1e9, 2e9)}
    assert unmeasured(
        LayerToLayer(store="cpu"), Perceptron(16, 4), torch.randn(8, 16), **pair
    ).hidden_from == pytest.approx(200)


def test_that_many_rows_make_computing_the_longer_part(tmp_path):
    def planned(rows: int) -> Plan:
        chosen = options_for(tmp_path, "disk", microbatch_size=rows)
        return unmeasured(chosen, Perceptron(64, 3), torch.zeros(rows, 64), bandwidth=1e9, flops=1e10)

    rows = planned(256).step_hidden_from  # of whole pages
    assert planned(math.ceil(rows * 1.05)).timing.bound == "compute"
    assert planned(math.floor(rows * 0.95)).timing.bound == "transfer"


def test_time_is_the_longer_of_computing_and_moving():
    chosen = LayerToLayer(store="cpu", device="cuda")
    plan = unmeasured(chosen, Perceptron(16, 4), torch.zeros(8, 16), bandwidth=(1e6, 2e6), flops=1e9)
    weights, product = 4 * 16 * 16 * 4, 2 * 8 * 16 * 16
    forward, backward, optimizer = plan.timing.phases
    assert forward.transfer == pytest.approx(weights / 1e6)
    assert forward.compute == pytest.approx(4 * product / 1e9)
    assert backward.transfer == pytest.approx(weights / 1e6)  # both directions at once: gradients go at twice the speed
    assert backward.compute == pytest.approx((3 * 4 * product - product) / 1e9)  # the input needs no gradient
    assert (optimizer.compute, optimizer.transfer) == (0, 0)  # on the host, and nobody has measured that
    assert plan.timing.seconds == pytest.approx(2 * weights / 1e6)
    assert plan.timing.bound == "transfer"
    assert len(plan.timing_eager.phases) == 2


def test_memory_is_flat_in_depth(tmp_path):
    def peak(depth: int, store: str) -> int:
        chosen = options_for(tmp_path, store, microbatch_size=4)
        return unmeasured(chosen, on_meta(Perceptron, 256, depth), torch.zeros(16, 256)).device_peak.nbytes

    assert peak(12, "disk") <= 1.05 * peak(4, "disk")
    assert peak(12, "cpu") > 2 * peak(4, "cpu")  # a CPU holds the store in the same memory


def test_device_and_host_have_a_peak_each():
    model, x = Perceptron(256, 4), torch.zeros(4, 256)
    nbytes = 4 * 256 * 256
    plan = unmeasured(LayerToLayer(store="cpu", device="cuda", prefetch=2), model, x)
    assert plan.device_peak.parts["layers that are loaded"] == 3 * nbytes
    assert plan.device_peak.parts["gradients of a layer"] == nbytes
    assert plan.device_peak.nbytes < 5 * nbytes
    host = plan.host_peak.parts
    assert (host["parameters"], host["gradients"], host["the optimizer's tensors"]) == (
        4 * nbytes,
        4 * nbytes,
        8 * nbytes,
    )


# ------------------------------------------------------------------------------------------------------- what is planned


def test_a_model_that_fits_nowhere_takes_no_memory():
    model = on_meta(Perceptron, 50_000, 10)
    plan = unmeasured(LayerToLayer(store="cpu", device="cuda"), model, torch.empty(4, 50_000, device="meta"))
    assert plan.parameter_bytes == 10 * 4 * 50_000**2
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_streamed_model_is_planned_as_the_one_that_it_was(tmp_path):
    model, ids = Language(), tokens()
    chosen = options_for(tmp_path, "disk", microbatch_size=2)
    before = unmeasured(chosen, model, ids, labels=ids).to_dict()
    graphopt.transform(model, [LayerToLayer(store="cpu")], compiler="eager")
    assert unmeasured(chosen, model, ids, labels=ids).to_dict() == before
    model(ids, labels=ids).backward()  # still streamed
    assert graphopt.stream(model).store.is_written("grad/head.weight")
    assert not (tmp_path / "store").exists()
    graphopt.stream(model).close()


def test_a_transformed_model_is_planned_with_its_other_passes():
    model, ids = Language(), tokens()
    plain = unmeasured(LayerToLayer(store="cpu"), model, ids, labels=ids)
    graphopt.transform(model, [TrueGrad(), LayerToLayer()], compiler="eager")
    plan = unmeasured(LayerToLayer(store="cpu"), model, ids, labels=ids)
    assert plain.moved.total(kind="statistics") == 0
    assert plan.moved.total(kind="statistics") == plan.moved.total(kind="gradients", direction="written")


def test_stages_say_what_is_frozen_and_why_they_are_whole(tmp_path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.norm(x)

    model = Normed()
    model.layers[0].requires_grad_(False)
    model.layers[1].bias.requires_grad_(False)
    plan = unmeasured(options_for(tmp_path, "disk", microbatch_size=2), model, torch.randn(6, 8))
    stages = {stage.name: stage for stage in plan.stages}
    assert [stages[f"layers.{i}"].training for i in range(3)] == ["frozen", "partly", "trainable"]
    assert stages["layers.1"].trainable_bytes == 8 * 8 * 4
    assert [stages[f"layers.{i}"].num_parts for i in range(3)] == [3, 3, 3]
    (whole,) = [stage for stage in plan.stages if stage.num_parts == 1]
    assert "in norm" in whole.whole
    assert stages["layers.1"].kept_bytes == 6 * 8 * 4
    frozen = unmeasured(options_for(tmp_path, "disk"), model, torch.randn(6, 8))
    assert {stage.whole for stage in frozen.stages} == {"microbatch_size is not given"}
    # Backward does not go through what is frozen, and its weights are not read again.
    read = {phase: frozen.moved.total(phases=[phase], kind="weights") for phase in ("forward", "backward")}
    assert read["forward"] - read["backward"] == 2 * 4096  # a page for the weight, one for the bias


def test_text_and_json(tmp_path):
    chosen = options_for(tmp_path, "disk", microbatch_size=2)
    plan = unmeasured(chosen, Language(depth=5), tokens(), labels=tokens(), bandwidth=1e9, flops=1e11)
    text = str(plan)
    assert "Language: " in text.splitlines()[0]
    assert "layers.* x5" in text
    assert "[1] a reduction over the samples" in text
    assert "    forward: weights" in text
    assert "a step takes at least" in text
    assert "rows (tokens) per visit of a layer hide the transfer" in text
    assert repr(plan).startswith("Plan(Language: 8 stages, peak ")
    assert max(map(len, text.splitlines())) < 200
    found = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert found["peak"]["device"]["bytes"] == plan.device_peak.nbytes
    assert sum(move["nbytes"] for move in found["moved"]["eager=False"]) == plan.traffic.read + plan.traffic.written
    assert found["timing"]["eager=True"]["bound"] == plan.timing_eager.bound
    unknown = unmeasured(chosen, Language(), tokens(), labels=tokens())
    assert unknown.timing is None
    assert unknown.hidden_from is None
    assert "time: not known" in str(unknown)


# ------------------------------------------------------------------------------------------------------------- measuring


def test_measuring_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_RECORD", 1 << 20)
    monkeypatch.setattr(machine, "_SIZE", {"cpu": 64})
    monkeypatch.setattr(machine, "_SHORTEST", 0.0)
    chosen = LayerToLayer(store="disk", store_path=tmp_path / "not" / "there" / "store")
    plan = chosen.plan(Perceptron(16, 2), torch.randn(4, 16))
    speeds = plan.machine
    assert min(speeds.read, speeds.written, speeds.flops, speeds.memory) > 0
    assert plan.hidden_from == pytest.approx(speeds.flops * 4 / (2 * speeds.read))
    assert plan.timing.phases[2].compute > 0  # the optimizer's, at the speed of memory
    assert list(tmp_path.iterdir()) == []
    in_memory = LayerToLayer(store="cpu").plan(Perceptron(16, 2), torch.randn(4, 16)).machine
    assert in_memory.read == in_memory.memory / 2


def test_what_cannot_be_measured_says_so():
    model, x = Perceptron(16, 2), torch.randn(4, 16)
    with pytest.raises(
        StoreError, match=r"measures the disk in a temporary folder in /proc, and cannot: .*plan\(measure=False\)"
    ):
        LayerToLayer(store="disk", store_path="/proc/no/store").plan(model, x)
    with pytest.raises(
        OptionError, match=r"mps cannot be measured on this machine\. Say how fast it is, plan\(measure=False"
    ):
        LayerToLayer(store="cpu", device="mps").plan(model, x)


# ---------------------------------------------------------------------------------------------------------------- errors


def test_options_that_mean_nothing_are_refused():
    model, x = Perceptron(16, 2), torch.randn(4, 16)
    with pytest.raises(OptionError, match=r"store='device'\)\.plan\(\): the layers stay on the device"):
        LayerToLayer().plan(model, x)
    with pytest.raises(
        OptionError, match=r"optimizer='lion': what it keeps for each parameter is not known; known are \['ada"
    ):
        LayerToLayer(store="cpu").plan(model, x, optimizer="lion")
    with pytest.raises(OptionError, match="says what measuring would find out: add measure=False"):
        LayerToLayer(store="cpu").plan(model, x, bandwidth=1e9)
    with pytest.raises(OptionError, match=r"plan\(flops=-1\): it is a speed in operations per second, above 0"):
        unmeasured(LayerToLayer(store="cpu"), model, x, flops=-1)
    with pytest.raises(OptionError, match=r"plan\(bandwidth=0\): it is a speed in bytes per second, above 0"):
        unmeasured(LayerToLayer(store="cpu"), model, x, bandwidth=(1e9, 0))


def test_models_that_cannot_be_captured_are_refused():
    class Branches(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.isnan().any().item():
                raise RuntimeError("not a number")
            raise RuntimeError("the zeros of a plan end here")

    with pytest.raises(
        UnsupportedError,
        match=r"Branches cannot be planned without running it \(RuntimeError: .*Let the forward pass take no",
    ):
        unmeasured(LayerToLayer(store="cpu"), Branches(3, 2), torch.randn(4, 3))

    class Skipped(nn.Linear):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    with pytest.raises(UnsupportedError, match=r"a graph of Skipped cannot be captured, .*: Dynamo skipped the call"):
        unmeasured(LayerToLayer(store="cpu"), Skipped(3, 2), torch.randn(4, 3))
