#!/usr/bin/env python3
"""shoal's training loop against the same training written by hand, as Markdown on standard output.

    benchmarks/training.py > training.md                                # two CPU cores: `single`, and `ddp` on 2 ranks
    benchmarks/training.py --device cuda --precision bf16 --batch-size 1024 > training.md      # one GPU

Both train the same model in the same processes and take turns, a block of steps each; a turn's ratio is that of its two
blocks, so that what else the machine does meets both. Shown are the median of the turns and its quartiles, of the time
and of the CPU time, which other programs disturb less. Peak memory is that of processes that run one of the two alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import shoal
from shoal.bench.models import MODELS, random_samples
from shoal.learners.torch_ranks import joined

EPOCH = 20_000
"""Samples of an epoch, about: both loops have whole batches only."""
LONGEST = 900
"""Seconds that one row may take."""
WANTED = {"single": 0.98, "ddp": 0.97}
LEARNING_RATE = 0.01


class OwnLoop:
    """The training as one writes it by hand: samples on the device, batches picked there, nothing told.

    Args:
        model: On its device, and within DDP if there are several ranks.
        inputs: All samples, [samples, …], on the device.
        targets: Their classes, [samples].
        batch_size: Samples in a batch of one rank.
        precision: Of the forward pass.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int, precision: str) -> None:
        self.model = model.train()
        self.inputs = inputs
        self.targets = targets
        self.batch_size = batch_size
        self.bf16 = precision == "bf16"
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.draws = torch.Generator().manual_seed(0)
        self.batches = iter(())

    def epoch(self) -> list[Tensor]:
        """Returns this rank's batches of a new order."""
        order = torch.randperm(len(self.targets), generator=self.draws)
        return list(order.view(-1, self.ranks, self.batch_size)[:, self.rank].to(self.inputs.device))

    def block(self, steps: int) -> None:
        """Takes steps."""
        for _ in range(steps):
            rows = next(self.batches, None)
            if rows is None:
                self.batches = iter(self.epoch())
                rows = next(self.batches)
            inputs, targets = self.inputs.index_select(0, rows), self.targets.index_select(0, rows)
            self.optimizer.zero_grad()
            with torch.autocast(inputs.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
                loss = F.cross_entropy(self.model(inputs), targets)
            loss.backward()
            self.optimizer.step()


def epoch(options: argparse.Namespace) -> int:
    """Returns how many samples an epoch has: whole batches, on one device and on two."""
    return EPOCH // (2 * options.batch_size) * 2 * options.batch_size


def own_block(options: argparse.Namespace, device: torch.device) -> Callable[[int], None]:
    """Returns a block of the loop written by hand."""
    kind = MODELS[options.model]
    data = random_samples(kind, epoch(options))
    inputs, targets = (torch.from_numpy(array).to(device) for array in (data.inputs, data.targets()))
    torch.manual_seed(0)
    model = kind.make().to(device)
    if dist.is_initialized():
        on = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=on, gradient_as_bucket_view=True)
    return OwnLoop(model, inputs, targets, options.batch_size, options.precision).block


@contextlib.contextmanager
def shoal_block(options: argparse.Namespace, devices: shoal.Devices):
    """Yields a block of shoal's loop, with what ``shoal.train`` does every ``log_every`` steps."""
    kind = MODELS[options.model]
    learner = shoal.TorchLearner(
        kind.make,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE),
        batch_size=options.batch_size,
        devices=devices,
    )
    with learner.training(random_samples(kind, epoch(options)), epochs=10**6, seed=0) as ongoing:

        def block(steps: int) -> None:
            until = ongoing.step + steps
            while ongoing.step < until:  # it pauses at the end of an epoch
                ongoing.advance(until)

        yield block


def clock(block: Callable[[int], None], steps: int, device: torch.device) -> tuple[float, float]:
    """Returns the seconds that a block takes, from a common start of all ranks, and those of CPU time of this rank."""
    if dist.is_initialized():
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, busy = time.perf_counter(), time.process_time()
    block(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, time.process_time() - busy


def peak(device: torch.device) -> int:
    """Returns the most memory that tensors had on a GPU, or else the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measures one row, or the memory of one of the two, in this process and the other ranks."""
    devices = shoal.Devices(
        options.strategy, accelerator=options.device, precision=options.precision, threads=options.threads
    )
    with joined(devices) as ranks, contextlib.ExitStack() as stack:
        device = ranks.device
        if device.type == "cpu":
            torch.set_num_threads(options.threads)
        own = own_block(options, device) if options.alone != "shoal" else None
        ours = stack.enter_context(shoal_block(options, devices)) if options.alone != "own" else None
        for block in filter(None, (own, ours)):
            clock(block, options.steps, device)
        if own is None or ours is None:
            return {"peak": peak(device)}
        turns: list[dict[str, tuple[float, float]]] = []
        gc.collect()
        for turn in range(options.turns):
            order = {"own": own, "shoal": ours} if turn % 2 else {"shoal": ours, "own": own}
            turns.append({name: clock(block, options.steps, device) for name, block in order.items()})
    found: dict[str, object] = {
        name: options.steps / statistics.median(turn[name][0] for turn in turns) for name in ("own", "shoal")
    }
    for number, name in enumerate(("ratios", "cpu_ratios")):
        found[name] = [turn["own"][number] / turn["shoal"][number] for turn in turns]
    return found


def run(options: argparse.Namespace, model: str, strategy: str, **further: str) -> dict[str, object]:
    """Measures in processes of their own."""
    count = 2 if strategy == "ddp" else 1
    chosen = {"model": model, "strategy": strategy, **further}
    for name in ("device", "precision", "turns", "steps", "batch_size", "threads"):
        chosen[name.replace("_", "-")] = getattr(options, name)
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += [__file__, *words]
    environment = {"OMP_NUM_THREADS": str(options.threads)} | dict(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def heading(options: argparse.Namespace) -> None:
    """Prints what was measured where, and the head of the table."""
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        device = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    print(f"- machine: {device}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}")
    print(f"- versions: shoal {shoal.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"- command: `{' '.join(['benchmarks/training.py', *sys.argv[1:]])}`")
    print(
        f"- {options.turns} turns of {options.steps} steps, {options.batch_size} samples of a step on each device;",
        end="",
    )
    print(" medians, of the ratio with its quartiles\n")
    print("| model | devices | precision | by hand: steps/s | shoal: steps/s | shoal / by hand | wanted ", end="")
    print("| the same of CPU time | by hand: peak MiB | shoal: peak MiB |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)


def table(options: argparse.Namespace) -> None:
    """Prints all rows."""
    heading(options)
    for model in ("mlp10m", "har"):
        for strategy in ("single",) if options.device == "cuda" else ("single", "ddp"):
            found = run(options, model, strategy)
            memory = [run(options, model, strategy, alone=which)["peak"] / 2**20 for which in ("own", "shoal")]
            quarters = [statistics.quantiles(found[name]) for name in ("ratios", "cpu_ratios")]
            time_ratio, cpu_ratio = (f"{middle:.3f} ({low:.3f}–{high:.3f})" for low, middle, high in quarters)
            speeds = [f"{found[which]:.1f}" for which in ("own", "shoal")]
            cells = [model, "2 ranks, ddp" if strategy == "ddp" else strategy, options.precision, *speeds]
            cells += [time_ratio, str(WANTED[strategy]), cpu_ratio, *(f"{each:.0f}" for each in memory)]
            print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    """Prints the table, or one row's numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--turns", type=int, default=21, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=50, help="steps of a block; shoal.train logs as often")
    parser.add_argument("--batch-size", type=int, default=64, help="samples of a step on each device")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operation")
    parser.add_argument("--model", choices=tuple(MODELS), help="measure this one here, and print JSON")
    parser.add_argument("--strategy", choices=("single", "ddp"), default="single", help="how, with --model")
    parser.add_argument("--alone", choices=("own", "shoal"), help="with --model: the peak memory of one of the two")
    options = parser.parse_args()
    if options.model is None:
        table(options)
        return
    found = measure(options)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
