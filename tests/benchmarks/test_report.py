"""Tables, pictures and the table that is embedded elsewhere."""

import copy

import pytest

from benchmarks import report, results
from benchmarks.figures import add_figures
from benchmarks.tables import case_table, summary_table


def rival(label, seconds, **more):
    samples = {"seconds": seconds, "peak_bytes": [2**30], "step_bytes": [2**29]}
    record = {"label": label, "status": "ok", "ours": False, "note": "", "samples": samples}
    return {**record, "first_step_seconds": 9.0, "peak_life_bytes": 2**31, **more}


@pytest.fixture
def content():
    check = {"verdict": "wrong", "max_relative_error": 3.0, "worst_parameter": "w", "num_checked": 4, "num_wrong": 2}
    rivals = {
        "plain": rival("Plain", [0.1, 0.2]),
        "ours": rival("Ours", [0.2, 0.4], ours=True, note="a remark"),
        "wrong": rival("Wrong", [0.3, 0.6], check=check),
        "broken": {"label": "Broken", "status": "failed", "ours": False, "note": "", "error": "Error: a | b"},
    }
    add_figures(rivals, "plain")
    record = {
        "title": "Some work",
        "measure": "steps",
        "baseline": "plain",
        "settings": {"rounds": 2, "threads": 2, "quick": False},
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "uncommitted_changes": True,
        "load_average": [0.5, 0.5, 0.5],
        "rivals": rivals,
    }
    machine = {"slug": "box", "cpu": "A CPU", "cores": 2, "ram_gib": 8.0, "gpus": [], "os": "An OS", "python": "3"}
    machine["torch"] = "2"
    return {"format": results.FORMAT, "benchmark": "gone", "machine": machine, "cases": {"some": record}}


def test_case_table(content):
    text = case_table("some", content["cases"]["some"])
    assert "| **Ours** | 300 ms | 2.00 [2.00, 2.00] | 1024 MiB | 1.00 | 512 MiB | 1.00 | 9.0 s | 2048 MiB |" in text
    assert "* Wrong: wrong for 2 of 4 parameters, worst w." in text
    assert "* Broken: failed: Error: a \\| b." in text
    assert "commit abc with uncommitted changes" in text
    assert "Quick form" not in text


def test_summary_table(content):
    lines = summary_table(content).splitlines()
    assert "| Plain | 1 (150 ms) | 1 | — |" in lines
    assert "| **Ours** | 2.00 | 1.00 | — |" in lines
    assert "| Broken | failed |  | — |" in lines


def test_report_is_written(content, tmp_path):
    text = report.write(tmp_path, [content]).read_text()
    assert "![some](gone-box-some.png)" in text
    assert (tmp_path / "gone-box-some.png").stat().st_size > 1000


def test_embed_replaces_what_stands_between_the_markers(content, tmp_path):
    newer = copy.deepcopy(content)
    newer["machine"] |= {"slug": "other", "cpu": "Another CPU"}
    newer["cases"]["some"]["date"] = "2027-01-01T00:00:00+00:00"
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- benchmark: gone -->\nold\n<!-- end of benchmark -->\nafter\n")
    assert report.embed(path, [content, newer]) == ["gone"]
    first = path.read_text()
    assert first.startswith("before\n")
    assert first.endswith("after\n")
    assert "old" not in first
    assert "Measured on Another CPU" in first
    assert report.embed(path, [content, newer]) == ["gone"]
    assert path.read_text() == first
    report.embed(path, [content, newer], machine="box")
    assert "Measured on A CPU" in path.read_text()


def test_embed_says_what_is_missing(content, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing here")
    assert report.embed(path, [content]) == []
    path.write_text("<!-- benchmark: gone -->")
    with pytest.raises(SystemExit, match="no <!-- end of benchmark --> after it"):
        report.embed(path, [content])


def test_store_keeps_the_other_cases(tmp_path):
    results.store(tmp_path, "some", {"a": 1, "b": 2})
    path = results.store(tmp_path, "some", {"b": 3})
    assert results.load(tmp_path)[0]["cases"] == {"a": 1, "b": 3}
    assert path.name.startswith("some-")
