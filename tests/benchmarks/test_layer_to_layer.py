"""The benchmarks of regions and of streaming: what they conclude from records, and that their quick forms run."""

import random
from dataclasses import replace

import pytest

from benchmarks import disk, kills, layer_to_layer, memory_against_depth, regions, report
from benchmarks.figures import add_figures
from benchmarks.harness import Case, Rival, Settings, run_case
from benchmarks.pictures import Curves, Line, draw_curves
from benchmarks.tables import case_table
from benchmarks.worker import Task

SETTINGS = Settings(rounds=1, block_seconds=0.0, warm_up_steps=1, threads=1, quick=True)


def measured(measure="steps", baseline="", columns=None, **rivals):
    """A record as the harness writes it; each rival is given as its samples and its metrics."""
    records = {
        name: {"label": name, "status": "ok", "ours": False, "note": "", "samples": samples, "metrics": metrics}
        for name, (samples, metrics) in rivals.items()
    }
    add_figures(records, baseline)
    return {"title": "Work", "measure": measure, "baseline": baseline, "columns": columns or {}, "rivals": records}


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def starts():
    def rival(*seconds, graphs=2):
        return {"cold_first_step_seconds": list(seconds)}, {"num_regions": 5, "num_distinct": 3, "graphs": graphs}

    rivals = {"inductor-4": rival(10, 20), "inductor-32": rival(60, 120)}
    rivals |= {"regions-4": rival(10, 20), "regions-32": rival(11, 22)}
    record = measured("starts", "inductor-32", **rivals)
    for found in record["rivals"].values():
        found["compiler"] = {"cold": {"fxgraph_cache_miss": 6}}
    return record


def test_cold_starts_are_compared_within_a_round(starts):
    line = row(regions.conclusions({"starts": starts}), "**graphopt, LayerToLayer**")
    assert "| 15.0 s | 16.5 s | 1.10x [1.10, 1.10] | 5.45x [5.45, 5.45] | 5, 3 distinct | 6 |" in line
    assert "| 6.00x [6.00, 6.00] | 1.00x" in row(regions.conclusions({"starts": starts}), "torch.compile")


def test_a_depth_that_failed_leaves_a_gap(starts):
    starts["rivals"]["regions-32"]["status"] = "failed"
    assert "| 15.0 s | — | — | — |" in row(regions.conclusions({"starts": starts}), "**graphopt, LayerToLayer**")
    (curves,) = regions.curves({"starts": starts})
    assert [point[0] for line in curves.lines if line.ours for point in line.points] == [4]


def test_step_time_of_regions_is_that_of_the_whole_graph():
    steps = measured(baseline="inductor", whole=({"seconds": [1.0, 2.0]}, {}), regions=({"seconds": [1.5, 3.0]}, {}))
    assert "takes 1.50x [1.50, 1.50] of one with the whole graph" in regions.conclusions({"steps": steps})


def test_regions_count_what_the_pass_reports():
    small = {"kind": "llama", "layers": 4, "hidden": 16, "intermediate": 16, "heads": 2, "vocabulary": 20}
    task = regions.build(workload={**small, "batch": 2, "length": 4}, method="regions", compiler="eager")
    task.step()
    task.step()
    found = task.metrics()
    assert 4 <= found["num_regions"]
    assert 2 <= found["num_distinct"] < found["num_regions"]


# --- layer by layer ---------------------------------------------------------------------------------------------------


@pytest.fixture
def streamed():
    moves = {"bytes_read": 6e9, "bytes_written": 4e9}
    speeds = {
        f"{what}_per_second": 1e9 for what in ("store_read", "store_written", "raw_read", "raw_written", "raw_mixed")
    }
    facts = {"tokens": 100, "num_parameters": 10_000_000}
    own = {**facts, "bytes_read": 12e9, "bytes_written": 8e9, "update_bytes_read": 4e9, "update_bytes_written": 6e9}
    return measured(
        baseline="checkpointing",
        checkpointing=({"seconds": [4.0, 8.0]}, {**facts, "update_seconds": 1.0}),
        transfer=({"seconds": [1.0, 3.0]}, {**facts, **moves, **speeds, "direct": True, "file_system": "ext4"}),
        disk=({"seconds": [5.0, 10.0]}, own),
    )


def test_the_bound_is_the_larger_of_computing_and_moving(streamed):
    # The rival moves twice as many bytes as was measured: 2 and 6 s, less than computing takes.
    assert layer_to_layer.bounds(streamed["rivals"], "disk") == [(4.0, 2.0, 5.0), (8.0, 6.0, 10.0)]
    line = row(layer_to_layer.conclusions({"a": streamed}), "100 | **disk**")
    assert "| 12000 / 8000 MB | 6.0 s | 4.0 s | 7.5 s | 0.80 [0.80, 0.80] |" in line


def test_the_bound_by_phases_does_not_hide_the_update_behind_backward(streamed):
    # Half of the bytes belong to the update: max(4 - 1, 1) + max(1, 1), and max(8 - 1, 3) + max(1, 3).
    assert layer_to_layer.bound_by_phases(streamed["rivals"], "disk") == [4.0, 10.0]


def test_the_knee_follows_from_both_speeds(streamed):
    streamed["rivals"]["disk-eager"] = streamed["rivals"]["disk"]
    forward, step = layer_to_layer._knees({"a": streamed})
    per_token = (6.0 - 1.0) / 100
    assert forward == pytest.approx(8 * 10_000_000 / per_token * 4 / (2 * 1e9))
    assert step == pytest.approx((4.0 - 1.0) / per_token)
    (curves,) = layer_to_layer.curves({"a": streamed})
    assert [x for x, _ in curves.marks] == [forward, step]


def test_without_a_bound_the_other_tables_stay(streamed):
    streamed["rivals"]["transfer"]["status"] = "failed"
    text = layer_to_layer.conclusions({"a": streamed})
    assert "bound" not in text
    assert "| disk | 15 |" in text


@pytest.mark.parametrize(
    "method",
    [
        {"name": "plain", "compiler": "eager"},
        {"name": "checkpointing", "compiler": "eager"},
        {"name": "streamed", "compiler": "eager", "store": "disk", "eager": True},
        {"name": "streamed", "compiler": "eager", "store": "cpu"},
    ],
    ids=lambda method: method.get("store", method["name"]),
)
def test_rivals_arrive_at_the_same_losses(method, monkeypatch, tmp_path):
    monkeypatch.setenv(disk.VARIABLE, str(tmp_path))
    small = {**layer_to_layer.SMALL, "batch": 4}
    assert layer_to_layer.check(small=small, microbatch=2, method=method)["verdict"] == "same"


def test_a_rival_that_forgets_a_micro_batch_is_found_out(monkeypatch):
    from benchmarks import layer_to_layer_rivals

    def forgetful(workload, microbatch, **options):
        workload.batch = {name: tensor[microbatch:] for name, tensor in workload.batch.items()}
        return layer_to_layer_rivals.plain(workload, microbatch, **options)

    monkeypatch.setattr(layer_to_layer_rivals, "forgetful", forgetful, raising=False)
    small = {**layer_to_layer.SMALL, "batch": 4}
    found = layer_to_layer.check(small=small, microbatch=2, method={"name": "forgetful", "compiler": "eager"})
    assert found["verdict"] == "wrong"


def test_bytes_are_counted_by_phase_and_the_disk_alone_moves_them(monkeypatch, tmp_path):
    from benchmarks import workloads  # here: it imports torch, which the small rivals of this module can do without

    monkeypatch.setenv(disk.VARIABLE, str(tmp_path))
    monkeypatch.setattr(disk, "RAW_BYTES", 2 * disk.PIECE)
    workload = {**layer_to_layer.SMALL, "batch": 2}
    weights = sum(p.nbytes for p in workloads.make(**workload).model.parameters())

    def metrics(method):
        task = layer_to_layer.build(workload=workload, microbatch=2, method=method)
        for _ in range(3):
            task.step()
        return task.metrics()

    own = metrics({"name": "streamed", "compiler": "eager", "store": "disk"})
    assert own["bytes_read"] == own["forward_backward_bytes_read"] + own["update_bytes_read"]
    # forward, backward, and parameter, gradient and two tensors of AdamW; small records take whole pages
    assert 6 * weights < own["bytes_read"] < 20 * weights
    assert 3 * weights < own["update_bytes_written"] < own["bytes_written"]
    alone = metrics({"name": "transfer"})
    assert alone["bytes_read"] / alone["bytes_written"] == pytest.approx(6 / 4)
    assert alone["store_read_per_second"] > 0
    assert alone["raw_mixed_per_second"] > 0


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_compared_with_the_shallowest_and_with_empty_processes():
    def rival(mebibytes, **metrics):
        return {"peak_bytes": [mebibytes * 2**20]}, metrics

    record = measured(
        **{"disk-8": rival(600, buffers_bytes=2**20), "disk-64": rival(660, buffers_bytes=2**20)},
        **{"plain-8": rival(1000), "plain-64": rival(5000), "torch": rival(300), "compiler": rival(500)},
    )
    text = memory_against_depth.conclusions({"depth": record})
    assert row(text, "**graphopt, store=disk**") == "| **graphopt, store=disk** | 600 MiB | 660 MiB | 1.10x |"
    assert row(text, "— beside torch |") == "| — beside torch | 300 MiB | 360 MiB | 1.20x |"
    assert row(text, "— beside torch, its compiler") == (
        "| — beside torch, its compiler and transformers | 100 MiB | 160 MiB | 1.60x |"
    )
    assert row(text, "— the store's buffers") == "| — the store's buffers | 1 MiB | 1 MiB | 1.00x |"
    (curves,) = memory_against_depth.curves({"depth": record})
    assert [point[2] for point in curves.lines[-1].points] == [1000, 5000]


def allocate(mebibytes):
    sizes = iter([mebibytes])

    def step():
        block = bytearray(next(sizes, 1) << 20)
        block[::4096] = b"\1" * len(block[::4096])

    return Task(step, lambda: {"word": "yes"})


def test_a_life_keeps_the_first_step_apart(tmp_path):
    rivals = tuple(
        Rival(name=name, label=name, build=allocate, options={"mebibytes": size})
        for name, size in (("small", 100), ("large", 400))
    )
    columns = {"peak_bytes": "peak", "later_peak_bytes": "later", "word": "said"}
    case = Case(name="a", title="A", rivals=rivals, baseline="small", measure="lives", steps=2, columns=columns)
    parts = []
    record = run_case(case, replace(SETTINGS, threads=None), keep=parts.append)  # without threads: no torch is imported
    assert [part["unfinished"] for part in parts] == [True, True]
    assert "interrupted" in case_table("a", parts[0])
    assert "interrupted" not in case_table("a", record)
    large = record["rivals"]["large"]["samples"]
    assert large["peak_bytes"][0] > 400 << 20
    assert large["later_peak_bytes"][0] < 300 << 20
    line = row(case_table("a", record), "large")
    assert line.endswith("| yes |")
    assert "MiB (" in line


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def killing(tmp_path):
    return kills.Killing(tmp_path, eager=False, steps=3, generator=random.Random(0), wanted=["a", "b", "c"])


def step(number, loss):
    return ("forward", number, ""), ("backward", number, loss)


def said(*words):
    return kills._Child(0, 0, 0.0, [(0.0, word) for word in words])


def test_a_step_that_was_committed_before_the_kill_may_be_there(killing):
    killing._look_at(said(("opened", 0, ""), *step(0, "a"), ("end", 0, ""), *step(1, "b"), ("update", 1, "")))
    killing._look_at(said(("opened", 2, ""), *step(2, "c"), ("end", 2, "")))
    facts = killing.facts()
    assert (facts["committed_unsaid"], facts["repeated"], facts["steps_compared"]) == (1, 0, 3)
    assert killing.problems == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([("opened", 0, "")], "the store was at step 0, though 1 were finished and 2 begun"),
        ([("opened", 3, "")], "the store was at step 3, though 1 were finished and 2 begun"),
        ([("opened", 1, ""), ("backward", 1, "x")], "the loss of step 1 is x and was b"),
    ],
)
def test_what_is_lost_or_different_is_a_problem(killing, words, problem):
    killing._look_at(said(("opened", 0, ""), *step(0, "a"), ("end", 0, ""), ("forward", 1, "")))
    killing._look_at(said(*words))
    assert killing.problems == [problem]


@pytest.mark.slow
def test_a_training_is_killed_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv(disk.VARIABLE, str(tmp_path / "stores"))
    (case,) = kills.cases(True, 2)
    record = run_case(replace(case, rivals=case.rivals[1:], baseline=case.rivals[1].name), SETTINGS)
    (rival,) = record["rivals"].values()
    assert rival["status"] == "ok", rival
    assert rival["metrics"]["kills"] == 2
    assert rival["metrics"]["problems"] == []
    assert rival["metrics"]["steps_compared"] >= kills.QUICK_STEPS
    assert "killed 2 times: nothing but unfinished steps was lost" in kills.conclusions({"kills": record})
    assert list((tmp_path / "stores").iterdir()) == []


# --- pictures and folders ---------------------------------------------------------------------------------------------


def test_curves_are_drawn(tmp_path):
    lines = [Line(label="a", points=[(1, 1, 2, 3), (2, 2, 3, 4)], ours=True), Line(label="b", points=[])]
    curves = Curves(name="c", title="T", x="x", y="y", lines=lines, marks=[(1.5, "here")])
    assert draw_curves(tmp_path / "a.png", curves)
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert not draw_curves(tmp_path / "b.png", replace(curves, lines=lines[1:]))


def test_the_report_has_conclusions_and_curves(starts, tmp_path):
    starts |= {"settings": {"rounds": 2, "threads": 2, "quick": False}, "date": "2026-01-02", "commit": "abc"}
    starts |= {"uncommitted_changes": False, "load_average": [0.5]}
    counters = (
        "autograd_cache_enabled",
        "fxgraph_cache_hit",
        "fxgraph_cache_miss",
        *(f"autograd_cache_{x}" for x in ("hit", "miss", "bypass")),
    )
    for rival in starts["rivals"].values():
        rival["compiler"] = {state: dict.fromkeys(counters, 0) for state in ("cold", "warm")}
    machine = {"slug": "box", "cpu": "A CPU", "cores": 2, "ram_gib": 8.0, "gpus": [], "os": "An OS", "python": "3"}
    content = {"benchmark": "regions", "machine": {**machine, "torch": "2"}, "cases": {"starts": starts}}
    text = report.write(tmp_path, [content]).read_text()
    assert "32 against 4 (target: 1.2)" in text
    assert "(regions-box-depth.png)" in text
    assert (tmp_path / "regions-box-depth.png").exists()
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark: regions -->\n<!-- end of benchmark -->\n")
    report.embed(page, [content], pictures=tmp_path)
    assert "(regions-box-depth.png)" in page.read_text()


def test_stores_do_not_lie_in_memory(monkeypatch, tmp_path):
    monkeypatch.setenv(disk.VARIABLE, str(tmp_path))
    monkeypatch.setattr(disk, "file_system", lambda path: "tmpfs")
    with pytest.raises(
        RuntimeError, match=f"is on tmpfs, that is in memory; set {disk.VARIABLE} to a folder on a disk"
    ):
        disk.new_folder()


def test_what_killed_processes_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv(disk.VARIABLE, str(tmp_path))
    (tmp_path / str(2**22 + 1)).mkdir()  # no process has such a number
    (tmp_path / "notes").mkdir()
    assert disk.new_folder().exists()
    assert not (tmp_path / str(2**22 + 1)).exists()
    assert (tmp_path / "notes").exists()
