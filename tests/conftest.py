"""What all tests share: the three scripts as modules, and a way to run them as a user does."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("mini_vit", "mini_vit_concat", "mini_vit_augment")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# A model and a run of seconds; the concat model can't be narrower than the image.
TINY = {name: "--n_layers 2 --n_head 4 --d_head 14 --n_embd 56".split() for name in SCRIPTS}
TINY["mini_vit_concat"] = "--n_layers 1 --n_head 40 --d_head 20 --n_embd 800".split()
SHORT = "--subset 512 --batch_size 64 --max_iters 24 --eval_interval 8 --warmup_iters 4 --device cpu".split()


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture
def module(script):
    return importlib.import_module(script)


@pytest.fixture(scope="session")
def no_report(tmp_path_factory) -> Path:
    """A folder that, on PYTHONPATH, hides matplotlib: runs are faster without the picture."""
    folder = tmp_path_factory.mktemp("no_matplotlib")
    (folder / "matplotlib.py").write_text("raise ImportError('hidden by the tests')\n")
    return folder


@pytest.fixture
def start(tmp_path, no_report):
    """Start a script in the background: start(script, *flags, processes=1, report=False, **of Popen)."""
    started = []

    def start(script, *flags, processes=1, report=False, python=(), **options):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *python, *(launch if processes > 1 else []), str(ROOT / f"{script}.py"), *flags]
        path = {} if report else {"PYTHONPATH": str(no_report)}
        environment = os.environ | path | options.pop("env", {})
        if "--data_dir" not in flags and "--help" not in flags and "data" not in options:
            command += ["--data_dir", str(ROOT / "data")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **(pipes | options)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run(start):
    """Run a script to its end and return the finished process, with status, stdout and stderr."""

    def run(*args, status=0, **options):
        process = start(*args, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
