"""What the tests share: the scripts as modules, ways to run them, and what they wrote."""

import csv
import functools
import gzip
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: small models want one thread
import torch

# In the background or under nohup these are ignored, and processes the tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
gzip.decompress = functools.lru_cache(gzip.decompress)  # hundreds of runs read the same archives
ROOT = Path(__file__).parents[1]
SCRIPTS = ("mini_vit", "mini_vit_concat", "mini_vit_augment", "vit")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# A model and a run of seconds; the concat model can't be narrower than the image.
SHAPES = {name: {"n_layers": 2, "n_head": 4, "d_head": 14, "n_embd": 56} for name in SCRIPTS}
SHAPES["mini_vit"] |= {"first_layers": 1, "growth": 4.0}  # so that a block joins
SHAPES["mini_vit_concat"] = {"n_layers": 1, "n_head": 80, "d_head": 10, "n_embd": 800}
SHAPES["vit"] = {"n_layers": 2, "n_head": 2, "n_embd": 32, "patch_size": 7}
TINY = {
    name: [f"--{field}={value}" for field, value in shape.items()] for name, shape in SHAPES.items()
}
SHORT = "--subset 512 --batch_size 64 --max_iters 24 --eval_interval 8 --warmup_iters 4".split()
SHORT += ["--device", "cpu"]
STILL = "--rotation 0 --scaling 0 --shear 0 --translation 0 --elastic 0".split()
SAVE_OFTEN = {"SAVE_SECONDS = 60": "SAVE_SECONDS = 0", "50 * (last_save": "0 * (last_save"}


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture
def module(script):
    return importlib.import_module(script)


@pytest.fixture
def main(tmp_path, monkeypatch, capfd):
    """Run a script in this process and in tmp_path: main(script, *flags, status=0)."""
    monkeypatch.chdir(tmp_path)

    def main(script, *flags, status=0):
        module = importlib.import_module(script)
        capfd.readouterr()
        code = None
        last_words = ""
        try:
            module.main(list(flags))
        except SystemExit as stop:
            code = stop.code
        if isinstance(code, str):  # the interpreter prints it on stderr
            last_words = code + "\n"
            code = 1
        out, err = capfd.readouterr()
        assert (code or 0) == status, f"exit status {code}\n{out}\n{err}\n{last_words}"
        return subprocess.CompletedProcess(flags, status, out, err + last_words)

    return main


@pytest.fixture
def interrupt(main, monkeypatch):
    """Train, save at the first evaluation, and stop there: interrupt(script, *flags, at=9)."""

    def interrupt(script, *flags, at=9):
        module = importlib.import_module(script)
        original = module.blocks_in_use

        def blocks_in_use(step, config):
            if step == at:
                raise KeyboardInterrupt
            return original(step, config)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "SAVE_SECONDS", 0)
            patch.setattr(module, "blocks_in_use", blocks_in_use)
            main(script, *flags)
        module.lock_of.cache_clear()  # as if this process had ended: its lock is free

    return interrupt


@pytest.fixture
def start(tmp_path):
    """Start a script as a user does: start(script, *flags, launch=(), **options of Popen).

    It may be a copy with changed lines: replacing={"SAVE_SECONDS = 60": "SAVE_SECONDS = 0"}.
    """
    started = []

    def start(script, *flags, launch=(), replacing=None, env=None, **options):
        path = ROOT / f"{script}.py"
        if replacing:
            path = changed_copy(script, tmp_path, replacing)
            flags += ("--data_dir", str(ROOT / "data"))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *launch, str(path), *flags]
        options = {"cwd": tmp_path, "env": os.environ | (env or {})} | pipes | options
        process = subprocess.Popen(command, **options)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run(start):
    """Run a script as a user does, to its end: run(script, *flags, status=0, **options)."""

    def run(*args, status=0, **options):
        process = start(*args, **options)
        out, err = process.communicate(timeout=900)
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def changed_copy(script: str, folder: Path, replacing: dict[str, str]) -> Path:
    """Write a script with some of its text replaced into a folder; return the copy's path."""
    text = (ROOT / f"{script}.py").read_text()
    for old, new in replacing.items():
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    path = folder / f"{script}.py"
    path.write_text(text)
    return path


def torchrun(n: int, *flags) -> list[str]:
    """Return how Python starts n processes that train together."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *flags]


def wait_for(condition, process=None, seconds=120):
    """Wait until a condition holds, while the process, if any, runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.001)


def children(pid: int) -> list[int]:
    """Return the ids of a process's children (Linux)."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(n) for n in listed.split()]


def load(path: Path) -> dict:
    """Return what a checkpoint.pt or model.pt holds."""
    return torch.load(path, weights_only=True)


def weights(folder: Path) -> dict:
    """Return the weights of a finished run."""
    return load(folder / "model.pt")["model"]


def assert_same(a: dict, b: dict, rtol=0.0, atol=0.0) -> None:
    """See that two models have the same weights, bit for bit if no tolerance is given."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=name)


def rows(folder: Path) -> list[dict]:
    """Return the rows of log.csv, without its times."""
    found = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    for row in found:
        del row["images_per_second"], row["seconds"]
    return found


def assert_finished_alike(folder: Path, other: Path) -> None:
    """See that two runs ended with the same weights and log, and left nothing but those."""
    assert_same(weights(folder), weights(other))
    assert rows(folder) == rows(other)
    assert {path.name for path in folder.iterdir()} <= {"model.pt", "log.csv", ".lock"}


def one_line(result, *words) -> None:
    """See that stderr is one line (after argparse's usage) with these words, and no traceback."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, result.stderr
    assert "error:" in lines[0]
    for word in words:
        assert word in lines[0], lines[0]


def small_config(module, **changes):
    """Return the Config of a model that trains in seconds, in float32."""
    return module.Config(**SHAPES[module.__name__] | {"precision": "float32"} | changes)


def random_model(module, **changes) -> torch.nn.Module:
    """Return a small Transformer whose weights are all random: of a new one's, some are 0 or 1."""
    model = module.Transformer(small_config(module, **changes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def random_images(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n images (n, 784) uint8 and labels (n,) of noise."""
    return torch.randint(0, 256, (n, 784), dtype=torch.uint8), torch.randint(0, 10, (n,))
