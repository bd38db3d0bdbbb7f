"""Train a small GPT-2 on the source of Python's standard library with graphopt, and again with AdamW, and compare.

    python examples/train_lm.py            # about three minutes on two CPU cores; writes runs/train_lm.png and .json
    python examples/train_lm.py --quick    # a tiny model, under a minute

The model reads bytes, so its loss in bits is the number of bits that it needs per byte of text. A model that knows only
how often each byte occurs needs the text's unigram entropy; the script fails if the model trained with graphopt needs
as much as that on files that it has never seen.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import graphopt

WARM_UP_STEPS = 3
"""The steps that compile; the first evaluation falls among them. Speed is measured on the steps that follow."""
QUICK = {"steps": 60, "seconds": 60.0, "layers": 2, "width": 64, "context": 64, "batch": 16, "eval_batches": 4}


def main() -> int:
    options = parse_options()
    transformers.logging.set_verbosity_error()
    text = load_text()
    print(
        f"text: {len(text.train):,} bytes to train on, {len(text.held_out):,} held out; "
        f"unigram entropy {text.unigram_entropy:.3f} bits/byte",
        flush=True,
    )

    model = graphopt.transform(build_model(options))
    optimizer = graphopt.optim.TGAdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    ours = train("graphopt", model, optimizer, text, options)
    coverage = coverage_by_status(model)

    torch.compiler.reset()
    model = torch.compile(build_model(options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
    same_steps = argparse.Namespace(**{**vars(options), "steps_to_run": len(ours.train), "seconds": math.inf})
    baseline = train("AdamW", model, optimizer, text, same_steps)

    runs = {"graphopt": ours, "AdamW": baseline}
    print_summary(runs, coverage, text)
    write_results(runs, coverage, text, options)
    learned = ours.final_held_out < text.unigram_entropy
    if not learned:
        print("FAILED: the held-out loss is not below the unigram entropy", file=sys.stderr)
    return 0 if learned else 1


def train(name: str, model, optimizer, text: Text, options: argparse.Namespace) -> Run:
    """Train for ``options.steps_to_run`` steps, fewer if they take longer than ``options.seconds``."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    scheduler = LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, options.steps))
    held_out = text.held_out_batches(options)
    run = Run()
    progress = tqdm(total=options.steps_to_run, desc=name, unit="step", disable=None)

    for step in range(1, options.steps_to_run + 1):
        start = time.perf_counter()
        batch = text.sample(options, generator)
        model.train()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        run.train.append(loss.item() / math.log(2))
        run.step_seconds.append(time.perf_counter() - start)
        progress.set_postfix_str(f"{run.train[-1]:.3f} bits/byte, {batch.numel() / run.step_seconds[-1]:,.0f} tokens/s")
        progress.update()

        last = step == options.steps_to_run or sum(run.step_seconds[WARM_UP_STEPS:]) > options.seconds
        if step == 1 or step % options.eval_every == 0 or last:
            start = time.perf_counter()
            model.eval()
            with torch.no_grad():
                losses = [model(input_ids=unseen, labels=unseen).loss.item() for unseen in held_out]
            run.held_out[step] = statistics.mean(losses) / math.log(2)
            run.eval_seconds.append(time.perf_counter() - start)
            if progress.disable:
                print(f"{name} {step:>4}/{options.steps_to_run}: {run.describe_losses()}", flush=True)
        if step == WARM_UP_STEPS:
            graphs = counters["stats"]["unique_graphs"]
        if last:
            break

    progress.close()
    run.recompiles = counters["stats"]["unique_graphs"] - graphs
    run.tokens_per_second = batch.numel() / statistics.median(run.step_seconds[WARM_UP_STEPS:])
    run.compile_seconds = excess(run.step_seconds, WARM_UP_STEPS) + excess(run.eval_seconds, 1)
    return run


@dataclass
class Run:
    """What one training run measured; losses in bits per byte."""

    train: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    eval_seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = math.nan
    compile_seconds: float = math.nan
    recompiles: int = 0

    @property
    def final_train(self) -> float:
        return statistics.mean(self.train[-20:])

    @property
    def final_held_out(self) -> float:
        return self.held_out[len(self.train)]

    def describe_losses(self) -> str:
        return f"{self.final_train:.3f} bits/byte in training, {self.final_held_out:.3f} held out"


@dataclass
class Text:
    """Bytes to train on, bytes of other files, and the entropy of the latter's byte frequencies."""

    train: torch.Tensor
    held_out: torch.Tensor
    unigram_entropy: float

    def sample(self, options: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
        """Return (batch, context) bytes from random places of the training text."""
        starts = torch.randint(len(self.train) - options.context, (options.batch, 1), generator=generator)
        return self.train[starts + torch.arange(options.context)].long()

    def held_out_batches(self, options: argparse.Namespace) -> torch.Tensor:
        """Return (eval_batches, batch, context) bytes, spread evenly over the held-out text."""
        count = options.eval_batches * options.batch
        starts = torch.linspace(0, len(self.held_out) - options.context, count).long().unsqueeze(1)
        return self.held_out[starts + torch.arange(options.context)].long().unflatten(0, (-1, options.batch))


def load_text() -> Text:
    """Read the modules of the running interpreter's standard library; every tenth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    contents = [torch.tensor(list(file.read_bytes()), dtype=torch.uint8) for file in files]
    if len(contents) < 20:
        raise SystemExit(f"no standard library source in {sysconfig.get_path('stdlib')}: nothing to train on")
    held_out = torch.cat(contents[::10])
    frequency = torch.bincount(held_out, minlength=256) / len(held_out)
    entropy = torch.special.entr(frequency).sum().item() / math.log(2)
    return Text(torch.cat([part for index, part in enumerate(contents) if index % 10]), held_out, entropy)


def build_model(options: argparse.Namespace) -> GPT2LMHeadModel:
    """Return the same GPT-2 for the same seed: bytes as tokens, tied embeddings, dropout 0.1."""
    torch.manual_seed(options.seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=options.context,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.width // 32,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # unset, it means the same, after a warning that splits the graph in two
    return model


def warm_up_then_cosine(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))


def excess(seconds: list[float], warm_up: int) -> float:
    """Return how much longer the first ``warm_up`` entries took than as many of the others."""
    return sum(seconds[:warm_up]) - warm_up * statistics.median(seconds[warm_up:])


def coverage_by_status(model: torch.nn.Module) -> dict[str, int]:
    """Count the model's parameters by how TrueGrad served them; "missing" ones are in no record."""
    statuses = {row.name: row.status for record in graphopt.records(model) for row in record.coverage}
    return Counter(statuses.get(name, "missing") for name, _ in model.named_parameters())


def print_summary(runs: dict[str, Run], coverage: dict[str, int], text: Text) -> None:
    covered = sum(count for status, count in coverage.items() if status not in ("skipped", "missing"))
    detail = ", ".join(f"{count} {status}" for status, count in coverage.items())
    print(f"\nsum of squared per-sample gradients: {covered} of {sum(coverage.values())} parameters ({detail})")
    print(f"{'':10}{'train':>8}{'held out':>10}{'tokens/s':>10}{'compile':>10}{'recompiles after warm-up':>26}")
    for name, run in runs.items():
        print(
            f"{name:10}{run.final_train:8.3f}{run.final_held_out:10.3f}{run.tokens_per_second:10,.0f}"
            f"{run.compile_seconds:8.1f} s{run.recompiles:26}"
        )
    steps = len(runs["graphopt"].train)
    print(f"losses in bits per byte after {steps} steps; unigram entropy {text.unigram_entropy:.3f} bits/byte")


def write_results(runs: dict[str, Run], coverage: dict[str, int], text: Text, options: argparse.Namespace) -> None:
    """Write the loss curves to ``options.out`` and every number behind them to a JSON file beside it."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (name, run), colour in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
        steps = range(1, len(run.train) + 1)
        axes.plot(steps, run.train, color=colour, alpha=0.35, linewidth=1, label=f"{name}, training")
        axes.plot(*zip(*run.held_out.items(), strict=True), color=colour, marker="o", label=f"{name}, held out")
    axes.axhline(text.unigram_entropy, color="grey", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="bits per byte", title="GPT-2 on the source of Python's standard library")
    axes.legend()
    figure.savefig(options.out, dpi=120)
    results = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "unigram_entropy": text.unigram_entropy,
        "coverage": coverage,
        "runs": {name: asdict(run) for name, run in runs.items()},
    }
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1))
    print(f"wrote {options.out} and {options.out.with_suffix('.json')}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model; the options below still override its sizes")
    parser.add_argument("--steps", type=int, default=400, help="training steps per run, 10 or more")
    parser.add_argument("--seconds", type=float, default=75.0, help="stop after this long, compilation not counted")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32, the width of a head")
    parser.add_argument("--context", type=int, default=128, help="bytes per sample")
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--eval-batches", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm.png"))
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    if options.steps < 10:
        parser.error(f"--steps must be at least 10, got {options.steps}")
    options.steps_to_run, options.eval_every = options.steps, max(1, options.steps // 10)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
