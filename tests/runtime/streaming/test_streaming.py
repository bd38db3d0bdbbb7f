"""Training layer by layer from a store is ordinary training: losses, gradients, statistics, buffers and weights."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.errors import StreamError
from graphopt.passes import LayerToLayer, TrueGrad
from tests.layered_models import MODELS, D, N, SecondAxis, Stack, T, ids, scalar
from tests.models import Block
from tests.runtime.streaming.sides import CLOSE, MOMENTUM, Dropped


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


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # torch says it of its own default
def test_results_of_one_operator_stay_with_it(pair):
    """torch's decoder layer splits a projection long before it takes the parts: no boundary stands between."""
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0)
    kwargs = {"src": torch.randn(T, N, 8), "tgt": torch.randn(T, N, 8)}
    sides = pair(model, kwargs, store="cpu", microbatch_size=2, options={"sample_axis": 1})
    sides.backward()
    sides.assert_gradients_equal(**CLOSE)


def test_samples_on_the_second_axis(pair):
    sides = pair(SecondAxis(), {"x": torch.randn(T, N, D)}, store="cpu", microbatch_size=2, options={"sample_axis": 1})
    sides.backward()
    sides.assert_gradients_equal(**CLOSE)
    assert not [note for note in graphopt.records(sides.model)[0].results[-1].notes if "whole batch" in note]


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


def test_one_layer_at_a_time(tmp_path):
    """At most ``1 + prefetch`` layers are in memory in forward and backward."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.Tanh()) for _ in range(6)))
    layer = 1024 * 1024 * 4 + 4096  # the bias takes a page
    for prefetch in (0, 1, 2):
        path = tmp_path / f"store{prefetch}"
        passes = [LayerToLayer(store="disk", store_path=path, stash="device", prefetch=prefetch)]
        streamed = graphopt.transform(copy.deepcopy(model), passes, compiler="eager")
        store = graphopt.stream(streamed).store
        store.flush()
        store.reset_counters()
        loss = streamed(torch.randn(3, 1024)).square().sum()
        assert store.peak_resident_bytes == (1 + prefetch) * layer
        assert store.bytes_read == 6 * layer
        loss.backward()
        store.flush()
        assert store.bytes_read == 12 * layer
        assert store.peak_resident_bytes <= (1 + prefetch + 2) * layer  # and 8 MiB of gradients on their way out
        graphopt.stream(streamed).close()


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
