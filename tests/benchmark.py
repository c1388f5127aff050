"""Time and memory of a training step, side by side: the original's way, ours, and the floor without attention.

    python tests/benchmark.py                            # base and concat model on the device it finds
    python tests/benchmark.py --layers 16 --batch_size 512
    python tests/benchmark.py --compile on --precision bfloat16

The models take turns in one run, after a warm-up step each; a time is the median of its turns. Peak memory comes
from a process of its own per model on the CPU, and from CUDA's allocator on a GPU.
"""

import argparse
import importlib
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from reference import HeadByHead, NoAttention, with_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
VARIANTS = {"reference": HeadByHead, "ours": None, "floor": NoAttention}
SCRIPTS = {"base": "mini_vit", "concat": "mini_vit_concat"}


class Trainer:
    """One model with its optimizer and a batch of random images."""

    def __init__(self, model: str, variant: str, args: argparse.Namespace, **shape):
        self.script = importlib.import_module(SCRIPTS[model])
        shape = {"n_layers": args.layers, "dropout": 0.1} | shape  # the original's dropout, ours and the floor's, too
        self.config = self.script.Config(
            batch_size=args.batch_size, device=args.device, precision=args.precision, compile=args.compile, **shape
        )
        self.device, *_ = self.script.set_up(self.config)
        original = self.script.Transformer
        if VARIANTS[variant]:  # build compiles the blocks: attention must be replaced before
            self.script.Transformer = lambda config: with_attention(original(config), config, VARIANTS[variant])
        self.model, self.optimizer = self.script.build(self.config, self.device, {})
        self.script.Transformer = original
        self.images = torch.rand(args.batch_size, 784, device=self.device)
        self.labels = torch.randint(0, 10, (args.batch_size,), device=self.device)

    def step(self) -> float:
        """Train on one batch and return the milliseconds per image."""
        began = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / len(self.images)

    def evaluate(self) -> float:
        """Evaluate the batch and return the milliseconds per image."""
        began = time.perf_counter()
        self.script.evaluate(self.model, self.images, self.labels, len(self.images))
        return 1e3 * (time.perf_counter() - began) / len(self.images)


def peak_memory(model: str, variant: str, args: argparse.Namespace) -> float:
    """Return the peak memory, in GB, of two training steps, the process and its libraries included on a CPU."""
    command = [sys.executable, __file__, "--peak", model, variant]
    for name in ("layers", "batch_size", "device", "precision", "compile"):
        command += [f"--{name}", str(getattr(args, name))]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def compare(model: str, args: argparse.Namespace) -> None:
    """Print the table of one model."""
    trainers = {variant: Trainer(model, variant, args) for variant in VARIANTS}
    times = {variant: [] for variant in VARIANTS}
    for turn in range(-args.warmup, args.turns):
        for variant, trainer in trainers.items():
            milliseconds = trainer.step()
            if turn >= 0:
                times[variant].append(milliseconds)
    evaluating = statistics.median(trainers["ours"].evaluate() for _ in range(3))
    device, precision = trainers["ours"].device, "bfloat16" if trainers["ours"].model.bfloat16 else "float32"
    del trainers, trainer
    base = statistics.median(times["reference"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n{model}: {args.layers} layers, batch {args.batch_size}, {precision}, compile {args.compile}, ", end="")
    print(f"{device} ({name}), torch {torch.__version__}")
    print(f"{'':10} {'ms/image':>9} {'images/s':>9} {'faster':>7} {'peak GB':>8}")
    for variant in VARIANTS:
        median = statistics.median(times[variant])
        memory = peak_memory(model, variant, args)
        print(f"{variant:10} {median:9.3f} {1e3 / median:9.0f} {base / median:6.2f}x {memory:8.2f}", flush=True)
    print(f"evaluating takes {evaluating / statistics.median(times['ours']):.2f} of training's time per image")


def growth(args: argparse.Namespace) -> None:
    """Print how the base model's cost grows with depth and with the width of a head."""
    shapes = [{"n_layers": n} for n in (2, 4, 8, 16)]
    shapes += [{"n_layers": 4, "n_head": 784 // d, "d_head": d} for d in (28, 56, 98, 196)]
    print(f"\n{'':36} {'ours':>8} {'reference':>10}   ms/image")
    for shape in shapes:
        medians = []
        for variant in ("ours", "reference"):
            trainer = Trainer("base", variant, args, **shape)
            trainer.step()
            medians.append(statistics.median(trainer.step() for _ in range(3)))
        text = ", ".join(f"{name} {value}" for name, value in shape.items())
        print(f"{text:36} {medians[0]:8.3f} {medians[1]:10.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="default: 16; for the concat model 4, as three of them must fit")
    parser.add_argument("--batch_size", type=int, help="default: 512; for the concat model on a CPU 128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--models", nargs="+", default=list(SCRIPTS), choices=SCRIPTS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--no_growth", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "VARIANT"), help="print the peak memory of one model only")
    args = parser.parse_args()
    if args.peak:  # --layers and --batch_size are given
        trainer = Trainer(*args.peak, args)
        for _ in range(2):
            trainer.step()
        if trainer.device.type == "cuda":
            return print(torch.cuda.max_memory_allocated() / 1e9)
        status = Path("/proc/self/status").read_text()  # not getrusage, which starts from the parent's peak
        return print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9)
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
