"""Tables and pictures from the result files.

``python -m benchmarks.report`` writes ``results/README.md`` and its pictures; ``--embed FILE`` also fills FILE in: what
stands between ``<!-- benchmark: <name> -->`` and ``<!-- end of benchmark -->`` becomes that benchmark's summary.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results, run
from benchmarks.harness import Benchmark
from benchmarks.pictures import draw, draw_curves
from benchmarks.tables import case_table, machine_line, summary_table

BEGIN, END = "<!-- benchmark: {name} -->", "<!-- end of benchmark -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the JSON (default %(default)s)")
    parser.add_argument("--embed", type=Path, metavar="FILE", help="a markdown file with markers to fill")
    parser.add_argument("--machine", metavar="SLUG", help="whose figures to embed (default: the newest)")
    options = parser.parse_args(arguments)
    contents = results.load(options.results)
    if not contents:
        raise SystemExit(f"there are no results in {options.results}; run python -m benchmarks.run first")
    print(f"written to {write(options.results, contents)}")
    if options.embed:
        names = embed(options.embed, contents, options.machine, pictures=options.results)
        print(f"{options.embed}: filled in {', '.join(names) or 'nothing, it has no markers'}")
    return 0


def write(folder: Path, contents: Sequence[dict[str, Any]]) -> Path:
    """Write README.md and the pictures beside the result files."""
    parts = ["# Results\n\nWritten by `python -m benchmarks.report`; `benchmarks/README.md` says how to read it.\n"]
    for content in contents:
        benchmark = _benchmark(content["benchmark"])
        stem = f"{content['benchmark']}-{content['machine']['slug']}"
        parts.append(f"## {benchmark.title}\n\n{benchmark.text}\n\n{machine_line(content['machine'])}\n")
        if conclusions := benchmark.conclusions(content["cases"]):
            parts.append(f"{conclusions}\n")
        for curves in benchmark.curves(content["cases"]):
            picture = f"{stem}-{curves.name}.png"
            if draw_curves(folder / picture, curves):
                parts.append(f"![{curves.title}]({picture})\n")
        for name, record in content["cases"].items():
            picture = f"{stem}-{name}.png"
            drawn = draw(folder / picture, record)
            parts.append(f"### {name}\n\n{case_table(name, record)}" + (f"\n![{name}]({picture})\n" if drawn else ""))
    path = folder / "README.md"
    path.write_text("\n".join(parts))
    return path


def embed(
    path: Path, contents: Sequence[dict[str, Any]], machine: str | None = None, pictures: Path | None = None
) -> list[str]:
    """Fill the markers of a markdown file; returns the names of the benchmarks that were filled in.

    Args:
        path: The file.
        contents: Of the result files.
        machine: Whose figures; the newest by default.
        pictures: The folder that `write` has drawn curves into; they are shown below the summary.
    """
    text, filled = path.read_text(), []
    for name in dict.fromkeys(content["benchmark"] for content in contents):
        mine = [content for content in contents if content["benchmark"] == name]
        mine = [content for content in mine if machine in (None, content["machine"]["slug"])]
        begin = BEGIN.format(name=name)
        if not mine or begin not in text:
            continue
        newest = max(mine, key=lambda content: max(record["date"] for record in content["cases"].values()))
        summary = _benchmark(name).conclusions(newest["cases"]) or summary_table(newest)
        for curves in () if pictures is None else _benchmark(name).curves(newest["cases"]):
            picture = pictures / f"{name}-{newest['machine']['slug']}-{curves.name}.png"
            if picture.exists():
                summary += f"\n\n![{curves.title}]({os.path.relpath(picture, path.parent)})"
        block = f"{begin}\n{summary}\n\n{machine_line(newest['machine'])}\n{END}"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(END), flags=re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{path} has {begin} but no {END} after it")
        text = pattern.sub(lambda _, block=block: block, text)
        filled.append(name)
    path.write_text(text)
    return filled


def _benchmark(name: str) -> Benchmark:
    if name in run.names():
        return run.find(name)
    return Benchmark(
        name=name, title=name, text="This benchmark is no longer in the repository.", cases=lambda quick: ()
    )


if __name__ == "__main__":
    raise SystemExit(main())
