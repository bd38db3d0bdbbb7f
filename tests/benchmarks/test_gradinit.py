"""The benchmarks of GradInit: the rivals do the same, what is concluded from records, and that an arm runs."""

import math

import pytest
import torch

from benchmarks import gradinit, gradinit_effect, gradinit_rivals, report
from benchmarks.figures import add_figures
from benchmarks.gradinit_problems import PROBLEMS, START

TINY = {"layers": 1, "hidden": 32, "heads": 2, "batch": 2, "length": 8}


def record(baseline, measure="steps", **rivals):
    """A record as the harness writes it; each rival is given as its samples and whatever else it has."""
    records = {
        name: {"label": name, "status": "ok", "ours": False, "note": "", "samples": samples, **more}
        for name, (samples, more) in rivals.items()
    }
    add_figures(records, baseline)
    return {"title": "Work", "measure": measure, "baseline": baseline, "columns": {}, "rivals": records}


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


# --- the price of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["constraint", "look_ahead"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_learn_init_and_what_is_written_by_hand_agree(branch, compiler):
    found = gradinit.check(small=TINY, branch=branch, method={"name": "learn_init", "compiler": compiler})
    assert found["verdict"] == "exact"


@pytest.mark.parametrize("compiler", [None, "eager"])
def test_wrapper_and_what_is_written_by_hand_agree(compiler):
    sizes = {**TINY, "dtype": "float64", "small_numbers": True}
    ours = gradinit._scale_gradients(sizes, {"name": "wrapper", "compiler": compiler})
    plain = gradinit._scale_gradients(sizes, {"name": "by_hand"})
    assert gradinit._compare(ours, plain)["verdict"] == "exact"
    assert len(ours) == len(plain) > 20


def test_eager_and_compiled_parts_of_what_is_written_by_hand_agree():
    algorithm = gradinit_rivals.ByHand(gradinit_rivals.bert(**TINY, dtype="float64", small_numbers=True))
    scales = {name: torch.ones((), dtype=torch.float64) for name in algorithm.weights}
    for gamma in (0.0, math.inf):
        eager, parts = algorithm.eager(scales, gamma), algorithm.compiled(scales, gamma)
        pairs = [{name: value.item() for name, value in found.items()} for found in (eager, parts)]
        assert gradinit._compare(*pairs)["verdict"] == "exact"


def test_a_wrong_derivative_is_found_out():
    found = gradinit._compare({"a": 1.0, "b": 2.001}, {"a": 1.0, "b": 2.0})
    assert (found["verdict"], found["worst_parameter"], found["num_wrong"]) == ("wrong", "b", 1)
    assert gradinit._compare({"a": 1.0}, {"a": 1.0, "b": 0.0})["verdict"] == "wrong"


def test_a_turn_is_one_iteration():
    seen = []

    def loop(batches):
        for batch in batches:
            seen.append((batch, next(batches)))

    turns = gradinit_rivals.Turns(loop, "batch", drawn=2)
    counts = []
    for _ in range(3):
        turns.step()
        counts.append(len(seen))
    assert counts == [2, 3, 4]  # the first turn ends with the four batches that learn_init looks at before it begins


def test_an_error_in_the_loop_reaches_whoever_waits():
    def loop(batches):
        next(batches)
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        gradinit_rivals.Turns(loop, "batch", drawn=1).step()


@pytest.mark.parametrize("name", ["learn-init-eager", "by-hand", "wrapper-eager"])
def test_steps_can_be_repeated(name):
    rivals = {rival.name: rival for case in gradinit.cases(True) for rival in case.rivals}
    task = gradinit.build(**{**rivals[name].options, "workload": TINY})
    for _ in range(3):
        task.step()
    assert task.metrics()["num_parameters"] > 20


def test_a_start_takes_both_kinds_of_step():
    gradinit.build_both(workload=TINY, method={"name": "learn_init", "compiler": "eager"}).step()


def test_steps_are_compared_within_a_round():
    check = {"check": {"verdict": "exact", "max_relative_error": 2e-15}}
    constraint = record(
        "johngull",
        **{"johngull": ({"seconds": [1.0, 2.0]}, {}), "learn-init": ({"seconds": [0.5, 1.0]}, check)},
    )
    starts = record(
        "learn-init-4",
        **{f"learn-init-{depth}": ({gradinit.COLD: [seconds]}, {}) for depth, seconds in ((4, 40.0), (16, 50.0))},
    )
    text = gradinit.conclusions({"constraint": constraint, "starts": starts})
    assert "| 750 ms | 2.00x [2.00, 2.00] | — | exact (2e-15) |" in row(text, "**graphopt.learn_init**")
    assert "| 40.0 s | 50.0 s | 1.25x [1.25, 1.25] |" in text


# --- the effect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_problems_are_the_same_each_time_and_keep_their_data_apart(name):
    plan = gradinit_effect.PLANS[name]["problem"]
    one, other = (PROBLEMS[name](**plan) for _ in range(2))
    for _, first, second in zip(range(3), one.batches(0), other.batches(0), strict=False):
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(one.test["x"], other.test["x"])
    if name == "digits":
        assert len(one.train["x"]) + len(one.validation["x"]) + len(one.test["x"]) == 1797
    validation, test = one.scores(one.net())
    assert not one.has_learnt(validation)
    assert not one.has_learnt(test)


@pytest.mark.parametrize("start", sorted(START))
def test_starts_have_the_size_they_should(start):
    problem = PROBLEMS["digits"](depth=2, channels=64)
    torch.manual_seed(0)
    net = problem.net()
    START[start](net)
    fan_in = 64 * 9
    wanted = {"default": 1 / (3 * fan_in), "he": 2 / fan_in, "xavier": 2 / (2 * fan_in), "orthogonal": 1 / fan_in}
    assert net[2].weight.var().item() == pytest.approx(wanted[start], rel=0.05)


def test_what_an_arm_is_charged_is_taken_from_its_training():
    plan = {"budget": 100, "every": 20, "early": 10}
    assert gradinit_effect.marks(plan, 0) == [10, 20, 40, 60, 80, 100]
    assert gradinit_effect.marks(plan, 45) == [10, 15, 35, 55]
    assert gradinit_effect.marks(plan, 100) == [10]


def arm(charge, *runs):
    steps = gradinit_effect.marks(PLAN, charge)
    found = [
        {
            "seed": seed,
            "rate": rate,
            "steps": steps,
            "validation": [v] * len(steps),
            "test": [t] * len(steps),
            "has_learnt": ok,
        }
        for seed, rate, v, t, ok in runs
    ]
    return {}, {"metrics": {"plan": PLAN, "charge": charge, "runs": found}}


PLAN = {"budget": 40, "every": 10, "early": 5, "reference": "he", "problem": {"depth": 3, "channels": 4, "batch": 8}}


@pytest.fixture
def digits():
    plain = arm(
        0, (0, 0.1, 0.5, 0.4, True), (1, 0.1, 0.7, 0.6, True), (0, 0.2, 0.9, 0.3, True), (1, 0.2, 0.1, 0.1, False)
    )
    learned = arm(
        15, (1, 0.1, 0.8, 0.7, True), (0, 0.1, 0.8, 0.8, True), (1, 0.2, 0.9, 0.9, True), (0, 0.2, 0.1, 0.1, False)
    )
    return record("he", "lives", he=plain, gradinit=learned)


def test_the_rate_is_chosen_on_validation_data_and_reported_on_test_data(digits):
    text = gradinit_effect.conclusions({"digits": digits})
    assert "| 0 | 0.500 ± 1.271 | 0.500 ± 1.271 | 0.500 ± 1.271 | — | 0.1 | 0 of 2 | 1 of 4 |" in row(text, "he")
    # Paired by seed: 0.8 - 0.4 and 0.7 - 0.6.
    line = row(text, "gradinit")
    assert "| 15 | 0.750 ± 0.635 | 0.750 ± 0.635 | 0.750 ± 0.635 | +0.250 ± 1.906 | 0.1 | 0 of 2 | 1 of 4 |" in line


def test_an_arm_that_is_still_learning_has_no_score(digits):
    learned = digits["rivals"]["gradinit"]["metrics"]
    assert gradinit_effect.chosen("digits", PLAN, learned, 10) is None
    assert gradinit_effect.chosen("digits", PLAN, learned, 20)["test"] == [0.8, 0.7]


def test_curves_are_at_what_was_spent(digits, tmp_path):
    (curves,) = gradinit_effect.curves({"digits": digits})
    plain, learned = curves.lines
    assert [point[0] for point in plain.points] == [10, 20, 30, 40]
    assert [point[0] for point in learned.points] == [20, 30, 40]
    assert report.draw_curves(tmp_path / "a.png", curves)


def test_intervals_are_students():
    mean, half = gradinit_effect.confidence([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3))


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_an_arm_runs(name):
    rivals = {rival.name: rival for case in gradinit_effect.cases(True) if case.name == name for rival in case.rivals}
    options = dict(rivals["gradinit-sgd-he" if name == "digits" else "gradinit"].options)
    options["plan"] = {**options["plan"], "budget": 40, "every": 20, "rates": [0.01]}
    task = gradinit_effect.build(**{**options, "seeds": [0]})
    task.step()
    found = task.metrics()
    (run,) = found["runs"]
    assert found["charge"] > 0
    assert run["steps"] == gradinit_effect.marks(options["plan"], found["charge"])
    assert len(run["test"]) == len(run["steps"])
    assert found["starts"][0]["num_steps"] == 3
