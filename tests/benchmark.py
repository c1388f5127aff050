"""Time and memory of a training step: the original's way, ours, and the floor without attention.

    python tests/benchmark.py               # base and concat model, on a GPU if there is one
    python tests/benchmark.py --layers 16 --batch_size 512
    python tests/benchmark.py --compile on --precision bfloat16

Each model lives in a process of its own. They take turns, after a warm-up; a time is the median of
its turns. On a GPU, ours and the floor are compiled and recorded as a CUDA graph, as in training.
The original's way is never compiled: on a CPU, that makes it slower. GFLOP/s counts only the
operations of the matrix products, to compare with the processor's peak. Peak memory is that of the
model's process on a CPU, and that of CUDA's allocator on a GPU.
"""

import argparse
import importlib
import multiprocessing
import re
import statistics
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
from reference import HeadByHead, NoAttention

sys.path.insert(0, str(Path(__file__).parents[1]))
SCRIPTS = {"base": "mini_vit", "concat": "mini_vit_concat"}
VARIANTS = ("reference", "ours", "floor")


class Candidate:
    """One model with its optimizer and a batch of random images."""

    def __init__(self, model: str, variant: str, args: argparse.Namespace, **shape):
        self.script = importlib.import_module(SCRIPTS[model])
        if variant == "reference":
            self.script.MultiHead = HeadByHead
        if variant == "floor":
            self.script.MultiHead = NoAttention
        options = {
            "n_layers": args.layers,
            "batch_size": args.batch_size,
            "device": args.device,
            "precision": args.precision,
            "compile": "off" if variant == "reference" else args.compile,
            "dropout": 0.1,  # the original's
            "adversarial": 0.0,  # the original has no adversarial images
        }
        self.config = self.script.Config(**options | shape)
        self.device, *_ = self.script.set_up(self.config)
        self.trainer = self.script.Trainer(self.config, self.device)
        self.trainer.set_depth(self.config.n_layers)
        self.script.compile_blocks(self.trainer.model, self.config, self.device)
        if variant == "reference":  # without TF32, and without a CUDA graph
            torch.set_float32_matmul_precision("highest")
            self.trainer.train_on = self.trainer.update
        self.images = torch.rand(args.batch_size, 784, device=self.device)
        self.labels = torch.randint(0, 10, (args.batch_size,), device=self.device)

    def warm_up(self) -> None:
        """Do first steps: they get memory from the system and, on a GPU, compile and record."""
        for _ in range(5):
            self.step()
        self.evaluate()

    def step(self) -> float:
        """Train on one batch and return the milliseconds per image."""
        began = time.perf_counter()
        self.trainer.train_on(self.images, self.labels)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / len(self.images)

    def evaluate(self) -> float:
        """Evaluate the batch and return the milliseconds per image."""
        began = time.perf_counter()
        self.script.evaluate(self.trainer.model, self.images, self.labels, len(self.images))
        return 1e3 * (time.perf_counter() - began) / len(self.images)

    def peak_memory(self) -> float:
        """Return the peak memory so far, in GB; on a CPU, the process with all its libraries."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        # getrusage would start from the peak of the parent process.
        status = Path("/proc/self/status").read_text()
        kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
        return kilobytes * 1024 / 1e9

    def flops(self) -> int:
        """Return the operations of one image's matrix products.

        Each weight costs 2 of them in the forward pass and 4 in the backward pass.
        """
        return 6 * sum(p.numel() for p in self.trainer.model.parameters() if p.dim() == 2)

    def name(self) -> str:
        """Return what this is, and on what it runs."""
        config = self.config
        hardware = f"{torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            hardware = torch.cuda.get_device_name()
        shape = f"{config.n_layers} layers, {config.n_head} heads of {config.d_head}"
        precision = self.trainer.model.precision
        options = f"batch {config.batch_size}, {precision}, compile {config.compile}"
        place = f"{self.device} ({hardware}), torch {torch.__version__}"
        return f"{self.script.SCRIPT}: {shape}, {options}, {place}"


class Remote:
    """A Candidate in a process of its own, where only its own memory counts."""

    candidate: Candidate  # in that process only

    def __init__(self, *args, **shape):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.created = self.pool.submit(Remote.create, args, shape)

    @staticmethod
    def create(args: tuple, shape: dict) -> None:
        """Make the candidate; this runs in the process that will hold it."""
        Remote.candidate = Candidate(*args, **shape)

    @staticmethod
    def run(method: str) -> float | str:
        """Call a method of the candidate; this runs in the process that holds it."""
        return getattr(Remote.candidate, method)()

    def begin(self, method: str) -> Future:
        """Call a method of the candidate without waiting for its result."""
        return self.pool.submit(Remote.run, method)

    def call(self, method: str) -> float | str:
        """Call a method of the candidate and return its result."""
        return self.begin(method).result()


def measure(model: str, args: argparse.Namespace, **shape) -> dict[str, dict]:
    """Return the measurements of each variant.

    They are its name, ms per image, GFLOP/s, the peak memory in GB, and ms per image in evaluation.
    """
    remotes = {variant: Remote(model, variant, args, **shape) for variant in args.variants}
    for remote in remotes.values():
        remote.created.result()
    # All at the same time, because compiling takes long.
    warming_up = [remote.begin("warm_up") for remote in remotes.values()]
    for future in warming_up:
        future.result()
    times = {variant: [] for variant in remotes}
    for _ in range(args.turns):
        for variant, remote in remotes.items():
            times[variant].append(remote.call("step"))
    measured = {}
    for variant, remote in remotes.items():
        ms = statistics.median(times[variant])
        measured[variant] = {
            "name": remote.call("name"),
            "ms": ms,
            "gflops": remote.call("flops") / ms / 1e6,
            "memory": remote.call("peak_memory"),
            "evaluating": statistics.median(remote.call("evaluate") for _ in range(3)),
        }
        remote.pool.shutdown()
    return measured


def compare(model: str, args: argparse.Namespace) -> None:
    """Print the table of one model: its variants side by side."""
    rows = measure(model, args)
    first = rows[args.variants[0]]
    print(f"\n{rows.get('ours', first)['name']}")
    columns = f"{'ms/image':>9} {'images/s':>9} {'faster':>7} {'GFLOP/s':>8}"
    print(f"{'':10} {columns} {'peak GB':>8} {'evaluating':>11}")
    for variant, row in rows.items():
        speed = f"{row['ms']:9.3f} {1e3 / row['ms']:9.0f} {first['ms'] / row['ms']:6.2f}x"
        rest = f"{row['gflops']:8.0f} {row['memory']:8.2f} {row['evaluating']:11.3f}"
        print(f"{variant:10} {speed} {rest}", flush=True)


def growth(args: argparse.Namespace) -> None:
    """Print how the base model's cost grows with depth and with the width of a head."""
    shapes = [{"n_layers": n} for n in (2, 4, 8, 16)]
    for d_head in (28, 56, 98, 196):
        shapes.append({"n_layers": 4, "n_head": 784 // d_head, "d_head": d_head})
    print(f"\n{'ms/image':36}" + "".join(f"{variant:>10}" for variant in args.variants))
    for shape in shapes:
        rows = measure("base", args, **shape)
        times = "".join(f"{row['ms']:10.3f}" for row in rows.values())
        text = ", ".join(f"{name} {value}" for name, value in shape.items())
        print(f"{text:36}{times}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--layers", type=int, help="default: 16; for the concat model 4, as three of them must fit"
    )
    parser.add_argument(
        "--batch_size", type=int, help="default: 512; for the concat model on a CPU 128"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--models", nargs="+", default=list(SCRIPTS), choices=SCRIPTS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no_growth", action="store_true")
    return parser.parse_args()


def main() -> None:
    asked = parse_arguments()
    on_gpu = torch.cuda.is_available() and asked.device != "cpu"
    for model in asked.models:
        args = argparse.Namespace(**vars(asked))
        args.layers = asked.layers or (4 if model == "concat" else 16)
        args.batch_size = asked.batch_size or (128 if model == "concat" and not on_gpu else 512)
        compare(model, args)
    if not asked.no_growth:
        asked.batch_size = asked.batch_size or 512
        growth(asked)


if __name__ == "__main__":
    main()
