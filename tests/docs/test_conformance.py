"""The committed table of conformance is what the zoo and the rules say, and the page is made of it; nothing is measured here."""

import json
from collections import Counter

import pytest
import torch

from docs.conformance import PAGE, RESULTS, cases, describe, main, page, rule_samples
from graphopt.passes import TrueGrad
from tests.models import double
from tests.passes.truegrad.checks import capture
from tests.zoo.case import Case
from tests.zoo.measure import tolerance

AGAIN = "type: python -m docs.conformance (--only MODEL for some models, --page to write the page alone)"
results = json.loads(RESULTS.read_text())


def names_of(row):
    return {name: kind for kind in ("fallback", "refused", "unused") for name in row[kind]}


def test_page_is_made_of_the_results():
    assert PAGE.read_text() == page(results), AGAIN


def test_every_model_of_the_zoo():
    assert list(results["zoo"]) == list(cases), AGAIN


@pytest.mark.parametrize("name", list(cases))
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning"
)  # what libraries say of their models; test_zoo.py is strict
def test_outcomes_are_those_that_the_zoo_expects(name):
    row, case = results["zoo"][name], cases[name]
    model = case.build()
    expected = case.expected(name for name, param in model.named_parameters() if param.requires_grad)
    assert names_of(row) == {name: kind for name, kind in expected.items() if kind != "exact"}, AGAIN
    assert row["exact"] == Counter(expected.values())["exact"], AGAIN
    assert row["graphs"] == case.graphs, AGAIN
    assert row["error"] <= tolerance(case.dtype)


def test_every_sample_of_every_rule():
    expected = []
    for rule, index, sample in rule_samples():
        torch.manual_seed(3)
        module, *inputs = sample()
        expected.append((rule, index, describe(module), [list(value.shape) for value in inputs]))
    assert [(row["rule"], row["index"], row["module"], row["shapes"]) for row in results["rules"]] == expected, AGAIN


@pytest.mark.parametrize("rule", sorted({rule for rule, _, _ in rule_samples()}))
def test_outcomes_of_the_rules(rule):
    rows = iter([row for row in results["rules"] if row["rule"] == rule])
    for _, _, sample in (found for found in rule_samples() if found[0] == rule):
        torch.manual_seed(3)
        module, *inputs = sample()
        model, batch = double(module, tuple(inputs))
        counts = Counter(row.status.value for row in TrueGrad().run(capture(model, *batch).copy()).coverage)
        row = next(rows)
        assert {kind: row[kind] for kind in ("exact", "fallback")} == {
            kind: counts[kind] for kind in ("exact", "fallback")
        }
        assert row["error"] <= 1e-10
        torch._dynamo.reset()


def test_page_alone(tmp_path, monkeypatch):
    copied = tmp_path / "conformance.json"
    copied.write_text(RESULTS.read_text())
    monkeypatch.setattr("docs.conformance.RESULTS", copied)
    monkeypatch.setattr("docs.conformance.PAGE", tmp_path / "conformance.md")
    assert main(["--page"]) == 0
    assert (tmp_path / "conformance.md").read_text() == PAGE.read_text()


def test_a_pattern_that_fits_nothing_is_an_error():
    case = Case("x", "plain", lambda: None, lambda num: {}, lambda output: (output,), fallback=("head.*",))
    with pytest.raises(ValueError, match=r"x: 'head\.\*' of 'fallback' fits nothing"):
        case.expected(["body.weight"])
    assert case.expected(["head.weight", "body.weight"]) == {"head.weight": "fallback", "body.weight": "exact"}


def test_the_readme_links_the_page():
    assert "(docs/conformance.md)" in (PAGE.parent.parent / "README.md").read_text()
