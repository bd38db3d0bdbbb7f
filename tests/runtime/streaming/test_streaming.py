"""Training layer by layer from a store is ordinary training: losses, gradients, statistics, buffers and weights."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.errors import OptionError, StoreError, StreamError
from graphopt.optim import TGAdamW
from graphopt.passes import LayerToLayer, TrueGrad
from graphopt.runtime.stores import StoredTensor
from tests.layered_models import MODELS, D, N, SecondAxis, Stack, T, ids, scalar
from tests.models import Block

CLOSE = {"atol": 1e-11, "rtol": 1e-9}
MOMENTUM = functools.partial(
    SGD, lr=1e-2, momentum=0.9
)  # Adam would make a step of what is left of a gradient that is zero


@pytest.mark.parametrize("name", MODELS)
def test_whole_batches_in_memory(pair, name):
    sides = pair(name, store="cpu")
    for found, expected in sides.train(MOMENTUM):
        torch.testing.assert_close(found, expected, **CLOSE)
    sides.assert_equal(**CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_on_disk(pair, name):
    """Five samples in twos: the last micro-batch is smaller."""
    sides = pair(name, store="disk", microbatch_size=2)
    for found, expected in sides.train(MOMENTUM):
        torch.testing.assert_close(found, expected, **CLOSE)
    sides.assert_equal(**CLOSE)
    (record,) = graphopt.records(sides.model)
    whole = [note for note in record.results[-1].notes if "takes the whole batch" in note]
    assert all("samples meet" in note.partition(" takes")[0] for note in whole) == MODELS[name].splits, whole


@pytest.mark.parametrize("name", ["transformer", "mask_table_and_skip", "encoder_decoder", "class_token"])
def test_bitwise_without_micro_batches(pair, name):
    """What PyTorch computes, in the same order."""
    sides = pair(name, store="disk", compiler="aot_eager")
    sides.plain = graphopt.transform(sides.plain, [LayerToLayer()], compiler="aot_eager")
    tied = name == "encoder_decoder"  # three contributions to one gradient are added in another order
    for found, expected in sides.train(MOMENTUM if tied else functools.partial(AdamW, lr=1e-2)):
        torch.testing.assert_close(found, expected, **(CLOSE if tied else {"atol": 0, "rtol": 0}))
    sides.assert_equal(**(CLOSE if tied else {"atol": 0, "rtol": 0}))


def test_inductor(pair):
    sides = pair("mean_loss_inside", store="disk", microbatch_size=2, compiler="inductor")
    for found, expected in sides.train(functools.partial(AdamW, lr=1e-2), steps=3):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)
    sides.assert_equal(atol=1e-8, rtol=1e-6)


COUNTED = ["transformer", "mask_table_and_skip", "encoder_decoder", "one_layer_four_times"]


@pytest.mark.parametrize(
    ("name", "microbatch_size"), [*((name, 2) for name in COUNTED), ("transformer", 1), ("transformer", None)]
)
def test_statistics(pair, name, microbatch_size):
    """Squares of per-sample gradients, over micro-batches and over two backward passes."""
    before = (
        [TrueGrad(statistics=("sum_position_grad_squared", "sample_grad_norm"))]
        if name == "transformer"
        else [TrueGrad()]
    )
    sides = pair(name, before=before, store="cpu", microbatch_size=microbatch_size)
    graphopt.transform(sides.plain, before, compiler="eager")
    for times in (1, 2):
        sides.backward()
        for (key, param), reference in zip(sides.model.named_parameters(), sides.plain.parameters(), strict=True):
            assert param.num_samples == reference.num_samples == times * N, key
            torch.testing.assert_close(param.sum_grad_squared.cpu(), reference.sum_grad_squared, **CLOSE)
            if name == "transformer":
                torch.testing.assert_close(param.sample_grad_norm, reference.sample_grad_norm, **CLOSE)
                torch.testing.assert_close(
                    param.sum_position_grad_squared.cpu(), reference.sum_position_grad_squared, **CLOSE
                )
    sides.assert_gradients_equal(**CLOSE)
    sides.model.zero_grad()
    assert all(find(param, SUM_GRAD_SQUARED) is None for param in sides.model.parameters())


def test_samples_on_the_second_axis(pair):
    sides = pair(SecondAxis(), {"x": torch.randn(T, N, D)}, store="cpu", microbatch_size=2, options={"sample_axis": 1})
    sides.backward()
    sides.assert_gradients_equal(**CLOSE)
    assert not [note for note in graphopt.records(sides.model)[0].results[-1].notes if "whole batch" in note]


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(0.4)) for _ in range(3))
        self.attention = nn.MultiheadAttention(D, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(("compiler", "microbatch_size"), [("eager", None), ("eager", 2), ("inductor", 2)])
def test_dropout_is_the_same_in_backward(pair, compiler, microbatch_size):
    """The gradient is that of the function that forward has computed: with the generator set, a difference quotient says so."""
    sides = pair(
        Dropped(), {"x": torch.randn(N, T, D)}, store="cpu", microbatch_size=microbatch_size, compiler=compiler
    )
    model, stream = sides.model, graphopt.stream(sides.model)

    def loss():
        torch.manual_seed(3)
        return scalar(model(**sides.kwargs))

    loss().backward()
    direction = {name: torch.randn_like(param.grad.cpu()) for name, param in model.named_parameters()}
    slope = sum((param.grad.cpu() * direction[name]).sum() for name, param in model.named_parameters())
    step, found = 1e-6, []
    for sign in (1, -2):
        for name, change in direction.items():
            stream.value(name).add_(sign * step * change)
        found.append(loss().detach())
    torch.testing.assert_close((found[0] - found[1]) / (2 * step), slope, atol=1e-6, rtol=1e-6)


def test_dropout_masks_differ_between_samples_and_calls(pair):
    sides = pair(
        nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)), {"input": torch.ones(N, D)}, store="cpu", microbatch_size=1
    )
    first, second = sides.model(**sides.kwargs), sides.model(**sides.kwargs)
    assert not torch.equal(first, second)
    assert len({tuple((row == 0).tolist()) for row in first}) > 1


def test_batch_norm_takes_the_whole_batch_once(pair):
    sides = pair("batch_norm", store="cpu", microbatch_size=2)
    sides.backward()
    assert sides.model.layers[0][1].num_batches_tracked == 1
    notes = graphopt.records(sides.model)[0].results[-1].notes
    assert sum("layers.0 takes the whole batch: aten." in note for note in notes) == 1
    sides.model.eval()
    sides.plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(sides.model(**sides.kwargs), sides.plain(**sides.kwargs), **CLOSE)
    assert not [note for note in graphopt.records(sides.model)[1].results[-1].notes if "whole batch" in note]


def test_gradients_of_inputs(pair):
    sides = pair("one_layer_four_times", store="cpu", microbatch_size=2)
    inputs = [sides.kwargs["x"].clone().requires_grad_() for _ in range(2)]
    for side, x in zip((sides.model, sides.plain), inputs, strict=True):
        scalar(side(x)).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **CLOSE)


def test_two_calls_before_backward(pair):
    sides = pair("one_layer_four_times", store="disk", microbatch_size=2)
    x, y = torch.randn(2, N, T, D, dtype=torch.float64)
    for side in (sides.model, sides.plain):
        (scalar(side(x)) * scalar(side(y))).backward()
    sides.assert_gradients_equal(**CLOSE)


def test_parts_of_the_output(pair):
    """A gradient that reaches some samples and not others, and a value of the model that is returned twice."""

    class Twice(Stack):
        def forward(self, ids):
            hidden = self.layers[1](self.layers[0](self.embed(ids)))
            return hidden, self.head(hidden), hidden

    sides = pair(Twice([Block(D), Block(D)]), {"ids": ids()}, store="cpu", microbatch_size=2)
    for side in (sides.model, sides.plain):
        hidden, _, again = side(**sides.kwargs)
        (hidden[3:].sum() + again[0].square().sum()).backward()
    sides.assert_gradients_equal(**CLOSE)


OPTIMIZERS = {
    "SGD": lambda params: SGD(params, lr=0.1),
    "SGD with momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda params: Adam(params, lr=1e-2, amsgrad=True),
    "AdamW fused": lambda params: AdamW(params, lr=1e-2, fused=True),
    "AdamW foreach": lambda params: AdamW(params, lr=1e-2, foreach=True, maximize=True),
    "RMSprop": lambda params: RMSprop(params, lr=1e-2, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(pair, name, store):
    sides = pair("transformer", store=store)
    for _ in sides.train(OPTIMIZERS[name], steps=3):
        pass
    sides.assert_equal(**CLOSE)


def test_truegrad_optimizer(pair):
    sides = pair("transformer", before=[TrueGrad()], store="disk")
    graphopt.transform(sides.plain, [TrueGrad()], compiler="eager")
    for _ in sides.train(functools.partial(TGAdamW, lr=1e-2), steps=3):
        pass
    sides.assert_equal(**CLOSE)


def test_groups_and_a_scheduler(pair):
    sides = pair("transformer", store="disk")

    def make(params):
        params = list(params)
        optimizer = AdamW([{"params": params[:3], "lr": 1e-3}, {"params": params[3:-2]}], lr=1e-2)
        return optimizer

    optimizers = make(sides.model.parameters()), make(sides.plain.parameters())
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3) for optimizer in optimizers]
    for _ in range(3):
        sides.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    sides.assert_equal(**CLOSE)


def test_closure(pair):
    sides = pair("transformer", store="cpu")
    losses = []
    for side in (sides.model, sides.plain):
        optimizer = AdamW(side.parameters(), lr=1e-2)

        def closure(side=side, optimizer=optimizer):
            optimizer.zero_grad()
            loss = scalar(side(**sides.kwargs))
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    sides.assert_equal(**CLOSE)


def test_accumulation_and_clipping(pair):
    sides = pair("transformer", store="disk", microbatch_size=2)
    optimizers = [AdamW(side.parameters(), lr=1e-2) for side in (sides.model, sides.plain)]
    for _ in range(2):
        sides.backward()
        sides.backward(0.5)
        norms = [nn.utils.clip_grad_norm_(side.parameters(), 0.3) for side in (sides.model, sides.plain)]
        torch.testing.assert_close(*norms, **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    sides.assert_equal(**CLOSE)


def test_clipping_rescales_the_statistic(pair):
    sides = pair("transformer", before=[TrueGrad()], store="disk")
    sides.backward()
    before = [param.sum_grad_squared.cpu() for param in sides.model.parameters()]
    nn.utils.clip_grad_norm_(sides.model.parameters(), 1e-2)
    norm = nn.utils.get_total_norm([param.grad for param in sides.plain.parameters()])
    for param, square in zip(sides.model.parameters(), before, strict=True):
        torch.testing.assert_close(
            param.sum_grad_squared.cpu(), square * (1e-2 / (norm + 1e-6)) ** 2, atol=0, rtol=1e-6
        )


def test_grad_scaler(pair):
    sides = pair("transformer", store="disk")
    optimizers = [AdamW(side.parameters(), lr=1e-2) for side in (sides.model, sides.plain)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for side, optimizer, scaler in zip((sides.model, sides.plain), optimizers, scalers, strict=True):
        scaler.scale(scalar(side(**sides.kwargs))).backward()
        scaler.step(optimizer)
        scaler.update()
    sides.assert_equal(**CLOSE)


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["transformer", "encoder_decoder", "frozen_layers"])
def test_eager(pair, store, name):
    """Updates during backward: the same numbers."""
    sides = pair(name, store=store, microbatch_size=2, eager=True)
    for found, expected in sides.train(MOMENTUM, steps=4):
        torch.testing.assert_close(found, expected, **CLOSE)
    sides.assert_equal(**CLOSE)
    assert graphopt.stream(sides.model).step == 4


def test_eager_with_statistics(pair):
    sides = pair("transformer", before=[TrueGrad()], store="disk", eager=True)
    graphopt.transform(sides.plain, [TrueGrad()], compiler="eager")
    for _ in sides.train(functools.partial(TGAdamW, lr=1e-2), steps=4):
        pass
    sides.assert_equal(**CLOSE)


def test_eager_refuses_what_it_cannot_do(pair):
    sides = pair("transformer", store="cpu", eager=True)
    values = {name: value.cpu() for name, value in sides.model.state_dict().items()}
    sides.backward()
    with pytest.raises(StreamError, match="gradient is used up before a norm over all of them"):
        nn.utils.clip_grad_norm_(sides.model.parameters(), 1.0)
    scaler, optimizer = torch.amp.GradScaler("cpu"), AdamW(sides.model.parameters())
    scaler.scale(torch.ones(()))
    with pytest.raises(StreamError, match="GradScaler"):
        scaler.unscale_(optimizer)
    with pytest.raises(StreamError, match="gradients cannot be accumulated over several backward passes"):
        sides.backward()
    for name, value in sides.model.state_dict().items():
        assert torch.equal(value.cpu(), values[name]), name
    optimizer.step()
    optimizer.zero_grad()
    first, second = scalar(sides.model(**sides.kwargs)), scalar(sides.model(**sides.kwargs))
    with pytest.raises(StreamError, match="backward passes of 1 other calls of the model"):
        first.backward()
    del second


def test_unknown_optimizers(pair):
    sides = pair("transformer", store="cpu")
    sides.backward()
    with pytest.raises(OptionError, match="LBFGS is not known to update each parameter by itself"):
        torch.optim.LBFGS(sides.model.parameters()).step(lambda: torch.zeros(()))

    class Own(torch.optim.Optimizer):
        updates_each_parameter_alone = True

        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.sub_(group["lr"] * param.grad)

    Own(sides.model.parameters()).step()
    SGD(sides.plain.parameters(), lr=0.1).step()
    sides.assert_equal(**CLOSE)


def test_a_failing_step_changes_nothing(pair):
    """On disk a step that fails on the way is as if it had not begun."""
    sides = pair("transformer", store="disk")
    for _ in sides.train(functools.partial(AdamW, lr=1e-2), steps=1):
        pass

    class Fails(SGD):
        updates_each_parameter_alone = True

        def step(self, closure=None):
            if any(param.shape == (11,) for group in self.param_groups for param in group["params"]):
                raise ZeroDivisionError("on purpose")
            return SGD.step.__wrapped__(self)

    values = {name: value.cpu() for name, value in sides.model.state_dict().items()}
    sides.backward()
    with pytest.raises(ZeroDivisionError):
        Fails(sides.model.parameters(), lr=1.0).step()
    for name, value in sides.model.state_dict().items():
        assert torch.equal(value.cpu(), values[name]), name


def test_one_layer_at_a_time(tmp_path):
    """At most ``1 + prefetch`` layers are in memory in forward and backward."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(6)))
    layer = 512 * 512 * 4 + 4096  # the bias takes a page
    for prefetch in (0, 1, 2):
        path = tmp_path / f"store{prefetch}"
        passes = [LayerToLayer(store="disk", store_path=path, stash="device", prefetch=prefetch)]
        streamed = graphopt.transform(copy.deepcopy(model), passes, compiler="eager")
        store = graphopt.stream(streamed).store
        store.flush()
        store.reset_counters()
        loss = streamed(torch.randn(3, 512)).square().sum()
        assert store.peak_resident_bytes == (1 + prefetch) * layer
        assert store.bytes_read == 6 * layer
        loss.backward()
        store.flush()
        assert store.bytes_read == 12 * layer
        assert store.peak_resident_bytes <= (1 + prefetch + 2) * layer  # and gradients on their way out
        graphopt.stream(streamed).close()


def test_husks(pair):
    """The parameters stay what they are, but for their values."""
    torch.manual_seed(0)
    model = Stack([Block(D)])
    before = {name: id(param) for name, param in model.named_parameters()}
    graphopt.transform(model, [LayerToLayer(store="cpu")], compiler="eager")
    assert {name: id(param) for name, param in model.named_parameters()} == before
    weight = model.head.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((11, D), torch.float32, "cpu")
    assert weight.untyped_storage().nbytes() == 4
    assert weight.isnan().all()
    assert isinstance(graphopt.stream(model).value("head.weight"), StoredTensor)
    model(ids())
    assert weight.stage.store == "cpu"
    with pytest.raises(
        RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"
    ):
        weight.data.normal_()
    nn.init.zeros_(weight)  # which torch lets pass
    with pytest.raises(StreamError, match=r"head\.weight was given a value of its own"):
        model(ids())


def test_restore_brings_everything_back(pair):
    sides = pair("transformer", store="disk")
    optimizers = [AdamW(side.parameters(), lr=1e-2) for side in (sides.model, sides.plain)]
    for number in range(4):
        if number == 2:
            graphopt.restore(sides.model)
            assert all(param.untyped_storage().nbytes() == param.nbytes for param in sides.model.parameters())
        sides.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    sides.assert_equal(**CLOSE)


def test_no_grad_and_eval(pair):
    sides = pair("mask_table_and_skip", store="disk", microbatch_size=2)
    with torch.no_grad():
        torch.testing.assert_close(sides.model(**sides.kwargs), sides.plain(**sides.kwargs), **CLOSE)
    sides.model.eval()
    found = sides.model(**sides.kwargs)
    assert found.requires_grad
    assert not [key for key in graphopt.stream(sides.model).store.keys() if key.startswith("stash/") and found is None]


def test_the_stash_is_freed(pair):
    sides = pair("mask_table_and_skip", store="disk", microbatch_size=2)
    store = graphopt.stream(sides.model).store
    loss = scalar(sides.model(**sides.kwargs))
    assert [key for key in store.keys() if key.startswith("stash/")]
    loss.backward()
    assert not [key for key in store.keys() if key.startswith("stash/")]
    sides.model(**sides.kwargs)  # backward never comes
    store.flush()
    assert not [key for key in store.keys() if key.startswith("stash/")]


@pytest.mark.parametrize("stash", ["device", "cpu", "disk"])
def test_places_for_the_stash(pair, stash):
    sides = pair("mask_table_and_skip", store="disk", microbatch_size=2, stash=stash)
    sides.backward()
    sides.assert_gradients_equal(**CLOSE)


def test_resume(tmp_path):
    """A second process (here: a second model) goes on where the first has stopped, with dropout, momentum and a scheduler's rate."""

    def build(resume):
        torch.manual_seed(0)
        model = Dropped().double()
        passes = [LayerToLayer(store="disk", store_path=tmp_path / "store", microbatch_size=2, resume=resume)]
        graphopt.transform(model, passes, compiler="eager")
        return model, SGD(model.parameters(), lr=0.1 if resume else 0.05, momentum=0.9)

    x = torch.randn(N, T, D, dtype=torch.float64)

    def train(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            loss = scalar(model(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = build(resume=False)
    train(model, optimizer, 2)
    scalar(model(x)).backward()  # an unfinished step
    graphopt.stream(model).close()
    with pytest.raises(
        StreamError, match=r"the store of this model is closed. Call graphopt.transform again, with resume=True"
    ):
        model(x)

    with pytest.raises(StoreError, match="holds a store already, and the model has values of its own"):
        build(resume=False)
    model, optimizer = build(resume=True)
    scalar(model(x)).backward()
    with pytest.raises(StoreError, match=r"Call graphopt.stream\(model\).resume\(optimizer\) before the first step"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(StoreError, match="holds the state of other optimizers"):
        graphopt.stream(model).resume(AdamW(model.parameters()))
    assert graphopt.stream(model).resume(optimizer) == 2
    assert optimizer.param_groups[0]["lr"] == 0.05
    resumed = train(model, optimizer, 2)
    graphopt.stream(model).close()

    path = tmp_path / "whole"
    torch.manual_seed(0)
    model = Dropped().double()
    graphopt.transform(model, [LayerToLayer(store="disk", store_path=path, microbatch_size=2)], compiler="eager")
    assert train(model, SGD(model.parameters(), lr=0.05, momentum=0.9), 4)[2:] == resumed
    graphopt.stream(model).close()


def test_a_store_of_another_model(tmp_path):
    options = {"store": "disk", "store_path": tmp_path / "store"}
    model = graphopt.transform(nn.Linear(3, 2), [LayerToLayer(**options)], compiler="eager")
    graphopt.stream(model).close()
    with pytest.raises(StoreError, match="weight"):
        graphopt.transform(nn.Linear(3, 4), [LayerToLayer(**options, resume=True)], compiler="eager")


REFUSED = {
    "would replace embed.weight, whose value is in a store": (StreamError, lambda model: model.half()),
    "embed.weight was given a value of its own": (
        StreamError,
        lambda model: setattr(model.embed.weight, "data", torch.zeros(11, D)),
    ),
    "was added to the model after graphopt.transform": (
        StreamError,
        lambda model: setattr(model.head, "bias", nn.Parameter(torch.zeros(11))),
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_held_wrong(text):
    error, do = REFUSED[text]
    model = graphopt.transform(Stack([Block(D)]), [LayerToLayer(store="cpu")], compiler="eager")

    def use():
        do(model)
        model(ids())

    with pytest.raises(error, match=text):
        use()


def test_backward_twice(pair):
    sides = pair("transformer", store="cpu")
    loss = scalar(sides.model(**sides.kwargs))
    loss.backward(retain_graph=True)
    with pytest.raises(StreamError, match="backward through a streamed model a second time"):
        loss.backward()


@pytest.mark.parametrize("name", ["step", "load_state_dict", "input"])
def test_changes_between_forward_and_backward(pair, name):
    """Backward computes layers again, so what it reads must be what forward has read; PyTorch refuses the same by versions."""
    sides = pair("one_layer_four_times", store="disk")
    optimizer = SGD(sides.model.parameters(), lr=0.1)
    sides.backward()
    loss = scalar(sides.model(**sides.kwargs))
    if name == "step":
        optimizer.step()
    elif name == "load_state_dict":
        sides.model.load_state_dict(sides.plain.state_dict())
    else:
        sides.kwargs["x"].zero_()
    what = (
        "a tensor that the model was called with"
        if name == "input"
        else "inner.norm1.weight was changed between forward"
    )
    with pytest.raises(StreamError, match=what):
        loss.backward()


def test_not_streamed():
    with pytest.raises(StreamError, match="the layers of this Linear are not streamed"):
        graphopt.stream(nn.Linear(2, 2))
    model = graphopt.transform(nn.Linear(2, 2), [LayerToLayer(store="cpu")], compiler="eager")
    with pytest.raises(StreamError, match="the model has no parameter 'weights'; it has"):
        graphopt.stream(model).value("weights")
    with pytest.raises(StreamError, match="cannot be copied: the copy would need a store of its own"):
        copy.deepcopy(model)
    assert "Stream(2 parameters, step 0, HostStore(" in repr(graphopt.stream(model))
