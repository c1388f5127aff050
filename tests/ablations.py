"""One change at a time: what does each part of a script bring? Prints a Markdown table.

    python tests/ablations.py                # mini_vit.py: 27 runs of a small network, two at a time
    python tests/ablations.py --script vit   # vit.py
    python tests/ablations.py --quick        # every row for a few steps, to see that it works

Each run tests on the last 10,000 training images, held out. It has one core, and a folder below runs/ablations/. Ctrl-C
stops; the same command goes on, and what is finished is not run again: delete that folder when you change a row.
"""

import argparse
import csv
import importlib
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from reference import NoAttention
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
SHORT = "--subset 256 --holdout 64 --batch_size 32 --max_iters 4 --eval_interval 2"


def no_attention(script: ModuleType) -> None:
    """Have each block use its values as they are: o = v."""
    script.MultiHead = NoAttention


def change_model(script: ModuleType, change: Callable) -> None:
    """Have each new Transformer changed in place."""
    original = script.Transformer

    def transformer(config):
        model = original(config)
        change(model)
        return model

    script.Transformer = transformer


def no_positions(script: ModuleType) -> None:
    """Keep a vit's position embeddings at zero."""
    change_model(script, lambda model: model.position.requires_grad_(False).zero_())


def mean_of_tokens(script: ModuleType) -> None:
    """Have a vit's head see the mean of all tokens, not the class token, which without attention sees no patch."""

    def average(block, inputs, x):  # (B, 1 + patches, n_embd)
        return x.mean(1, keepdim=True)

    change_model(script, lambda model: model.blocks[-1].register_forward_hook(average))


def mean_without_attention(script: ModuleType) -> None:
    """Have each patch go its own way until the mean of all tokens."""
    no_attention(script)
    mean_of_tokens(script)


def loss_over_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log p, where p is the true label's share in one softmax over all logits (B, 10)."""
    return -logits.flatten().log_softmax(0).view_as(logits).gather(1, labels[:, None]).mean()


def original_loss(script: ModuleType) -> None:
    """Train with one softmax over the whole batch; evaluation stays as it is."""
    step = script.Trainer.step

    def with_that_loss(self, images, labels):
        with mock.patch.object(F, "cross_entropy", loss_over_batch):
            return step(self, images, labels)

    script.Trainer.step = with_that_loss


# For each script: the flags of all runs, and in each row flags to add, or a function that changes the script.
BASE = "--n_layers 4 --n_head 5 --n_embd 280 --learning_rate 1e-3 --max_iters 2000 --eval_interval 2000"
ROWS: dict[str, tuple[str, dict[str, str | Callable]]] = {
    "mini_vit": (
        BASE,
        {
            "as it is": "",
            "no attention among features": no_attention,
            "the original's loss, one softmax over the whole batch": original_loss,
            "no adversarial images": "--adversarial 0",
            "no dropout": "--dropout 0",
            "all blocks from the start": "--growth 0",
            "no warmup": "--warmup_iters 0",
            "no weight decay": "--weight_decay 0",
            "gradients not clipped": "--grad_clip 1e9",
        },
    ),
    "vit": (
        "--max_iters 3000 --eval_interval 3000",
        {
            "as it is": "",
            "the head sees the mean of all tokens": mean_of_tokens,
            "the same, no attention among patches": mean_without_attention,
            "no position embeddings": no_positions,
            "images not augmented": "--rotation 0 --scaling 0 --shear 0 --translation 0 --elastic 0",
            "no warmup": "--warmup_iters 0",
            "no weight decay": "--weight_decay 0",
        },
    ),
}


def train(name: str, row: str, seed: int, folder: Path, quick: bool) -> None:
    """Train one run to its end, or further if it was stopped, in a process of its own; exit with its status."""
    script, (flags, rows) = importlib.import_module(name), ROWS[name]
    change = rows[row]
    flags += " --holdout 10000 --device cpu " + (change if isinstance(change, str) else "") + f" {SHORT}" * quick
    if not isinstance(change, str):
        change(script)
    torch.set_num_threads(1)
    begin = ["--resume"] if (folder / "checkpoint.pt").exists() else [*flags.split(), "--seed", str(seed)]
    folder.mkdir(parents=True, exist_ok=True)
    if begin[0] != "--resume":  # what a run that was killed before its first checkpoint has left
        (folder / "log.csv").unlink(missing_ok=True)
    with open(folder / "output.txt", "a", 1) as output, redirect_stdout(output), redirect_stderr(output):
        sys.stdout.reconfigure = lambda **_: None
        sys.exit(script.main([*begin, "--out_dir", str(folder)]))


def run(name: str, row: str, seed: int, folder: Path, quick: bool) -> dict[str, float]:
    """Return the last line of a run's log, once it is trained. Raise RuntimeError if it doesn't come to its end."""
    if not (folder / "model.pt").exists():
        process = multiprocessing.get_context("spawn").Process(target=train, args=(name, row, seed, folder, quick))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{folder} ended with status {process.exitcode}: see output.txt there")
    with open(folder / "log.csv") as log:
        return {column: float(value) for column, value in list(csv.DictReader(log))[-1].items()}


def spread(values: list[float]) -> str:
    """Return the mean and, of several values, their standard deviation, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--script", default="mini_vit", choices=ROWS)
    parser.add_argument("--rows", nargs="+", default=[""], help='only those that begin so: --rows "as it" "no att"')
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images, one seed")
    args = parser.parse_args()
    place = Path("runs", "ablations", args.script + "-quick" * args.quick)
    seeds = range(1, 2 if args.quick else args.seeds + 1)
    rows = {row: i for i, row in enumerate(ROWS[args.script][1]) if row.startswith(tuple(args.rows))}
    pool = ThreadPoolExecutor(args.jobs)

    def stop(number, _):  # the runs save and end
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        print("stopped; the same command goes on", file=sys.stderr)
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with pool:
        done = {
            (row, seed): pool.submit(run, args.script, row, seed, place / f"{i}-{seed}", args.quick)
            for seed in seeds
            for row, i in rows.items()
        }
        print(f"| {args.script}.py | held-out accuracy | of each seed | held-out loss | seconds |\n|" + " --- |" * 5)
        for row in rows:
            logs = [done[row, seed].result() for seed in seeds]
            accuracies, losses, seconds = ([log[c] for log in logs] for c in ("test_accuracy", "test_loss", "seconds"))
            each = ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
            numbers = f"{statistics.mean(losses):.4f} | {statistics.mean(seconds):.0f}"
            print(f"| {row} | {spread(accuracies)} | {each} | {numbers} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
