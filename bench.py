"""Does a change help? Train with it and without, on the same seeds, and compare the losses.

    python bench.py vit.py                  # your edit of vit.py against the last commit's
    python bench.py vit.py --dropout 0.1    # vit.py with a flag against vit.py without
    python bench.py ideas/vit_muon.patch    # the last commit's script with a patch and without
    python bench.py                         # what the collection says: the table and docs/ideas.png

Both sides train at the same small size (FLAGS; --full for the script's own), and are tested on the
last 10,000 training images, which are held out. Flags beside a patch are given to both sides. The
result is printed anew after each seed; if you stop it, the same command goes on from there. Those
of a patch in ideas/, with no further flags, go into ideas/results.csv.

± is the 95 % interval of the mean difference, over seeds; the images tested on are always the same.
So if you decide beforehand how many seeds there will be, one in twenty changes that do nothing gets
the verdict "better" or "worse" for its loss, and one in twenty for its accuracy. If you stop at the
first such verdict within ten seeds, it is one in five. The tables of the collection, with their
many ideas, are stricter: there, one table in twenty has such a mistake (Bonferroni).
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, NoReturn

import torch
from filelock import FileLock
from scipy import stats
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs" / "bench"
IDEAS = HERE / "ideas"
RESULTS = IDEAS / "results.csv"
COLUMNS = "idea side seed loss accuracy seconds error torch processor commit".split()
# What is compared, and its column in log.csv.
FIGURES = {"loss": "test_loss", "accuracy": "test_accuracy", "seconds": "seconds"}
# Of the picture.
TICKS = [-0.1, -0.03, -0.01, -0.005, 0, 0.005, 0.01, 0.03, 0.1, 0.3]
# Flags that are the same for both sides, whatever is compared.
OURS = "--seed --holdout --resume --out_dir --data_dir --eval_interval".split()
# The small sizes: about a minute on one core. --subset limits the held-out images as well, so it
# must not be below 10000. vit.py trains on all images of a batch here (--easy_share 0): to look
# for the hardest would double the time.
FLAGS = {
    "mini_vit.py": "--n_layers 4 --first_layers 1 --n_head 14 --d_head 20 --n_embd 280"
    " --max_iters 600 --warmup_iters 100 --subset 15000",
    "mini_vit_concat.py": "--n_layers 2 --first_layers 1 --n_head 20 --d_head 53 --n_embd 1060"
    " --max_iters 400 --warmup_iters 50 --subset 10000",
    "mini_vit_augment.py": "--n_layers 4 --first_layers 1 --n_head 14 --d_head 20 --n_embd 280"
    " --batch_size 512 --max_iters 900 --warmup_iters 100 --subset 10000",
    "vit.py": "--n_embd 64 --n_layers 2 --batch_size 128 --easy_share 0 --max_iters 900"
    " --warmup_iters 100 --subset 10000",
}


# ---------------------------------------------------------------- what is compared
class Side(NamedTuple):
    """One side of a comparison: a script and the flags it trains with."""

    script: str  # its name, such as vit.py
    text: str
    flags: list[str]


def sides_of_script(script: str, given: list[str], size: list[str]) -> tuple[Side, Side]:
    """Compare a script without and with given flags; without any, the last commit with the edit."""
    text = (HERE / script).read_text("utf-8")
    if given:
        return Side(script, text, size), Side(script, text, size + given)
    committed = last_commits(script)
    if committed == text:
        fail(f"{script} is as in the last commit: edit it, or give a flag to compare")
    return Side(script, committed, size), Side(script, text, size)


def sides_of_patch(path: Path, size: list[str]) -> tuple[Side, Side]:
    """Compare a script with itself as a patch changes it, by a diff, by flags, or by both.

    It is the last commit's, which the patch was made from: your edit may still be in the script.
    """
    header = read_header(path)
    script = header["Script"]
    text = last_commits(script)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, script)
        copy.write_text(text, "utf-8")
        if "diff --git" in path.read_text("utf-8"):
            git("apply", str(path.resolve()), folder=Path(folder))
        changed = copy.read_text("utf-8")
    flags = shlex.split(header.get("Flags", ""))
    if changed == text and not flags:
        fail(f"{path} changes nothing: it needs a diff, or a line 'Flags: '")
    return Side(script, text, size), Side(script, changed, size + flags)


def last_commits(script: str) -> str:
    """Return the text of a script as it is in the last commit."""
    return git("show", f"HEAD:./{script}", folder=HERE)


def read_header(path: Path) -> dict[str, str]:
    """Return what stands before a patch's diff: Idea (its first line), Source, Script and Flags."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        fail(f"can't read {path} ({error})")
    idea, *lines = text.partition("diff --git")[0].splitlines() or [""]
    header = {"Idea": idea} | dict(line.strip().split(": ", 1) for line in lines if ": " in line)
    if header.get("Script") not in FLAGS:
        fail(f"{path} needs a line 'Script: ' that names one of {', '.join(FLAGS)}")
    return header


def git(*arguments: str, folder: Path) -> str:
    """Return what a git command prints."""
    # Even if temporary folders lie within a repository, a copy in one is no part of it.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": tempfile.gettempdir()}
    command = ["git", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding="utf-8"
        )
    except FileNotFoundError:
        fail("this needs git, which is not installed")
    if done.returncode:
        fail(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout


# ---------------------------------------------------------------- runs
def compare(name: str, base: Side, changed: Side, n_seeds: int, jobs: int, record: str) -> list:
    """Train both sides on each seed, and print the result anew after each.

    Return the pairs of results. If `record` names an idea, they go into ideas/results.csv, too.
    """
    pairs = []
    bar = tqdm(total=2 * n_seeds, unit="run", disable=None)

    def run(side: Side, seed: int) -> dict:
        result = train(side, seed)
        bar.update()
        return result

    with bar, ThreadPoolExecutor(jobs) as pool:
        runs = [
            (pool.submit(run, base, seed), pool.submit(run, changed, seed))
            for seed in range(1, n_seeds + 1)
        ]
        try:
            for before, after in runs:
                pairs.append((before.result(), after.result()))
                if "error" in pairs[-1][0]:
                    fail(f"{base.script} fails without the change: {pairs[-1][0]['error']}")
                if record:
                    write_rows(record, len(pairs), *pairs[-1])
                tqdm.write(summary(name, pairs) + "\n")
        finally:
            pool.shutdown(cancel_futures=True)
    return pairs


def train(side: Side, seed: int) -> dict:
    """Return a run's loss, accuracy and seconds, or its error; train it if that isn't done yet."""
    flags = [*side.flags, "--holdout", "10000", "--seed", str(seed)]
    what = json.dumps([side.text, flags, torch.__version__, processor()])
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    folder = RUNS / f"{Path(side.script).stem}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "bench.lock"):  # another bench.py may need the same run
        if not (folder / "result.json").exists():
            result = run_script(side, flags, folder)
            if "error" in result:
                return result
            write_whole(folder / "result.json", json.dumps(result))
            (folder / "model.pt").unlink()  # those of many runs would fill a disk
        return json.loads((folder / "result.json").read_text())


def run_script(side: Side, flags: list[str], folder: Path) -> dict:
    """Train in a folder, or go on there; return the loss, accuracy and seconds, or the error."""
    (folder / side.script).write_text(side.text, "utf-8")
    command = [sys.executable, side.script, "--resume", "--out_dir", str(folder), *flags]
    command += ["--data_dir", str(HERE / "data"), "--eval_interval", str(10**9)]
    one_thread = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    environment = os.environ | one_thread
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        fail(f"a run was stopped by signal {-done.returncode}; the same command goes on")
    last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == 2:  # as argparse ends
        fail(last_line)
    if done.returncode > 0:
        tqdm.write(done.stderr, sys.stderr)  # a traceback says where
        return {"error": last_line}
    with open(folder / "log.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    result = {key: float(last[column]) for key, column in FIGURES.items()}
    return result if math.isfinite(result["loss"]) else {"error": "the held-out loss is not finite"}


def write_whole(path: Path, text: str) -> None:
    """Write a file; if that is stopped, the old one stays."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def processor() -> str:
    """Return the name of the GPU, or of the CPU and the precision that the scripts choose there."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line[line.index(":") + 2 :] for line in lines if "model name" in line), name)
    bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return f"{name}, {'bfloat16' if bfloat16 else 'float32'}"


# ---------------------------------------------------------------- what came of it
def interval(differences: list[float], level: float = 0.95) -> tuple[float, float]:
    """Return the mean and half the width of its confidence interval, infinity for one seed."""
    mean = fmean(differences)
    if len(differences) < 2:
        return mean, math.inf
    t = stats.t.ppf((1 + level) / 2, len(differences) - 1)  # Student's
    return mean, float(stats.sem(differences) * t)


def with_interval(differences: list[float], digits: int) -> str:
    """Return the mean with its interval as text."""
    mean, half = interval(differences)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def verdict(differences: list[float], good: int, level: float = 0.95) -> str:
    """Return whether a change helps. good is 1 where more is better, -1 where less is."""
    mean, half = interval(differences, level)
    if abs(mean) <= half:
        return "no clear difference"
    return "better" if mean * good > 0 else "worse"


def column(pairs: list, key: str, scale: float = 1.0) -> tuple[float, float, list[float]]:
    """Return the mean without and with the change, and the paired differences."""
    before = [scale * base[key] for base, _ in pairs]
    after = [scale * changed[key] for _, changed in pairs]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return fmean(before), fmean(after), differences


def fastest(pairs: list) -> tuple[float, float]:
    """Return each side's least seconds: what else the machine does only ever adds to them."""
    return min(base["seconds"] for base, _ in pairs), min(new["seconds"] for _, new in pairs)


def error_of(pairs: list) -> str:
    """Return the error of a seed with which the changed side fails, or ""."""
    return next((changed["error"] for _, changed in pairs if changed.get("error")), "")


def summary(name: str, pairs: list) -> str:
    """Return the lines that say what came of a comparison."""
    lines = [f"{name}: {len(pairs)} seed{'s' if len(pairs) > 1 else ''}"]
    if error_of(pairs):
        return f"{lines[0]}\nworse: with the change, it fails: {error_of(pairs)}"
    before, after, change = column(pairs, "loss")
    text = f"{before:.4f} -> {after:.4f}   {with_interval(change, 4)}"
    lines.append(f"held-out loss      {text}    {verdict(change, -1)}")
    before, after, change = column(pairs, "accuracy", 100)
    text = f"{before:.2f} -> {after:.2f} %   {with_interval(change, 2)} %"
    lines.append(f"held-out accuracy   {text}  {verdict(change, 1)}")
    before, after = fastest(pairs)
    lines.append(f"time               {before:6.0f} -> {after:.0f} s")
    return "\n".join(lines)


# ---------------------------------------------------------------- the collection
def read_rows() -> dict[tuple, dict]:
    """Return the rows of ideas/results.csv by (idea, side, seed)."""
    if not RESULTS.exists():
        return {}
    with open(RESULTS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["seed"] = int(row["seed"])
        if not row["error"]:
            row |= {key: float(row[key]) for key in FIGURES}
    return {(row["idea"], row["side"], row["seed"]): row for row in rows}


def write_rows(idea: str, seed: int, base: dict, changed: dict) -> None:
    """Note both results of a seed in ideas/results.csv.

    A loss that differs from the one noted before means that the script or the patch has changed. So
    the rows of later seeds, which are from before the change, are dropped.
    """
    commit = git("rev-parse", "--short", "HEAD", folder=HERE).strip()
    where = {"torch": torch.__version__, "processor": processor(), "commit": commit}
    with FileLock(RUNS / "results.lock"):  # another bench.py may add its own rows
        rows = read_rows()
        for side, result in (("base", base), ("idea", changed)):
            new = {"idea": idea, "side": side, "seed": seed} | result | where
            if rows.get((idea, side, seed), new).get("loss") != new.get("loss"):
                rows = {key: row for key, row in rows.items() if key[0] != idea or key[2] <= seed}
            rows[idea, side, seed] = new
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
        write_whole(RESULTS, text.getvalue())


def show_collection() -> None:
    """Print a Markdown table for each script, and draw them all into docs/ideas.png."""
    rows = read_rows()
    tables = {}  # of each script, its ideas with their pairs of results
    for path in sorted(IDEAS.glob("*.patch")):
        header = read_header(path)
        seeds = sorted(seed for idea, side, seed in rows if (idea, side) == (path.stem, "idea"))
        pairs = [(rows[path.stem, "base", seed], rows[path.stem, "idea", seed]) for seed in seeds]
        if pairs:
            tables.setdefault(header["Script"], []).append((path.stem, header["Idea"], pairs))
    if not tables:
        fail(f"{RESULTS} holds no results")
    for script, ideas in tables.items():
        ideas.sort(key=lambda idea: change_of_loss(idea[2]))
        print(f"**{script}**: `{FLAGS[script]}`\n")
        print("| idea | | seeds | held-out loss | held-out accuracy, % | time | verdict |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, text, pairs in ideas:
            print(f"| {name} | {text} | {len(pairs)} | {table_cells(pairs, len(ideas))} |")
        print()
    draw(tables, HERE / "docs" / "ideas.png")


def change_of_loss(pairs: list) -> float:
    """Return by how much an idea changes the held-out loss; infinity if it fails."""
    return math.inf if error_of(pairs) else interval(column(pairs, "loss")[2])[0]


def table_cells(pairs: list, n_ideas: int) -> str:
    """Return an idea's changes of loss, accuracy and time, and a verdict among so many ideas."""
    if error_of(pairs):
        return "fails | | | worse"
    loss = with_interval(column(pairs, "loss")[2], 4)
    accuracy = with_interval(column(pairs, "accuracy", 100)[2], 2)
    before, after = fastest(pairs)
    return f"{loss} | {accuracy} | {after / before:.2f} | {strict_verdict(pairs, n_ideas)}"


def strict_verdict(pairs: list, n_ideas: int) -> str:
    """Return whether an idea helps, where so many are looked at (Bonferroni)."""
    return verdict(column(pairs, "loss")[2], -1, level=1 - 0.05 / n_ideas)


def draw(tables: dict[str, list], path: Path) -> None:
    """Draw a forest plot: how each idea changes the held-out loss, with its interval."""
    from matplotlib.figure import Figure

    most = max(map(len, tables.values()))
    figure = Figure((6 * len(tables), 0.18 * most + 1.6), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, sharex=True)[0]
    colours = {"better": "C2", "worse": "C3"}
    for axes, (script, ideas) in zip(panels, tables.items(), strict=True):
        works = [(name, pairs) for name, _, pairs in ideas if not error_of(pairs)]
        for y, (_, pairs) in enumerate(works):
            mean, half = interval(column(pairs, "loss")[2])
            colour = colours.get(strict_verdict(pairs, len(ideas)), "0.5")
            axes.errorbar(mean, y, xerr=half, fmt="o", color=colour, ms=3, capsize=2)
        names = [
            f"{name.partition('_')[2].replace('_', ' ')} ({len(pairs)})" for name, pairs in works
        ]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.axvline(0, color="0.4", linewidth=1)
        axes.set_xscale("symlog", linthresh=0.01)  # even up to 0.01, logarithmic beyond
        axes.set_xticks(TICKS, TICKS, fontsize=8)
        axes.grid(axis="x", color="0.9")
        axes.invert_yaxis()
        axes.set(title=script, xlabel="change of held-out loss")
    figure.suptitle("green: better, red: worse, grey: no clear difference; (number of seeds)")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------- command line
def fail(message: str) -> NoReturn:
    """End with one line on stderr and exit status 1."""
    raise SystemExit(f"bench.py: error: {message}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line, sys.argv if argv is None."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "bench.py", description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("target", nargs="*", help="a script, with flags of it or edited; or patches")
    add("--seeds", type=int, default=10, help="of each side (default: 10)")
    add("--jobs", type=int, help="runs side by side (default: one per core; one on a GPU)")
    add("--full", action="store_true", help="train at the script's own size")
    args, given = parser.parse_known_args(argv)
    jobs = args.jobs or (1 if torch.cuda.is_available() else torch.get_num_threads())
    if min(args.seeds, jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    for flag in given:
        if flag.partition("=")[0] in OURS:
            parser.error(f"{flag} is set by bench.py itself")
    if not args.target:
        show_collection()
    comparisons = [plan(target, given, args.full) for target in args.target]
    for name, sides, record in comparisons:
        compare(name, *sides, args.seeds, jobs, record)


def plan(target: str, given: list[str], full: bool) -> tuple[str, tuple[Side, Side], str]:
    """Return a comparison's name, its two sides, and the idea to record it as, or ""."""
    path = Path(target)
    is_patch = path.suffix == ".patch"
    if not is_patch and not (path.name in FLAGS and path.resolve().parent == HERE):
        fail(f"{target} is neither a patch nor one of {', '.join(FLAGS)} in {HERE}")
    script = read_header(path)["Script"] if is_patch else path.name
    size = [] if full else FLAGS[script].split()
    if not is_patch:
        name = f"{script}, {shlex.join(given) or 'your edit'}"
        return name, sides_of_script(script, given, size), ""
    is_idea = path.resolve().parent == IDEAS and not given and not full
    name = f"{script}, {shlex.join([target, *given])}"
    return name, sides_of_patch(path, size + given), path.stem if is_idea else ""


if __name__ == "__main__":
    main()
