"""The command ``graphopt``: one function below for each of its commands.

A function with ``@app.command()`` is a command, its docstring the help text. Errors of graphopt end as one line on standard
error, with exit code 2 if the options are to blame, else 1.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NoReturn

try:
    import typer
    from rich.console import Console
    from typer.core import TyperGroup
except ImportError as missing:
    raise SystemExit(
        f"graphopt: the command line needs {missing.name}, which is not installed: pip install 'graphopt[cli]'"
    ) from missing

import torch
from torch import nn

from graphopt.errors import GraphoptError, OptionError
from graphopt.inspect.plan import make_plan
from graphopt.passes import LayerToLayer

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

_FAILED, _MISUSED = 1, 2  # exit codes


class _Commands(TyperGroup):
    """Ends on graphopt's errors without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GraphoptError as error:
            _fail(str(error), _MISUSED if isinstance(error, OptionError) else _FAILED)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """What the console script runs."""
    app(prog_name="graphopt")


@app.callback()
def graphopt() -> None:
    """A compiler for training PyTorch models."""


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="PACKAGE.MODULE:FUNCTION or PATH/TO/FILE.py:FUNCTION, a function without arguments that returns (model, args) "
            "or (model, args, kwargs); or the path of a Hugging Face config.json, or of a folder with one.",
            show_default=False,
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Samples of a batch, for a config.json.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample, for a config.json.")] = 512,
    store: Annotated[Literal["cpu", "disk"], typer.Option(help="Where the weights live.")] = "disk",
    store_path: Annotated[
        Path, typer.Option(help="Folder of the disk store. Nothing is written to it; its disk is measured.")
    ] = Path("graphopt-store"),
    microbatch_size: Annotated[int | None, typer.Option(min=1, help="Samples that a layer computes at once.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, sgd, sgd_momentum, tgadamw, ...")] = "adamw",
    device: Annotated[str | None, typer.Option(help="Where layers compute; without it, where the model is.")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Update a layer while backward goes on.")] = False,
    prefetch: Annotated[int, typer.Option(min=0, help="Layers that are loaded ahead.")] = 1,
    meta: Annotated[
        bool, typer.Option("--meta", help="Call FUNCTION under torch.device('meta'), without memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, seconds, operations.")] = False,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure this machine's speeds.")] = True,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="Bytes per second to and from the store, with --no-measure.", show_default=False),
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="Operations per second of the device, with --no-measure.", show_default=False)
    ] = None,
) -> None:
    """Say what it takes to train MODEL layer by layer: memory, bytes moved, time. Nothing is run, and no weights are loaded."""
    if measure and (bandwidth is not None or flops is not None):
        _fail("--bandwidth and --flops say what measuring would find out: add --no-measure", _MISUSED)
    load = _loader(model, batch, tokens, meta)
    layer_to_layer = LayerToLayer(
        store=store,
        store_path=store_path if store == "disk" else None,
        device=_device(device),
        microbatch_size=microbatch_size,
        eager=eager,
        prefetch=prefetch,
    )
    with Console(stderr=True).status("making the model"):
        module, args, kwargs = load()
    with Console(stderr=True).status("capturing the model" + (" and measuring this machine" if measure else "")):
        made = make_plan(
            layer_to_layer,
            module,
            args,
            kwargs,
            optimizer=optimizer,
            measure=measure,
            bandwidth=bandwidth,
            flops=flops,
        )
    print(json.dumps(made.to_dict(), indent=2) if as_json else made)


# --------------------------------------------------------------------------------------------------------- what MODEL means


def _loader(model: str, batch: int, tokens: int, meta: bool) -> Callable[[], Call]:
    """A function that makes the model, after the cheap checks of its name."""
    path = Path(model)
    if path.is_dir() or path.suffix == ".json":
        config = path / "config.json" if path.is_dir() else path
        if not config.is_file():
            _fail(f"MODEL {model}: there is no {config}. Give a Hugging Face config.json, or MODULE:FUNCTION", _MISUSED)
        return lambda: _from_config(config, batch, tokens)
    place, colon, name = model.rpartition(":")
    if not colon or not place or not name.isidentifier():
        _fail(
            f"MODEL {model!r} is neither a config.json, nor a folder with one, nor package.module:function, nor "
            "path/to/file.py:function",
            _MISUSED,
        )
    if place.endswith(".py") and not Path(place).is_file():
        _fail(f"MODEL {model}: there is no file {place}", _MISUSED)
    return lambda: _from_function(place, name, meta)


def _from_function(place: str, name: str, meta: bool) -> Call:
    """Call the function that a user names."""
    module = _import(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        _fail(
            f"MODEL {place}:{name}: {place} has no function {name!r}; it has {', '.join(known[:10]) or 'none'}",
            _MISUSED,
        )
    with ExitStack() as stack:
        if meta:
            stack.enter_context(torch.device("meta"))
        made = function()
    match made:
        case (nn.Module() as model, tuple() | list() as args):
            return model, tuple(args), {}
        case (nn.Module() as model, tuple() | list() as args, Mapping() as kwargs):
            return model, tuple(args), dict(kwargs)
    found = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else type(made).__name__
    _fail(
        f"MODEL {place}:{name} returned {found}; return (model, args) or (model, args, kwargs), args a tuple", _MISUSED
    )


def _import(place: str) -> ModuleType:
    """The module at a dotted name or in a file; the folder of either may hold others that it imports."""
    if place.endswith(".py"):
        path = Path(place).absolute()
        sys.path.insert(0, str(path.parent))
        name = f"_graphopt_{path.stem}"  # not the name of a module that others import
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, "")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # an import inside of it, which its traceback explains
        _fail(f"MODEL {place}: there is no module {error.name!r} here or in the environment", _MISUSED)


def _from_config(config: Path, batch: int, tokens: int) -> Call:
    """A language model without values, and a batch of zeros: nothing depends on which tokens they are."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        _fail(f"MODEL {config}: a config.json needs transformers: pip install 'graphopt[hf]'", _FAILED)
    transformers.logging.set_verbosity_error()
    try:
        settings = transformers.AutoConfig.from_pretrained(str(config), local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings)
            ids = torch.zeros(batch, tokens, dtype=torch.long)
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        _fail(
            f"MODEL {config}: not the config.json of a causal language model that transformers {transformers.__version__} knows "
            f"({reason}). Give a function that makes the model: path/to/file.py:function",
            _MISUSED,
        )
    return model.train(), (), {"input_ids": ids, "labels": ids, "use_cache": False}


def _device(name: str | None) -> torch.device | None:
    try:
        return None if name is None else torch.device(name)
    except RuntimeError:
        _fail(f"--device {name}: no such kind of device; cpu, cuda or cuda:1", _MISUSED)


def _fail(text: str, code: int) -> NoReturn:
    """One line on standard error, and the end."""
    print(f"graphopt: {' '.join(text.split())}", file=sys.stderr)
    raise typer.Exit(code)
