"""Draw what chains do on functions of two variables: ``python -m docs.gallery`` writes gallery.md and gallery/*.png."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.optim import Modular, m, wrappers

FOLDER = Path(__file__).parent
PAGE, PICTURES = FOLDER / "gallery.md", FOLDER / "gallery"
TARGET = 1e-8  # a run ends below it


@dataclass(frozen=True)
class Function:
    """A function of a vector of two elements, where runs start, and the window that is drawn."""

    name: str
    formula: str
    of: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    window: tuple[float, float, float, float]


ROSENBROCK = Function(
    "Rosenbrock",
    "(1 - x)² + 100 (y - x²)²",
    lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2,
    (-1.1, 2.5),
    (-2.0, 2.0, -1.0, 3.2),
)
BOOTH = Function(
    "Booth",
    "(x + 2y - 7)² + (2x + y - 5)²",
    lambda p: (p[0] + 2 * p[1] - 7) ** 2 + (2 * p[0] + p[1] - 5) ** 2,
    (0.0, -8.0),
    (-8.0, 10.0, -9.0, 9.0),
)
RASTRIGIN = Function(
    "Rastrigin",
    "20 + x² + y² - 10 cos 2πx - 10 cos 2πy",
    lambda p: 20 + (p**2).sum(0) - 10 * torch.cos(2 * math.pi * p).sum(0),
    (3.2, -2.1),
    (-5.0, 5.0, -5.0, 5.0),
)
VALLEY = Function(
    "a quadratic with condition number 50",
    "½ (x² + 50 y²)",
    lambda p: 0.5 * (p[0] ** 2 + 50 * p[1] ** 2),
    (-8.0, 2.0),
    (-9.0, 4.0, -3.0, 3.0),
)


@dataclass(frozen=True)
class Picture:
    """Runs of one family on one function.

    Attributes:
        runs: for each the code of a chain, or of an optimizer of ``params``, and how many steps it may make.
    """

    name: str
    title: str
    function: Function
    text: str
    runs: tuple[tuple[str, int], ...]


GALLERY = (
    Picture(
        "adaptive",
        "Adaptive methods",
        BOOTH,
        "Each element has a step size of its own, so that the first steps go along a diagonal wherever the gradient points. "
        "Adam's momentum carries it past the minimum and around; RMSprop has none; Lion moves both elements by the same amount "
        "in every step, and never comes to rest while its rate is constant.",
        (
            ("m.Adam(), m.LR(0.5)", 200),
            ("m.RMSprop(0.9), m.LR(0.2)", 200),
            ("m.Lion(), m.LR(0.15)", 200),
            ("m.Adan(), m.LR(0.5)", 200),
        ),
    ),
    Picture(
        "momentum",
        "Momentum",
        VALLEY,
        "The gradient points across the valley. Plain descent is slow along it, as its rate is limited by the steep direction. "
        "Momentum adds up what successive gradients agree on and swings around the minimum; Nesterov's form damps the swing "
        "across the valley; the cautious form leaves out what the present gradient contradicts, and does not swing.",
        (
            ("m.LR(0.02)", 150),
            ("m.HeavyBall(0.9), m.LR(0.02)", 150),
            ("m.NAG(0.9), m.LR(0.02)", 150),
            ("m.HeavyBall(0.9), m.Cautious(), m.LR(0.02)", 150),
        ),
    ),
    Picture(
        "stabilization",
        "Clipping and normalizing",
        ROSENBROCK,
        "The gradient at the start is above 500 in length, so that a rate that suits the valley would throw the parameters far "
        "out of the window. Clipped before the momentum, the same rate works. A step of constant length "
        "(normalizing) does not come to rest.",
        (
            ("m.ClipNorm(10.0), m.HeavyBall(0.95), m.LR(0.002)", 400),
            ("m.ClipValue(5.0), m.HeavyBall(0.95), m.LR(0.002)", 400),
            ("m.Normalize(), m.HeavyBall(0.95), m.LR(0.005)", 400),
        ),
    ),
    Picture(
        "step_size",
        "Step sizes from what was seen",
        VALLEY,
        "No rate is given. Barzilai and Borwein divide the last move by the change of the gradient: not every step goes down, "
        "and it is much faster than a constant rate. Polyak's step needs to know the lowest loss (0 here). Prodigy "
        "raises its estimate of the distance until it fits.",
        (
            ("m.BarzilaiBorwein()", 100),
            ("m.PolyakStepSize()", 100),
            ("m.Prodigy()", 100),
        ),
    ),
    Picture(
        "line_search",
        "Line searches",
        BOOTH,
        "Each step goes along the negative gradient, and a search decides how far. Backtracking is content with some decrease; "
        "the strong Wolfe conditions also ask that the slope has become small, which costs more evaluations in a step, and "
        "fewer in all.",
        (
            ("m.Backtracking()", 60),
            ("m.AdaptiveBacktracking()", 60),
            ("m.StrongWolfe()", 60),
        ),
    ),
    Picture(
        "conjugate_gradient",
        "Conjugate gradients",
        ROSENBROCK,
        "Directions remember the last one, at the price of two vectors of memory. Along the valley that is worth a lot: "
        "steepest descent with the same search (the first chain) needs more evaluations, and is far from the minimum still.",
        (
            ("m.StrongWolfe(c2=0.1)", 60),
            ("m.FletcherReeves(), m.StrongWolfe(c2=0.1)", 60),
            ("m.PolakRibiere(), m.StrongWolfe(c2=0.1)", 60),
            ("m.HagerZhang(), m.StrongWolfe(c2=0.1)", 60),
        ),
    ),
    Picture(
        "quasi_newton",
        "Quasi-Newton methods",
        ROSENBROCK,
        "The curvature is learned from how the gradient changes. The first step is that of steepest descent; at the end the "
        "steps are almost Newton's, without second derivatives, at two to three evaluations a step.",
        (
            ("m.BFGS(), m.StrongWolfe()", 60),
            ("m.LBFGS(), m.StrongWolfe()", 60),
            ("m.SR1(), m.StrongWolfe(fallback=True)", 60),
            ("m.SSVM(), m.StrongWolfe()", 60),
        ),
    ),
    Picture(
        "second_order",
        "Second derivatives",
        ROSENBROCK,
        "Newton's method knows the curvature and jumps into the valley at once; the steps that follow it are as long as the "
        "search allows. The cubic model bounds its steps by itself, and needs no search.",
        (
            ("m.Newton(), m.Backtracking()", 60),
            ("m.NewtonCG(), m.Backtracking()", 60),
            ("m.CubicRegularization()", 60),
        ),
    ),
    Picture(
        "grad_approximation",
        "Gradients from losses alone",
        BOOTH,
        "Finite differences cost two evaluations for each element, and follow the path of the gradient. SPSA costs two "
        "however many elements there are: its path is noisy, and right on average. Smoothing averages several random "
        "directions. A forward gradient is the exact slope along a random direction, by forward-mode differentiation.",
        (
            ("m.FDM(), m.LR(0.05)", 60),
            ("m.SPSA(seed=0), m.LR(0.02)", 150),
            ("m.GaussianSmoothing(n_samples=5, seed=0), m.LR(0.05)", 60),
            ("m.ForwardGradient(seed=0), m.LR(0.02)", 150),
        ),
    ),
    Picture(
        "smoothing",
        "A smoothed function",
        RASTRIGIN,
        "The gradient leads to the nearest of a hundred minima. The average over a cloud around the parameters has fewer: while "
        "the cloud is wide the path leads down the bowl; it is halved whenever there is no more progress. Each evaluation of "
        "the average is 50 of the loss.",
        (
            ("m.LR(0.002)", 150),
            ("m.GaussianHomotopy(50, 1.0, tol=0.01, seed=0), m.BFGS(), m.StrongWolfe()", 60),
        ),
    ),
    Picture(
        "wrappers",
        "Other libraries, without gradients or in a box",
        RASTRIGIN,
        "Dots are evaluations. Annealing and both kinds of differential evolution look everywhere in the box, and find the "
        "lowest of all minima; the simplex of Nelder and Mead walks down from where it is.",
        (
            ("wrappers.ScipyDualAnnealing(params, -5.0, 5.0, maxiter=100, seed=0)", 1),
            ("wrappers.ScipyDE(params, -5.0, 5.0, popsize=10, seed=0)", 1),
            ('wrappers.NevergradOptimizer(params, "DE", 1000, lb=-5.0, ub=5.0, seed=0)', 1000),
            ('wrappers.ScipyMinimize(params, "nelder-mead")', 1),
        ),
    ),
)


@dataclass(frozen=True)
class Run:
    """What a chain did: the points after each step (all evaluated ones of a wrapper), and what it cost."""

    code: str
    points: list[list[float]]
    losses: list[float]
    steps: int
    evaluations: int


def make(code: str, params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer that a line of code stands for."""
    found: Any = eval(code, {"m": m, "wrappers": wrappers, "params": params})
    if isinstance(found, torch.optim.Optimizer):
        return found
    return Modular(params, *(found if isinstance(found, tuple) else (found,)))


def run(code: str, function: Function, most_steps: int) -> Run:
    """Step until the loss is below `TARGET`, or as often as allowed."""
    torch.manual_seed(0)
    params = [torch.tensor(function.start, dtype=torch.float64).requires_grad_()]
    optimizer = make(code, params)
    is_wrapper = code.startswith("wrappers.")
    evaluated: list[list[float]] = []

    def closure(backward: bool = True) -> Tensor:
        evaluated.append(params[0].detach().tolist())
        loss = function.of(params[0])
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    points, losses = [list(function.start)], [float(function.of(params[0].detach()))]
    steps = 0
    while steps < most_steps and losses[-1] >= TARGET:
        optimizer.step(closure)  # type: ignore[arg-type]
        steps += 1
        points.append(params[0].detach().tolist())
        losses.append(float(function.of(params[0].detach())))
    return Run(code, evaluated if is_wrapper else points, losses, steps, len(evaluated))


def draw(picture: Picture, runs: Sequence[Run], file: Path) -> None:
    """Write one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    left, right, bottom, top = picture.function.window
    x = torch.linspace(left, right, 200, dtype=torch.float64)
    y = torch.linspace(bottom, top, 200, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"))
    values = torch.log10(picture.function.of(grid) + 1e-2)
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=80)
    axes.contourf(x.numpy(), y.numpy(), values.numpy(), levels=12, cmap="Greys", alpha=0.5)
    for index, entry in enumerate(runs):
        xs, ys = zip(*entry.points, strict=True)
        style = (
            {"linestyle": "none", "markersize": 2}
            if entry.code.startswith("wrappers.")
            else {"markersize": 2.5, "linewidth": 1}
        )
        label = entry.code.replace("m.", "").replace("wrappers.", "").replace("params, ", "").split(", budget")[0]
        axes.plot(xs, ys, marker="o", color=f"C{index}", label=label, **style)
    axes.plot(*picture.function.start, marker="s", color="black", markersize=5)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_title(f"{picture.title}: {picture.function.name}", fontsize=10)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    with BytesIO() as buffer:
        figure.savefig(buffer, metadata={"Software": None})
        pyplot.close(figure)
        buffer.seek(0)
        image = (
            Image.open(buffer).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        )  # a third of the size
        image.save(file, optimize=True)


def section(picture: Picture, runs: Sequence[Run]) -> str:
    """The text of one picture."""
    rows = [
        f"| `{entry.code}` | {entry.steps} | {entry.evaluations} | {describe(min(entry.losses))} | {describe(entry.losses[-1])} |"
        for entry in runs
    ]
    return "\n".join(
        [
            f"## {picture.title}",
            "",
            f"On {picture.function.name}, `{picture.function.formula}`, from {picture.function.start} (the square).",
            "",
            f"![{picture.title}](gallery/{picture.name}.png)",
            "",
            picture.text,
            "",
            "| chain | steps | evaluations | lowest loss | last loss |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def describe(loss: float) -> str:
    """A loss with two digits, as rounding may differ from machine to machine in more."""
    return f"below {TARGET:g}" if loss < TARGET else f"{loss:.2g}"


def page(sections: Sequence[str]) -> str:
    """The whole page."""
    return (
        "# Gallery\n\n"
        "What chains of modules do on functions of two variables. Each chain is the code that was run, as in\n"
        "`Modular(params, <chain>)`, in float64; an evaluation is one call of the closure. A run ends below a loss of "
        f"{TARGET:g}.\n"
        "Which chain suits what you have: [choosing.md](choosing.md). Written by `python -m docs.gallery`.\n\n"
        + "\n\n".join(sections)
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args(arguments)
    sections = []
    for picture in GALLERY:
        runs = [run(code, picture.function, most) for code, most in picture.runs]
        draw(picture, runs, PICTURES / f"{picture.name}.png")
        sections.append(section(picture, runs))
    PAGE.write_text(page(sections))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
