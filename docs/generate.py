"""Fill the generated tables of README.md from the registries: ``python docs/generate.py`` (``--check`` only compares)."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- rules -->", "<!-- end of rules -->"


def rules_table() -> str:
    """One row for each rule file of TrueGrad: what it serves, and what it costs."""
    from graphopt.passes.truegrad import rules
    from graphopt.passes.truegrad._registry import batched_rules, closed_rules

    rows = ["| rule | operators | what it computes |", "|---|---|---|"]
    for info in sorted(pkgutil.iter_modules(rules.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{rules.__name__}.{info.name}")
        targets = {
            t
            for table in (closed_rules, batched_rules)
            for t, rule in table.items()
            if rule.__module__ == module.__name__
        }
        operators = (
            ", ".join(sorted({f"`{target.overloadpacket.__name__}`" for target in targets})) or "`embedding` + `linear`"
        )
        summary = " ".join((module.__doc__ or "").split("\n\n")[0].split())
        rows.append(f"| `{info.name}` | {operators} | {summary.replace('``', '`')} |")
    rows.append(
        "| (general) | every operator that broadcasts | one gradient row for each sample, summed and squared in the same kernel |"
    )
    rows.append("| (general) | any other operator | `torch.func.vmap`; what it cannot batch is refused by name |")
    return "\n".join(rows)


def filled(text: str) -> str:
    """The text with its tables made anew."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), flags=re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no {BEGIN} ... {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{rules_table()}\n{END}", text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if README.md is out of date")
    before = README.read_text()
    after = filled(before)
    if parser.parse_args().check:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
