"""Time and memory of a training step, side by side: the original's way, ours, and the floor without attention.

    python tests/benchmark.py                            # base and concat model on the device it finds
    python tests/benchmark.py --layers 16 --batch_size 512
    python tests/benchmark.py --compile on --precision bfloat16

Each model lives in a process of its own. They take turns, after a warm-up; a time is the median of its turns. On a GPU,
ours and the floor are compiled and recorded as a CUDA graph, as in training. The original's way is never compiled: on a
CPU, that makes it slower. GFLOP/s counts the operations of the matrix products alone, to compare with the processor's
peak. Peak memory is that of the model's process on a CPU, and that of CUDA's allocator on a GPU.
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
from reference import HeadByHead, NoAttention, with_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
VARIANTS = {"reference": HeadByHead, "ours": None, "floor": NoAttention}
SCRIPTS = {"base": "mini_vit", "concat": "mini_vit_concat"}


class Candidate:
    """One model with its optimizer and a batch of random images."""

    def __init__(self, model: str, variant: str, args: argparse.Namespace, **shape):
        self.script = importlib.import_module(SCRIPTS[model])
        shape = {"n_layers": args.layers, "dropout": 0.1} | shape  # the original's dropout, ours and the floor's, too
        self.config = self.script.Config(
            batch_size=args.batch_size,
            device=args.device,
            precision=args.precision,
            compile="off" if variant == "reference" else args.compile,
            adversarial=0.0,
            **shape,
        )
        self.device, *_ = self.script.set_up(self.config)
        original = self.script.Transformer
        if VARIANTS[variant]:  # the script's Trainer compiles the blocks: attention must be replaced before
            self.script.Transformer = lambda config: with_attention(original(config), config, VARIANTS[variant])
        self.train = self.script.Trainer(self.config, self.device, 1, {})
        self.script.Transformer, self.model = original, self.train.model
        if variant == "reference":  # multiplies as torch does by default, and launches kernels one by one
            torch.set_float32_matmul_precision("highest")
            self.train.recorded = False
        self.images = torch.rand(args.batch_size, 784, device=self.device)
        self.labels = torch.randint(0, 10, (args.batch_size,), device=self.device)

    def warm_up(self) -> None:
        for _ in range(5):  # the first steps get memory from the system and, on a GPU, compile and record
            self.step()
        self.evaluate()

    def step(self) -> float:
        """Train on one batch and return the milliseconds per image."""
        began = time.perf_counter()
        self.train(self.images, self.labels)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / len(self.images)

    def evaluate(self) -> float:
        """Evaluate the batch and return the milliseconds per image."""
        began = time.perf_counter()
        self.script.evaluate(self.model, self.images, self.labels, len(self.images))
        return 1e3 * (time.perf_counter() - began) / len(self.images)

    def peak_memory(self) -> float:
        """Return the peak memory so far, in GB; on a CPU the process and its libraries are included."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        status = Path("/proc/self/status").read_text()  # not getrusage, which starts from the parent's peak
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9

    def flops(self) -> int:
        """Return the operations of one image's matrix products: 2 a weight in the forward pass, 4 in the backward."""
        return 6 * sum(p.numel() for p in self.model.parameters() if p.dim() == 2)

    def name(self) -> str:
        """Return what this is, and on what it runs."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        precision = self.model.precision
        shape = f"{self.config.n_layers} layers, {self.config.n_head} heads of {self.config.d_head}"
        numbers = f"batch {self.config.batch_size}, {precision}, compile {self.config.compile}"
        return f"{self.script.SCRIPT}: {shape}, {numbers}, {self.device} ({name}), torch {torch.__version__}"


class Remote:
    """A Candidate in a process of its own: nobody else's memory gets in its way."""

    candidate: Candidate  # in that process only

    def __init__(self, *args, **shape):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.created = self.pool.submit(Remote.create, args, shape)

    @staticmethod
    def create(args: tuple, shape: dict) -> None:
        Remote.candidate = Candidate(*args, **shape)

    @staticmethod
    def call(method: str) -> float | str:
        return getattr(Remote.candidate, method)()

    def begin(self, method: str) -> Future:
        return self.pool.submit(Remote.call, method)

    def __call__(self, method: str) -> float | str:
        return self.begin(method).result()


def measure(model: str, args: argparse.Namespace, **shape) -> dict[str, dict]:
    """Return what each variant is and takes: name, ms per image, GFLOP/s, peak GB, ms per image in evaluation."""
    trainers = {variant: Remote(model, variant, args, **shape) for variant in args.variants}
    for trainer in trainers.values():
        trainer.created.result()
    for warm in [trainer.begin("warm_up") for trainer in trainers.values()]:  # at the same time: compiling takes long
        warm.result()
    turns = [{variant: trainer("step") for variant, trainer in trainers.items()} for _ in range(args.turns)]
    measured = {}
    for variant, trainer in trainers.items():
        ms, memory = statistics.median(turn[variant] for turn in turns), trainer("peak_memory")
        evaluating = statistics.median(trainer("evaluate") for _ in range(3))
        gflops = trainer("flops") / ms / 1e6
        row = {"name": trainer("name"), "ms": ms, "gflops": gflops, "memory": memory, "evaluating": evaluating}
        measured[variant] = row
        trainer.pool.shutdown()
    return measured


def compare(model: str, args: argparse.Namespace) -> None:
    """Print the table of one model: its variants side by side."""
    rows = measure(model, args)
    first = rows[args.variants[0]]
    columns = f"{'ms/image':>9} {'images/s':>9} {'faster':>7} {'GFLOP/s':>8} {'peak GB':>8} {'evaluating':>11}"
    name = rows.get("ours", first)["name"]
    print(f"\n{name}\n{'':10} {columns}")
    for variant, row in rows.items():
        speed = f"{row['ms']:9.3f} {1e3 / row['ms']:9.0f} {first['ms'] / row['ms']:6.2f}x {row['gflops']:8.0f}"
        print(f"{variant:10} {speed} {row['memory']:8.2f} {row['evaluating']:11.3f}", flush=True)


def growth(args: argparse.Namespace) -> None:
    """Print how the base model's cost grows with depth and with the width of a head."""
    shapes = [{"n_layers": n} for n in (2, 4, 8, 16)]
    shapes += [{"n_layers": 4, "n_head": 784 // d, "d_head": d} for d in (28, 56, 98, 196)]
    print(f"\n{'ms/image':36}" + "".join(f"{variant:>10}" for variant in args.variants))
    for shape in shapes:
        times = "".join(f"{row['ms']:10.3f}" for row in measure("base", args, **shape).values())
        print(f"{', '.join(f'{name} {value}' for name, value in shape.items()):36}{times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="default: 16; for the concat model 4, as three of them must fit")
    parser.add_argument("--batch_size", type=int, help="default: 512; for the concat model on a CPU 128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--models", nargs="+", default=list(SCRIPTS), choices=SCRIPTS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no_growth", action="store_true")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    asked = argparse.Namespace(**vars(args))
    for model in args.models:
        args.layers = asked.layers or (4 if model == "concat" else 16)
        args.batch_size = asked.batch_size or (128 if model == "concat" and not on_gpu else 512)
        compare(model, args)
    if not args.no_growth:
        args.batch_size = asked.batch_size or 512
        growth(args)


if __name__ == "__main__":
    main()
