"""Figures from samples: medians with quartiles, and medians of paired ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summary(samples: Sequence[float]) -> dict[str, float] | None:
    """Median and quartiles of ``samples``; None if there are none."""
    if not samples:
        return None
    if len(samples) == 1:
        return {"median": samples[0], "q1": samples[0], "q3": samples[0]}
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def paired_ratio(samples: Sequence[float | None], baseline: Sequence[float | None]) -> dict[str, float] | None:
    """Summary of ``samples[i] / baseline[i]``: both come from the same round, so slow drift cancels."""
    pairs = zip(samples, baseline, strict=False)  # a rival that failed half-way has fewer rounds
    return summary([mine / theirs for mine, theirs in pairs if mine is not None and theirs])


def samples(rivals: Mapping[str, Any], name: str, quantity: str) -> list[Any]:
    """What was measured of a rival, round by round; nothing if it is not there or has failed."""
    record = rivals.get(name, {})
    found: list[Any] = record.get("samples", {}).get(quantity, []) if record.get("status") == "ok" else []
    return found


def add_figures(rivals: dict[str, dict[str, Any]], baseline: str) -> None:
    """Give every rival's record its ``figures``: for each measured quantity a summary and its ratio to the baseline.

    Args:
        rivals: Records by name; ``record["samples"]`` holds a list per quantity, one entry a round.
        baseline: The name of the rival that the others are divided by.
    """
    reference = rivals.get(baseline, {}).get("samples", {})
    for record in rivals.values():
        record["figures"] = {}
        for quantity, samples in record.get("samples", {}).items():
            value = summary([sample for sample in samples if sample is not None])
            if value is not None:
                ratio = paired_ratio(samples, reference.get(quantity, ()))
                record["figures"][quantity] = {**value, "ratio": ratio}
