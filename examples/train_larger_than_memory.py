"""Train a Llama whose weights and optimizer state do not fit into memory, from a folder on disk; plain PyTorch is killed.

    python examples/train_larger_than_memory.py                      # about a minute on two CPU cores
    python examples/train_larger_than_memory.py --layers 32 --width 1024 --memory 700    # larger

Two processes get the same limit of memory beyond what torch and its compiler take once they have trained something tiny
(``RLIMIT_AS``, in MB; on a GPU a fraction of its memory). One trains the model as ever, and fails. The other builds it on the
meta device, fills a store layer by layer, and trains it layer by layer: on the CPU from disk, on a GPU from host memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

import graphopt
from graphopt.passes import LayerToLayer

MB = 1 << 20
ARMS = ("plain", "graphopt")


def main() -> int:
    options = parse_options()
    if options.arm:
        tiny = argparse.Namespace(**{**vars(options), "layers": 2, "steps": 1, "quiet": True})
        train_streamed(tiny)
        limit_memory(options)
        return (train_plain if options.arm == "plain" else train_streamed)(options)
    parameters = sum(p.numel() for p in build(options, "meta").parameters())
    print(f"{parameters / 1e6:.0f} million parameters: {16 * parameters / MB:.0f} MB with gradients and AdamW's state")
    print(f"limit: {options.memory} MB beyond what torch takes", flush=True)
    ended = {arm: subprocess.run([sys.executable, __file__, *sys.argv[1:], "--arm", arm], check=False) for arm in ARMS}
    failed = ended["plain"].returncode != 0
    trained = ended["graphopt"].returncode == 0
    print(f"plain PyTorch {'ran out of memory' if failed else 'FITS: choose a larger model'}; ", end="")
    print(f"graphopt {'trained' if trained else 'FAILED'}")
    return ended["graphopt"].returncode or int(not failed)


def train_plain(options: argparse.Namespace) -> int:
    try:
        model = build(options, options.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
        return loop(model, optimizer, options)
    except (RuntimeError, MemoryError) as error:  # what the allocator says; torch.cuda.OutOfMemoryError is one, too
        print(f"plain PyTorch: {str(error).splitlines()[0][:100]}", flush=True)
        return 1


def train_streamed(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.device == "cuda":  # the model fits into host memory
            model, store = build(options, "cpu"), {"store": "cpu", "device": "cuda"}
        else:
            model, store = build(options, "meta"), {"store": "disk", "store_path": folder}
            graphopt.fill_store(model, folder)  # initialised layer by layer
        graphopt.transform(model, [LayerToLayer(microbatch_size=options.microbatch, **store)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
        status = loop(model, optimizer, options)
        graphopt.stream(model).close()
    return status


def loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> int:
    text = torch.tensor(list(b"".join(path.read_bytes() for path in stdlib())))
    losses = []
    for step in range(options.steps):
        start = time.perf_counter()
        places = torch.randint(len(text) - options.context, (options.batch,))
        ids = torch.stack([text[place : place + options.context] for place in places]).to(options.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not options.quiet:
            print(f"{options.arm}: step {step}, loss {losses[-1]:.3f}, {time.perf_counter() - start:.1f} s", flush=True)
    torch.compiler.reset()
    return 0 if losses[-1] < losses[0] else 1


def build(options: argparse.Namespace, device: str) -> LlamaForCausalLM:
    transformers_logging.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        vocab_size=256,
        use_cache=False,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).train()


def limit_memory(options: argparse.Namespace) -> None:
    """Let this process, and what it starts, take so much more than it has now."""
    if options.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory * MB / total)
        return
    size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    limit = int(size.split()[1]) * 1024 + options.memory * MB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def stdlib() -> list[Path]:
    """Python's own source."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--microbatch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--memory", type=int, default=300, help="MB beyond what torch takes")
    parser.add_argument("--folder", type=Path, help="where the store goes (default: the system's temporary folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.set_defaults(quiet=False)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
