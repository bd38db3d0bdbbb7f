"""The public surface: names, packages, what an import does and does not do, and that every error is tested."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import graphopt
from graphopt import errors

ROOT = Path(graphopt.__file__).parent.parent
NAMES = {
    "transform",
    "restore",
    "records",
    "annotations",
    "optim",
    "passes",
    "GraphoptError",
    "nn",
    "patch_model",
    "patch_torch",
    "stream",
    "fill_store",
    "Layer2Layer",
    "layers",
    "pipeline_stage",
    "GradInitWrapper",
    "learn_init",
}  # grows with design.md, section 5


def python(script, **options):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, **options)


def test_names():
    assert set(dir(graphopt)) >= NAMES
    for name in ("transform", "restore", "records"):
        assert inspect.getdoc(getattr(graphopt, name))
    assert str(inspect.signature(graphopt.transform)).startswith("(model: 'Model', passes: ")
    assert list(inspect.signature(graphopt.transform).parameters) == [
        "model",
        "passes",
        "compiler",
        "dynamic",
        "options",
    ]
    kinds = {name: parameter.kind.name for name, parameter in inspect.signature(graphopt.transform).parameters.items()}
    assert {kinds[name] for name in ("compiler", "dynamic", "options")} == {"KEYWORD_ONLY"}
    assert graphopt.optim.TGAdamW
    assert graphopt.passes.TrueGrad


def test_everything_exported_is_imported_on_purpose():
    """``import x as x`` marks what is public; nothing else than submodules may appear beside it."""
    tree = ast.parse((ROOT / "graphopt" / "__init__.py").read_text())
    aliases = [alias for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for alias in aliases)
    assert NAMES <= {alias.name for alias in aliases}


def test_every_folder_is_packaged():
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("installed from a wheel")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {_package(file.parent) for top in ("graphopt", "passes") for file in (ROOT / top).rglob("__init__.py")}
    assert listed == found


def _package(folder):
    dotted = ".".join(folder.relative_to(ROOT).parts)
    return dotted if dotted.startswith("graphopt") else f"graphopt.{dotted}"


def test_passes_cannot_be_imported_from_the_root():
    done = python("import passes", cwd=ROOT)
    assert "ImportError: import graphopt.passes, not passes" in done.stderr


def test_import_brings_nothing_but_torch():
    script = (
        "import sys, torch, torch._inductor.compile_fx\n"
        "before = set(sys.modules)\n"
        "import graphopt\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"
        "print([n for n in ('matplotlib', 'transformers', 'rich', 'typer', 'sklearn', 'psutil') if n in sys.modules])"
    )
    done = python(script)
    found, extras = done.stdout.splitlines()
    assert ast.literal_eval(found) <= {"graphopt", "torch"}, done.stderr
    assert extras == "[]"


def test_import_patches_nothing():
    script = (
        "import torch, torch._inductor.compile_fx as inductor\n"
        "from torch._inductor.decomposition import decompositions\n"
        "parameter, module, optimizer, table = (dict(vars(c)) for c in (torch.nn.Parameter, torch.nn.Module, torch.optim.Optimizer, inductor))\n"
        "known = set(decompositions)\n"
        "import graphopt\n"
        "assert vars(torch.nn.Parameter) == parameter\n"
        "assert vars(torch.nn.Module) == module\n"
        "assert vars(torch.optim.Optimizer) == optimizer\n"
        "assert vars(inductor) == table\n"
        "assert set(decompositions) == known\n"
        "print('nothing')"
    )
    done = python(script)
    assert done.stdout.strip() == "nothing", done.stderr


def test_torch_outside_the_supported_range():
    script = "import torch; torch.__version__ = '2.99.0'\nimport graphopt"
    assert "ImportError: graphopt needs torch >=2.11,<2.16 and found 2.99.0" in python(script).stderr


def classes():
    return [value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__]


def test_errors_derive_from_the_builtin_that_fits():
    for cls in classes():
        if issubclass(cls, Warning):
            assert issubclass(cls, UserWarning)
        else:
            assert issubclass(cls, errors.GraphoptError)
            if cls is not errors.GraphoptError:
                assert cls.__bases__[0] is errors.GraphoptError
                assert len(cls.__bases__) == 2
        assert inspect.getdoc(cls)


def test_every_error_has_a_test_that_matches_its_text():
    matched = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in ("pytest.raises", "pytest.warns") and any(
                k.arg == "match" for k in call.keywords
            ):
                matched |= {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
                matched |= {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
        matched |= {name for name in ("SampleAxisError", "UnsupportedError") if f'"{name}": (' in file.read_text()}
    assert {cls.__name__ for cls in classes()} - matched <= {"GraphoptError"}
