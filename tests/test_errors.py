"""Every error of a user gives one clear line, and a start that fails leaves no trace."""

import dataclasses
import gzip
import os
import re
import resource
import shutil
import signal
from typing import get_args

import pytest
import torch
from conftest import ROOT, SAVE_OFTEN, SHORT, TINY, children, load, one_line, torchrun, wait_for

import mini_vit

RUN = [*TINY["mini_vit"], *SHORT]


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("mini_vit", "--n_layer 2", "--n_layer"),
        ("mini_vit", "--n_layers two", "--n_layers"),
        ("mini_vit", "--n_layers 0", "n_layers must be 1 or more, not 0"),
        ("mini_vit", "--batch_size -1", "batch_size must be 1 or more, not -1"),
        ("mini_vit", f"--seed {2**63}", "seed"),
        ("mini_vit", "--learning_rate nan", "learning_rate must be above 0 and finite, not nan"),
        ("mini_vit", "--learning_rate inf", "learning_rate"),
        ("mini_vit", "--grad_clip 0", "grad_clip"),
        ("mini_vit", "--weight_decay nan", "weight_decay"),
        ("mini_vit", "--dropout 1", "dropout must be in [0, 1), not 1.0"),
        ("mini_vit", "--precision float8", "--precision"),
        ("mini_vit", "--attention slow", "--attention"),
        ("mini_vit", "--n_head 3", "n_head 3 * d_head 56 must be n_embd 784"),
        ("mini_vit", "a_word", "a_word"),
        ("mini_vit_concat", "--n_embd 784 --d_head 49", "n_embd"),
        ("mini_vit_augment", "--num_workers -2", "num_workers"),
        ("mini_vit_augment", "--easy_share 1", "easy_share"),
        ("mini_vit_augment", "--rotation -1", "rotation"),
        ("vit", "--scaling 1", "scaling"),
        ("vit", "--patch_size 5", "patch_size 5 must divide image_size 28"),
        ("vit", "--n_head 5", "n_head 5 must divide n_embd 128"),
        ("vit", "--channels 0", "channels"),
    ],
)
def test_bad_flags(script, flags, words, main):
    one_line(main(script, *flags.split(), status=2), words)


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("vit", "--classes 5", "there is a label 9: raise classes"),
        ("vit", "--channels 3", "MNIST's images have channels 1 and image_size 28"),
        ("vit", "--image_size 35", "MNIST's images have channels 1 and image_size 28"),
        ("mini_vit", "--holdout 60000", "leaves none of the 60000 training images"),
        ("mini_vit", "--device gpu", "device gpu can't be used"),
        ("mini_vit", "--device cuda:99", "device cuda:99 can't be used"),
        ("mini_vit", "--device meta", "device meta can't be used"),
    ],
)
def test_a_start_that_fails_leaves_no_trace(script, flags, words, main, tmp_path):
    one_line(main(script, *TINY[script], *SHORT, *flags.split(), status=1), words)
    assert not list(tmp_path.iterdir())


def test_help_lists_every_field_with_comment_and_default(module, main):
    text = " ".join(main(module.__name__, "--help").stdout.split())
    for field in dataclasses.fields(module.Config):
        kind = ".*" if get_args(field.type) else field.type.__name__
        default = re.escape(f"(default: {field.default})")
        # A comment stands before the default.
        assert re.search(rf"--{field.name} {kind} \w[^()]*.* {default}", text), field.name


@pytest.fixture
def archives(tmp_path):
    """A copy of the data, to be damaged."""
    return shutil.copytree(ROOT / "data", tmp_path / "data") / "MNIST" / "raw"


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "empty", "a folder"])
def test_damaged_archives(damage, archives, main, tmp_path):
    archive = archives / "t10k-images-idx3-ubyte.gz"
    content = bytearray(archive.read_bytes())
    archive.unlink()
    content[1000] ^= 1
    if damage in ("truncated", "altered", "empty"):
        damaged = {"truncated": content[:5000], "altered": content, "empty": b""}
        archive.write_bytes(damaged[damage])
    if damage == "a folder":
        archive.mkdir()
    one_line(main("mini_vit", *RUN, "--data_dir", "data", status=1), "t10k-images", "--data_dir")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "labels, words", [([3, 10], "there is a label 10"), ([3], "784 pixels for each label")]
)
def test_archives_that_do_not_fit(labels, words, archives, main):
    """Two training images, one of them with a label too large, or without a label."""
    for name, content in {
        "train-images-idx3-ubyte.gz": bytes(16 + 2 * 784),
        "train-labels-idx1-ubyte.gz": bytes(8) + bytes(labels),
    }.items():
        (archives / name).write_bytes(gzip.compress(content))
    one_line(main("mini_vit", *RUN, "--data_dir", "data", status=1), words)


def test_a_cluster_s_variables_mean_nothing_without_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert mini_vit.rank_and_world() == (0, 1)


def test_a_tilde_is_the_home_folder(main, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    main("mini_vit", *RUN, "--out_dir", "~/mine")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "mine" / "model.pt").exists()


@pytest.mark.parametrize("place", ["a_file", "a_file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written(place, main, tmp_path):
    (tmp_path / "a_file").write_text("mine")
    one_line(main("mini_vit", *RUN, "--out_dir", place, status=1), f"can't write into {place}")
    assert (tmp_path / "a_file").read_text() == "mine"


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_checkpoint(interrupt, run, tmp_path):
    """A file may have at most 20 MB; a checkpoint of this run takes 88."""
    interrupt("mini_vit", "--n_layers", "1", *SHORT)
    path = tmp_path / "runs" / "mini_vit" / "checkpoint.pt"

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))

    options = {"replacing": SAVE_OFTEN, "preexec_fn": small_files}
    one_line(run("mini_vit", "--resume", status=1, **options), "can't write into runs/mini_vit")
    assert load(path)["iter"] == 8


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_too_little_memory_is_one_line(error, main, monkeypatch):
    def evaluate(*args):
        raise error

    monkeypatch.setattr(mini_vit, "evaluate", evaluate)
    result = main("mini_vit", *RUN, status=1)
    one_line(result, "out of memory: lower batch_size", str(error) or "MemoryError")


def test_memory_that_suffices_for_a_batch_suffices_to_evaluate(main, monkeypatch):
    """Evaluation takes 16 times as many images as a training batch, but 2000 at most."""
    original = mini_vit.evaluate
    sizes = []

    def evaluate(model, images, labels, batch_size):
        sizes.append(batch_size)
        return original(model, images, labels, batch_size)

    monkeypatch.setattr(mini_vit, "evaluate", evaluate)
    for batch_size in ("10", "200"):
        main("mini_vit", *RUN, "--batch_size", batch_size, "--max_iters", "1")
    assert sizes == [160, 2000]


def test_a_bug_keeps_its_traceback(main, monkeypatch):
    monkeypatch.setattr(mini_vit, "learning_rate", lambda step, config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main("mini_vit", *RUN)


def test_a_loss_that_is_not_finite_is_never_saved(main, monkeypatch, tmp_path):
    """Nor is a network that a gradient has ruined."""
    monkeypatch.setattr(mini_vit, "SAVE_SECONDS", 0)
    flags = [*RUN, "--learning_rate", "1e18", "--warmup_iters", "20"]
    one_line(main("mini_vit", *flags, status=1), "learning_rate", "finite")
    path = tmp_path / "runs" / "mini_vit" / "checkpoint.pt"
    assert not path.exists() or all(x.isfinite().all() for x in load(path)["model"].values())


@pytest.mark.slow
def test_processes_that_cannot_share_a_batch(run):
    result = run("mini_vit", *RUN, "--batch_size", "63", launch=torchrun(2), status=1)
    assert "batch_size 63 can't be split evenly over 2 processes" in result.stderr


@pytest.mark.slow
def test_the_error_of_one_process_is_not_buried_by_the_other(run, tmp_path):
    (tmp_path / "mine").write_text("in its way")
    result = run("mini_vit", *RUN, "--out_dir", "mine", launch=torchrun(2), status=1)
    assert "mini_vit.py: error: can't write into mine" in result.stderr
    assert not re.search("closed by peer|reset by peer", result.stderr)


@pytest.mark.slow
def test_compile_that_cannot_work_is_one_line(run):
    env = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": "cache"}
    result = run("mini_vit", *RUN, "--compile", "on", env=env)
    assert "continuing without torch.compile, which doesn't work here" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("accuracy: ")


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_torch_s_own_words(start, tmp_path):
    flags = [*TINY["mini_vit_augment"], *SHORT, "--max_iters=1000000", "--num_workers=2"]
    process = start("mini_vit_augment", *flags)
    log = tmp_path / "runs" / "mini_vit_augment" / "log.csv"
    wait_for(lambda: log.exists() and log.stat().st_size, process)  # it is under way
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    # The worker's death is noticed by itself, or when what it sent can't be fetched from it.
    assert "DataLoader worker (pid" in err or "ConnectionResetError" in err
