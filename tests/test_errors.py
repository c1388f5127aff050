"""Everything a user can get wrong is one clear line, and loses nothing."""

import resource
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHORT, TINY
from PIL import Image, ImageDraw

RUN = [*TINY["mini_vit"], *SHORT]


def one_line(result, *words):
    """See that stderr is one line (after argparse's usage) with these words, and no traceback."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, result.stderr
    assert "error:" in lines[0]
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--n_layer", "2"], "--n_layer"),
        (["--n_layers", "two"], "--n_layers"),
        (["--n_layers", "0"], "n_layers"),
        (["--batch_size", "-1"], "batch_size"),
        (["--learning_rate", "nan"], "learning_rate"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--grad_clip", "0"], "grad_clip"),
        (["--seed", str(2**63)], "seed"),
        (["--dropout", "1"], "dropout"),
        (["--precision", "float8"], "precision"),
        (["--n_head", "3"], "n_embd"),
        (["--classify"], "--classify"),
        (["--resume", "--overwrite"], "--overwrite"),
    ],
)
def test_bad_flags(flags, word, main, monkeypatch):
    import mini_vit

    monkeypatch.setattr(mini_vit, "train", None)
    lines = main("mini_vit", *flags, status=2).stderr.splitlines()
    assert "error:" in lines[-1] and word in lines[-1]


@pytest.mark.parametrize(
    "script, flags",
    [
        ("mini_vit_concat", "--n_embd 784 --d_head 49"),
        ("mini_vit_augment", "--num_workers -1"),
        ("mini_vit_augment", "--easy_share 1"),
    ],
)
def test_bad_flags_of_the_other_scripts(script, flags, main):
    assert "error:" in main(script, *flags.split(), status=2).stderr.splitlines()[-1]


def test_help_lists_every_field_with_comment_and_default(module, capsys):
    import dataclasses

    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name} {field.type.__name__}" in text
        assert f"(default: {field.default})" in text


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "gpu", "meta"])
def test_a_device_that_cannot_be_used(device, main):
    one_line(main("mini_vit", *RUN, "--device", device, status=1), device)


@pytest.fixture
def damaged(tmp_path):
    """A copy of the data, to be damaged."""
    return shutil.copytree(ROOT / "data", tmp_path / "data") / "MNIST" / "raw"


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "all missing"])
def test_damaged_archives(damage, damaged, main, monkeypatch):
    archive = damaged / "t10k-images-idx3-ubyte.gz"
    content = bytearray(archive.read_bytes())
    content[1000] ^= 1
    if damage == "missing":
        archive.unlink()
    if damage == "truncated":
        archive.write_bytes(content[:5000])
    if damage == "altered":
        archive.write_bytes(content)
    if damage == "all missing":
        shutil.rmtree(damaged)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no network
    one_line(main("mini_vit", *RUN, "--data_dir", "data", status=1), "MNIST")


def test_damaged_unpacked_files_do_no_harm(damaged, main):
    for archive in damaged.glob("*.gz"):
        archive.with_suffix("").write_bytes(b"half a file")
    main("mini_vit", *RUN, "--data_dir", "data")


@pytest.mark.parametrize("place", ["a_file", "a_file/below", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_written(place, main, tmp_path):
    (tmp_path / "a_file").write_text("mine")
    one_line(main("mini_vit", *RUN, "--out_dir", place, status=1), place)
    assert (tmp_path / "a_file").read_text() == "mine"


def test_a_full_disk_keeps_the_old_checkpoint(run, tmp_path):
    run("mini_vit", "--n_layers", "1", *SHORT)  # 88 MB
    checkpoint = tmp_path / "runs" / "mini_vit" / "checkpoint.pt"
    before = checkpoint.read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000_000, 60_000_000))

    result = run("mini_vit", "--resume", "--max_iters", "32", status=1, preexec_fn=small_files)
    one_line(result, "checkpoint.pt", "too large")
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob("*.tmp"))


def test_two_runs_in_one_folder_never_write_the_same_file(module, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    with module.replacing(path) as ours:
        ours.write_text("ours")
        monkeypatch.setattr("os.getpid", lambda: 1)
        with module.replacing(path) as theirs:
            theirs.write_text("theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours"


class Malice:
    def __reduce__(self):
        return exec, ("open('harm', 'w').close()",)


CASES = ["missing", "truncated", "empty", "other script", "other version", "malicious", "not a dictionary"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode, name", [("--resume", "checkpoint.pt"), ("--eval", "model.pt")])
def test_a_checkpoint_that_is_none(case, mode, name, main, tmp_path):
    path = tmp_path / "runs" / "mini_vit" / name
    path.parent.mkdir(parents=True)
    if case == "truncated":
        torch.save({"script": "mini_vit", "model": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    if case == "empty":
        path.touch()
    if case == "other script":
        torch.save({"script": "mini_vit_concat"}, path)
    if case == "other version":
        torch.save({"script": "mini_vit", "config": {"n_layers": 2}}, path)
    if case == "malicious":
        torch.save({"script": "mini_vit", "config": Malice()}, path)
    if case == "not a dictionary":
        torch.save([1, 2, 3], path)
    one_line(main("mini_vit", mode, status=1), name)
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_of_another_architecture(main, monkeypatch):
    import mini_vit

    main("mini_vit", *RUN)
    for mode in ("--resume", "--eval"):
        one_line(main("mini_vit", mode, "--n_layers", "3", status=1), "n_layers")
    monkeypatch.setattr(mini_vit.Transformer, "img_size", 785)  # somebody edits the model
    for mode in ("--resume", "--eval"):
        one_line(main("mini_vit", mode, "--max_iters", "32", status=1), "Transformer")


def test_no_image(main, tmp_path):
    main("mini_vit", *RUN)
    (tmp_path / "text.png").write_text("no image")
    image = Image.new("L", (100, 100), 255)
    ImageDraw.Draw(image).line([(50, 20), (50, 80)], fill=0, width=9)
    image.save(tmp_path / "digit.png")
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    result = main("mini_vit", "--classify", "text.png", "missing.jpg", "blank.png", "digit.png", status=1)
    assert len(result.stderr.splitlines()) == 3
    assert "Traceback" not in result.stderr
    assert result.stdout.startswith("digit.png")
    assert main("mini_vit", "--classify", "digit.png").stderr == ""


def test_out_of_memory_names_batch_size(tmp_path):
    program = (
        "import resource, mini_vit\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2 ** 30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        f"mini_vit.main({[*RUN, '--batch_size', '200000', '--data_dir', str(ROOT / 'data')]!r})"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 1
    one_line(result, "batch_size")


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(main, tmp_path, monkeypatch):
    flags = [*TINY["mini_vit"], *SHORT, "--learning_rate", "1e18", "--warmup_iters", "20"]
    one_line(main("mini_vit", *flags, status=1), "learning_rate", "finite")
    path = tmp_path / "runs" / "mini_vit" / "checkpoint.pt"
    if path.exists():
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["model"].values())


def test_processes_that_cannot_share_a_batch(run):
    result = run("mini_vit", *RUN, "--batch_size", "63", processes=2, status=1)
    assert "can't be split evenly" in result.stderr


def test_compile_that_cannot_work_is_one_line(run, tmp_path):
    result = run("mini_vit", *RUN, "--compile", "on", env={"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": "cache"})
    assert "without torch.compile" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("accuracy: ")


def test_without_matplotlib_there_is_a_note(run):
    assert "matplotlib is not installed" in run("mini_vit", *RUN).stdout
