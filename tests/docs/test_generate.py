"""The generated parts of README.md are those that the registries give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_is_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run: python docs/generate.py\n{done.stderr}"


def test_readme_names_every_rule():
    text = (ROOT / "README.md").read_text()
    for file in (ROOT / "passes" / "truegrad" / "rules").glob("[a-z]*.py"):
        assert f"| `{file.stem}` |" in text
