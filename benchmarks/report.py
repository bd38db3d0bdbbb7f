"""Tables and pictures from the result files.

``python -m benchmarks.report`` writes ``results/README.md`` and its pictures; ``--embed FILE`` also fills FILE in: what
stands between ``<!-- benchmark: <name> -->`` and ``<!-- end of benchmark -->`` becomes that benchmark's summary.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results, run
from benchmarks.pictures import draw
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
        names = embed(options.embed, contents, options.machine)
        print(f"{options.embed}: filled in {', '.join(names) or 'nothing, it has no markers'}")
    return 0


def write(folder: Path, contents: Sequence[dict[str, Any]]) -> Path:
    """Write README.md and the pictures beside the result files."""
    parts = ["# Results\n\nWritten by `python -m benchmarks.report`; `benchmarks/README.md` says how to read it.\n"]
    for content in contents:
        title, text = _title_and_text(content["benchmark"])
        parts.append(f"## {title}\n\n{text}\n\n{machine_line(content['machine'])}\n")
        for name, record in content["cases"].items():
            picture = f"{content['benchmark']}-{content['machine']['slug']}-{name}.png"
            drawn = draw(folder / picture, record)
            parts.append(f"### {name}\n\n{case_table(name, record)}" + (f"\n![{name}]({picture})\n" if drawn else ""))
    path = folder / "README.md"
    path.write_text("\n".join(parts))
    return path


def embed(path: Path, contents: Sequence[dict[str, Any]], machine: str | None = None) -> list[str]:
    """Fill the markers of a markdown file; returns the names of the benchmarks that were filled in."""
    text, filled = path.read_text(), []
    for name in dict.fromkeys(content["benchmark"] for content in contents):
        mine = [content for content in contents if content["benchmark"] == name]
        mine = [content for content in mine if machine in (None, content["machine"]["slug"])]
        begin = BEGIN.format(name=name)
        if not mine or begin not in text:
            continue
        newest = max(mine, key=lambda content: max(record["date"] for record in content["cases"].values()))
        block = f"{begin}\n{summary_table(newest)}\n\n{machine_line(newest['machine'])}\n{END}"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(END), flags=re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{path} has {begin} but no {END} after it")
        text = pattern.sub(lambda _, block=block: block, text)
        filled.append(name)
    path.write_text(text)
    return filled


def _title_and_text(name: str) -> tuple[str, str]:
    if name not in run.names():
        return name, "This benchmark is no longer in the repository."
    benchmark = run.find(name)
    return benchmark.title, benchmark.text


if __name__ == "__main__":
    raise SystemExit(main())
