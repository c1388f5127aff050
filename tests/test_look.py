"""look.py shows what a run has learned, and reads digits from pictures of any kind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, TINY, load, one_line
from PIL import Image

import look
import mini_vit

RUN = [*TINY["mini_vit"], *SHORT]


def looking(*arguments, cwd, script=ROOT / "look.py", **environment):
    """Run look.py as a user does, in a folder; return the finished process."""
    command = [sys.executable, str(script), "--device", "cpu", *map(str, arguments)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def picture_of_a_one(path: Path) -> None:
    """Draw a stroke with ink on paper."""
    pixels = np.full((60, 60), 230, np.uint8)
    pixels[12:48, 28:32] = 20
    Image.fromarray(pixels).save(path, "png")


def assert_drawn(path: Path) -> None:
    """See that a picture is no blank sheet."""
    with Image.open(path) as picture:
        assert picture.width > 500
        assert len(set(picture.convert("L").tobytes())) > 50


def write_log(folder: Path, *accuracies: float) -> None:
    """Write a run's log.csv with an evaluation each minute."""
    folder.mkdir(parents=True)
    lines = ["test_accuracy,seconds"]
    for minute, accuracy in enumerate(accuracies, 1):
        lines.append(f"{accuracy},{60 * minute}")
    (folder / "log.csv").write_text("\n".join([*lines, ""]))


def error_of(*arguments) -> subprocess.CompletedProcess:
    """Run look.py in this process, see that it fails, and return what it says on stderr."""
    with pytest.raises(SystemExit) as stop:  # with a text: it goes to stderr, and the status is 1
        look.main(["--device", "cpu", *map(str, arguments)])
    return subprocess.CompletedProcess(arguments, 1, "", stop.value.code)


@pytest.fixture
def finished(main, tmp_path):
    """The folder of a finished run of mini_vit.py; the working folder is tmp_path."""
    main("mini_vit", *RUN)
    return tmp_path / "runs" / "mini_vit"


# ---------------------------------------------------------------- a run
@pytest.mark.slow
def test_a_finished_run(script, main, tmp_path):
    main(script, *TINY[script], *SHORT, "--out_dir", "runs/mine")
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    result = looking(cwd=tmp_path, **notebook)
    assert result.returncode == 0
    assert result.stderr == ""
    first, *lines = result.stdout.splitlines()
    assert first.startswith(f"runs/mine: {script}.py, 24 steps")
    digits = [f"accuracy of {digit}" for digit in range(10)]
    measured = "measured on 512 test images of MNIST"
    assert [line.split(":")[0] for line in lines] == [measured, "test loss", *digits, "accuracy"]
    assert lines[-1].endswith(" of 512)")
    assert_drawn(tmp_path / "runs" / "mine" / "report.png")


def test_a_run_under_way_is_looked_at_with_the_blocks_it_has(interrupt, capfd):
    """The second block joins at step 24, the last; the run is stopped before that."""
    interrupt("mini_vit", *RUN, "--growth", "20")
    capfd.readouterr()
    state = load(Path("runs/mini_vit/checkpoint.pt"))
    assert (state["iter"], state["depth"]) == (8, 1)
    assert look.main(["--device", "cpu"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("runs/mini_vit: mini_vit.py, 8 steps")
    assert f"test loss: {state['log'][-1]['test_loss']:.4f}\n" in out
    assert err == ""
    assert_drawn(Path("runs/mini_vit/report.png"))


def test_a_run_that_is_tested_on_held_out_images_is_looked_at_with_those(main, capfd):
    said = main("mini_vit", *RUN, "--holdout", "100").stdout.splitlines()[-1]
    assert look.main(["--device", "cpu"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1] == "measured on 100 held-out images of MNIST"
    assert lines[-1] == said
    assert said.startswith("held-out accuracy: ")


def test_runs_that_were_tested_on_different_images_are_compared_with_a_caution(main, capfd):
    for name, flags in {"a": [], "b": ["--seed", "2"], "c": ["--holdout", "100"]}.items():
        main("mini_vit", *RUN, *flags, "--out_dir", f"runs/{name}")
    caution = "caution: these runs were not tested on the same images"
    for other, expected in [("b", False), ("c", True)]:
        assert look.main(["runs/a", f"runs/{other}"]) == 0
        assert (caution in capfd.readouterr().out) == expected


def test_a_script_that_has_changed_since_is_named(finished, capfd):
    path = finished / "model.pt"
    torch.save(load(path) | {"source": "an earlier text"}, path)
    look.load_run(finished, device="cpu")
    expected = f"mini_vit.py has changed since {finished} was trained\n"
    assert capfd.readouterr().err == expected


def test_load_run_changes_nothing_in_the_process(finished, monkeypatch):
    def refuse(*args):
        raise AssertionError("load_run changed the process")

    monkeypatch.setattr(mini_vit.ctypes, "CDLL", refuse)
    monkeypatch.setattr(mini_vit.dist, "init_process_group", refuse)
    monkeypatch.setattr(mini_vit.torch, "manual_seed", refuse)
    monkeypatch.setattr(signal, "signal", refuse)
    look.load_run(finished, device="cpu")


def test_load_run_returns_script_config_device_model_and_state(finished):
    run = look.load_run(finished, device="cpu")
    assert run.script is mini_vit
    assert isinstance(run.config, mini_vit.Config)
    assert run.config.n_embd == 56
    assert (run.config.subset, run.config.holdout) == (512, 0)  # it is tested on those images
    assert run.config.data_dir == mini_vit.Config.data_dir
    assert run.device == torch.device("cpu")
    assert not run.model.training
    assert run.model.depth == run.state["depth"] == 2
    assert run.model.precision == mini_vit.choose_precision(run.config, run.device)
    assert (run.state["script"], run.state["iter"]) == ("mini_vit", 24)
    for name, weights in torch.load(finished / "model.pt", weights_only=True)["model"].items():
        assert torch.equal(run.model.state_dict()[name], weights)
    assert look.load_run(str(finished), "elsewhere", "cpu").config.data_dir == "elsewhere"


def test_load_run_builds_no_optimizer(finished, monkeypatch):
    def no_optimizer(*args, **options):
        raise AssertionError("an optimizer was built")

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", no_optimizer)
    monkeypatch.setattr(mini_vit, "Trainer", no_optimizer)
    look.load_run(finished, device="cpu")


@pytest.mark.slow
def test_a_script_with_a_dot_in_its_name(run, tmp_path):
    """Someone keeps copies of a script, and look.py beside them."""
    for name, copy in {"mini_vit": "mini_vit.v2", "look": "look"}.items():
        shutil.copy(ROOT / f"{name}.py", tmp_path / f"{copy}.py")
    run(tmp_path / "mini_vit.v2", *RUN, "--data_dir", ROOT / "data")
    place = {"cwd": tmp_path, "script": tmp_path / "look.py"}
    result = looking("runs/mini_vit.v2", "--data_dir", ROOT / "data", **place)
    assert result.stderr == ""
    assert result.stdout.startswith("runs/mini_vit.v2: mini_vit.v2.py, 24 steps")
    assert_drawn(tmp_path / "runs" / "mini_vit.v2" / "report.png")


@pytest.mark.slow
def test_report_png_needs_neither_scipy_nor_scikit_image(finished, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("scipy", "skimage"):
        (hidden / f"{name}.py").write_text("raise ImportError('hidden by the test')\n")
    result = looking(cwd=tmp_path, PYTHONPATH=str(hidden))
    assert result.returncode == 0
    assert result.stderr == ""
    assert_drawn(finished / "report.png")


@pytest.mark.slow
def test_without_matplotlib_there_are_numbers_and_one_line(finished, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('hidden by the test')\n")
    result = looking(cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1].startswith("accuracy: ")
    assert result.stderr.splitlines() == ["no report.png: ImportError: hidden by the test"]


def test_what_cannot_be_looked_at_is_one_line(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    one_line(error_of("empty"), "empty", "neither a run nor an image")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "log.csv").touch()
    one_line(error_of("lost"), "lost", "no weights yet")
    one_line(error_of("lost", "nowhere.png"), "lost", "no weights yet")
    state = torch.load(finished / "model.pt", weights_only=True)
    torch.save(state | {"script": "gone"}, finished / "model.pt")
    one_line(error_of(), "gone.py", "beside look.py")
    (finished / "gone.py").write_text("raise SystemExit('this must not run')")
    for elsewhere in (str(finished / "gone"), "runs/mini_vit/gone", ["gone"]):
        torch.save(state | {"script": elsewhere}, finished / "model.pt")
        one_line(error_of(), "names no script")
    torch.save(state | {"model": {}}, finished / "model.pt")
    one_line(error_of(), "mini_vit.py", "changed")
    torch.save(state | {"config": {"other": 1}}, finished / "model.pt")
    one_line(error_of(), "mini_vit.py", "changed")
    (finished / "model.pt").write_bytes(b"half")
    one_line(error_of(), "model.pt", "damaged")
    (finished / "model.pt").unlink()
    one_line(error_of(), "no run below runs/ has saved yet")
    shutil.rmtree(finished)
    one_line(error_of(), "there is no run below runs/")


def test_a_blank_page_hides_no_other_and_what_show_wrote_is_not_read(finished, tmp_path, capfd):
    one = tmp_path / "one.png"
    picture_of_a_one(one)
    (tmp_path / "scans").mkdir()
    with Image.open(one) as page:
        pages = [Image.new("L", page.size, 230), page.copy()]
    pages[0].save(tmp_path / "scans" / "scan.tif", save_all=True, append_images=[page, pages[0]])
    for _ in range(2):
        assert look.main(["--device", "cpu", "--show", "scans"]) == 1
        out, err = capfd.readouterr()
        assert "scan.tif, page 2 of 3   " in out
        assert [line.rpartition("scans/")[2] for line in err.splitlines()] == [
            "scan.tif, page 1 of 3: there is nothing in it",
            "scan.tif, page 3 of 3: there is nothing in it",
        ]
    assert {path.name for path in (tmp_path / "scans").iterdir()} == {
        "scan.tif",
        "scan-2.digits.png",
    }


@pytest.mark.parametrize("kind", ["black on nothing", "white on nothing", "16 bits"])
def test_what_show_writes_looks_like_the_picture(kind, finished, tmp_path):
    """Ink and paper differ, though there is no paper in the file, or in another range."""
    pixels = np.full((90, 90), 40_000, np.uint16)
    pixels[20:70, 42:48] = 9_000
    picture = Image.fromarray(pixels)
    if kind != "16 bits":
        picture = Image.new("RGBA", (90, 90))
        picture.paste(kind.split()[0], (42, 20, 48, 70))
    picture.save(tmp_path / "one.png")
    assert look.main(["--device", "cpu", "--show", "one.png"]) == 0
    with Image.open(tmp_path / "one.digits.png") as shown:
        paper, ink = shown.getpixel((80, 80)), shown.getpixel((45, 45))
    if kind == "white on nothing":
        paper, ink = ink, paper
    assert min(paper) > 200 and max(ink) < 60


# ---------------------------------------------------------------- several runs
def labels_of_comparison(*folders, monkeypatch) -> list[str]:
    """Compare runs; return the texts in comparison.png, as matplotlib is given them."""
    from matplotlib.axes import Axes

    labels = []
    original = Axes.annotate

    def annotate(axes, text, *args, **options):
        labels.append(text)
        return original(axes, text, *args, **options)

    monkeypatch.setattr(Axes, "annotate", annotate)
    assert look.main([*map(str, folders)]) == 0
    return labels


def test_several_runs_are_compared(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_log(Path("runs/a"), 0.5, 0.9)
    write_log(Path("runs/b"), 0.8, 0.95)
    assert labels_of_comparison("runs/a", "runs/b", monkeypatch=monkeypatch) == ["a", "b"]
    out, err = capfd.readouterr()
    lines = ["runs/a: 90.00% after 2.0 minutes", "runs/b: 95.00% after 2.0 minutes"]
    assert out.splitlines() == lines
    assert err == ""
    assert_drawn(Path("runs/comparison.png"))


def test_runs_whose_folders_have_the_same_name_get_distinct_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one/vit", "two/vit", "two/other"):
        write_log(Path(name), 0.5, 0.9)
    labels = labels_of_comparison("one/vit", "two/vit", "two/other", monkeypatch=monkeypatch)
    assert len(set(labels)) == 3
    assert "one/vit" in labels and "two/vit" in labels


@pytest.mark.parametrize("name", ["a$b", "$a$", "$\\frac$", "a$b$c$", "100$"])
def test_dollars_in_a_folder_s_name_make_no_formula(name, tmp_path, monkeypatch, capfd):
    from matplotlib.text import Text

    monkeypatch.chdir(tmp_path)
    write_log(Path("runs", name), 0.5, 0.9)
    write_log(Path("runs/other"), 0.5, 0.9)
    label, _ = labels_of_comparison(f"runs/{name}", "runs/other", monkeypatch=monkeypatch)
    assert capfd.readouterr().err == ""
    shown, formula = Text()._preprocess_math(label)
    assert (shown, formula) == (name, False)
    assert_drawn(Path("runs/comparison.png"))


@pytest.mark.parametrize("text", ["\nParseFatalException: a symbol", "\n \n  a symbol\nmore"])
def test_a_picture_that_cannot_be_drawn_has_its_reason_in_one_line(text, tmp_path, capfd):
    """matplotlib begins some errors with a newline."""

    def draw(path):
        raise ValueError(text)

    look.try_to_draw(draw, tmp_path / "comparison.png")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("no comparison.png: ValueError: ")
    assert "a symbol" in err
    assert err.count("\n") == 1


def test_a_picture_whose_error_says_nothing_has_the_error_s_type(tmp_path, capfd):
    def draw(path):
        raise MemoryError

    look.try_to_draw(draw, tmp_path / "comparison.png")
    assert capfd.readouterr().err == "no comparison.png: MemoryError: MemoryError\n"


@pytest.fixture
def write_log_b(tmp_path, monkeypatch):
    """A function that writes runs/b/log.csv, beside a good log of runs/a."""
    monkeypatch.chdir(tmp_path)
    write_log(Path("runs/a"), 0.5, 0.9)
    write_log(Path("runs/b"), 0.5, 0.9)
    return Path("runs/b/log.csv").write_text


@pytest.mark.parametrize("content", ["", "test_accuracy,seconds\n"])
def test_a_run_without_an_evaluation_is_one_line(content, write_log_b):
    write_log_b(content)
    one_line(error_of("runs/a", "runs/b"), "runs/b", "no evaluation yet")
    one_line(error_of("runs/b", "runs/a"), "runs/b", "no evaluation yet")


def test_columns_that_are_empty_or_hold_words_do_not_matter(write_log_b):
    write_log_b("seconds,mine,test_accuracy,new\n60,word,0.5,\n120,word,0.9,0.1\n")
    look.compare([Path("runs/a"), Path("runs/b")])


def test_a_log_with_semicolons_is_one_line(write_log_b):
    content = Path("runs/b/log.csv").read_text()
    write_log_b(content.replace(",", ";").replace(".", ","))
    one_line(error_of("runs/a", "runs/b"), "runs/b/log.csv", "semicolons")


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "test_accuracy,seconds\n0.5\n", "x\nyes\n"])
def test_what_is_no_log_is_one_line(content, write_log_b):
    write_log_b(content)
    one_line(error_of("runs/a", "runs/b"), "runs/b/log.csv", "not the log of a run")
    Path("runs/b/log.csv").unlink()
    Path("runs/b/model.pt").touch()
    one_line(error_of("runs/a", "runs/b"), "runs/b/log.csv", "FileNotFoundError")


# ---------------------------------------------------------------- images
def test_the_images_in_a_folder(finished, tmp_path, capfd):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    picture_of_a_one(folder / "b.png")
    picture_of_a_one(folder / "a.png")
    (folder / ".hidden").touch()
    assert look.main(["--device", "cpu", "runs/mini_vit", "photos"]) == 0
    out, err = capfd.readouterr()
    first, a, b = out.splitlines()
    assert first == "runs/mini_vit: mini_vit.py, 24 steps"
    assert a.startswith("photos/a.png   ")
    assert b.startswith("photos/b.png   ")
    assert err == ""


def test_an_image_whose_name_begins_with_a_dash(finished, tmp_path, capfd):
    picture_of_a_one(tmp_path / "-7.png")
    assert look.main(["--device", "cpu", "-7.png"]) == 0
    _, line = capfd.readouterr().out.splitlines()
    assert line.startswith("-7.png   ")


@pytest.mark.slow
def test_images_are_read_when_python_does_not_look_beside_the_script(finished, tmp_path):
    picture_of_a_one(tmp_path / "one.png")
    result = looking("one.png", cwd=tmp_path, PYTHONSAFEPATH="1")
    assert result.stderr == ""
    assert result.stdout.splitlines()[1].startswith("one.png   ")


@pytest.mark.slow
def test_files_that_are_no_image_do_not_stop_the_others(finished, tmp_path):
    (tmp_path / "photo.heic").write_text("no image")
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    odd = b"d\xffgit.png".decode(errors="surrogateescape")
    picture_of_a_one(tmp_path / odd)
    paths = ["photo.heic", "missing.jpg", "blank.png", odd]
    result = looking(*paths, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    heic, missing, blank = result.stderr.splitlines()
    assert "save it as JPEG or PNG" in heic
    assert "missing.jpg" in missing
    assert "nothing in it" in blank
    assert result.stdout.splitlines()[1].startswith("d\\udcffgit.png   ")


def two_strokes(path: Path, **options) -> None:
    """Draw two strokes side by side."""
    pixels = np.full((60, 100), 230, np.uint8)
    pixels[12:48, 28:32] = pixels[12:48, 68:72] = 20
    Image.fromarray(pixels).save(path, **options)


def test_a_number_comes_with_how_sure_all_of_it_is(finished, tmp_path, capfd):
    two_strokes(tmp_path / "eleven.png")
    assert look.main(["--device", "cpu", "eleven.png"]) == 0
    _, number, first, second = capfd.readouterr().out.splitlines()
    shares = [line.split("%")[0].split()[-1] for line in (number.split(": ")[1], first, second)]
    all_of_it, *each = (float(share) / 100 for share in shares)
    assert "2 digits" in number
    assert abs(all_of_it - each[0] * each[1]) < 0.002


def test_a_reading_that_is_not_sure_says_so(finished, tmp_path, capfd):
    """A model of a few steps isn't sure of anything."""
    picture_of_a_one(tmp_path / "one.png")
    assert look.main(["--device", "cpu", "one.png"]) == 0
    _, line = capfd.readouterr().out.splitlines()
    assert "not sure: " in line and "may also be a" in line


def test_of_many_pages_the_first_are_read(finished, tmp_path, capfd):
    two_strokes(tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as page:
        frames = [page.point(lambda p, n=n: p - n) for n in range(25)]
    frames[0].save(tmp_path / "many.gif", save_all=True, append_images=frames[1:])
    assert look.main(["--device", "cpu", "many.gif"]) == 0
    out = capfd.readouterr().out
    assert "page 20 of 25   " in out and "page 21 of 25" not in out
    assert out.splitlines()[-1] == "many.gif: only the first 20 of 25 pages were read"


def test_what_is_missing_of_a_file_is_said(finished, tmp_path, capfd):
    two_strokes(tmp_path / "cut.jpg", quality=95)
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: -len(whole) // 5])
    assert look.main(["--device", "cpu", "cut.jpg"]) == 0
    line = capfd.readouterr().out.splitlines()[1]
    assert line.startswith("cut.jpg   its last ") and line.endswith(" % is missing")
