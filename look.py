"""Look at a run: its loss, its accuracy for each digit, report.png, and what it says of your own digits.

python look.py                        # the newest run below runs/, finished or under way
python look.py runs/small             # that one; report.png goes into its folder
python look.py photo.jpg drawing.png  # the three likeliest digits of each image, says the newest run
python look.py runs/small photo.jpg   # ... says that one
python look.py runs/small runs/large  # comparison.png: accuracy over the minutes of training, a line for each run
"""

import argparse
import csv
import importlib
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from digits import read_digits


# ---------------------------------------------------------------------------- runs
def fail(message: str):
    """End with one line on stderr and exit status 1."""
    raise SystemExit(f"look.py: error: {message}")


def newest_run() -> Path:
    """Return the folder below runs/ that was written last."""
    files = [*Path("runs").glob("*/model.pt"), *Path("runs").glob("*/checkpoint.pt")]
    if not files:
        fail("there is no run below runs/: train first, or name the run's folder")
    return max(files, key=os.path.getmtime).parent


def load_run(folder: Path, data_dir: str | None, device: str):
    """Return the script that made a run, its Config, the device, its model there, and its state."""
    path = folder / ("model.pt" if (folder / "model.pt").exists() else "checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # leaves the optimizer on the disk
        name, config, weights = state["script"], state["config"], state["model"]
    except Exception as error:
        fail(f"can't read {path}: it is missing, damaged or not from a run ({type(error).__name__})")
    script_path = Path(__file__).with_name(f"{name}.py")
    if not script_path.exists():
        fail(f"{path} is from {name}.py, which is not beside look.py")
    sys.path.insert(0, str(script_path.parent))
    script = importlib.import_module(name)
    try:
        config = replace(script.Config(**config), subset=0, holdout=0, compile="off", device=device)
        config = replace(config, data_dir=data_dir or script.Config.data_dir)
        device, *_ = script.set_up(config)
        model = script.Trainer(config, device, 1, {}).model
        model.load_state_dict(weights)
    except (TypeError, RuntimeError, ValueError) as error:
        fail(f"{path} doesn't fit {name}.py: was that changed since? ({str(error).splitlines()[0]})")
    model.depth = state["depth"]
    return script, config, device, model.eval(), state


def likeliest(probabilities: Tensor) -> str:
    """Return the three likeliest digits of probabilities (10,) as text."""
    return "   ".join(f"{digit}: {p:7.2%}" for p, digit in zip(*probabilities.topk(3), strict=True))


# ---------------------------------------------------------------------------- report.png
def attention_matrix(model, image: Tensor, block: int) -> Tensor:
    """Return one image's attention weights, (n_head, d_head, d_head), in one block."""
    attn, seen = model.blocks[block].attn, []
    hook = attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(image[None])
    hook.remove()
    q, k, _ = attn.qkv(seen[0]).unflatten(-1, (3, attn.n_head, -1))[0]
    return (attn.scale * q[:, :, None] * k[:, None, :]).softmax(-1).cpu()


def new_figure(width: float, height: float):
    """Return a matplotlib figure, in inches, whatever a notebook or a matplotlibrc has set."""
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # a matplotlibrc may ask for LaTeX
    return Figure((width, height), layout="constrained")


def draw(into_file: Callable[[], None], name: str) -> None:
    """Draw a picture or, where that can't be done, say why in one line."""
    try:
        into_file()
    except Exception as error:
        print(f"no {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)


def draw_curves(axes, log: list[dict]) -> None:
    """Draw losses and, in the second axes, test accuracy and learning rate, over the steps."""
    losses, accuracy = axes
    steps = [row["iter"] for row in log]
    losses.plot(steps, [row["train_loss"] for row in log], "C0--o", label="training")
    losses.plot(steps, [row["test_loss"] for row in log], "C0-o", label="test")
    losses.set(xlabel="step", title="cross-entropy", yscale="log")
    losses.legend()
    accuracy.plot(steps, [100 * row["test_accuracy"] for row in log], "C1-o")
    accuracy.set(xlabel="step", title=f"accuracy when trained: {log[-1]['test_accuracy']:.2%}" if log else "")
    accuracy.set_ylabel("accuracy, %", color="C1")
    rate = accuracy.twinx()
    rate.plot(steps, [row["learning_rate"] for row in log], "C2:")
    rate.set_ylabel("learning rate", color="C2")


def draw_confusion(axes, predicted: Tensor, labels: Tensor) -> None:
    """Draw how often each digit was taken for which."""
    counts = torch.zeros(10, 10, dtype=torch.long).index_put_((labels, predicted), torch.tensor(1), True)
    axes.imshow(counts.float().log1p(), cmap="Blues")
    for i, j in counts.nonzero().tolist():
        axes.text(j, i, counts[i, j].item(), ha="center", va="center", fontsize=8, color="w" if i == j else "k")
    axes.set(xlabel="predicted", ylabel="true", xticks=range(10), yticks=range(10), title="test digits, counted")


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
            axes.set_title(f"{labels[i]} → {predicted[i]}\n{probabilities[i].max():.1%}", fontsize=9)


def draw_attention(figure, model, image: Tensor) -> None:
    """Draw one digit, and how features attend to features in three heads of the first and of the last block."""
    figure.suptitle("attention of one digit: each row is one feature (query), bright where it looks (keys)")
    axes = figure.subplots(2, 4)
    for ax in axes.flat:
        ax.axis("off")
    axes[0, 0].imshow(image.cpu().view(28, 28), cmap="gray")
    axes[0, 0].set_title("the digit")
    for row, (place, block) in zip(axes, [("first", 0), ("last", model.depth - 1)], strict=True):
        for head, (ax, weights) in enumerate(zip(row[1:], attention_matrix(model, image, block), strict=False)):
            ax.axis("on")
            ax.imshow(weights, cmap="viridis")
            ax.set(title=f"{place} block, head {head + 1}", xlabel="key: feature j", ylabel="query: feature i")


def rollout(model, images: Tensor) -> Tensor:
    """Return how much a vit's class token has of each patch, (N, rows, columns), through all blocks in use.

    Attention, averaged over the heads, and the residual connection count half each (Abnar and Zuidema 2020,
    arXiv:2005.00928).
    """
    seen, hooks = [], []
    for block in model.blocks[: model.depth]:
        hooks.append(block.attn.register_forward_pre_hook(lambda module, args: seen.append((module, args[0]))))
    model(images)
    for hook in hooks:
        hook.remove()
    mixed = torch.eye(len(model.position), device=images.device)
    for attn, x in seen:
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.n_head, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)  # (N, tokens, tokens)
        mixed = (attention + torch.eye(len(model.position), device=images.device)) / 2 @ mixed
    side = round((len(model.position) - 1) ** 0.5)
    return mixed[:, 0, 1:].unflatten(-1, (side, side)).cpu()


def draw_patches(figure, model, images: Tensor) -> None:
    """Draw where the class token of a vit looks, for a few digits, and how alike its position embeddings are."""
    figure.suptitle("where the class token looks (attention rolled out over the blocks), and position embeddings")
    *axes, last = figure.subplots(2, 5).T.flat
    for ax, image, share in zip(axes, images, rollout(model, images), strict=False):
        ax.axis("off")
        ax.imshow(image.cpu().view(28, 28), cmap="gray", extent=(0, 28, 28, 0))
        ax.imshow(share, cmap="inferno", alpha=0.6, extent=(0, 28, 28, 0), interpolation="bilinear")
    patches = torch.nn.functional.normalize(model.position[1:].cpu(), dim=-1)
    side = round(len(patches) ** 0.5)
    tiles = torch.nn.functional.pad((patches @ patches.T).view(side, side, side, side), (0, 1, 0, 1), value=torch.nan)
    last.imshow(tiles.permute(0, 2, 1, 3).reshape(side * (side + 1), -1), cmap="viridis")
    last.set(title="position embeddings:\ncosine similarity", xticks=[], yticks=[])
    last.set_xlabel("tile: one patch with all others", fontsize=8)


def draw_report(model, log: list[dict], images: Tensor, labels: Tensor, probabilities: Tensor, path: Path) -> None:
    """Draw learning curves, confusion matrix, the most confident mistakes, and attention, into one picture."""
    figure = new_figure(12, 13)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(4, 3, 5))
    *curves, confusion = top.subplots(1, 3)
    draw_curves(curves, log)
    draw_confusion(confusion, probabilities.argmax(-1), labels)
    draw_mistakes(middle, images, labels, probabilities)
    some = images[:9].to(next(model.parameters()).device)
    draw_patches(bottom, model, some) if hasattr(model, "position") else draw_attention(bottom, model, some[0])
    figure.savefig(path, dpi=70)


# ---------------------------------------------------------------------------- comparison.png
def draw_comparison(logs: dict[str, list[dict]], path: Path) -> None:
    """Draw the test accuracy of each run, by its log's rows, over the minutes that it had been training."""
    figure = new_figure(9, 5)
    axes = figure.subplots()
    for name, rows in logs.items():
        minutes = [float(row["seconds"]) / 60 for row in rows]
        accuracy = [100 * float(row["test_accuracy"]) for row in rows]
        (line,) = axes.plot(minutes, accuracy, "-o", markersize=4)
        end, style = (minutes[-1], accuracy[-1]), {"va": "center", "color": line.get_color()}
        axes.annotate(name, end, (6, 0), textcoords="offset points", **style)
    worst = min(100 * float(rows[-1]["test_accuracy"]) for rows in logs.values())
    axes.set(xscale="log", xlabel="minutes of training", ylabel="test accuracy, %", ylim=(worst - 1, None))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.margins(x=0.25)  # names need room at the right
    axes.set_xlim(left=min(float(rows[0]["seconds"]) / 60 for rows in logs.values()))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def compare(folders: list[Path]) -> int:
    """Print the last accuracy of each run, and draw comparison.png beside the first; return the exit status."""
    logs = {}
    for folder in folders:
        try:
            with open(folder / "log.csv") as file:
                rows = logs[folder.name] = list(csv.DictReader(file))
            seconds, accuracy = float(rows[-1]["seconds"]), float(rows[-1]["test_accuracy"])
        except (OSError, LookupError, ValueError) as error:
            fail(f"can't read {folder / 'log.csv'}: no evaluation yet, or not from a run ({type(error).__name__})")
        print(f"{folder}: {accuracy:.2%} after {seconds / 60:.1f} minutes")
    draw(lambda: draw_comparison(logs, folders[0].parent / "comparison.png"), "comparison.png")
    return 0


# ---------------------------------------------------------------------------- main
def classify(model, paths: list[str], device) -> int:
    """Print the three likeliest digits of each image file; return the exit status, 1 if one could not be read."""
    status = 0
    for path in paths:
        try:
            digits = read_digits(path)
        except Exception as error:  # whatever Pillow says of one file, the others are read
            is_unknown = type(error).__name__ == "UnidentifiedImageError"
            advice = ": save it as JPEG or PNG" if is_unknown else ""
            reason = str(error).partition("\n")[0] or type(error).__name__
            print(f"look.py: error: {path}: {reason}{advice}", file=sys.stderr)
            status = 1
            continue
        for n, digit in enumerate(digits, 1):
            which = f", digit {n}" if len(digits) > 1 else ""
            print(f"{path}{which}   {likeliest(model(digit[None].to(device)).softmax(-1)[0])}")
    return status


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal may not know all letters of a file's name
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="the run's folder, then images; neither is a must")
    parser.add_argument("--data_dir", help="holds MNIST/raw/*.gz (default: data beside the script)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args(argv)
    folders = list(itertools.takewhile(Path.is_dir, (Path(path).expanduser() for path in args.paths)))
    if len(folders) > 1 and len(folders) == len(args.paths):
        return compare(folders)
    folder, args.paths = folders[0] if folders else newest_run(), args.paths[len(folders[:1]) :]
    script, config, device, model, state = load_run(folder, args.data_dir, args.device)
    print(f"{folder}: {state['script']}.py, {state['iter']} steps" + "; report.png goes there" * (not args.paths))
    if args.paths:
        return classify(model, args.paths, device)
    *_, images, labels = script.load_mnist(config)
    loss, probabilities = script.evaluate(model, images.to(device), labels.to(device))
    model.eval()
    probabilities = probabilities.cpu()
    right = probabilities.argmax(-1) == labels
    print(f"test loss: {loss:.4f}")
    for digit in range(10):
        print(f"accuracy of {digit}: {right[labels == digit].double().mean():.2%}")
    print(f"accuracy: {right.double().mean():.2%} ({right.sum()} of {len(labels)})", flush=True)
    report = folder / "report.png"
    draw(lambda: draw_report(model, state["log"], images, labels, probabilities, report), report.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
