"""What the tests share: the scripts as modules, ways to run them, and what they wrote."""

import csv
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: small models want one thread
import torch

# In the background or under nohup these are ignored, and processes the tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
ROOT = Path(__file__).parents[1]
SCRIPTS = ("mini_vit", "mini_vit_concat", "mini_vit_augment", "vit")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# A model and a run of seconds; the concat model can't be narrower than the image.
SHAPES = {name: {"n_layers": 2, "n_head": 4, "d_head": 14, "n_embd": 56} for name in SCRIPTS}
SHAPES["mini_vit"] |= {"first_layers": 1, "growth": 4.0}  # so that a block joins
SHAPES |= {"mini_vit_concat": {"n_layers": 1, "n_head": 80, "d_head": 10, "n_embd": 800}}
SHAPES |= {"vit": {"n_layers": 2, "n_head": 2, "n_embd": 32, "patch_size": 7}}
TINY = {
    name: [f"--{field}={value}" for field, value in shape.items()] for name, shape in SHAPES.items()
}
STILL = [
    f"--{strength}=0" for strength in ("rotation", "scaling", "shear", "translation", "elastic")
]
SHORT = "--subset 512 --batch_size 64 --max_iters 24 --eval_interval 8 --warmup_iters 4".split()
SHORT += ["--device", "cpu"]
SAVE_OFTEN = {"SAVE_SECONDS = 300": "SAVE_SECONDS = 0"}
LONG = [*SHORT, "--max_iters", "60", "--eval_interval", "20"]


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture
def module(script):
    return importlib.import_module(script)


@pytest.fixture
def main(tmp_path, monkeypatch, capfd):
    """Run a script in this process: main(script, *flags, status=0, save_seconds=300)."""
    monkeypatch.chdir(tmp_path)

    def main(script, *flags, status=0, save_seconds=300):
        module = importlib.import_module(script)
        monkeypatch.setattr(module, "SAVE_SECONDS", save_seconds, raising=False)
        capfd.readouterr()
        try:
            returned, last_words = module.main(list(flags)), ""
        except SystemExit as stop:  # the interpreter prints a text on stderr, with status 1
            is_text = isinstance(stop.code, str)
            returned, last_words = (1, stop.code + "\n") if is_text else (stop.code, "")
        out, err = capfd.readouterr()
        assert returned == status, f"exit status {returned}\n{out}\n{err}\n{last_words}"
        return subprocess.CompletedProcess(flags, returned, out, err + last_words)

    return main


@pytest.fixture
def signal_at(monkeypatch):
    """Have a script get a signal at the beginning of a step: signal_at(module, step, SIGTERM)."""

    def signal_at(module, step, number=signal.SIGTERM):
        original = module.blocks_in_use

        def blocks_in_use(now, config):
            if now == step:
                os.kill(os.getpid(), number)
            return original(now, config)

        monkeypatch.setattr(module, "blocks_in_use", blocks_in_use)
        return lambda: monkeypatch.setattr(module, "blocks_in_use", original)

    return signal_at


@pytest.fixture
def start(tmp_path):
    """Start a script as a user does: start(script, *flags, processes=1, **options of Popen).

    It may be a copy with other constants: replacing={"SAVE_SECONDS = 300": "SAVE_SECONDS = 0"}.
    """
    started = []

    def start(script, *flags, processes=1, replacing=(), env=(), **options):
        path = str(ROOT / f"{script}.py")
        launch = []
        if processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone"]
            launch.append(f"--nproc_per_node={processes}")
        if replacing:
            text = Path(path).read_text()
            for old, new in replacing.items():
                assert old in text
                text = text.replace(old, new)
            path = f"{script}.py"
            (tmp_path / path).write_text(text)
            flags += ("--data_dir", str(ROOT / "data"))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *launch, path, *flags]
        options = {"cwd": tmp_path, "env": os.environ | dict(env)} | pipes | options
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run(start):
    """Run a script as a user does, to its end: run(script, *flags, status=0, **options)."""

    def run(*args, status=0, **options):
        process = start(*args, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def wait_for(condition, process, seconds=120):
    """Wait until a condition holds, while the process runs."""
    for _ in range(seconds * 50):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise TimeoutError


def free_port() -> int:
    """Return a port that nothing listens on: tests run side by side, a fixed one may be taken."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def children(pid: int) -> list[int]:
    """Return the ids of a process's children (Linux)."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(n) for n in listed.split()]


def weights(folder: Path) -> dict:
    """Return the weights in a run's folder: the finished model's or else the checkpoint's."""
    path = folder / ("model.pt" if (folder / "model.pt").exists() else "checkpoint.pt")
    return torch.load(path, weights_only=True)["model"]


def assert_same(a: dict, b: dict, **tolerance) -> None:
    """See that two models have the same weights, bit for bit if no tolerance is given."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name
        )


def rows(folder: Path, drop=("images_per_second", "seconds")) -> list[dict]:
    """Return the rows of log.csv, without its times."""
    text = (folder / "log.csv").read_bytes().decode()
    assert "\r" not in text
    return [
        {k: v for k, v in row.items() if k not in drop} for row in csv.DictReader(text.splitlines())
    ]


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
