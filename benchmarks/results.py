"""Result files: one JSON per benchmark and machine, ``results/<benchmark>-<machine slug>.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import machine

FOLDER = machine.ROOT / "benchmarks" / "results"
SCRATCH_FOLDER = FOLDER / "scratch"  # quick and partial runs; not committed
FORMAT = 1


def store(folder: Path, benchmark: str, cases: dict[str, Any]) -> Path:
    """Write ``cases`` into the file of this benchmark on this machine; the others that it holds stay."""
    description = machine.describe()
    path = folder / f"{benchmark}-{description['slug']}.json"
    kept = json.loads(path.read_text())["cases"] if path.exists() else {}
    content = {"format": FORMAT, "benchmark": benchmark, "machine": description, "cases": {**kept, **cases}}
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)  # at once: whoever interrupts the run leaves a whole file
    return path


def load(folder: Path) -> list[dict[str, Any]]:
    """All result files of a folder, in the order of their names."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [content for content in contents if content.get("format") == FORMAT]
