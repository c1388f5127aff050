"""Look at a run: its loss, its accuracy for each digit, report.png, and your own digits.

python look.py                        # the newest run below runs/, finished or under way
python look.py runs/small             # that one; report.png goes into its folder
python look.py photo.jpg drawing.png  # the newest run's three likeliest digits for each
python look.py runs/small photo.jpg   # that run's
python look.py photo.jpg --show       # photo.digits.png: the digits that were found in it
python look.py runs/small runs/large  # comparison.png: accuracy over the minutes of training
python look.py runs/small my_digits   # accuracy on digits labelled and saved in draw.py
"""

import argparse
import csv
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
RUN_FILES = ("model.pt", "checkpoint.pt", "log.csv")
FOUND = ".digits.png"  # how the names of pictures end that --show writes
PROGRAM = "look.py"  # what errors begin with; draw.py puts its own name here


# ---------------------------------------------------------------------------- runs
@dataclass
class Run:
    """A run, read from its folder, and its model, ready to use."""

    script: ModuleType  # that made it
    config: Any  # the script's Config
    device: torch.device
    model: nn.Module  # on the device, in eval mode
    state: dict  # what model.pt or checkpoint.pt holds


def load_run(folder: str | Path, data_dir: str | None = None, device: str = "auto") -> Run:
    """Return the run in a folder. End with one line on stderr if it can't be read."""
    path = Path(folder, "model.pt")
    if not os.path.exists(path):
        path = Path(folder, "checkpoint.pt")
    if not os.path.exists(path) and os.path.exists(path.with_name("log.csv")):
        fail(f"{folder} holds no weights yet: a run saves every minute or so, and when it ends")
    try:
        # mmap leaves the optimizer's averages on the disk.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        name = state["script"]
        config = state["config"]
        weights = state["model"]
    except Exception as error:
        reason = type(error).__name__
        fail(f"can't read {path}: it is missing, damaged or not from a run ({reason})")
    script = load_script(name, path)
    try:
        config = script.Config(**config)
        config = replace(config, data_dir=data_dir or config.data_dir)
        device = script.choose_device(device)
        model = script.Transformer(config).to(device)
        model.load_state_dict(weights)
        model.precision = script.choose_precision(config, device)
        model.depth = state["depth"]
    except (TypeError, RuntimeError, ValueError, LookupError, AttributeError) as error:
        fail(f"{path} doesn't fit {name}.py: has the script changed since? ({first_line(error)})")
    if state.get("source", script.SOURCE) != script.SOURCE:
        print(f"{name}.py has changed since {folder} was trained", file=sys.stderr)
    for mapped in ("model", "optimizer", "loss_sum"):  # Windows can't replace a mapped file
        state.pop(mapped, None)
    return Run(script, config, device, model.eval(), state)


def load_script(name: str, path: Path) -> ModuleType:
    """Return the script that made the run saved in `path`, as a module."""
    if not isinstance(name, str) or Path(name).name != name:  # a file that somebody has prepared
        fail(f"{path} names no script")
    if name in sys.modules:
        return sys.modules[name]
    script_path = HERE / f"{name}.py"
    if not script_path.exists():
        fail(f"{path} is from {name}.py, which is not beside look.py")
    # importlib.import_module would take a dotted name, such as mini_vit.v2, for a package's module.
    spec = importlib.util.spec_from_file_location(name, script_path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_name(holdout: int) -> str:
    """Return what a run's test images are called, given its setting `holdout`."""
    return "held-out" if holdout else "test"


def newest_run() -> Path:
    """Return the folder below runs/ that was written last."""
    files = [*Path("runs").glob("*/model.pt"), *Path("runs").glob("*/checkpoint.pt")]
    if not files and any(Path("runs").glob("*/log.csv")):
        fail("no run below runs/ has saved yet: they do every minute or so, and at their end")
    if not files:
        fail("there is no run below runs/: train first, or name the run's folder")
    return max(files, key=os.path.getmtime).parent


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's."""
    return any(os.path.exists(folder / name) for name in RUN_FILES)


# ---------------------------------------------------------------------------- errors
def fail(message: str) -> NoReturn:
    """End with one line on stderr and exit status 1."""
    raise SystemExit(f"{PROGRAM}: error: {message}")


def first_line(error: Exception) -> str:
    """Return the first non-blank line of an error's message, or else its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------------------- attention
@contextmanager
def inputs_of_attention(model: nn.Module) -> Iterator[list]:
    """While open, collect (attention module, input) of each block that runs."""
    seen = []

    def remember(module: nn.Module, args: tuple) -> None:
        seen.append((module, args[0]))

    hooks = [block.attn.register_forward_pre_hook(remember) for block in model.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def attention_matrix(model: nn.Module, image: Tensor, block: int) -> Tensor:
    """Return one image's attention weights, (n_head, d_head, d_head), in one block."""
    with inputs_of_attention(model) as seen:
        model(image[None])
    attn, x = seen[block]
    q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.n_head, -1))[0]  # each (n_head, d_head)
    scores = attn.scale * q[:, :, None] * k[:, None, :]
    return scores.softmax(-1).cpu()


def rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Return how much each patch contributes to a vit's class token, (N, rows, columns).

    This is attention rollout: in each block in use, attention averaged over the heads and the
    residual connection count half each (Abnar and Zuidema 2020, arXiv:2005.00928).
    """
    with inputs_of_attention(model) as seen:
        model(images)
    identity = torch.eye(len(model.position), device=images.device)
    mixed = identity
    for attn, x in seen:
        qkv = attn.qkv(x).unflatten(-1, (3, attn.n_head, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # each (N, n_head, tokens, d_head)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        mixed = (weights.mean(1) + identity) / 2 @ mixed  # (N, tokens, tokens)
    side = round((len(model.position) - 1) ** 0.5)
    return mixed[:, 0, 1:].unflatten(-1, (side, side)).cpu()


# ---------------------------------------------------------------------------- report.png
def new_figure(width: float, height: float):
    """Return a matplotlib figure, in inches, with no settings of a notebook or a matplotlibrc."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # a matplotlibrc may ask for LaTeX
    return Figure((width, height), layout="constrained")


def try_to_draw(draw: Callable[[Path], None], path: Path) -> None:
    """Draw a picture into a file or, where that can't be done, say why in one line."""
    try:
        draw(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"no {path.name}: {reason}", file=sys.stderr)


def draw_curves(axes, log: list[dict], test: str) -> None:
    """Draw losses and, in the second axes, accuracy and learning rate, over the steps.

    `test` is what the run is tested on: "test" or "held-out" images.
    """
    losses, accuracy = axes
    steps = [row["iter"] for row in log]
    losses.plot(steps, [row["train_loss"] for row in log], "C0--o", label="training")
    losses.plot(steps, [row["test_loss"] for row in log], "C0-o", label=test)
    losses.set(xlabel="step", title="cross-entropy", yscale="log")
    losses.legend()
    accuracy.plot(steps, [100 * row["test_accuracy"] for row in log], "C1-o")
    final = f": {log[-1]['test_accuracy']:.2%}" if log else ""
    accuracy.set(xlabel="step", title=f"{test} accuracy{final}")
    accuracy.set_ylabel("accuracy, %", color="C1")
    rate = accuracy.twinx()
    rate.plot(steps, [row["learning_rate"] for row in log], "C2:")
    rate.set_ylabel("learning rate", color="C2")


def draw_confusion(axes, predicted: Tensor, labels: Tensor) -> None:
    """Draw the confusion matrix: how often each digit was predicted as which."""
    counts = torch.zeros(10, 10, dtype=torch.long)
    counts.index_put_((labels, predicted), torch.tensor(1), accumulate=True)
    axes.imshow(counts.float().log1p(), cmap="Blues")
    style = {"ha": "center", "va": "center", "fontsize": 8}
    for i, j in counts.nonzero().tolist():
        axes.text(j, i, counts[i, j].item(), color="w" if i == j else "k", **style)
    axes.set(xlabel="predicted", ylabel="true", title="confusion matrix")
    axes.set(xticks=range(10), yticks=range(10))


def draw_mistakes(figure, images: Tensor, labels: Tensor, probabilities: Tensor) -> None:
    """Draw the twenty mistakes that the model is surest of."""
    figure.suptitle("most confident mistakes: true → predicted")
    predicted = probabilities.argmax(-1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[probabilities[wrong].amax(-1).argsort(descending=True)]
    for axes, i in itertools.zip_longest(figure.subplots(2, 10).flat, wrong[:20].tolist()):
        axes.axis("off")
        if i is not None:
            axes.imshow(images[i].view(28, 28), cmap="gray")
            title = f"{labels[i]} → {predicted[i]}\n{probabilities[i].max():.1%}"
            axes.set_title(title, fontsize=9)


def draw_attention(figure, model, image: Tensor) -> None:
    """Draw one digit, and attention in three heads of the first and of the last block."""
    title = "attention within one digit: a row is a feature (query), bright where it looks (keys)"
    figure.suptitle(title)
    axes = figure.subplots(2, 4)
    for ax in axes.flat:
        ax.axis("off")
    axes[0, 0].imshow(image.cpu().view(28, 28), cmap="gray")
    axes[0, 0].set_title("input")
    for row, (place, block) in zip(axes, [("first", 0), ("last", model.depth - 1)], strict=True):
        heads = zip(row[1:], attention_matrix(model, image, block), strict=False)
        for head, (ax, weights) in enumerate(heads, 1):
            ax.axis("on")
            ax.imshow(weights, cmap="viridis")
            ax.set_title(f"{place} block, head {head}")
            ax.set(xlabel="key: feature j", ylabel="query: feature i")


def draw_patches(figure, model, images: Tensor) -> None:
    """Draw where a vit's class token looks, and how alike its position embeddings are."""
    title = "where the class token looks (attention rolled out over blocks); position embeddings"
    figure.suptitle(title)
    *axes, last = figure.subplots(2, 5).T.flat
    for ax, image, share in zip(axes, images, rollout(model, images), strict=False):
        ax.axis("off")
        ax.imshow(image.cpu().view(28, 28), cmap="gray", extent=(0, 28, 28, 0))
        ax.imshow(share, cmap="inferno", alpha=0.6, extent=(0, 28, 28, 0), interpolation="bilinear")
    patches = torch.nn.functional.normalize(model.position[1:].cpu(), dim=-1)
    side = round(len(patches) ** 0.5)
    alike = (patches @ patches.T).view(side, side, side, side)
    tiles = torch.nn.functional.pad(alike, (0, 1, 0, 1), value=torch.nan)  # lines between tiles
    last.imshow(tiles.permute(0, 2, 1, 3).reshape(side * (side + 1), -1), cmap="viridis")
    last.set(title="position embeddings:\ncosine similarity", xticks=[], yticks=[])
    last.set_xlabel("tile: one patch with all others", fontsize=8)


def draw_report(
    run: Run, images: Tensor, labels: Tensor, probabilities: Tensor, path: Path
) -> None:
    """Draw learning curves, confusion matrix, surest mistakes and attention, as one picture."""
    figure = new_figure(12, 13)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(4, 3, 5))
    *curves, confusion = top.subplots(1, 3)
    draw_curves(curves, run.state["log"], test_name(run.config.holdout))
    draw_confusion(confusion, probabilities.argmax(-1), labels)
    draw_mistakes(middle, images, labels, probabilities)
    some = images[:9].to(run.device)
    if hasattr(run.model, "position"):
        draw_patches(bottom, run.model, some)
    else:
        draw_attention(bottom, run.model, some[0])
    figure.savefig(path, dpi=70)


def report(run: Run, folder: Path) -> None:
    """Print a run's loss and accuracy, for each digit and for all, and draw report.png."""
    *_, images, labels = run.script.load_mnist(run.config)
    test = test_name(run.config.holdout)
    where = run.config.data_dir
    if where == run.script.Config.data_dir:
        where = "MNIST"
    print(f"{folder}: {run.state['script']}.py, {run.state['iter']} steps; report.png goes there")
    print(f"measured on {len(labels)} {test} images of {where}")
    loss, probabilities = run.script.evaluate(
        run.model, images.to(run.device), labels.to(run.device)
    )
    probabilities = probabilities.cpu()
    right = probabilities.argmax(-1) == labels
    print(f"{test} loss: {loss:.4f}")
    for digit in range(10):
        print(f"accuracy of {digit}: {right[labels == digit].double().mean():.2%}")
    accuracy = right.double().mean()
    kind = "held-out accuracy" if run.config.holdout else "accuracy"
    print(f"{kind}: {accuracy:.2%} ({right.sum()} of {len(labels)})", flush=True)

    def draw(path: Path) -> None:
        draw_report(run, images, labels, probabilities, path)

    try_to_draw(draw, folder / "report.png")


# ---------------------------------------------------------------------------- comparison.png
def read_log(folder: Path) -> list[dict]:
    """Return the seconds and the test accuracy of each evaluation in a run's log.csv."""
    path = folder / "log.csv"
    try:
        text = path.read_text()
    except (OSError, UnicodeError) as error:
        fail(f"can't read {path} ({type(error).__name__})")
    if ";" in text:
        fail(f"{path} has semicolons: a spreadsheet has changed it; save it with commas")
    try:
        rows = [
            {name: float(row[name]) for name in ("seconds", "test_accuracy")}
            for row in csv.DictReader(text.splitlines())
        ]
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{path} is not the log of a run ({type(error).__name__})")
    if not rows:
        fail(f"{folder} has no evaluation yet")
    return rows


def tested_on(folder: Path) -> dict:
    """Return the settings that say what images a run is tested on; {} if it hasn't saved yet."""
    for name in ("model.pt", "checkpoint.pt"):
        try:
            state = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            config = state["config"]
        except Exception:  # it is missing or damaged, and log.csv alone is enough to compare
            continue
        return {field: config.get(field) for field in ("data_dir", "subset", "holdout")}
    return {}


def draw_comparison(logs: dict[str, list[dict]], test: str, path: Path) -> None:
    """Draw each run's accuracy, from its log's rows, against minutes of training."""
    figure = new_figure(9, 5)
    axes = figure.subplots()
    for name, rows in logs.items():
        minutes = [row["seconds"] / 60 for row in rows]
        accuracy = [100 * row["test_accuracy"] for row in rows]
        (line,) = axes.plot(minutes, accuracy, "-o", markersize=4)
        axes.annotate(
            name.replace("$", r"\$"),  # else matplotlib takes it for a formula
            (minutes[-1], accuracy[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
        )
    worst = min(100 * rows[-1]["test_accuracy"] for rows in logs.values())
    earliest = min(rows[0]["seconds"] for rows in logs.values()) / 60
    axes.set(xscale="log", xlabel="minutes of training")
    axes.set(ylabel=f"{test} accuracy, %", ylim=(worst - 1, None))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.margins(x=0.25)  # names need room at the right
    axes.set_xlim(left=earliest)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def compare(folders: list[Path]) -> None:
    """Print the last accuracy of each run, and draw comparison.png beside the first."""
    names = [folder.resolve().name for folder in folders]  # "." has no name itself
    logs = {}
    for folder, name in zip(folders, names, strict=True):
        rows = read_log(folder)
        logs[name if names.count(name) == 1 else str(folder)] = rows
        accuracy = rows[-1]["test_accuracy"]
        minutes = rows[-1]["seconds"] / 60
        print(f"{folder}: {accuracy:.2%} after {minutes:.1f} minutes")
    tests = [tested_on(folder) for folder in folders]
    if any(test != tests[0] for test in tests):
        print("caution: these runs were not tested on the same images")
    test = test_name(all(test.get("holdout") for test in tests))

    def draw(path: Path) -> None:
        draw_comparison(logs, test, path)

    try_to_draw(draw, folders[0].resolve().parent / "comparison.png")


# ---------------------------------------------------------------------------- your own digits
def likeliest(probabilities: Tensor) -> str:
    """Return the three likeliest digits of probabilities (10,) as text."""
    top = zip(*probabilities.topk(3), strict=True)
    return "   ".join(f"{digit}: {p:7.2%}" for p, digit in top)


def classify(run: Run, folder: Path, paths: list[Path], show: bool) -> int:
    """Print what the run says of each image file; return the exit status.

    It is 1 if any file could not be read; the others are still read.
    """
    sys.path.insert(0, str(HERE))
    import digits  # here, because report.png must not need its dependencies

    status = 0
    for path in paths:
        try:
            n_pages = digits.count_pages(path)
        except Exception as error:  # Pillow raises many kinds
            status = say_unread(path, error)
            continue
        for page in range(min(n_pages, digits.MOST_PAGES)):
            name = f"{path}, page {page + 1} of {n_pages}" if n_pages > 1 else str(path)
            try:
                picture = digits.open_picture(path, page)
                found = digits.digits_of(picture)
                say_digits(run, name, found)
                if show:
                    suffix = f"-{page + 1}" if n_pages > 1 else ""
                    drawn = draw_found(picture, found)
                    print(save_found(drawn, f"{path.stem}{suffix}{FOUND}", path, folder))
            except Exception as error:
                status = say_unread(name, error)
        if n_pages > digits.MOST_PAGES:
            print(f"{path}: only the first {digits.MOST_PAGES} of {n_pages} pages were read")
    return status


def say_unread(name: str | Path, error: Exception) -> int:
    """Print on stderr why an image could not be read; return 1, the exit status."""
    unknown = type(error).__name__ == "UnidentifiedImageError"
    advice = ": save it as JPEG or PNG" if unknown else ""
    print(f"look.py: error: {name}: {first_line(error)}{advice}", file=sys.stderr)
    return 1


def say_digits(run: Run, name: str, found: list) -> None:
    """Print what the run reads: the number, if there are several digits, and then each digit."""
    import digits

    logits = torch.cat([run.model(digit.pixels[None].to(run.device)) for digit in found])
    probabilities = logits.softmax(-1).cpu()
    if found.note:
        print(f"{name}   {found.note}")
    if len(found) > 1:
        sureness, number = probabilities.max(-1)
        text = "".join(map(str, number.tolist()))
        print(f"{name}   {text}   {len(found)} digits, all of them right: {sureness.prod():.1%}")
    for n, (digit, p) in enumerate(zip(found, probabilities, strict=True), 1):
        which = f", digit {n}" if len(found) > 1 else ""
        doubt = digits.doubt(digit, p)
        print(f"{name}{which}   {likeliest(p)}" + (f"   not sure: {doubt}" if doubt else ""))


def draw_found(picture, found: list):
    """Return a picture with a box around each digit, and the 28 x 28 image of each beside it."""
    from PIL import Image, ImageDraw

    tile = 84  # pixels of a side: 28 x 28, three times as large
    per_column = max(1, picture.height // tile)
    columns = -(-len(found) // per_column)
    size = (picture.width + columns * tile, max(picture.height, tile))
    sheet = Image.new("RGB", size, "gray")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for n, digit in enumerate(found):
        left, top, right, bottom = (side / picture.info["scale"] for side in digit.box)
        width = max(1, max(picture.size) // 300)
        pen.rectangle((left, top, right - 1, bottom - 1), outline="red", width=width)
        pen.text((left, max(0, top - 12)), str(n + 1), fill="red")
        image = Image.fromarray(digit.pixels.view(28, 28).numpy()).resize((tile, tile))
        x = picture.width + n // per_column * tile
        y = n % per_column * tile
        sheet.paste(image, (x, y))
        pen.text((x + 3, y + 1), str(n + 1), fill="red")
    return sheet


def save_found(sheet, name: str, path: Path, folder: Path) -> Path:
    """Save a picture of what was found beside the image or else in the run's folder."""
    try:
        sheet.save(path.with_name(name))
        return path.with_name(name)
    except OSError:
        sheet.save(folder / name)
        return folder / name


# ---------------------------------------------------------------------------- your handwriting
def has_labels(folder: Path) -> bool:
    """Return whether a folder holds labelled digits, as draw.py saves them: in folders 0 to 9."""
    return any((folder / str(label)).is_dir() for label in range(10))


def read_labelled(folder: Path) -> tuple[list[Path], Tensor, Tensor]:
    """Return the files of labelled digits, their images (N, 784) uint8, and their labels (N,)."""
    import numpy as np  # here, because report.png must not need Pillow
    from PIL import Image

    files = [path for n in range(10) for path in sorted((folder / str(n)).glob("*.png"))]
    if not files:
        fail(f"{folder} holds no PNG in its folders 0 to 9")
    images = []
    for path in files:
        try:
            pixels = np.array(Image.open(path, formats=["PNG"]).convert("L"))
        except Exception as error:  # Pillow raises many kinds
            fail(f"can't read {path}: {first_line(error)}")
        if pixels.shape != (28, 28):
            fail(f"{path} is not 28 x 28 pixels, white on black: draw.py saves such digits")
        images.append(torch.from_numpy(pixels).flatten())
    return files, torch.stack(images), torch.tensor([int(path.parent.name) for path in files])


def measure_handwriting(run: Run, folder: Path, labelled: Path) -> None:
    """Print a run's accuracy on labelled digits, and each mistake."""
    files, images, labels = read_labelled(labelled)
    answers = [run.model(some.to(run.device)).argmax(-1).cpu() for some in images.split(100)]
    answers = torch.cat(answers)
    right = answers == labels
    accuracy = right.double().mean()
    print(f"{folder} on {labelled}: {accuracy:.2%} ({right.sum()} of {len(labels)})")
    for n in (~right).nonzero().flatten().tolist():
        print(f"    {files[n]}: {answers[n]}")


# ---------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments: paths, data_dir, device."""
    parser = argparse.ArgumentParser(
        prog="look.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="run folders, then images; both optional"
    )
    parser.add_argument(
        "--show", action="store_true", help="write photo.digits.png: what was found in photo.jpg"
    )
    parser.add_argument("--data_dir", help="holds MNIST/raw/*.gz (default: data beside the script)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    words = sys.argv[1:] if argv is None else argv
    # A file may be called -7.png.
    words = [f"./{word}" if word[0:1] == "-" and Path(word).exists() else word for word in words]
    args = parser.parse_args(words)
    args.paths = [Path(os.path.expanduser(path)) for path in args.paths]
    return args


def images_in(path: Path) -> list[Path]:
    """Return a file, or the files in a folder, but not those that --show wrote."""
    if not os.path.isdir(path):
        return [path]
    try:
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    except OSError as error:
        fail(f"can't read {path}: {error.strerror}")
    files = [file for file in files if not file.name.endswith(FOUND)]
    if not files:
        fail(f"{path} holds neither a run nor an image")
    return files


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Run the command line, sys.argv if argv is None; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may not know all letters of a file's name
            stream.reconfigure(errors="backslashreplace")
    args = parse_arguments(argv)
    runs = list(itertools.takewhile(is_run, args.paths))
    if len(runs) > 1 and len(runs) == len(args.paths):
        compare(runs)
        return 0
    labelled = args.paths[len(runs) :]
    if len(labelled) == 1 and has_labels(labelled[0]):
        for folder in runs or [newest_run()]:
            run = load_run(folder, args.data_dir, args.device)
            measure_handwriting(run, folder, labelled[0])
        return 0
    paths = args.paths[1:] if runs else args.paths
    if any(map(is_run, paths)):
        fail("name either several runs, or one run and then images")
    folder = runs[0] if runs else newest_run()
    images = [image for path in paths for image in images_in(path)]
    run = load_run(folder, args.data_dir, args.device)
    if images:
        print(f"{folder}: {run.state['script']}.py, {run.state['iter']} steps")
        return classify(run, folder, images, args.show)
    report(run, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
