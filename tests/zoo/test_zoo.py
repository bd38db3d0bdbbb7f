"""Every architecture of the zoo has the outcome that stands beside it: exact, fallback or refused by name; never wrong."""

import re

import pytest
import transformers

from tests.zoo.measure import run, tolerance
from tests.zoo.zoo import cases

transformers.logging.set_verbosity_error()


NAMES = [pytest.param(name, marks=[pytest.mark.slow] if case.slow else []) for name, case in cases.items()]
NOT_CAPTURED = "no captured graph"  # the reason of a parameter that no pass has ever seen, so no operator stands in it


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`",  # transformers asks which packages there are, in forward
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft asks transformers for it
    "ignore:enable_nested_tensor is True:UserWarning",  # torch.nn.Transformer says it of its own default
    "ignore::graphopt.errors.UncapturedCall",  # expected of the cases that are refused for it
)
def test_outcome(name):
    case = cases[name]
    outcome = run(
        case, "eager"
    )  # the rewritten graph as it stands; docs/conformance.py runs all cases with AOTAutograd
    assert not outcome.names("wrong")
    assert outcome.error <= tolerance(case.dtype), outcome.worst
    assert outcome.statuses == case.expected(outcome.statuses)
    assert outcome.graphs == case.graphs
    for parameter, reason in outcome.reasons.items():
        assert any(words in reason for words in case.refused.values()), f"{parameter}: {reason}"
        if NOT_CAPTURED not in reason:
            assert re.search(r"\.py:\d+|at .*: ", reason), f"no source line in: {reason}"
            assert reason in outcome.refusal, "an error, unless unsupported='skip'"


def test_size():
    """What the issue asks for."""
    assert len(cases) >= 30
    assert len({case.family for case in cases.values()}) >= 8
