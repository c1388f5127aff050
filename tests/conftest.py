"""What all tests share: the three scripts as modules, and a way to run them as a user does."""

import importlib
import os
import signal
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


@pytest.fixture
def main(tmp_path, monkeypatch, capfd):
    """Run a script's main() in this process, in tmp_path, without the picture: main(script, *flags, status=0).

    Each evaluation is saved, unless save_share tells otherwise.
    """
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def main(script, *flags, status=0, save_share=float("inf")):
        module = importlib.import_module(script)
        monkeypatch.setattr(module, "draw_report", lambda *args: None)
        monkeypatch.setattr(module, "SAVE_SHARE", save_share)
        if "--data_dir" not in flags:
            flags += ("--data_dir", str(ROOT / "data"))
        capfd.readouterr()
        try:
            returned, last_words = module.main(list(flags)), ""
        except SystemExit as stop:  # as the interpreter treats it: a text goes to stderr, with status 1
            is_text = isinstance(stop.code, str)
            returned, last_words = (1, stop.code + "\n") if is_text else (stop.code, "")
        out, err = capfd.readouterr()
        assert returned == status, f"exit status {returned}\n{out}\n{err}\n{last_words}"
        return subprocess.CompletedProcess(flags, returned, out, err + last_words)

    yield main
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def no_matplotlib(tmp_path_factory) -> Path:
    """A folder that, on PYTHONPATH, hides matplotlib: runs are faster without the picture."""
    folder = tmp_path_factory.mktemp("no_matplotlib")
    (folder / "matplotlib.py").write_text("raise ImportError('hidden by the tests')\n")
    return folder


@pytest.fixture
def start(tmp_path, no_matplotlib):
    """Start a script as a user does: start(script, *flags, processes=1, report=False, **options of Popen)."""
    started = []

    def start(script, *flags, processes=1, report=False, env=(), **options):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / f"{script}.py"), *flags]
        if "--data_dir" not in flags:
            command += ["--data_dir", str(ROOT / "data")]
        environment = os.environ | ({} if report else {"PYTHONPATH": str(no_matplotlib)}) | dict(env)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run(start):
    """Run a script as a user does, to its end: run(script, *flags, status=0, **options of start)."""

    def run(*args, status=0, **options):
        process = start(*args, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
