"""The Python environments that rivals run in: the current one, and ones of their own for peers.

A peer's environment sees everything that the current one has (torch is not installed twice) and, on top, the peers'
packages at fixed versions. What cannot be installed is remembered, and every rival that needs it reports the reason.
``python -m benchmarks.environments`` builds them all.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import ROOT

FOLDER = ROOT / "benchmarks" / ".venvs"

# Installed with --no-deps, so that no peer can replace torch; what a peer needs beside torch and numpy is listed too.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "peers": (
        "opacus==1.6.0",
        "opt-einsum==3.4.0",  # opacus
        "backpack-for-pytorch==1.7.1",
        "einops==0.8.2",  # backpack
        "unfoldNd==0.2.3",  # backpack
        "truegrad==5.0.0",
    ),
    "gradinit": ("gradinit==0.1.1",),
    "optim": (
        "torchzero==0.4.4",
        "heavyball==3.2.1",
        "opt-einsum==3.4.0",  # heavyball
    ),
    "layer-to-layer": ("layer-to-layer-pytorch==0.3.0",),  # it wants an older torch and numpy, and runs with these
}
ONLY_IF_MISSING = {"scipy": "scipy==1.17.1"}  # opacus; big, and usually there


@dataclass(frozen=True)
class Environment:
    """Where a rival's interpreter is, and what could not be installed for it.

    Args:
        name: ``"current"`` or a key of ``REQUIREMENTS``.
        python: Its interpreter.
        errors: The installer's words for each requirement that failed.
    """

    name: str
    python: Path
    errors: dict[str, str]


def environment(name: str) -> Environment:
    """The environment of that name, built if it is not there or no longer fits the current one."""
    if name == "current":
        return Environment(name, Path(sys.executable), {})
    if name not in REQUIREMENTS:
        raise ValueError(f"no environment is called {name!r}; there are 'current' and {sorted(REQUIREMENTS)}")
    folder = FOLDER / name
    wanted = _wanted(name)
    record = folder / "installed.json"
    if record.exists():
        built = json.loads(record.read_text())
        if built["wanted"] == wanted:
            return Environment(name, _python(folder), built["errors"])
    return Environment(name, _python(folder), _build(folder, wanted))


def _wanted(name: str) -> dict[str, object]:
    missing = [pin for package, pin in ONLY_IF_MISSING.items() if importlib.util.find_spec(package) is None]
    return {
        "requirements": [*REQUIREMENTS[name], *missing],
        "base": sys.executable,
        "python": sysconfig.get_python_version(),
    }


def _build(folder: Path, wanted: dict[str, object]) -> dict[str, str]:
    print(f"building the environment {folder.relative_to(ROOT)}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    requirements = wanted["requirements"]
    assert isinstance(requirements, list)
    try:
        venv.create(folder, with_pip=True)
    except subprocess.CalledProcessError as error:  # Debian's Python has no ensurepip
        return dict.fromkeys(requirements, f"no environment can be made here: {error}")
    python = _python(folder)
    errors = {}
    for requirement in requirements:  # one by one: a peer that cannot be had must not take the others along
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors[requirement] = done.stderr.strip()[-500:]
            print(f"  {requirement} cannot be installed: {errors[requirement]}", file=sys.stderr)
    _see_current_environment(python)
    (folder / "installed.json").write_text(json.dumps({"wanted": wanted, "errors": errors}, indent=2))
    return errors


def _see_current_environment(python: Path) -> None:
    """Append the current site-packages to the new environment's path, editable installs included."""
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    target = Path(subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    folders = dict.fromkeys([*site.getsitepackages(), *(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))])
    lines = [f"import site; site.addsitedir({path!r})" for path in folders]
    (target / "zz_current_environment.pth").write_text("\n".join(lines) + "\n")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


if __name__ == "__main__":
    for key in REQUIREMENTS:
        found = environment(key)
        print(f"{found.name}: {found.python}" + (f", without {sorted(found.errors)}" if found.errors else ""))
