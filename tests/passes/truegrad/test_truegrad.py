"""The pass as a user meets it: which parameters are served, how, and what is said about those that are not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import GraphoptError, OptionError, SampleAxisError, UnsupportedError
from graphopt.passes import TrueGrad
from graphopt.pipeline import Status, run_passes
from tests.models import MODELS, double, smooth
from tests.oracle import copy_per_position, from_losses, loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, capture, check, train_step


class Model(nn.Module):
    """A forward function over parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs, **options):
        return self.function(self, *inputs, **options)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


def rows(model):
    return {row.name: row for record in graphopt.records(model) for row in record.coverage}


def step(model, *inputs, **options):
    graphopt.transform(model, [TrueGrad(**options)], compiler="aot_eager")
    train_step(model, inputs)
    return model


IDS = torch.tensor([[0, 1, 1, 3, 2], [2, 2, 6, 0, 5], [4, 4, 4, 1, 3], [6, 0, 5, 5, 1]])

# --- against the loop over samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models(name):
    model = check(*MODELS[name]())
    trainable = {key for key, param in model.named_parameters() if param.requires_grad}
    assert set(rows(model)) == trainable


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_block", "tied_three_uses", "class_token", "conv_net"])
def test_models_compiled_by_inductor(name):
    check(*MODELS[name](), compiler="inductor")


def penultimate(x):
    return torch.arange(x.shape[0], device=x.device), (x[..., 0] > 0).sum(1).clamp(max=x.shape[1] - 1)


def shifted(model, x):
    buffer = x.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2])
    buffer[:, 1:] = model.layer(x)
    buffer[:, 0] = model.token
    return model.layer(buffer)


def into_zeros(model, x):
    buffer = torch.zeros(x.shape[0], x.shape[1] + 1, x.shape[2], dtype=x.dtype)
    buffer[:, 1:] = x
    return model.layer(buffer)


def in_place(model, x):
    h = model.layer(x).mul_(2)
    h += model.bias
    return h.tanh()


ODD = {
    "in place": lambda: Model(in_place, layer=nn.Linear(3, 3), bias=weight(3)),
    "written into a buffer": lambda: Model(shifted, layer=nn.Linear(3, 3), token=weight(3)),
    "written into zeros": lambda: Model(into_zeros, layer=nn.Linear(3, 3)),
    "last position": lambda: Model(lambda m, x: m.layer(x)[penultimate(x)] * m.scale, layer=nn.Linear(3, 3), scale=weight(3)),
    "overlapping slices": lambda: Model(lambda m, x: F.linear(x, m.weight[:3]) + F.linear(x, m.weight[1:]), weight=weight(4, 3)),
    "disjoint slices": lambda: Model(lambda m, x: F.linear(x, m.weight[:2]) + F.linear(x, m.weight[2:]), weight=weight(4, 3)),
    "weight on the left": lambda: Model(lambda m, x: m.weight @ x, weight=weight(2, 5)),
    "weight on the left, with a leading one": lambda: Model(lambda m, x: m.weight @ x, weight=weight(1, 2, 5)),
    "repeated token": lambda: Model(
        lambda m, x: m.layer(torch.cat([m.token.repeat(x.shape[0], 1, 1), x], 1)), token=weight(1, 1, 3), layer=nn.Linear(3, 2)
    ),
    "learned queries": lambda: Model(
        lambda m, x: F.scaled_dot_product_attention(m.query.expand(x.shape[0], -1, -1), m.layer(x), x),
        query=weight(1, 2, 3), layer=nn.Linear(3, 3),
    ),
    "mask token": lambda: Model(lambda m, x: m.layer(torch.where(x[..., :1] > 0, m.token, x)), token=weight(3), layer=nn.Linear(3, 2)),
    "mixing weights": lambda: Model(lambda m, x: (m.mix.softmax(0)[:, None] * m.layer(x)).sum(1), mix=weight(5), layer=nn.Linear(3, 2)),
    "exponent and bound": lambda: Model(lambda m, x: x.abs().pow(m.power.exp()) + x.clamp(min=m.bound), power=weight(3), bound=weight(3)),
    "checkpoint": lambda: Model(
        lambda m, x: torch.utils.checkpoint.checkpoint(m.body, x, use_reentrant=False),
        body=nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
    ),
    "without gradients in between": lambda: Model(
        lambda m, x: m.layer(x) + _without_gradients(m.layer, x), layer=nn.Linear(3, 3)
    ),
    "multi-head attention": lambda: Model(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(3, 1, batch_first=True)),
}  # fmt: skip


def _without_gradients(layer, x):
    with torch.no_grad():
        return layer(x).sin()


@pytest.mark.parametrize("name", sorted(ODD))
def test_odd_models(name):
    check(ODD[name](), (torch.randn(4, 5, 3),))


IMAGES = {
    "batch norm in eval mode": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval(),
    "group norm": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)),
    "instance norm": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4, padding=1)),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 3),
    "circular": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_image_models(name):
    check(IMAGES[name](), (torch.randn(4, 2, 5, 5),))


def test_batch_norm_in_train_mode():
    """Samples meet in the statistics of the batch, which count as given; each sample is what its own rows contribute."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    x = torch.randn(5, 3, dtype=torch.float64)
    plain = copy.deepcopy(model)
    hidden = plain[0](x)
    hidden.retain_grad()
    normalised = F.batch_norm(hidden, None, None, training=True, eps=plain[1].eps)
    scaled = normalised * plain[1].weight + plain[1].bias
    scaled.retain_grad()
    smooth(plain[2](scaled)).backward()
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    train_step(model, (x,))
    rows_of = {
        "0.weight": hidden.grad[:, :, None] * x[:, None, :],
        "0.bias": hidden.grad,
        "1.weight": scaled.grad * normalised.detach(),
        "1.bias": scaled.grad,
    }
    for name, each in rows_of.items():
        param = model.get_parameter(name)
        torch.testing.assert_close(param.grad, each.sum(0))
        torch.testing.assert_close(param.sum_grad_squared, each.square().sum(0))
    assert model[1].num_batches_tracked == 1


# --- where the samples are ---------------------------------------------------------------------------------------------------

SEQUENCE_FIRST = {
    "linear": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 4, 3)),
    "encoder": lambda: (nn.TransformerEncoderLayer(4, 2, 8, 0.0), torch.randn(5, 4, 4)),
    "tied": lambda: (
        Model(lambda m, i: F.linear(m.table(i).tanh(), m.table.weight), table=nn.Embedding(7, 3)),
        IDS.t(),
    ),
    "tied, three uses": lambda: (
        Model(
            lambda m, i: F.linear(
                m.table(i).tanh() + m.table((3 * i[:2] + 1) % 7).sin().mean(0, keepdim=True), m.table.weight
            ),
            table=nn.Embedding(7, 3),
        ),
        IDS.t(),
    ),
}


@pytest.mark.parametrize("name", sorted(SEQUENCE_FIRST))
def test_sequence_first(name):
    model, x = SEQUENCE_FIRST[name]()
    check(model, (x,), axes=1, options={"sample_axis": 1})


def gated(m, x, table):
    return m.layer(x) * (m.other(table)).sum(0)


def test_sample_axis_by_name():
    model = Model(gated, layer=nn.Linear(3, 3), other=nn.Linear(3, 3))
    model.forward = lambda x, table: gated(model, x, table)
    inputs = (torch.randn(4, 5, 3), torch.randn(2, 3))
    check(model, inputs, axes={0: 0, 1: None}, options={"sample_axis": {"x": 0, "table": None}})


def test_two_inputs():
    model = Model(lambda m, x, y: m.left(x) * m.right(y)[:, None], left=nn.Linear(3, 3), right=nn.Linear(2, 3))
    check(model, (torch.randn(4, 5, 3), torch.randn(4, 2)))


def test_inputs_that_count_differently():
    model = Model(lambda m, x, y: m.layer(x)[:, None] + y, layer=nn.Linear(3, 3))
    with pytest.raises(SampleAxisError, match=r"counted by different inputs.*sample_axis"):
        step(model, torch.randn(4, 3), torch.randn(6, 3))


def test_no_tensor_among_the_inputs():
    model = Model(lambda m, number: m.layer(torch.ones(3)) * number, layer=nn.Linear(3, 3))
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    with pytest.raises(SampleAxisError, match="without a tensor that holds samples"):
        model(2.0)


def test_a_model_of_integers():
    model = Model(lambda m, ids: (ids * 2).cumsum(1), unused=weight(2))
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    assert torch.equal(model(IDS), (IDS * 2).cumsum(1))


# --- per token ---------------------------------------------------------------------------------------------------------------

TOKENS = {
    "linear": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 5, 3)),
    "no positions": lambda: (nn.Linear(3, 2), torch.randn(4, 3)),
    "embedding": lambda: (nn.Sequential(nn.Embedding(7, 3, padding_idx=1), nn.Linear(3, 2)), IDS),
    "layer norm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.randn(4, 5, 3)),
    "scale and shift": lambda: (
        Model(lambda m, x: x * m.scale + m.shift, scale=weight(3), shift=weight(3)),
        torch.randn(4, 5, 3),
    ),
    "used twice": lambda: (Model(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.Linear(3, 3)), torch.randn(4, 5, 3)),
    "tied": lambda: (Model(lambda m, i: F.linear(m.table(i).tanh(), m.table.weight), table=nn.Embedding(7, 3)), IDS),
    "convolution": lambda: (nn.Conv2d(2, 3, 2, stride=2), torch.randn(4, 2, 6, 6)),
}


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_per_token(name):
    model, (x,) = (lambda built: double(built[0], built[1:]))(TOKENS[name]())
    expected = copy_per_position(copy.deepcopy(model), (x,), smooth)
    step(model, x, per="token")
    for key, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[key][0].grad)
        torch.testing.assert_close(param.sum_grad_squared, expected[key][0].sum_grad_squared)
        assert rows(model)[key].status is Status.PER_TOKEN


def test_num_samples_per_token_and_per_sample():
    x = torch.randn(4, 5, 3)
    model = step(nn.Linear(3, 2), x, per="token")
    assert model.weight.num_samples == model.bias.num_samples == 20
    model = step(nn.Linear(3, 2), x)
    assert model.weight.num_samples == model.bias.num_samples == 4
    smooth(model(torch.randn(7, 5, 3))).backward()
    assert model.weight.num_samples == 11
    step(model.train(), x[:1])
    assert model.weight.num_samples == 1


def test_per_sample_and_per_token_agree_without_positions():
    torch.manual_seed(1)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    first = step(model, x).weight.sum_grad_squared.clone()
    torch.testing.assert_close(step(model, x, per="token").weight.sum_grad_squared, first)


# --- which parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    ["0.*", ["0.weight", "0.bias"], ("0.?eight", "0.b*"), lambda name, value: name.startswith("0.") and value.ndim > 0],
    ids=["pattern", "list", "tuple", "predicate"],
)
def test_where(where):
    model, inputs = double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(4, 3),))
    expected = loop_over_samples(model, inputs, smooth, reduction="sum")
    step(model, *inputs, where=where)
    assert_statistics(model, {name: value for name, value in expected.items() if name.startswith("0.")}, 4)
    for name in ("2.weight", "2.bias"):
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name].grad)
        assert rows(model)[name].status is Status.SKIPPED
        assert "where" in rows(model)[name].reason


def unserved(m, x):
    return m.good(x) + m.mixed(x.sum(0))


def test_unsupported_is_an_error_that_says_where():
    model = Model(unserved, good=nn.Linear(3, 2), mixed=nn.Linear(3, 2))
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    with pytest.raises(UnsupportedError) as error:
        model(torch.randn(4, 5, 3))
    text = str(error.value)
    for part in ("mixed.weight", "mixed.bias", "aten.sum", "test_truegrad.py", "x.sum(0)", "unsupported='skip'"):
        assert part in text
    assert "good.weight" not in text
    assert any("truegrad" in note for note in error.value.__notes__)


def test_unsupported_can_be_skipped():
    model = Model(unserved, good=nn.Linear(3, 2), mixed=nn.Linear(3, 2)).double()
    plain, x = copy.deepcopy(model), torch.randn(4, 5, 3).double()
    smooth(plain(x)).backward()
    step(model, x, unsupported="skip")
    for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad)
        row = rows(model)[name]
        if name.startswith("mixed"):
            assert row.status is Status.SKIPPED
            assert "a reduction over the samples" in row.reason
            assert find(param, SUM_GRAD_SQUARED) is None
        else:
            assert row.status is Status.EXACT
            assert find(param, NUM_SAMPLES) == 4
    hidden = plain(x).detach().requires_grad_()
    smooth(hidden).backward()
    each = torch.einsum("nto,nti->noi", hidden.grad, x)
    torch.testing.assert_close(model.good.weight.sum_grad_squared, each.square().sum(0))


def test_sparse_embedding_is_refused_with_the_fix():
    model = Model(lambda m, i: m.layer(m.table(i)), table=nn.Embedding(7, 3, sparse=True), layer=nn.Linear(3, 2))
    with pytest.raises(UnsupportedError, match=r"table\.weight: .*build it with sparse=False"):
        step(model, IDS)


REFUSED = {
    "flipped": (lambda m, x: m.layer(x.flip(0)), "flip works across samples"),
    "mixed": (lambda m, x: m.layer(x.sum(0)), "a reduction over the samples"),
    "sorted": (lambda m, x: m.layer(x.sort(0).values), "sort works across samples"),
    "copied from another order": (
        lambda m, x: m.layer(torch.empty_like(x).copy_(x.flip(0))),
        "flip works across samples",
    ),
    "penalty": (lambda m, x: (x.sin(), m.layer.weight.square().sum()), "belongs to no sample"),
    "each with each": (lambda m, x: (x @ x.t()) * m.layer.bias[0], "samples meet on different axes"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name):
    function, reason = REFUSED[name]
    model = Model(function, layer=nn.Linear(3, 3))
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=reason):
        model(torch.randn(4, 3))


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def test_a_custom_function_is_right_or_refused():
    model = Model(lambda m, x: m.layer(Sine.apply(m.layer(x))), layer=nn.Linear(3, 3))
    try:
        check(model, (torch.randn(4, 3),))
    except GraphoptError as error:
        assert "Sine" in str(error) or "autograd.Function" in str(error)


# --- options -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"per": "batch"}, "per='batch'"),
        ({"unsupported": "ignore"}, "unsupported='ignore'"),
        ({"square_dtype": torch.int32}, "int32"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(OptionError, match=text):
        TrueGrad(**options)


def test_bfloat16_parameters_have_a_float32_statistic():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)).bfloat16()
    x = torch.randn(4, 5, 3).bfloat16()
    expected = loop_over_samples(copy.deepcopy(model).double(), (x.double(),), smooth, reduction="sum")
    step(model, x)
    for name, param in model.named_parameters():
        assert param.grad.dtype == torch.bfloat16
        assert param.sum_grad_squared.dtype == torch.float32
        reference = expected[name].sum_grad_squared
        difference = (param.sum_grad_squared.double() - reference).norm() / reference.norm()
        assert difference < 0.05, name


def test_square_dtype():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(16, 3)
    expected = loop_over_samples(copy.deepcopy(model), (x,), smooth, reduction="sum")
    step(model, x, square_dtype=torch.bfloat16)
    for name in ("0.weight", "2.weight"):
        param, reference = model.get_parameter(name), expected[name].sum_grad_squared
        assert param.sum_grad_squared.dtype == torch.float32
        relative = ((param.sum_grad_squared - reference).norm() / reference.norm()).item()
        assert 1e-6 < relative < 1e-2  # rounded, and only as much as bfloat16 rounds
        torch.testing.assert_close(param.grad, expected[name].grad)


# --- the contract of a pass --------------------------------------------------------------------------------------------------


def test_second_run_changes_nothing():
    model, inputs = double(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (torch.randn(4, 5, 3),))
    graph, _ = run_passes(capture(model, *inputs), [TrueGrad()])
    again = TrueGrad().run(graph)
    assert again.num_changed == 0
    assert again.graph is graph


def test_nothing_applies_without_gradients():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad():
        graph = capture(model, x)
    result = TrueGrad().run(graph)
    assert result.num_changed == 0
    assert result.graph is graph


def test_a_refused_graph_is_left_as_it_was():
    graph = capture(Model(unserved, good=nn.Linear(3, 2), mixed=nn.Linear(3, 2)), torch.randn(4, 5, 3))
    before = graph.graph_module.code
    with pytest.raises(UnsupportedError):
        run_passes(graph, [TrueGrad()])
    graph.graph_module.recompile()
    assert graph.graph_module.code == before


def test_the_loss_may_be_part_of_the_model():
    model = Model(lambda m, x, y: F.cross_entropy(m.layer(x), y), layer=nn.Linear(3, 5)).double()
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 4, 2, 1])
    expected = from_losses(model, (model(x[n : n + 1], y[n : n + 1]) / 4 for n in range(4)))
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    model(x, y).backward()
    assert_statistics(model, expected, 4)


def test_many_models_in_one_process():
    for width in range(2, 12):
        model, x = nn.Linear(3, width), torch.randn(4, 3)
        graphopt.transform(model, [TrueGrad()], compiler="eager")
        model(x).sum().backward()
        torch.testing.assert_close(model.weight.sum_grad_squared, x.square().sum(0).expand(width, 3))
