"""``nn.MultiheadAttention``, ``nn.Transformer`` and its parts, and attention with learned parts, against a loop over samples."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from tests.models import smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, check, train_step

# AOTAutograd takes most of a test's time. What each option is made of it traces in the tests that do not name a compiler.
N, T, D, HEADS = 4, 5, 8, 2
SECOND = {"axes": 1, "options": {"sample_axis": 1}}


def rows(positions=T, width=D, batch_first=True):
    return torch.randn(N, positions, width) if batch_first else torch.randn(positions, N, width)


def padding():
    """True where there is nothing; (N, T)."""
    mask = torch.zeros(N, T, dtype=torch.bool)
    mask[0, 3:] = mask[2, 4:] = True
    return mask


def causal(dtype):
    ones = torch.ones(T, T, dtype=torch.bool).triu(1)
    return ones if dtype is torch.bool else torch.zeros(T, T, dtype=torch.float64).masked_fill(ones, float("-inf"))


class Attention(nn.Module):
    """``nn.MultiheadAttention`` of a sequence to itself, or to others."""

    def __init__(self, mask=None, need_weights=False, is_causal=False, **options):
        super().__init__()
        self.inner = nn.MultiheadAttention(D, HEADS, **{"batch_first": True, **options})
        self.register_buffer("mask", mask)
        self.need_weights = need_weights
        self.is_causal = is_causal

    def forward(self, query, key=None, value=None, padding=None):
        key = query if key is None else key
        value = key if value is None else value
        output, weights = self.inner(query, key, value, padding, self.need_weights, self.mask, is_causal=self.is_causal)
        output = output if self.inner.batch_first else output.transpose(0, 1)
        return output if weights is None else torch.cat([output, weights], -1)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training, need_weights):
    check(Attention(need_weights=need_weights).train(training), (rows(),))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"mask": causal(torch.float64)}, id="float mask"),
        pytest.param({"mask": causal(torch.bool)}, id="bool mask"),
        pytest.param({"bias": False}, id="no bias"),
        pytest.param({"add_bias_kv": True}, id="learned key and value"),
        pytest.param({"add_zero_attn": True}, id="zero key and value"),
        pytest.param({"mask": causal(torch.bool), "add_bias_kv": True, "add_zero_attn": True}, id="all together"),
    ],
)
def test_multihead_attention_options(options, need_weights):
    check(Attention(need_weights=need_weights, **options), (rows(),), compiler="eager")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_key_padding(training, need_weights):
    model = Attention(need_weights=need_weights).train(training)
    check(model, (rows(), rows(), rows(), padding()), compiler="eager")


def test_declared_causal():
    check(Attention(mask=causal(torch.bool), is_causal=True), (rows(),), compiler="eager")


def test_other_widths_of_keys_and_values():
    model = Attention(kdim=3, vdim=6, add_bias_kv=True)
    check(model, (rows(), rows(7, 3), rows(7, 6)), compiler="eager")


@pytest.mark.parametrize("need_weights", [True, False])
def test_sequence_first(need_weights):
    """Samples and heads lie on one axis inside, (T, N * heads, D / heads)."""
    model = Attention(need_weights=need_weights, batch_first=False, add_bias_kv=True, add_zero_attn=True)
    check(model, (rows(batch_first=False),), **SECOND)


def test_sequence_first_with_padding():
    """Each argument has an axis of its own."""
    inputs = (rows(batch_first=False), rows(batch_first=False), rows(batch_first=False), padding())
    axes = {0: 1, 1: 1, 2: 1, 3: 0}
    option = {"query": 1, "key": 1, "value": 1, "padding": 0}
    check(Attention(batch_first=False), inputs, axes=axes, compiler="eager", options={"sample_axis": option})


class MaskOfEachHead(nn.Module):
    """A mask for each sample and head, (N * heads, T, T)."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.bias = nn.Linear(D, HEADS * T)

    def forward(self, input):
        mask = self.bias(input).unflatten(-1, (HEADS, T)).transpose(1, 2).flatten(0, 1)
        return self.inner(input, input, input, attn_mask=mask, need_weights=False)[0]


def test_mask_that_is_computed():
    check(MaskOfEachHead(), (rows(),), compiler="eager")


# --- nn.Transformer --------------------------------------------------------------------------------------------------------------

layer = functools.partial(nn.TransformerEncoderLayer, D, HEADS, 16, dropout=0.0, batch_first=True)
decoder_layer = functools.partial(nn.TransformerDecoderLayer, D, HEADS, 16, dropout=0.0, batch_first=True)


class Call(nn.Module):
    """A module, with further arguments; samples come out in front."""

    def __init__(self, inner, batch_first=True, **options):
        super().__init__()
        self.inner, self.batch_first, self.options = inner, batch_first, options

    def forward(self, *inputs):
        output = self.inner(*inputs, **self.options)
        return output if self.batch_first else output.transpose(0, 1)


class Padded(nn.Module):
    """What a padded position gives is not specified, and differs between torch's own roads; here it counts nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input, padding):
        return self.inner(input, src_key_padding_mask=padding) * (~padding).unsqueeze(-1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True, "activation": "gelu", "bias": False}], ids=["norm last", "norm first"]
)
def test_encoder_layer(options, training):
    check(Call(layer(**options)).train(training), (rows(),), compiler="eager")


def test_encoder_layer_sequence_first():
    check(Call(layer(batch_first=False), batch_first=False), (rows(batch_first=False),), compiler="eager", **SECOND)


@pytest.mark.parametrize("training", [True, False])
def test_encoder_with_padding(training):
    """``nn.TransformerEncoder`` uses nested tensors by default, in eval mode without gradients."""
    check(Padded(nn.TransformerEncoder(layer(), 2)).train(training), (rows(), padding()), compiler="eager")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_in_eval_mode_without_gradients():
    model = Padded(nn.TransformerEncoder(layer(), 2)).eval()
    inputs = rows(), padding()
    with torch.no_grad():
        expected = model(*inputs)
        graphopt.transform(model, compiler="aot_eager")
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [None, True])
def test_encoder_with_a_causal_mask(is_causal):
    """Without the hint, torch compares the mask's values with those of a causal one, which no graph can hold."""
    encoder = nn.TransformerEncoder(layer(), 1, norm=nn.LayerNorm(D))
    check(Call(encoder, mask=causal(torch.float64), is_causal=is_causal), (rows(),), compiler="eager")


def test_decoder():
    decoder = nn.TransformerDecoder(decoder_layer(), 2)
    check(Call(decoder, tgt_mask=causal(torch.float64)), (rows(), rows(3)), compiler="eager")


@pytest.mark.parametrize("training", [True, False])
def test_decoder_layer_sequence_first(training):
    model = Call(decoder_layer(batch_first=False, norm_first=True), batch_first=False).train(training)
    check(model, (rows(batch_first=False), rows(3, batch_first=False)), compiler="eager", **SECOND)


def test_transformer():
    model = nn.Transformer(D, HEADS, 1, 1, 16, dropout=0.0, batch_first=True)
    check(Call(model, tgt_mask=causal(torch.float64)), (rows(3), rows()), compiler="eager")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_transformer_sequence_first():
    model = nn.Transformer(D, HEADS, 1, 1, 16, dropout=0.0)
    inputs = rows(3, batch_first=False), rows(batch_first=False)
    check(Call(model, batch_first=False), inputs, compiler="eager", **SECOND)


def test_batches_of_any_size_without_recompiling():
    model, input = Call(nn.TransformerEncoder(layer(), 1), mask=causal(torch.float64)).double(), rows().double()
    plain = graphopt.restore(model)
    expected = {n: loop_over_samples(plain, (input[:n],), smooth, reduction="sum") for n in (4, 3, 2)}
    graphopt.transform(model, compiler="aot_eager")
    train_step(model, (input,))
    for n in (3, 2):
        with torch._dynamo.config.patch(error_on_recompile=True):
            train_step(model, (input[:n],))
        assert_statistics(model, expected[n], n)


# --- attention with learned parts -------------------------------------------------------------------------------------------------


class Learned(nn.Module):
    """``F.scaled_dot_product_attention`` with parameters of its own."""

    def __init__(self, form, heads=HEADS, groups=HEADS):
        super().__init__()
        self.form, self.heads, self.groups = form, heads, groups
        width = D // heads
        self.query, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.key, self.value = nn.Linear(D, groups * width), nn.Linear(D, groups * width)
        shapes = {
            "bias of a head": (heads, T, T),
            "bias": (T, T),
            "bias with a batch axis": (1, heads, T, T),
            "bias of a key": (1, T),
            "relative bias": (2 * T - 1, heads),
            "temperature": (heads, 1, 1),
            "layer scale": (D,),
            "sink": (heads,),
        }
        if form is not None:
            self.extra = nn.Parameter(torch.randn(shapes[form]))

    def forward(self, input, padding=None):
        query = self._split(self.query(input), self.heads)
        key, value = self._split(self.key(input), self.groups), self._split(self.value(input), self.groups)
        mask = self._mask()
        if padding is not None:
            hidden = torch.zeros(padding.shape, dtype=input.dtype).masked_fill(padding, -1e9)[:, None, None]
            mask = hidden if mask is None else mask + hidden
        if self.form == "temperature":
            query = query * self.extra
        if self.form == "sink":
            scores = query @ key.transpose(-1, -2)
            sink = self.extra.view(1, -1, 1, 1).expand(len(input), -1, T, 1)
            output = torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ value
        else:
            grouped = self.heads != self.groups
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
        output = self.out(output.transpose(1, 2).flatten(2))
        return input + (self.extra * output if self.form == "layer scale" else output)

    def _split(self, value: Tensor, heads: int) -> Tensor:
        return value.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _mask(self) -> Tensor | None:
        if self.form == "relative bias":
            places = torch.arange(T)
            return self.extra[places[:, None] - places + T - 1].permute(2, 0, 1)
        return self.extra if self.form is not None and self.form.startswith("bias") else None


FORMS = [
    "bias of a head", "bias", "bias with a batch axis", "bias of a key", "relative bias", "temperature", "layer scale", "sink",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_learned(form):
    check(Learned(form), (rows(),), compiler="eager")


@pytest.mark.parametrize("form", ["bias of a head", "relative bias", None])
def test_learned_bias_and_padding(form):
    check(Learned(form), (rows(), padding()))


@pytest.mark.parametrize("form", ["bias of a head", "bias", None])
def test_grouped_queries(form):
    check(Learned(form, heads=4, groups=2), (rows(),), compiler="eager")
