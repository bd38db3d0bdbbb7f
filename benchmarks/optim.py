"""What a step of a chain of optimizer modules costs: graphopt against torch, torchzero, HeavyBall and a copy of as many bytes."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from benchmarks.harness import Benchmark, Case, Rival
from benchmarks.optim_tables import LABELS, OVERHEAD_METHODS, SCHEDULED_STEPS, SET_LABELS, TIMED_ELEMENTS, conclusions
from benchmarks.worker import Task

BERT = {"kind": "bert", "vocabulary": 30522, "positions": 512}
SETS: dict[str, dict[str, Any]] = {
    "bert-11m": {**BERT, "layers": 4, "hidden": 256, "intermediate": 1024},
    "bert-110m": {**BERT, "layers": 12, "hidden": 768, "intermediate": 3072},
    "small-1000": {"kind": "equal", "number": 1000, "elements": 1000},
}
TINY_BERT = {"kind": "bert", "vocabulary": 100, "positions": 16, "layers": 1, "hidden": 32, "intermediate": 64}
QUICK_SETS: dict[str, dict[str, Any]] = {
    "bert-11m": TINY_BERT,
    "bert-110m": {**TINY_BERT, "layers": 2},
    "small-1000": {"kind": "equal", "number": 30, "elements": 100},
}
NUMBERS, QUICK_NUMBERS = (100, 200, 1000), (10, 30)  # of tensors, for the overhead
COUNTED_ELEMENTS = 1000
ROUNDS, LONG_ROUNDS, START_ROUNDS = 9, 7, 2  # of chains; of the largest set; of starts
CHECKED_SHAPES, CHECKED_STEPS = ((7, 13), (1000,), (31,)), 6
CHECKED_SCALES = (1.0, 20.0, 0.01)  # of the gradients, one after the other: some are clipped, and norms grow suddenly
SAME, CLOSE = 1e-5, 1e-2  # of the way that a parameter has gone: rounded only, or another formula
UNCOMPILABLE = ("small-1000",)  # HeavyBall takes 4.5 minutes to compile its step
COPIED_BYTES = 2**28  # at most, so that the largest set still fits

PEERS = ("torchzero", "heavyball")
ADAMW_METHODS = ("torch-fused", "graphopt", "torch-foreach", "torch-loop", "torchzero", "heavyball", "copy")
CHAIN_METHODS = ("torch-fused", "graphopt", "foreach", "torchzero", "copy")
OTHER_CHAINS = ("lion", "laprop", "signum", "cautious")


def build(*, parameters: dict[str, Any], method: str, chain: str, device: str) -> Task:
    """A step, and nothing else.

    Args:
        parameters: Arguments of ``optim_rivals.shapes``.
        method: A key of ``LABELS``; those of torch, and a copy, take the place of any chain.
        chain: A key of ``optim_rivals.CHAINS``.
        device: Where the parameters lie.
    """
    from benchmarks import optim_rivals

    if method == "copy":
        return _copy(parameters, chain, device)
    optim_rivals.prepare(method)
    held = optim_rivals.make_parameters(optim_rivals.shapes(**parameters), device)
    made = optim_rivals.optimizer(method, chain, held)
    moved = optim_rivals.CHAINS["adamw" if method.startswith("torch-") else chain].num_bytes
    return Task(optim_rivals.step_of(method, made), lambda: _sizes(held, moved))


def build_first(*, parameters: dict[str, Any], method: str, chain: str, device: str, imported: bool = False) -> Task:
    """A first step: the compiler is imported in it, unless it is to be ``imported`` before."""
    import torch

    from benchmarks import optim_rivals

    optim_rivals.prepare(method)
    if imported:
        from benchmarks import regions

        regions._import_compilers()
    held = optim_rivals.make_parameters(optim_rivals.shapes(**parameters), device)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    made = optim_rivals.optimizer(method, chain, held)
    construction = time.perf_counter() - start
    return Task(optim_rivals.step_of(method, made), lambda: {"construction_seconds": construction})


def build_scheduled(*, parameters: dict[str, Any], method: str, chain: str, device: str) -> Task:
    """A step of the optimizer and of a scheduler of its learning rate; counts what Inductor compiles."""
    import torch

    from benchmarks import optim_rivals

    compiled = _count_compilations()
    optim_rivals.prepare(method)
    held = optim_rivals.make_parameters(optim_rivals.shapes(**parameters), device)
    made = optim_rivals.optimizer(method, chain, held)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(made, SCHEDULED_STEPS)
    step = optim_rivals.step_of(method, made)
    by_step: list[int] = []

    def both() -> None:
        step()
        scheduler.step()
        by_step.append(len(compiled))

    return Task(both, lambda: {"num_compiled": by_step[-1], "num_compiled_in_first": by_step[0]})


def build_counted(*, parameters: dict[str, Any], method: str, chain: str, device: str) -> Task:
    """A step; its function calls are counted in one more, when all are over."""
    task = build(parameters=parameters, method=method, chain=chain, device=device)
    return Task(task.step, lambda: count_calls(task.step))


def count_calls(function: Callable[[], object]) -> dict[str, int]:
    """How many functions are called: those written in Python, and those that Python calls into C."""
    counts = {"call": 0, "c_call": 0}

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in counts:
            counts[event] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    counts["c_call"] -= 1  # the last call of setprofile
    return {"num_calls": sum(counts.values()), "num_python_calls": counts["call"], "num_c_calls": counts["c_call"]}


def build_method(*, shapes: list[list[int]], method: str, library: str, device: str) -> Task:
    """Ten steps of one of ``optim_methods.METHODS``, and nothing else."""
    from benchmarks import optim_methods, optim_rivals

    optim_rivals.prepare(library)
    held = optim_methods.make_parameters(shapes, device)
    return Task(optim_methods.stepper(method, library, held), lambda: _sizes(held, 0))


def _copy(parameters: dict[str, Any], chain: str, device: str) -> Task:
    """As many bytes as the chain must move, half of them read and half of them written, in one copy."""
    import torch

    from benchmarks import optim_rivals

    source = torch.ones(_copied_bytes(chain, parameters) // optim_rivals.FLOAT, device=device)
    target = torch.zeros_like(source)
    return Task(lambda: target.copy_(source), lambda: {"num_bytes": 2 * source.nbytes})


def _copied_bytes(chain: str, parameters: Mapping[str, Any]) -> int:
    from benchmarks import optim_rivals

    moved = sum(map(prod, optim_rivals.shapes(**parameters))) * optim_rivals.CHAINS[chain].num_bytes
    return min(moved // 2, COPIED_BYTES)


def _sizes(parameters: Sequence[Any], bytes_of_one: int) -> dict[str, int]:
    num = sum(parameter.numel() for parameter in parameters)
    return {"num_tensors": len(parameters), "num_elements": num, "num_bytes": num * bytes_of_one}


def _count_compilations() -> list[None]:
    """A list that grows by one for each graph that Inductor compiles and does not find in a cache."""
    import torch._inductor.compile_fx as inductor

    compiled: list[None] = []
    compile_graph = inductor.fx_codegen_and_compile

    def counted(*args: Any, **kwargs: Any) -> Any:
        compiled.append(None)
        return compile_graph(*args, **kwargs)

    inductor.fx_codegen_and_compile = counted  # in this process, which does nothing else
    return compiled


# --- the check --------------------------------------------------------------------------------------------------------


def check(*, method: str, chain: str, device: str, **_: Any) -> dict[str, Any]:
    """Take steps with new gradients, and compare where each parameter has gone with the same in float64."""
    import torch

    from benchmarks import optim_rivals

    optim_rivals.prepare(method)
    held = optim_rivals.make_parameters(CHECKED_SHAPES, device)
    exact = [torch.nn.Parameter(parameter.detach().double()) for parameter in held]
    start = [parameter.detach().clone() for parameter in exact]
    ours = optim_rivals.step_of(method, optim_rivals.optimizer(method, chain, held))
    wanted = optim_rivals.Foreach(exact, optim_rivals.CHAINS["adamw" if method.startswith("torch-") else chain])
    for number in range(CHECKED_STEPS):
        for mine, other in zip(held, exact, strict=True):
            mine.grad = torch.randn_like(mine) * CHECKED_SCALES[number % len(CHECKED_SCALES)]
            other.grad = mine.grad.double()
        ours()
        wanted.step()
    errors = []
    for mine, other, before in zip(held, exact, start, strict=True):
        rounding = CHECKED_STEPS * torch.finfo(mine.dtype).eps * other.abs().max()  # of the parameter itself
        gone = (other - before).abs().max()
        errors.append((((mine.double() - other).abs().max() - rounding).clamp(min=0) / gone).item())
    worst = max(errors)
    verdict = "same" if worst <= SAME else "close" if worst <= CLOSE else "another rule"
    return {"verdict": verdict, "max_relative_error": worst}


# --- the cases --------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> tuple[Case, ...]:
    """Steps of each chain; then first steps, compilations under a scheduler, function calls, and steps of tiny tensors."""
    from benchmarks import optim_methods

    device = _device()
    sets = QUICK_SETS if quick and device == "cpu" else SETS  # a GPU takes real sizes in no time
    numbers = QUICK_NUMBERS if quick else NUMBERS
    plan = [(chain, name) for chain in ("adamw", "readme") for name in sets]
    plan += [(chain, "bert-11m") for chain in OTHER_CHAINS]
    if quick:
        plan = [("adamw", "bert-11m"), ("readme", "bert-11m")]
    return (
        *(_steps(chain, name, sets[name], device, quick) for chain, name in plan),
        _starts(sets, device, quick),
        _compilations(sets, device, quick),
        *_overheads(numbers, device),
        *(_ten_steps(*item, device, quick) for item in optim_methods.plan(quick)),
    )


def _device() -> str:
    """Where the parameters lie: on a GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _rival(
    name: str, method: str, label: str, how: Callable[..., Task], *, checked: bool = False, **options: Any
) -> Rival:
    return Rival(
        name=name,
        label=label,
        build=how,
        check=check if checked else None,
        options={"method": method, **options},
        environment=_environment(method),
        ours=method == "graphopt",
    )


def _environment(library: str) -> str:
    # A machine that cannot build the environment may have a peer beside torch.
    return "optim" if library in PEERS and importlib.util.find_spec(library) is None else "current"


def _steps(chain: str, name: str, parameters: dict[str, Any], device: str, quick: bool) -> Case:
    from benchmarks import optim_rivals

    described = optim_rivals.CHAINS[chain]
    methods = list(ADAMW_METHODS if chain == "adamw" else CHAIN_METHODS)
    left_out = ("heavyball", "torch-loop") if quick else ("heavyball",) if name in UNCOMPILABLE else ()
    methods = [method for method in methods if method not in left_out]
    if not quick and (chain, name) == ("adamw", "bert-11m"):
        methods.append("torch-compiled")  # it takes minutes to compile the others
    options = {"parameters": parameters, "chain": chain, "device": device}
    rounds = LONG_ROUNDS if name == "bert-110m" else None if chain == "adamw" else ROUNDS
    return Case(
        name=f"{chain}-{name}",
        title=f"One step of [{described.title}] on {_described(parameters)}, {device}: {described.num_bytes} bytes an element",
        rivals=tuple(
            _rival(method, method, _label(method, chain, parameters), build, checked=method != "copy", **options)
            for method in methods
        ),
        baseline="torch-fused",
        rounds=rounds,
        checked="against float64",
        shares_caches=True,
    )


def _label(method: str, chain: str, parameters: Mapping[str, Any]) -> str:
    """In a table of times; a copy may be of fewer bytes than the chain moves."""
    return f"a copy of {_copied_bytes(chain, parameters) / 1e6:.3g} MB" if method == "copy" else LABELS[method]


def _starts(sets: Mapping[str, Any], device: str, quick: bool) -> Case:
    plan = [
        ("graphopt", chain, name) for chain in ("adamw", "readme") for name in sets if not quick or name == "bert-11m"
    ]
    if not quick:
        plan += [("heavyball", "adamw", name) for name in sets if name not in UNCOMPILABLE]
        plan.append(("torch-compiled", "adamw", "bert-11m"))
    plan.append(("torch-fused", "adamw", "bert-11m"))
    imported = _by_chain("graphopt", "readme", "bert-11m", build_first, sets, device, imported=True)
    rivals = (
        *(_by_chain(*item, build_first, sets, device) for item in plan),
        replace(imported, name="graphopt-imported", label=f"{imported.label}, compiler imported before"),
    )
    return Case(
        name="starts",
        title=f"The first step in a new process with empty compile caches, {device}",
        rivals=rivals,
        baseline="graphopt-adamw-bert-11m",
        measure="starts",
        rounds=None if quick else START_ROUNDS,
        caches=("cold",),
    )


def _compilations(sets: Mapping[str, Any], device: str, quick: bool) -> Case:
    plan = [("graphopt", "adamw", "bert-11m"), ("graphopt", "readme", "bert-11m")]
    if not quick:
        plan += [("graphopt", "readme", "small-1000"), ("heavyball", "adamw", "bert-11m")]
    rivals = tuple(_by_chain(*item, build_scheduled, sets, device) for item in plan)
    return Case(
        name="compilations",
        title=f"Graphs that Inductor compiles in {SCHEDULED_STEPS} steps, each with another learning rate",
        rivals=rivals,
        baseline=rivals[0].name,
        measure="lives",
        steps=SCHEDULED_STEPS,
        columns={
            "num_compiled": "graphs compiled",
            "num_compiled_in_first": "of them in the first step",
            "first_step_seconds": "first step",
            "seconds": "last step",
        },
    )


def _by_chain(
    method: str, chain: str, name: str, how: Callable[..., Task], sets: Mapping[str, Any], device: str, **options: Any
) -> Rival:
    """A rival that is named after its chain and its parameters, too."""
    return _rival(
        f"{method}-{chain}-{name}",
        method,
        f"{LABELS[method]}, {chain}, {SET_LABELS[name]}",
        how,
        parameters=sets[name],
        chain=chain,
        device=device,
        **options,
    )


def _overheads(numbers: Sequence[int], device: str) -> tuple[Case, Case]:
    def rivals(how: Callable[..., Task], elements: int) -> tuple[Rival, ...]:
        return tuple(
            _rival(
                f"{method}-{number}",
                method,
                f"{LABELS[method]}, {number:,} tensors",
                how,
                parameters={"kind": "equal", "number": number, "elements": elements},
                chain="adamw",
                device=device,
            )
            for method in OVERHEAD_METHODS
            for number in numbers
        )

    calls = Case(
        name="calls",
        title=f"Functions that a step of a chain equal to AdamW calls, by the number of tensors of {COUNTED_ELEMENTS:,}",
        rivals=rivals(build_counted, COUNTED_ELEMENTS),
        baseline=f"torch-fused-{numbers[0]}",
        measure="lives",
        steps=3,
        columns={
            "num_calls": "function calls",
            "num_python_calls": "of Python functions",
            "num_c_calls": "of C functions",
            "seconds": "step",
        },
    )
    tiny = Case(
        name="tiny",
        title=f"One step of a chain equal to AdamW, by the number of tensors of {TIMED_ELEMENTS}, {device}",
        rivals=rivals(build, TIMED_ELEMENTS),
        baseline=f"torch-fused-{numbers[0]}",
        rounds=ROUNDS,
        shares_caches=True,
    )
    return calls, tiny


def _ten_steps(
    method: str, name: str, rivals: Mapping[str, Any], shapes: list[tuple[int, ...]], device: str, quick: bool
) -> Case:
    from benchmarks import optim_methods

    return Case(
        name=f"{method}-{name}",
        title=f"{optim_methods.PERIOD} steps of {optim_methods.TITLES[method]}: {optim_methods.SET_LABELS[name]}, {device}",
        rivals=tuple(
            Rival(
                name=library,
                label=optim_methods.LABELS[library],
                build=build_method,
                options={"shapes": shapes, "method": method, "library": library, "device": device},
                environment=_environment(library),
                ours=library == "graphopt",
            )
            for library in rivals
            if not (quick and library == "heavyball")  # it compiles for minutes
        ),
        baseline="graphopt",
        rounds=None if quick else LONG_ROUNDS,
        shares_caches=True,
    )


def _described(parameters: Mapping[str, Any]) -> str:
    from benchmarks import optim_rivals

    sizes = [prod(shape) for shape in optim_rivals.shapes(**parameters)]
    return f"{sum(sizes):,} parameters in {len(sizes):,} tensors"


BENCHMARK = Benchmark(
    name="optim",
    title="A step of an optimizer",
    text=(
        "Parameters of BERT's shapes or many small ones, float32, with random gradients that stay; only `step()` is timed. "
        "*Bytes an element* is what a chain must move if every state and gradient is read and written once: 28 for AdamW, which "
        "reads p, g, m, v and writes p, m, v. A *copy* reads and writes as many bytes as the chain (at most 256 MiB each way, on "
        "the same device). Checks take six steps on small tensors and compare with the chain in float64: *same* is rounding, "
        "*close* another place for a small constant such as eps. The first step is timed in a new process after the imports of "
        "torch and of the library, and after the optimizer was made; what the compiler imports then is part of it. Function "
        "calls are Python's `call` and `c_call` events in a step after the third."
    ),
    cases=cases,
    conclusions=conclusions,
)
