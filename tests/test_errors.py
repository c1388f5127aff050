"""Every user error gives one clear line, and loses nothing."""

import dataclasses
import re
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SAVE_OFTEN, SHORT, TINY, one_line, weights

import mini_vit

RUN = [*TINY["mini_vit"], *SHORT]


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--n_layer", "2"], "--n_layer"),
        (["--n_layers", "two"], "--n_layers"),
        (["--n_layers", "0"], "n_layers must be from 1 to 2**63 - 1, not 0"),
        (["--batch_size", "-1"], "batch_size must be from 1 to 2**63 - 1, not -1"),
        (["--learning_rate", "nan"], "learning_rate must be above 0 and finite, not nan"),
        (["--learning_rate", "inf"], "learning_rate"),
        (["--grad_clip", "0"], "grad_clip"),
        (["--seed", str(2**63)], "seed"),
        (["--dropout", "1"], "dropout"),
        (["--precision", "float8"], "precision must be auto, float32 or bfloat16, not float8"),
        (["--n_head", "3"], "n_head 3 * d_head 56 must be n_embd 784"),
        (["a_word"], "a_word"),
    ],
)
def test_bad_flags(flags, word, main, monkeypatch):
    monkeypatch.setattr(mini_vit, "train", None)
    lines = main("mini_vit", *flags, status=2).stderr.splitlines()
    assert "error:" in lines[-1] and word in lines[-1]


@pytest.mark.parametrize(
    "script, flags",
    [
        ("mini_vit_concat", "--n_embd 784 --d_head 49"),
        ("mini_vit_augment", "--num_workers -2"),
        ("mini_vit_augment", "--easy_share 1"),
        ("vit", "--easy_share -0.1"),
        ("mini_vit_augment", "--rotation -1"),
        ("vit", "--scaling 1"),
    ],
)
def test_bad_flags_of_the_other_scripts(script, flags, main):
    assert "error:" in main(script, *flags.split(), status=2).stderr.splitlines()[-1]


@pytest.mark.parametrize("optimize", ["-O", "-OO"])
def test_help_lists_every_field_with_comment_and_default(module, script, optimize):
    """Also without docstrings."""
    command = [sys.executable, optimize, str(ROOT / f"{script}.py"), "--help"]
    text = subprocess.check_output(command, text=True, env={"COLUMNS": "1000"})
    for field in dataclasses.fields(module.Config):
        flag = f"--{field.name} {field.type.__name__}"
        default = re.escape(f"(default: {field.default})")
        assert re.search(rf"{flag}\s+\w.* {default}", text)  # a comment stands before the default


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "gpu", "meta"])
def test_a_start_that_fails_leaves_no_trace(device, main, tmp_path):
    one_line(main("mini_vit", *RUN, "--device", device, status=1), f"device {device} can't be used")
    assert not list(tmp_path.iterdir())


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
        archive.write_bytes({"truncated": content[:5000], "altered": content, "empty": b""}[damage])
    if damage == "a folder":
        archive.mkdir()
    one_line(main("mini_vit", *RUN, "--data_dir", "data", status=1), "t10k-images", "--data_dir")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_data_needs_no_temporary_folder_and_no_place_to_start_from(run):
    """The default data_dir is beside the script; tests start it from elsewhere."""
    run("mini_vit", *RUN, env={"TMPDIR": "/nowhere"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{"RANK": ""}, {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "4"}],
)
def test_a_cluster_s_variables_mean_nothing_without_torchrun(variables, run):
    assert "accuracy: " in run("mini_vit", *RUN, env=variables).stdout


@pytest.mark.slow
def test_a_tilde_is_the_home_folder(run, tmp_path):
    run("mini_vit", *RUN, "--out_dir", "~/mine", env={"HOME": str(tmp_path / "home")})
    assert (tmp_path / "home" / "mine" / "model.pt").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("place", ["a_file", "a_file/below", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_written(place, main, tmp_path):
    (tmp_path / "a_file").write_text("mine")
    one_line(main("mini_vit", *RUN, "--out_dir", place, status=1), place)
    assert (tmp_path / "a_file").read_text() == "mine"


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_checkpoint(main, start, run, signal_at, tmp_path):
    """A file may have at most 20 MB; a checkpoint of this run takes 88, its model 30."""
    signal_at(mini_vit, 12)
    main("mini_vit", "--n_layers", "1", *SHORT, status=143)
    path = tmp_path / "runs" / "mini_vit" / "checkpoint.pt"
    before = path.read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))

    flags = ["--resume", "--max_iters", "32"]
    result = run("mini_vit", *flags, status=1, replacing=SAVE_OFTEN, preexec_fn=small_files)
    assert result.stdout.count("checkpoint.pt (") == 4  # it goes on
    one_line(result, "can't write into runs/mini_vit, nor into")
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))


def test_no_directory_at_all_that_can_be_written_is_one_line(main, monkeypatch):
    def gettempdir():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(mini_vit, "tempfile", SimpleNamespace(gettempdir=gettempdir))
    monkeypatch.setattr(mini_vit, "save", lambda trainer, folder: False)
    one_line(main("mini_vit", *RUN, status=1), "can't write into runs/mini_vit, nor into")


@pytest.mark.parametrize("again", [True, False])
def test_a_folder_that_disappears_is_made_again_or_the_run_kept_elsewhere(
    again, main, monkeypatch, tmp_path
):
    original = mini_vit.blocks_in_use
    folder, rescue = tmp_path / "mine", tmp_path / "rescue"
    rescue.mkdir()
    monkeypatch.setattr(mini_vit.tempfile, "gettempdir", lambda: str(rescue))

    def blocks_in_use(step, config):
        if step == 20:
            shutil.rmtree(folder)
            if not again:
                folder.write_text("in its way")
        return original(step, config)

    monkeypatch.setattr(mini_vit, "blocks_in_use", blocks_in_use)
    result = main("mini_vit", *RUN, "--out_dir", "mine", status=0 if again else 1)
    if again:
        assert {path.name for path in folder.iterdir()} == {"model.pt", "log.csv"}
        assert len((folder / "log.csv").read_text().splitlines()) == 4
    else:
        one_line(result, "can't write into mine", str(rescue))
        (kept,) = rescue.iterdir()
        assert weights(kept)


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt", "log.csv"])
def test_a_file_that_is_locked_for_a_moment_is_written(name, main, monkeypatch, tmp_path):
    """As on Windows, while a virus scanner reads it."""
    original, refusals = mini_vit.os.replace, iter([True, True])

    def replace(source, target):
        if str(target).endswith(name) and next(refusals, False):
            raise PermissionError(13, "Permission denied", str(target))
        original(source, target)

    monkeypatch.setattr(mini_vit.os, "replace", replace)
    result = main("mini_vit", *RUN, save_seconds=0)
    assert "can't write" not in result.stdout
    assert next(refusals, None) is None
    assert (tmp_path / "runs" / "mini_vit" / "model.pt").exists()


def test_a_log_that_cannot_be_written_does_not_end_a_run(main, monkeypatch, tmp_path):
    """As on Windows, where a spreadsheet has it open."""
    original, refusals = mini_vit.os.replace, iter(8 * [True])  # each write tries four times
    monkeypatch.setattr(mini_vit.time, "sleep", lambda seconds: None)

    def replace(source, target):
        if str(target).endswith("log.csv") and next(refusals, False):
            raise PermissionError(13, "Permission denied", str(target))
        original(source, target)

    monkeypatch.setattr(mini_vit.os, "replace", replace)
    result = main("mini_vit", *RUN)
    assert result.stdout.count("the next evaluation will try again") == 2
    assert result.stdout.count("Permission denied") == 2
    assert len((tmp_path / "runs" / "mini_vit" / "log.csv").read_text().splitlines()) == 4


def test_two_runs_in_one_folder_never_write_the_same_file(module, tmp_path, monkeypatch):
    temporary = []
    for process in (1, 2):
        monkeypatch.setattr(module.os, "getpid", lambda process=process: process)
        with module.replacing(tmp_path / "log.csv") as file:
            temporary.append(file)
            file.touch()
    assert len(set(temporary)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


class Malice:
    def __reduce__(self):
        return exec, ("open('harm', 'w').close()",)


CASES = {
    "missing": None,
    "empty": b"",
    "other script": {"script": "mini_vit_concat", "config": {}, "iter": 1},
    "other version": {"script": "mini_vit", "config": {"no_field": 2}, "iter": 1},
    "malicious": {"script": "mini_vit", "config": Malice()},
    "not a dictionary": [1, 2, 3],
    "truncated": {"script": "mini_vit", "model": torch.zeros(1000)},
}


def write_case(case: str, path) -> None:
    """Write a file that is no checkpoint."""
    path.parent.mkdir(parents=True)
    if isinstance(CASES[case], bytes):
        path.write_bytes(CASES[case])
    elif CASES[case] is not None:
        torch.save(CASES[case], path)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_is_none(case, main, tmp_path):
    write_case(case, tmp_path / "runs" / "mini_vit" / "checkpoint.pt")
    one_line(main("mini_vit", "--resume", status=1), "checkpoint.pt")
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def stopped(main, signal_at):
    """A run that was stopped after its second step."""
    calm = signal_at(mini_vit, 2)
    main("mini_vit", *RUN, status=143)
    calm()


def test_resuming_refuses_another_network_or_other_data(stopped, main):
    for name, value in {"n_layers": 3, "batch_size": 32, "seed": 2, "learning_rate": 1}.items():
        one_line(main("mini_vit", "--resume", f"--{name}", str(value), status=1), f"--{name}")
    one_line(main("mini_vit", "--resume", "--max_iters", "1", status=1), "--max_iters")
    main("mini_vit", "--resume", *RUN, "--eval_interval", "5")  # the same values, but for one


def test_resuming_refuses_weights_that_do_not_fit(stopped, main, monkeypatch):
    original = mini_vit.FeedForward

    def wider(config):
        return original(dataclasses.replace(config, n_embd=60, d_head=15))

    monkeypatch.setattr(mini_vit, "FeedForward", wider)
    one_line(main("mini_vit", "--resume", status=1), "Transformer")


@pytest.mark.slow
def test_out_of_memory_names_batch_size_and_leaves_no_trace(tmp_path):
    program = (
        "import resource, sys, mini_vit\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "size = pages * resource.getpagesize() + 2 ** 30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        f"sys.exit(mini_vit.main({[*RUN, '--batch_size', '200000']!r}))"
    )
    command = [sys.executable, "-c", program]
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}}
    result = subprocess.run(command, **options, capture_output=True, text=True)
    assert result.returncode == 1
    one_line(result, "out of memory: start again with a lower batch_size")
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(main, monkeypatch):
    monkeypatch.setattr(mini_vit, "learning_rate", lambda step, config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main("mini_vit", *RUN)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(main, tmp_path):
    flags = [*RUN, "--learning_rate", "1e18", "--warmup_iters", "20"]
    one_line(main("mini_vit", *flags, status=1, save_seconds=0), "learning_rate", "finite")
    folder = tmp_path / "runs" / "mini_vit"
    if (folder / "checkpoint.pt").exists():
        assert all(value.isfinite().all() for value in weights(folder).values())


@pytest.mark.slow
def test_processes_that_cannot_share_a_batch(run):
    result = run("mini_vit", *RUN, "--batch_size", "63", processes=2, status=1)
    assert "can't be split evenly" in result.stderr


@pytest.mark.slow
def test_compile_that_cannot_work_is_one_line(run):
    env = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": "cache"}
    result = run("mini_vit", *RUN, "--compile", "on", env=env)
    assert "without torch.compile" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("accuracy: ")
