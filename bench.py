"""Does a change help? Train both sides on the same seeds, and compare what they hold out.

    python bench.py vit.py                  # your edit of vit.py against the last commit's
    python bench.py vit.py --dropout 0.1    # a flag against the default
    python bench.py ideas/vit_muon.patch    # an idea of the collection
    python bench.py                         # what the collection says: the table and docs/ideas.png

Both sides train at the same small size (FLAGS; --full for the script's own), and are tested on the
last 10,000 training images, which are held out. After each seed the result is printed anew, so stop
when you have seen enough: the same command goes on from there. ± is the 95 % interval of the mean
difference, so of comparisons without any effect, one in twenty is called better or worse. In the
table of the whole collection, the verdict allows for their number (Bonferroni).
"""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from scipy import stats
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs" / "bench"
IDEAS = HERE / "ideas"
RESULTS = IDEAS / "results.csv"
# About a minute on one core, with about as many passes as the default makes.
FLAGS = {
    "mini_vit.py": "--n_layers 4 --first_layers 1 --n_head 14 --d_head 20 --n_embd 280"
    " --max_iters 600 --warmup_iters 100 --subset 15000",
    "mini_vit_concat.py": "--n_layers 2 --first_layers 1 --n_head 20 --d_head 53 --n_embd 1060"
    " --max_iters 300 --warmup_iters 50 --subset 7500",
    "mini_vit_augment.py": "--n_layers 4 --first_layers 1 --n_head 14 --d_head 20 --n_embd 280"
    " --batch_size 512 --max_iters 900 --warmup_iters 100 --subset 4500 --num_workers 0",
    "vit.py": "--n_embd 64 --n_layers 3 --max_iters 900 --warmup_iters 100 --subset 6000",
}


# ---------------------------------------------------------------- what is compared
@dataclass
class Side:
    """One side of a comparison: a script's text and the flags it trains with."""

    script: str  # its name, such as vit.py
    text: str
    flags: list[str]


@dataclass
class Comparison:
    name: str
    base: Side
    changed: Side


def compare_edit(script: str, given: list[str], size: list[str]) -> Comparison:
    """Compare a script with and without flags; without any, its edit with the last commit."""
    text = (HERE / script).read_text("utf-8")
    if given:
        name = f"{script} {shlex.join(given)}"
        return Comparison(name, Side(script, text, size), Side(script, text, size + given))
    committed = git("show", f"HEAD:./{script}", folder=HERE)
    if committed == text:
        fail(f"{script} is as in the last commit: edit it, or give a flag to compare")
    name = f"{script}, your edit"
    return Comparison(name, Side(script, committed, size), Side(script, text, size))


def compare_patch(path: Path, given: list[str], size: dict[str, list[str]]) -> Comparison:
    """Compare a script with itself as a patch changes it, by a diff, by flags, or by both."""
    header = read_header(path)
    script = header["Script"]
    text = (HERE / script).read_text("utf-8")
    flags = size[script] + given
    changed = Side(script, patched(path, script), flags + shlex.split(header.get("Flags", "")))
    return Comparison(f"{script}, {path.name}", Side(script, text, flags), changed)


def read_header(path: Path) -> dict[str, str]:
    """Return what stands before a patch's diff: Idea (its first line), Source, Script and Flags."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        fail(f"can't read {path} ({error})")
    idea, *lines = text.partition("diff --git")[0].splitlines() or [""]
    header = {"Idea": idea} | dict(line.split(": ", 1) for line in lines if ": " in line)
    if header.get("Script") not in FLAGS:
        fail(f"{path} has no line 'Script: ' that names one of {', '.join(FLAGS)}")
    return header


def patched(path: Path, script: str) -> str:
    """Return a script's text with a patch applied to it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, script)
        shutil.copy(HERE / script, copy)
        if "diff --git" in path.read_text("utf-8"):
            git("apply", str(path.resolve()), folder=Path(folder))
        return copy.read_text("utf-8")


def git(*arguments: str, folder: Path) -> str:
    """Return what a git command prints."""
    # A repository that the folder happens to lie in is none of its business.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
    except FileNotFoundError:
        fail("git is not installed, and this needs it")
    if done.returncode:
        fail(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


# ---------------------------------------------------------------- runs
def train(side: Side, seed: int) -> dict:
    """Return a run's loss, accuracy and seconds, or its error; train it if it isn't done yet."""
    flags = [*side.flags, "--holdout", "10000", "--seed", str(seed)]
    settings = [side.text, *flags, torch.__version__, device_name()]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = RUNS / f"{Path(side.script).stem}-{digest}"
    result_file = folder / "result.json"
    if result_file.exists():
        return json.loads(result_file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / side.script).write_text(side.text, "utf-8")
    command = [sys.executable, side.script, "--resume", "--out_dir", str(folder), *flags]
    command += ["--data_dir", str(HERE / "data"), "--eval_interval", str(2**62)]
    environment = os.environ | ({} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode < 0:  # it was stopped: the next time, it goes on
        raise KeyboardInterrupt
    if done.returncode:
        result = {"error": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    else:
        with open(folder / "log.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        result = {
            "loss": float(last["test_loss"]),
            "accuracy": float(last["test_accuracy"]),
            "seconds": float(last["seconds"]),
        }
    result_file.write_text(json.dumps(result))
    (folder / "model.pt").unlink(missing_ok=True)  # hundreds of runs would fill the disk
    return result


def device_name() -> str:
    """Return the GPU's name or the processor's, and whether that has bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        name = models[0].partition(": ")[2] if models else name
    bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return f"{name}, {'bfloat16' if bfloat16 else 'float32'}"


def run(comparison: Comparison, n_seeds: int, jobs: int, record: str | None) -> None:
    """Train both sides on each seed, and print the result anew after each."""
    pairs = []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=2 * n_seeds, unit="run", disable=None) as bar:

        def one(side: Side, seed: int) -> dict:
            result = train(side, seed)
            bar.update()
            return result

        sides = (comparison.base, comparison.changed)
        futures = [
            [pool.submit(one, side, seed) for side in sides] for seed in range(1, n_seeds + 1)
        ]
        try:
            for seed, both in enumerate(futures, 1):
                base, changed = (future.result() for future in both)
                if "error" in base:
                    fail(f"without the change, {comparison.base.script} fails: {base['error']}")
                pairs.append((base, changed))
                if record:
                    write_rows(record, seed, base, changed)
                bar.clear()
                print("\n".join(summary(comparison.name, pairs)), end="\n\n", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ---------------------------------------------------------------- what came of it
def interval(differences: list[float], level: float = 0.95) -> tuple[float, float]:
    """Return the mean and half the width of its confidence interval (Student's t)."""
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return mean, math.inf
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return mean, float(stats.t.ppf((1 + level) / 2, n - 1)) * error


def verdict(differences: list[float], better: int, level: float = 0.95) -> str:
    """Return whether a change helps; better is 1 if more is better, -1 if less is."""
    mean, half = interval(differences, level)
    if abs(mean) <= half:
        return "no clear difference"
    return "better" if mean * better > 0 else "worse"


def summary(name: str, pairs: list[tuple[dict, dict]]) -> list[str]:
    """Return the lines that say what came of a comparison, from (base, changed) of each seed."""
    n = len(pairs)
    lines = [f"{name}: {n} seed{'s' if n > 1 else ''}"]
    errors = [changed["error"] for _, changed in pairs if "error" in changed]
    if errors:
        return [*lines, f"with the change, {len(errors)} of {n} fail: {errors[-1]}", "worse"]

    def means(key: str, factor: float) -> tuple[float, float, list[float]]:
        before = [factor * base[key] for base, _ in pairs]
        after = [factor * changed[key] for _, changed in pairs]
        return sum(before) / n, sum(after) / n, [a - b for a, b in zip(after, before, strict=True)]

    before, after, differences = means("loss", 1)
    change = "{:+.4f} ± {:.4f}".format(*interval(differences))
    word = verdict(differences, -1)
    lines.append(f"held-out loss      {before:.4f} -> {after:.4f}   {change}    {word}")
    before, after, differences = means("accuracy", 100)
    change = "{:+.2f} ± {:.2f} %".format(*interval(differences))
    word = verdict(differences, 1)
    lines.append(f"held-out accuracy   {before:.2f} -> {after:.2f} %   {change}    {word}")
    before, after, _ = means("seconds", 1)
    lines.append(f"time               {before:6.0f} -> {after:.0f} s")
    return lines


COLUMNS = "idea side seed loss accuracy seconds error torch processor commit".split()


def read_rows() -> dict[tuple, dict]:
    """Return the rows of ideas/results.csv by (idea, side, seed)."""
    if not RESULTS.exists():
        return {}
    with open(RESULTS, newline="", encoding="utf-8") as file:
        return {(row["idea"], row["side"], int(row["seed"])): row for row in csv.DictReader(file)}


def write_rows(idea: str, seed: int, base: dict, changed: dict) -> None:
    """Note both sides of a seed in ideas/results.csv, in place of earlier ones."""
    rows = read_rows()
    where = {
        "torch": torch.__version__,
        "processor": device_name(),
        "commit": git("rev-parse", "--short", "HEAD", folder=HERE).strip(),
    }
    for side, result in (("base", base), ("idea", changed)):
        row = {"idea": idea, "side": side, "seed": seed} | result | where
        rows[idea, side, seed] = row
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for key in sorted(rows):
            writer.writerow(rows[key])


# ---------------------------------------------------------------- the collection
@dataclass
class Finding:
    """What came of one idea of the collection."""

    name: str
    idea: str  # in one sentence
    script: str
    pairs: list[tuple[dict, dict]]  # (base, idea) of each seed


def read_findings() -> list[Finding]:
    """Return what ideas/results.csv says of each patch, the best first, script by script."""
    rows = read_rows()
    findings = []
    for path in sorted(IDEAS.glob("*.patch")):
        pairs = []
        for seed in range(1, 1000):
            both = [rows.get((path.stem, side, seed)) for side in ("base", "idea")]
            if all(both):
                pairs.append(tuple(map(numbers, both)))
        if pairs:
            header = read_header(path)
            findings.append(Finding(path.stem, header["Idea"], header["Script"], pairs))
    return sorted(findings, key=lambda f: (f.script, mean_difference(f)))


def numbers(row: dict) -> dict:
    """Return a row's figures as numbers, or its error."""
    if row["error"]:
        return {"error": row["error"]}
    return {key: float(row[key]) for key in ("loss", "accuracy", "seconds")}


def mean_difference(finding: Finding) -> float:
    """Return by how much an idea changes the held-out loss; infinity if it fails."""
    if any("error" in changed for _, changed in finding.pairs):
        return math.inf
    return interval(differences(finding, "loss"))[0]


def differences(finding: Finding, key: str) -> list[float]:
    """Return an idea's paired differences: idea minus base, seed by seed."""
    return [changed[key] - base[key] for base, changed in finding.pairs]


def print_table(findings: list[Finding]) -> None:
    """Print a Markdown table for each script: RESULTS.md has them word for word."""
    for script in dict.fromkeys(finding.script for finding in findings):
        some = [finding for finding in findings if finding.script == script]
        level = 1 - 0.05 / len(some)
        bases = [base for finding in some for base, _ in finding.pairs]
        loss = sum(base["loss"] for base in bases) / len(bases)
        print(f"**{script}** (held-out loss {loss:.4f}; `{FLAGS[script]}`)\n")
        print(
            "| idea | what it does | seeds | held-out loss | accuracy, % | time, times | verdict |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for finding in some:
            print(table_row(finding, level))
        print()


def table_row(finding: Finding, level: float) -> str:
    """Return an idea's row of the table."""
    begin = f"| {finding.name} | {finding.idea} | {len(finding.pairs)} |"
    if mean_difference(finding) == math.inf:
        return f"{begin} fails | | | worse |"
    loss = differences(finding, "loss")
    accuracy = [100 * d for d in differences(finding, "accuracy")]
    ratio = sum(changed["seconds"] for _, changed in finding.pairs)
    ratio /= sum(base["seconds"] for base, _ in finding.pairs)
    change = "{:+.4f} ± {:.4f}".format(*interval(loss))
    change_of_accuracy = "{:+.2f} ± {:.2f}".format(*interval(accuracy))
    return f"{begin} {change} | {change_of_accuracy} | {ratio:.2f} | {verdict(loss, -1, level)} |"


def draw(findings: list[Finding], path: Path) -> None:
    """Draw a forest plot: the change of held-out loss that each idea brings, with its interval."""
    from matplotlib.figure import Figure

    scripts = list(dict.fromkeys(finding.script for finding in findings))
    figure = Figure((12, 0.19 * max(map(len_of(findings), scripts)) + 1.5), layout="constrained")
    for axes, script in zip(
        figure.subplots(1, len(scripts), squeeze=False)[0], scripts, strict=True
    ):
        some = [f for f in findings if f.script == script and mean_difference(f) < math.inf]
        for y, finding in enumerate(some):
            mean, half = interval(differences(finding, "loss"))
            colour = "0.5"
            if abs(mean) > half:
                colour = "C2" if mean < 0 else "C3"
            axes.errorbar(mean, y, xerr=half, fmt="o", color=colour, markersize=3, capsize=2)
        axes.set_yticks(
            range(len(some)), [f.name.partition("_")[2].replace("_", " ") for f in some]
        )
        axes.tick_params(axis="y", labelsize=8)
        axes.axvline(0, color="0.7", linewidth=1)
        axes.set_xscale("symlog", linthresh=0.005)
        axes.invert_yaxis()
        axes.set(title=script, xlabel="change of held-out loss; left is better")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def len_of(findings: list[Finding]):
    """Return a function that counts a script's findings."""
    return lambda script: sum(finding.script == script for finding in findings)


# ---------------------------------------------------------------- command line
def fail(message: str) -> NoReturn:
    """End with one line on stderr and exit status 1."""
    raise SystemExit(f"bench.py: error: {message}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line, sys.argv if argv is None."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("bench.py", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("target", nargs="*", help="a script or patches; other flags are the script's")
    add("--seeds", type=int, default=10, help="of each side (default: 10)")
    add("--jobs", type=int, help="runs side by side (default: one per core; one on a GPU)")
    add("--full", action="store_true", help="train at the script's own size")
    args, given = parser.parse_known_args(argv)
    if not args.target:
        findings = read_findings()
        if not findings:
            fail(f"{RESULTS} holds no results yet")
        print_table(findings)
        draw(findings, HERE / "docs" / "ideas.png")
        return
    jobs = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    size = {script: [] if args.full else flags.split() for script, flags in FLAGS.items()}
    for target in args.target:
        path = Path(target)
        if path.suffix == ".patch":
            record = (
                path.stem if path.resolve().parent == IDEAS and not (given or args.full) else None
            )
            run(compare_patch(path, given, size), args.seeds, jobs, record)
        elif path.name in FLAGS:
            run(compare_edit(path.name, given, size[path.name]), args.seeds, jobs, None)
        else:
            fail(f"{target} is neither a patch nor one of {', '.join(FLAGS)}")


if __name__ == "__main__":
    main()
