"""look.py shows what a run has learned, and what it says of your own digits."""

import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, TINY, one_line
from pictures import draw
from PIL import Image

import look
import mini_vit

RUN = [*TINY["mini_vit"], *SHORT]


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
