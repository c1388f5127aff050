"""look.py shows what a run has learned, and reads digits from pictures of any kind."""

import contextlib
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, TINY, one_line
from pictures import BLANK, CHANCY, KINDS, draw, in_shadow, two_digits
from PIL import Image

import digits
import look
import mini_vit

RUN = [*TINY["mini_vit"], *SHORT]
FILES = {"cmyk": "tif", "lab": "tif", "float": "tif", "webp": "webp", "gif": "gif", "avif": "avif"}


@pytest.fixture(scope="module")
def trained():
    """A model that has seen enough real digits to know them, and test images that it knows, with their labels."""
    config = mini_vit.Config(n_layers=1, n_head=8, d_head=32, n_embd=256, max_iters=600, device="cpu", dropout=0)
    images, labels, test_images, test_labels = mini_vit.load_mnist(config)
    trainer = mini_vit.Trainer(config, torch.device("cpu"), 1, {})
    trainer.optimizer.param_groups[0]["lr"].fill_(1e-3)
    for indices in mini_vit.shuffled_indices(len(images), config, 0):
        trainer(images[indices], labels[indices])
    right = (trainer.model.eval()(test_images[:2000]).argmax(-1) == test_labels[:2000]).nonzero().flatten()
    return trainer.model, test_images[right], test_labels[right]


def read(model, picture: Image.Image, path) -> list[int]:
    """Return the digits that the model finds in a picture that is saved and opened again."""
    picture.save(path, **{"compress_level": 1} if path.suffix == ".png" else {})  # in less time
    with torch.no_grad():
        return [model(digit[None]).argmax(-1).item() for digit in digits.read_digits(str(path))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_digit_is_read_from_any_kind_of_picture(kind, trained, tmp_path):
    model, images, labels = trained
    rng, suffix = random.Random(kind), FILES.get(kind, "png")
    right = 0
    for image, label in zip(images[:20], labels[:20].tolist(), strict=True):
        with contextlib.suppress(ValueError):
            right += read(model, draw(image.view(28, 28).numpy(), kind, rng), tmp_path / f"digit.{suffix}") == [label]
    assert right >= (18 if kind in CHANCY else 19)


def test_two_digits_are_read_from_left_to_right(trained, tmp_path):
    model, images, labels = trained
    rng, right = random.Random(1), 0
    for _ in range(20):
        i, j = rng.randrange(500), rng.randrange(500)
        picture = two_digits(images[i].view(28, 28).numpy(), images[j].view(28, 28).numpy(), rng)
        right += read(model, picture, tmp_path / "two.png") == [labels[i].item(), labels[j].item()]
    assert right >= 19


@pytest.mark.parametrize("kind", BLANK)
def test_there_is_nothing_in_a_blank_sheet(kind, tmp_path):
    BLANK[kind]().save(tmp_path / "blank.png")
    with pytest.raises(ValueError, match="nothing in it"):
        digits.read_digits(str(tmp_path / "blank.png"))


def test_a_shadow_on_a_blank_sheet_is_nothing(tmp_path):
    rng, nothing = random.Random(1), 0
    for _ in range(60):
        in_shadow(rng).save(tmp_path / "shadow.png", compress_level=1)
        try:
            digits.read_digits(str(tmp_path / "shadow.png"))
        except ValueError:
            nothing += 1
    assert nothing >= 55


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_broken_exif_block_is_ignored(suffix, trained, tmp_path):
    model, images, labels = trained
    picture = draw(images[0].view(28, 28).numpy(), "photograph", random.Random(1))
    picture.save(tmp_path / f"digit.{suffix}", exif=b"Exif\x00\x00not at all")
    (digit,) = digits.read_digits(str(tmp_path / f"digit.{suffix}"))
    assert model(digit[None]).argmax(-1) == labels[0]


def test_mnist_images_come_back_nearly_unchanged(trained, tmp_path):
    distances = []
    for image in trained[1][:100]:
        Image.fromarray(image.view(28, 28).numpy()).save(tmp_path / "digit.png")
        (read,) = digits.read_digits(str(tmp_path / "digit.png"))
        distances.append((read.float() - image).abs().sum() / image.float().sum())
    assert torch.stack(distances).median() < 0.1


def looking(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    """Run look.py as a user does, in a folder."""
    command = [sys.executable, str(ROOT / "look.py"), "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def test_a_finished_run(script, main, tmp_path):
    main(script, *TINY[script], *SHORT, "--out_dir", "runs/mine")
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    result = looking(cwd=tmp_path, **notebook)
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"runs/mine: {script}.py, 24 steps")
    assert [line.split(":")[0] for line in lines[1:]] == [
        "test loss",
        *(f"accuracy of {d}" for d in range(10)),
        "accuracy",
    ]
    assert lines[-1].endswith(" of 10000)")
    with Image.open(tmp_path / "runs" / "mine" / "report.png") as picture:
        assert picture.width > 500 and len(set(picture.convert("L").tobytes())) > 50


def test_a_run_under_way_is_looked_at_with_the_blocks_it_has(main, tmp_path, monkeypatch):
    """The second block joins at the last step, 25; the checkpoint of step 24 is evaluated without it."""
    original = mini_vit.schedule
    monkeypatch.setattr(mini_vit, "SIGNALS", [])
    monkeypatch.setattr(mini_vit, "schedule", lambda n, c: (n == 24 and mini_vit.SIGNALS.append(15)) or original(n, c))
    flags = [*RUN, "--max_iters", "25", "--eval_interval", "24", "--growth", "20", "--subset", "0"]
    loss = main("mini_vit", *flags, status=143).stdout.split("test loss ")[1].split(",")[0]
    assert torch.load("runs/mini_vit/checkpoint.pt", weights_only=True)["depth"] == 1
    assert f"test loss: {loss}" in looking("runs/mini_vit", cwd=tmp_path).stdout


@pytest.fixture
def finished(main, tmp_path):
    """The folder of a finished run."""
    main("mini_vit", *RUN)
    return tmp_path / "runs" / "mini_vit"


def test_several_runs_are_compared(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, accuracies in {"a": (0.5, 0.9), "b": (0.8, 0.95)}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        rows = [f"{accuracy},{60 * minute}" for minute, accuracy in enumerate(accuracies, 1)]
        (tmp_path / "runs" / name / "log.csv").write_text("\n".join(["test_accuracy,seconds", *rows, ""]))
    assert look.main(["runs/a", "runs/b"]) == 0
    assert capfd.readouterr() == ("runs/a: 90.00% after 2.0 minutes\nruns/b: 95.00% after 2.0 minutes\n", "")
    with Image.open("runs/comparison.png") as picture:
        assert picture.width > 500 and len(set(picture.convert("L").tobytes())) > 50
    (tmp_path / "runs" / "b" / "log.csv").write_text("test_accuracy,seconds\n")
    with pytest.raises(SystemExit, match=r"b/log\.csv: no evaluation yet"):
        look.main(["runs/a", "runs/b"])


def test_files_that_are_no_image_do_not_stop_the_others(finished, tmp_path):
    (tmp_path / "photo.heic").write_text("no image")
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    odd = b"d\xffgit.png".decode(errors="surrogateescape")
    draw(np.eye(28, dtype=np.uint8) * 255, "plain", random.Random(1)).save(tmp_path / odd, "png")
    result = looking("photo.heic", "missing.jpg", "blank.png", odd, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    heic, missing, blank = result.stderr.splitlines()
    assert "save it as JPEG or PNG" in heic and "missing.jpg" in missing and "nothing in it" in blank
    assert result.stdout.splitlines()[1].startswith("d\\udcffgit.png   ")


def test_without_matplotlib_there_are_numbers_and_one_line(finished, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('hidden by the test')\n")
    result = looking(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0 and result.stdout.splitlines()[-1].startswith("accuracy: ")
    assert result.stderr.splitlines() == ["no report.png: ImportError: hidden by the test"]


def test_what_cannot_be_looked_at_is_one_line(finished, tmp_path, monkeypatch):
    def error(*arguments):
        with pytest.raises(SystemExit) as stop:  # with a text: it goes to stderr, and the status is 1
            look.main(["--device", "cpu", *arguments])
        return subprocess.CompletedProcess(arguments, 1, "", stop.value.code)

    (tmp_path / "empty").mkdir()
    one_line(error("empty"), "empty/checkpoint.pt")
    state = torch.load(finished / "model.pt", weights_only=True)
    torch.save(state | {"script": "gone"}, finished / "model.pt")
    one_line(error(), "gone.py", "beside look.py")
    torch.save(state | {"model": {}}, finished / "model.pt")
    one_line(error(), "mini_vit.py", "changed")
    torch.save(state | {"config": {"other": 1}}, finished / "model.pt")
    one_line(error(), "mini_vit.py", "changed")
    (finished / "model.pt").write_bytes(b"half")
    one_line(error(), "model.pt", "damaged")
    shutil.rmtree(finished)
    one_line(error(), "no run below runs/")
