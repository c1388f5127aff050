"""One change at a time: how much does each part of a script help? Prints a Markdown table.

    python tests/ablations.py                # mini_vit.py: 27 runs of a small network, two at once
    python tests/ablations.py --script vit   # vit.py
    python tests/ablations.py --quick        # every row for a few steps, to see that it works

Each run tests on the last 10,000 training images, which are held out. It uses one core,
and a folder under runs/ablations/. Ctrl-C stops; the same command resumes, and skips finished runs:
delete their folders when you change a row.
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
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))


# ---------------------------------------------------------------- changes
def no_attention(script: ModuleType) -> None:
    """Have each block use its values as they are: o = v."""
    script.MultiHead = NoAttention


def change_model(script: ModuleType, change: Callable[[nn.Module], None]) -> None:
    """Change each new Transformer in place."""
    original = script.Transformer

    def transformer(config):
        model = original(config)
        change(model)
        return model

    script.Transformer = transformer


def no_positions(script: ModuleType) -> None:
    """Keep a vit's position embeddings at zero."""

    def freeze(model: nn.Module) -> None:
        model.position.requires_grad_(False)
        model.position.zero_()

    change_model(script, freeze)


def mean_of_tokens(script: ModuleType) -> None:
    """Have a vit's head see the mean of all tokens.

    Usually it gets the class token, which without attention knows nothing of any patch.
    """

    def average(block: nn.Module, inputs: tuple, x: Tensor) -> Tensor:  # (B, 1 + patches, n_embd)
        return x.mean(1, keepdim=True)

    def add_average(model: nn.Module) -> None:
        model.blocks[-1].register_forward_hook(average)

    change_model(script, add_average)


def mean_without_attention(script: ModuleType) -> None:
    """Process each patch on its own, without attention, until the mean of all tokens."""
    no_attention(script)
    mean_of_tokens(script)


def loss_over_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -log p of logits (B, 10).

    p is the share of an image's true label in one softmax over the logits of all images.
    """
    log_p = logits.flatten().log_softmax(0).view_as(logits)
    return -log_p.gather(1, labels[:, None]).mean()


def original_loss(script: ModuleType) -> None:
    """Train with one softmax over the whole batch; evaluation stays as it is."""
    original = script.Trainer.update

    def update(self, images: Tensor, labels: Tensor) -> Tensor:
        with mock.patch.object(F, "cross_entropy", loss_over_batch):
            return original(self, images, labels)

    script.Trainer.update = update


# ---------------------------------------------------------------- rows
# A row is flags to add, or a function that changes the script.
FLAGS = {  # of all rows
    "mini_vit": "--n_layers 4 --n_head 5 --n_embd 280 --learning_rate 1e-3"
    " --max_iters 2000 --eval_interval 2000",
    "vit": "--max_iters 3000 --eval_interval 3000",
}
ROWS: dict[str, dict[str, str | Callable[[ModuleType], None]]] = {
    "mini_vit": {
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
    "vit": {
        "as it is": "",
        "the head sees the mean of all tokens": mean_of_tokens,
        "the same, no attention among patches": mean_without_attention,
        "no position embeddings": no_positions,
        "images not augmented": "--rotation 0 --scaling 0 --shear 0 --translation 0 --elastic 0",
        "no warmup": "--warmup_iters 0",
        "no weight decay": "--weight_decay 0",
    },
}
QUICK = "--subset 256 --holdout 64 --batch_size 32 --max_iters 4 --eval_interval 2"


# ---------------------------------------------------------------- runs
def train(name: str, row: str, seed: int, folder: Path, quick: bool) -> None:
    """Train or resume one run in this process, to its end; exit with its status."""
    script = importlib.import_module(name)
    change = ROWS[name][row]
    flags = f"--resume=auto --device cpu --holdout 10000 --seed {seed} {FLAGS[name]}"
    if isinstance(change, str):
        flags += f" {change}"
    else:
        change(script)
    if quick:
        flags += f" {QUICK}"
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    output = open(folder / "output.txt", "a", buffering=1)  # noqa: SIM115
    with output, redirect_stdout(output), redirect_stderr(output):
        try:
            status = script.main([*flags.split(), "--out_dir", str(folder)])
        except KeyboardInterrupt:  # it was stopped before its first step
            status = 128 + signal.SIGINT
    sys.exit(status)


def run(name: str, row: str, seed: int, folder: Path, quick: bool) -> dict[str, float]:
    """Return the last row of a run's log, once it is trained. Raise RuntimeError if it fails."""
    if not (folder / "model.pt").exists():
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=train, args=(name, row, seed, folder, quick))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(
                f"{folder} ended with status {process.exitcode}: see output.txt there"
            )
    with open(folder / "log.csv") as log:
        *_, last = csv.DictReader(log)
    return {column: float(value) for column, value in last.items()}


def stop_on_signals(pool: ThreadPoolExecutor) -> None:
    """On Ctrl-C or SIGTERM, let the runs save and end, then exit."""

    def stop(number: int, frame) -> None:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        print("stopped; the same command resumes", file=sys.stderr)
        os._exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


# ---------------------------------------------------------------- table
def spread(values: list[float]) -> str:
    """Return the mean and, of several values, their standard deviation, in percent."""
    text = f"{100 * statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {100 * statistics.stdev(values):.2f}"
    return f"{text} %"


def print_row(row: str, logs: list[dict[str, float]]) -> None:
    """Print a row of the table: a summary of its logs' last rows, one for each seed."""
    accuracies = [log["test_accuracy"] for log in logs]
    each = ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
    loss = statistics.mean(log["test_loss"] for log in logs)
    seconds = statistics.mean(log["seconds"] for log in logs)
    print(f"| {row} | {spread(accuracies)} | {each} | {loss:.4f} | {seconds:.0f} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--script", default="mini_vit", choices=ROWS)
    parser.add_argument(
        "--rows", nargs="+", default=[""], help='rows by prefix: --rows "as it" "no att"'
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this (default: 3)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, one core each (default: 2)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps on a few images, one seed"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    place = Path("runs", "ablations", f"{args.script}-quick" if args.quick else args.script)
    seeds = [1] if args.quick else range(1, args.seeds + 1)
    pool = ThreadPoolExecutor(args.jobs)
    stop_on_signals(pool)
    rows = [row for row in ROWS[args.script] if row.startswith(tuple(args.rows))]
    numbers = {row: number for number, row in enumerate(ROWS[args.script])}
    runs = {}
    with pool:
        for seed in seeds:
            for row in rows:
                folder = place / f"{numbers[row]}-{seed}"
                runs[row, seed] = pool.submit(run, args.script, row, seed, folder, args.quick)
        print(f"| {args.script}.py | held-out accuracy | of each seed | held-out loss | seconds |")
        print("| --- | --- | --- | --- | --- |")
        for row in rows:
            print_row(row, [runs[row, seed].result() for seed in seeds])
    return 0


if __name__ == "__main__":
    sys.exit(main())
