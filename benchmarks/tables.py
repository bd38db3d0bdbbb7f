"""Result records as markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

MISSING = "—"
GRADIENT_TOLERANCE = 1e-3  # above it the table says that the gradient itself is wrong


def case_table(name: str, record: Record) -> str:
    """A case: its title, its table, the notes and failures under it, and when it was measured."""
    content = {"steps": _steps_table, "starts": _starts_table, "lives": _lives_table}[record["measure"]](record)
    settings = record["settings"]
    commit = f"commit {record['commit']}" if record["commit"] else "no commit"
    if record["uncommitted_changes"]:
        commit += " with uncommitted changes"
    facts = (
        f"{settings['rounds']} rounds",
        f"{settings['threads']} threads",
        record["date"][:10],
        commit,
        f"load average {record['load_average'][0]} before the start",
    )
    remark = " **Quick form: the figures mean nothing.**" if settings["quick"] else ""
    if record.get("unfinished"):
        remark += " **The run was interrupted: rivals or rounds are missing.**"
    foot = f"*{name}: {', '.join(facts)}.*{remark}"
    return "\n\n".join(part for part in (f"**{record['title']}**", content, _notes(record), foot) if part) + "\n"


def summary_table(content: Record) -> str:
    """All cases of a benchmark that are measured by steps, in one table, small enough for a project's front page."""
    rows = []
    for record in content["cases"].values():
        if record["measure"] != "steps":
            continue
        rows.append((f"*{record['title']}*", "", "", ""))
        for name, rival in record["rivals"].items():
            if rival["status"] != "ok":
                rows.append((_label(rival), "failed", "", _verdict(rival)))
            elif name == record["baseline"]:
                rows.append((_label(rival), f"1 ({_duration(rival, 'seconds')})", "1", MISSING))
            else:
                rows.append((_label(rival), _ratio(rival, "seconds"), _ratio(rival, "peak_bytes"), _verdict(rival)))
    return table(("", "step time against plain", "memory against plain", "statistic"), rows)


def machine_line(machine: Record) -> str:
    """One sentence about a machine."""
    hardware = [machine["cpu"], f"{machine['cores']} cores", f"{machine['ram_gib']} GiB", *machine["gpus"]]
    software = [machine["os"], f"Python {machine['python']}", f"torch {machine['torch']}"]
    return f"Measured on {', '.join(hardware)}; {', '.join(software)}."


def ratio_of(rival: Record, quantity: str) -> dict[str, float] | None:
    """Median and quartiles of a rival's ratio to the baseline; None if it was not measured or failed."""
    figure = rival.get("figures", {}).get(quantity)
    return None if figure is None or rival["status"] != "ok" else figure["ratio"]


def _steps_table(record: Record) -> str:
    columns = ("rival", "step", "ratio [quartiles]", "peak memory", "ratio", "of it by a step", "ratio", "first step")
    rows = []
    for rival in record["rivals"].values():
        if rival["status"] != "ok":
            cells: tuple[str, ...] = ("failed", *[MISSING] * 7)
        else:
            cells = (
                _duration(rival, "seconds"),
                _ratio(rival, "seconds", quartiles=True),
                _mebibytes(rival, "peak_bytes"),
                _ratio(rival, "peak_bytes"),
                _mebibytes(rival, "step_bytes"),
                _ratio(rival, "step_bytes"),
                MISSING if record.get("shares_caches") else f"{rival['first_step_seconds']:.1f} s",
                f"{rival['peak_life_bytes'] / 2**20:.0f} MiB",
            )
        rows.append((_label(rival), *cells, _verdict(rival), _error(rival)))
    return table((*columns, "peak while compiling", record.get("checked", "statistic"), "worst error"), rows)


def _starts_table(record: Record) -> str:
    columns = ("rival", "caches", "first step", "ratio [quartiles]", "start to end of first step", "ratio [quartiles]")
    rows = []
    for rival in record["rivals"].values():
        if rival["status"] != "ok":
            rows.append((_label(rival), "failed", *[MISSING] * 8))
            continue
        for state, caches in (("cold", "empty"), ("warm", "filled")):
            counted = rival.get("compiler", {}).get(state)
            if counted is None:
                continue
            aot = [str(counted[f"autograd_cache_{outcome}"]) for outcome in ("hit", "miss", "bypass")]
            cells = (
                caches,
                _duration(rival, f"{state}_first_step_seconds"),
                _ratio(rival, f"{state}_first_step_seconds", quartiles=True),
                _duration(rival, f"{state}_ready_seconds"),
                _ratio(rival, f"{state}_ready_seconds", quartiles=True),
                _duration(rival, f"{state}_process_seconds"),
                _mebibytes(rival, f"{state}_peak_bytes"),
                f"{counted['fxgraph_cache_hit']} / {counted['fxgraph_cache_miss']}",
                " / ".join(aot) + ("" if counted["autograd_cache_enabled"] else " (off)"),
            )
            rows.append((_label(rival), *cells))
    caches = ("FX graph cache hit / miss", "AOTAutograd cache hit / miss / bypass")
    return table((*columns, "whole process", "peak memory", *caches), rows)


def _lives_table(record: Record) -> str:
    rows = []
    for rival in record["rivals"].values():
        cells = [_chosen(rival, key) if rival["status"] == "ok" else MISSING for key in record["columns"]]
        rows.append((_label(rival), *cells))
    return table(("rival", *record["columns"].values()), rows)


def _chosen(rival: Record, key: str) -> str:
    """A quantity with its ratio to the baseline, or a metric."""
    measured = _median(rival, key) is not None
    value = _median(rival, key) if measured else rival.get("metrics", {}).get(key)
    if value is None:
        return MISSING
    written = str(value)
    if key.endswith("_bytes"):
        written = f"{value / 2**20:.0f} MiB"
    elif key.endswith("seconds"):
        written = duration(value)
    return f"{written} ({_ratio(rival, key)})" if measured else written


def _notes(record: Record) -> str:
    lines = []
    for rival in record["rivals"].values():
        remarks = [*([rival["note"]] if rival["note"] else []), *_check_remarks(rival.get("check") or {})]
        if rival["status"] != "ok":
            remarks.append(f"failed: {_one_line(rival['error'], 300)}")
        for requirement, error in rival.get("environment_errors", {}).items():
            remarks.append(f"{requirement} could not be installed: {_one_line(error, 200)}")
        if remarks:
            lines.append(f"* {rival['label']}: {'; '.join(remarks)}.")
    return "\n".join(lines)


def _check_remarks(check: Record) -> list[str]:
    remarks = []
    checked = check.get("num_checked")
    if check.get("num_missing"):
        remarks.append(
            f"no statistic for {check['num_missing']} of {checked} parameters, such as {check['missing'][0]}"
        )
    if check.get("num_wrong"):
        remarks.append(f"wrong for {check['num_wrong']} of {checked} parameters, worst {check['worst_parameter']}")
    if check.get("gradient_relative_error", 0) > GRADIENT_TOLERANCE:
        remarks.append(f"the gradient itself is off by {check['gradient_relative_error']:.0e}")
    return remarks


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _label(rival: Record) -> str:
    return f"**{rival['label']}**" if rival["ours"] else str(rival["label"])


def _median(rival: Record, quantity: str) -> float | None:
    figure = rival.get("figures", {}).get(quantity)
    return None if figure is None else figure["median"]


def _ratio(rival: Record, quantity: str, *, quartiles: bool = False) -> str:
    ratio = ratio_of(rival, quantity)
    if ratio is None:
        return MISSING
    spread = f" [{ratio['q1']:.2f}, {ratio['q3']:.2f}]" if quartiles else ""
    return f"{ratio['median']:.2f}{spread}"


def _duration(rival: Record, quantity: str) -> str:
    seconds = _median(rival, quantity)
    return MISSING if seconds is None else duration(seconds)


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for limit, factor, unit, digits in ((1, 1, "s", 1), (0.1, 1e3, "ms", 0), (1e-3, 1e3, "ms", 1)):
        if seconds >= limit:
            return f"{seconds * factor:.{digits}f} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def _mebibytes(rival: Record, quantity: str) -> str:
    value = _median(rival, quantity)
    return MISSING if value is None else f"{value / 2**20:.0f} MiB"


def _verdict(rival: Record) -> str:
    return str((rival.get("check") or {}).get("verdict", MISSING))


def _error(rival: Record) -> str:
    error = (rival.get("check") or {}).get("max_relative_error")
    return MISSING if error is None else f"{error:.0e}"


def _one_line(text: str, length: int) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= length else f"{line[: length - 3]}..."
