"""The code of seed 000 (TrueGrad's README), with only its import lines changed.

Beyond that: ``while True`` ends after ten steps, and names that would be downloaded are made here: a random BERT of the size that
the name says, and a tokenizer that knows three words.
"""

from types import SimpleNamespace

import pytest
import torch
import transformers as real_transformers

from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find

STEPS = 10


class Tokenizer:
    """Enough of ``BertTokenizer``: words to numbers, with the marks of begin and end."""

    words = ("[CLS]", "[SEP]", "Hello", "World", "!")

    def __call__(self, texts, return_tensors):
        assert return_tensors == "pt"
        ids = [[0, *(self.words.index(word) for word in text.split()), 1] for text in texts]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long)}


@pytest.fixture
def transformers():
    """What the example takes from the hub, made at random."""

    def bert(name):
        assert name == "google/bert_uncased_L-2_H-128_A-2"
        config = real_transformers.BertConfig(
            vocab_size=5, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
        )
        return real_transformers.BertModel(config)

    return SimpleNamespace(
        BertModel=SimpleNamespace(from_pretrained=bert),
        BertTokenizer=SimpleNamespace(from_pretrained=lambda name: Tokenizer()),
    )


def assert_trained(model, before, skip=()):
    """Every parameter with a gradient has a statistic, and has moved."""
    served = 0
    for (name, param), old in zip(model.named_parameters(), before, strict=True):
        if param.grad is None or name in skip:
            continue
        served += 1
        assert find(param, SUM_GRAD_SQUARED) is not None, name
        assert find(param, SUM_GRAD_SQUARED).isfinite().all(), name
        if param.grad.any():
            assert not torch.equal(param, old), name
    assert served


def copies(model):
    return [param.detach().clone() for param in model.parameters()]


# fmt: off  (the seed's own layout)


def test_patch_custom_models(transformers):
    from graphopt import patch_model
    from graphopt.optim import TGAdamW

    model = transformers.BertModel.from_pretrained("google/bert_uncased_L-2_H-128_A-2")  # any existing model
    tokenizer = transformers.BertTokenizer.from_pretrained("google/bert_uncased_L-2_H-128_A-2")

    patch_model(model)  # replace torch.nn.Parameter with truegrad.nn.Parameter
    optim = TGAdamW(model.parameters())  # truegrad.optim.TGAdamW instead of torch.optim.AdamW
    before = copies(model)

    # training loop as normal
    for sample in ["Hello", "World", "!"]:
        out = model(**tokenizer([sample], return_tensors="pt"))
        out[0].mean().backward()
        optim.step()

    assert_trained(model, before)
    assert {find(p, NUM_SAMPLES) for p in model.parameters() if p.grad is not None} == {3}


def test_nn():
    import torch

    from graphopt import nn
    from graphopt.optim import TGAdamW

    # define model by mixing truegrad.nn and torch.nn
    model = torch.nn.Sequential(nn.Linear(1, 10), nn.LayerNorm([1, 10]), torch.nn.ReLU(), nn.Linear(10, 1))
    optim = TGAdamW(model.parameters())  # truegrad.optim.TGAdamW instead of torch.optim.AdamW
    before = copies(model)

    # training loop as normal
    for _ in range(STEPS):
        input = torch.randn((16, 1))
        model(input).mean().backward()
        optim.step()

    assert_trained(model, before)
    assert {find(p, NUM_SAMPLES) for p in model.parameters()} == {16 * STEPS}


def test_partial_truegrad():
    import torch

    from graphopt import nn
    from graphopt.optim import TGAdamW

    model = torch.nn.Sequential(
        nn.Linear(1, 10),  # Weights coming from truegrad.nn
        nn.LayerNorm([1, 10]),
        torch.nn.ReLU(),
        torch.nn.Linear(10, 1),
    )  # Weights coming torch.nn

    truegrad_parameters = []
    normal_parameters = []

    def get_parameters(mod: torch.nn.Module):
        if isinstance(mod, nn.modules):
            truegrad_parameters.extend(list(mod.parameters(recurse=False)))
        else:
            # you could do truegrad.utils.patch_model(mod, recurse=False) here!
            normal_parameters.extend(list(mod.parameters(recurse=False)))

    model = model.apply(get_parameters)

    optim0 = TGAdamW(truegrad_parameters)
    optim1 = torch.optim.AdamW(normal_parameters)
    before = copies(model)

    for _ in range(STEPS):
        input = torch.randn((16, 1))
        model(input).mean().backward()
        optim0.step()  # update both parameter sets separately
        optim1.step()

    assert len(truegrad_parameters) == 4
    assert len(normal_parameters) == 2
    assert_trained(model, before, skip=("3.weight", "3.bias"))
    assert all(find(param, SUM_GRAD_SQUARED) is None for param in normal_parameters)
    assert all(isinstance(param, nn.TrueGradParameter) for param in truegrad_parameters)
    assert not any(isinstance(param, nn.TrueGradParameter) for param in normal_parameters)


def test_partial_truegrad_as_its_comment_says():
    """``patch_model(mod, recurse=False)`` for the modules that are not graphopt's."""
    import torch

    from graphopt import nn, patch_model
    from graphopt.optim import TGAdamW

    model = torch.nn.Sequential(nn.Linear(1, 10), nn.LayerNorm([1, 10]), torch.nn.ReLU(), torch.nn.Linear(10, 1))

    def get_parameters(mod):
        if not isinstance(mod, nn.modules):
            patch_model(mod, recurse=False)

    model = model.apply(get_parameters)
    optim = TGAdamW(model.parameters())
    before = copies(model)
    for _ in range(STEPS):
        model(torch.randn((16, 1))).mean().backward()
        optim.step()
    assert_trained(model, before)
    assert {find(p, NUM_SAMPLES) for p in model.parameters()} == {16 * STEPS}
    assert all(isinstance(param, nn.TrueGradParameter) for param in model.parameters())
