"""What the statistic ``sum_grad_squared`` costs: the pass TrueGrad against plain training and against its peers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.harness import Benchmark, Case, Rival
from benchmarks.worker import Task

EXACT, ROUNDED = 1e-4, 2e-2  # largest relative error of float32, and of squares in bfloat16
ZERO = (
    1e-20  # a reference this small beside the largest one is a gradient that vanishes by symmetry (BERT's key biases)
)
LEARNING_RATE = 1e-5  # small: hundreds of steps on one batch must not end in overflow


def build(*, workload: dict[str, Any], method: dict[str, Any], optimizer: str = "adamw", check: object = None) -> Task:
    """A training step: forward, loss, backward, optimizer, zero_grad.

    Args:
        workload: Arguments of ``workloads.make``.
        method: ``{"name": a function of truegrad_rivals, and its options}``.
        optimizer: ``"adamw"``, torch's fused one, or ``"tgadamw"``.
        check: For the function ``check`` only.
    """
    import torch

    from benchmarks import truegrad_rivals, workloads

    training = workloads.make(**workload)
    used = getattr(truegrad_rivals, method["name"])(training, **_without_name(method))
    parameters = list(training.model.parameters())  # after the method: patch_model replaces them
    if optimizer == "tgadamw":
        from graphopt.optim import TGAdamW

        updates = TGAdamW(parameters, lr=LEARNING_RATE)
    else:
        updates = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step() -> None:
        used.backward()
        if used.has_statistic:  # reading may cost something, too
            for parameter in parameters:
                _ = parameter.sum_grad_squared
        updates.step()
        updates.zero_grad()
        used.clear()

    return Task(step, lambda: {"num_parameters": sum(parameter.numel() for parameter in parameters)})


def check(*, workload: dict[str, Any], method: dict[str, Any], check: dict[str, Any], **_: object) -> dict[str, Any]:
    """Compare gradient and statistic with a loop over samples in float64, on the small workload ``check``.

    Two steps are taken and the second is compared, so that a statistic that is never cleared is found out.
    """
    from benchmarks import truegrad_rivals, workloads

    training = workloads.make(**check, dropout=False)
    method = {**method, "chunk": 2} if "chunk" in method else method
    used = getattr(truegrad_rivals, method["name"])(training, **_without_name(method))
    for _step in range(2):
        for parameter in training.model.parameters():
            parameter.grad = None
        used.clear()
        used.backward()
    return _compare(
        dict(training.model.named_parameters()), *_loop_over_samples(workloads.make(**check, dropout=False))
    )


def _loop_over_samples(workload: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradient and statistic by definition: one backward per sample."""
    import torch

    model = workload.model.double()
    samples = [workload.sample(index) for index in range(workload.num_samples)]
    samples = [{name: t.double() if t.is_floating_point() else t for name, t in sample.items()} for sample in samples]
    names, parameters = zip(*model.named_parameters(), strict=True)
    total, squares = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    for sample in samples:
        contributions = torch.autograd.grad(workload.loss(model, sample) / len(samples), parameters)
        for contribution, gradient, square in zip(contributions, total, squares, strict=True):
            gradient += contribution
            square += contribution.square()
    return dict(zip(names, total, strict=True)), dict(zip(names, squares, strict=True))


def _compare(parameters: dict[str, Any], gradients: dict[str, Any], squares: dict[str, Any]) -> dict[str, Any]:
    largest = max(square.max().item() for square in squares.values())
    checked = [name for name, square in squares.items() if square.max().item() > ZERO * largest]
    statistics = {name: getattr(parameters.get(name), "sum_grad_squared", None) for name in checked}
    missing = [name for name, statistic in statistics.items() if statistic is None]
    errors = {name: _relative_error(statistics[name], squares[name]) for name in checked if name not in missing}
    worst = max(errors, key=lambda name: errors[name], default=None)
    return {
        "verdict": _verdict(errors[worst] if worst else None, missing),
        "max_relative_error": errors[worst] if worst else None,
        "worst_parameter": worst,
        "num_checked": len(checked),
        "num_wrong": sum(error > ROUNDED for error in errors.values()),
        "num_missing": len(missing),
        "missing": missing[:5],
        "gradient_relative_error": max(_relative_error(parameters[name].grad, gradients[name]) for name in checked),
    }


def _relative_error(got: Any, want: Any) -> float:
    if got is None or got.shape != want.shape:
        return float("inf")
    error: float = ((got.double() - want).abs().max() / want.abs().max()).item()
    return error if error == error else float("inf")


def _verdict(error: float | None, missing: list[str]) -> str:
    if error is None:
        return "none"
    word = "exact" if error <= EXACT else "rounded" if error <= ROUNDED else "wrong"
    return f"{word}, {len(missing)} missing" if missing else word


def _without_name(method: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in method.items() if key != "name"}


# --- the cases --------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> tuple[Case, ...]:
    """BERT, the MLP at two batch sizes, GPT-2 with a large and a small tied embedding, CNNs, and BERT's start."""
    bert = {"kind": "bert", **({"layers": 2, "hidden": 64, "heads": 2, "batch": 4, "length": 16} if quick else {})}
    return (
        _bert(bert),
        *(_mlp(batch, {"kind": "mlp", "batch": batch, **({"hidden": 64} if quick else {})}) for batch in (256, 64)),
        *(_gpt2(vocabulary, quick) for vocabulary in (50257, 256)),
        _resnet(quick),
        _cnn(quick),
        Case(
            name="bert-starts",
            title="First training step of the same BERT in a new process, without and with filled compile caches",
            rivals=(_rival("inductor", bert), _rival("graphopt", bert)),
            baseline="inductor",
            measure="starts",
        ),
    )


def _bert(sizes: dict[str, Any]) -> Case:
    small = {"kind": "bert", "layers": 2, "hidden": 64, "heads": 2, "batch": 4, "length": 16}
    names = ("eager", "inductor", "graphopt", "graphopt-tgadamw", "graphopt-no-pass")
    peers = ("vmap-grad", "vmap-grad-compiled", "opacus", "truegrad-patch-model")
    return Case(
        name="bert",
        title="One training step of BERT for classification, 4 layers of 256, batch 16, 128 tokens, dropout, AdamW",
        rivals=tuple(_rival(name, sizes, small, chunk=4) for name in (*names, *peers)),
        baseline="inductor",
    )


def _mlp(batch: int, sizes: dict[str, Any]) -> Case:
    small = {"kind": "mlp", "inputs": 32, "hidden": 48, "batch": 8}
    names = ("eager", "inductor", "graphopt", "graphopt-bfloat16")
    peers = ("backpack", "truegrad-nn", "opacus", "vmap-grad", "vmap-grad-compiled")
    return Case(
        name=f"mlp-{batch}",
        title=f"One training step of an MLP 784-1024-1024-1024-10, batch {batch}, AdamW",
        rivals=tuple(_rival(name, sizes, small, chunk=32) for name in (*names, *peers)),
        baseline="inductor",
    )


def _gpt2(vocabulary: int, quick: bool) -> Case:
    small = {"kind": "gpt2", "layers": 1, "hidden": 32, "heads": 2, "batch": 3, "length": 12, "vocabulary": vocabulary}
    return Case(
        name=f"gpt2-{vocabulary}",
        title=f"One training step of GPT-2, 4 layers of 256, {vocabulary} tied embeddings, batch 8, 128 tokens, "
        "dropout, AdamW",
        rivals=tuple(
            _rival(name, small if quick else {"kind": "gpt2", "vocabulary": vocabulary}, small, chunk=2)
            for name in ("eager", "inductor", "graphopt", "vmap-grad")
        ),
        baseline="inductor",
    )


def _resnet(quick: bool) -> Case:
    """Peers do not have the statistic with BatchNorm, whose samples are not independent; they run with GroupNorm.

    So the check, a loop over samples, is made with GroupNorm; the tests compare BatchNorm with a copy of the parameters for
    each sample.
    """
    small = {"kind": "resnet", "width": 8, "blocks": 1, "size": 8, "batch": 4, "grouped": True}
    sizes = {**small, "grouped": False} if quick else {"kind": "resnet"}
    ours = [_rival(name, sizes, small) for name in ("eager", "inductor", "graphopt")]
    grouped = {**sizes, "grouped": True}
    peers = [_rival(name, grouped, small, chunk=8) for name in ("opacus", "vmap-grad", "vmap-grad-compiled")]
    notes = ["; ".join(part for part in ("with GroupNorm", peer.note) if part) for peer in peers]
    return Case(
        name="resnet",
        title="One training step of a residual network with BatchNorm, 32 to 128 channels, 64 images of 32x32, AdamW",
        rivals=(*ours, *(replace(peer, note=note) for peer, note in zip(peers, notes, strict=True))),
        baseline="inductor",
    )


def _cnn(quick: bool) -> Case:
    small = {"kind": "cnn", "width": 8, "size": 8, "batch": 4}
    names = ("eager", "inductor", "graphopt", "backpack", "opacus", "vmap-grad", "vmap-grad-compiled")
    return Case(
        name="cnn",
        title="One training step of six convolutions in a row, 32 to 128 channels, 64 images of 32x32, AdamW",
        rivals=tuple(_rival(name, small if quick else {"kind": "cnn"}, small, chunk=8) for name in names),
        baseline="inductor",
    )


def _rival(name: str, sizes: dict[str, Any], small: dict[str, Any] | None = None, *, chunk: int = 1) -> Rival:
    """The rival of that name on a workload; checked on ``small`` if it has the statistic."""
    description: dict[str, Any] = {
        "eager": {"label": "PyTorch, eager", "method": {"name": "eager"}},
        "inductor": {"label": "torch.compile (Inductor)", "method": {"name": "inductor"}},
        "graphopt": {"label": "graphopt TrueGrad", "method": {"name": "graphopt"}},
        "graphopt-tgadamw": {
            "label": "graphopt TrueGrad and TGAdamW",
            "method": {"name": "graphopt"},
            "optimizer": "tgadamw",
            "note": "TGAdamW instead of AdamW; the statistic is that of the row above",
        },
        "graphopt-bfloat16": {
            "label": "graphopt TrueGrad, squares in bfloat16",
            "method": {"name": "graphopt", "square_dtype": "bfloat16"},
        },
        "graphopt-no-pass": {"label": "graphopt, no pass", "method": {"name": "graphopt", "true_grad": False}},
        "vmap-grad": {
            "label": "torch.func vmap(grad)",
            "method": {"name": "vmap_grad", "chunk": chunk},
            "note": f"{chunk} samples at a time",
        },
        "vmap-grad-compiled": {
            "label": "torch.func vmap(grad), compiled",
            "method": {"name": "vmap_grad", "chunk": chunk, "compiled": True},
            "note": f"{chunk} samples at a time",
        },
        "opacus": {
            "label": "Opacus",
            "method": {"name": "opacus"},
            "note": "BERT is given its position ids explicitly" if sizes["kind"] == "bert" else "",
        },
        "backpack": {"label": "BackPACK SumGradSquared", "method": {"name": "backpack"}},
        "truegrad-patch-model": {"label": "TrueGrad patch_model", "method": {"name": "truegrad_patch_model"}},
        "truegrad-nn": {"label": "truegrad.nn", "method": {"name": "truegrad_nn"}},
    }[name]
    options = {"workload": sizes, "method": description["method"], "optimizer": description.get("optimizer", "adamw")}
    checked = name not in ("eager", "inductor", "graphopt-no-pass", "graphopt-tgadamw")
    return Rival(
        name=name,
        label=description["label"],
        build=build,
        check=check if checked and small is not None else None,
        options={**options, "check": small},
        environment="peers" if name in ("opacus", "backpack", "truegrad-patch-model", "truegrad-nn") else "current",
        ours=name.startswith("graphopt"),
        note=description.get("note", ""),
    )


BENCHMARK = Benchmark(
    name="truegrad",
    title="The price of per-sample squared gradients",
    text=(
        "Every rival takes the same training step; all but eager PyTorch, Inductor and *graphopt, no pass* also have, "
        "for each parameter, the sum over samples of the squared per-sample gradient. *Statistic* is what a loop over "
        "samples in float64 says about that value on a small model without dropout: *exact* to 1e-4, *rounded* to "
        "2e-2, or *wrong*."
    ),
    cases=cases,
)
