"""Nothing is lost: closed terminals, clusters, restarts, broken pipes, notebooks."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import (
    LONG,
    ROOT,
    SHORT,
    TINY,
    assert_same,
    children,
    free_port,
    rows,
    wait_for,
    weights,
)

import mini_vit

RUN = [*TINY["mini_vit"], *SHORT]
FOREVER = [*RUN, "--max_iters", "1000000"]
STATIC = ["--nnodes=1", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")


def log_of(tmp_path, script="mini_vit"):
    return tmp_path / "runs" / script / "log.csv"


def torchrun(tmp_path, *flags, launch=(), **options) -> subprocess.Popen:
    """Start two processes by torchrun, in a session of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", *(launch or STATIC)]
    command += [str(ROOT / "mini_vit.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes | options)


def test_every_process_listens_before_any_goes_on_after_the_first_step(main, monkeypatch):
    """Else a signal could end one before it listens, and the others couldn't go on without it."""
    not_yet = []
    agree = mini_vit.agree

    def see_who_listens(loss, world):
        not_yet.append(mini_vit.stop.at_once)
        return agree(loss, world)

    monkeypatch.setattr(mini_vit, "agree", see_who_listens)
    main("mini_vit", *RUN)
    assert not_yet == 24 * [False]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_warnings_stop_a_run_as_sigterm_does(name, start, tmp_path):
    number = getattr(signal, name)
    process = start("mini_vit", *FOREVER)
    wait_for(log_of(tmp_path).exists, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert out.splitlines()[-1].startswith("stopped; to continue: python ")
    assert (tmp_path / "runs" / "mini_vit" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_signal_that_the_system_repeats_loses_nothing(start, tmp_path):
    """A closed terminal's SIGHUP comes twice, SIGXCPU each second; `timeout` adds a SIGCONT."""
    saving = {
        "    state = trainer.state_dict()": "    time.sleep(5)\n    state = trainer.state_dict()"
    }
    process = start("mini_vit", *FOREVER, replacing=saving)
    wait_for(log_of(tmp_path).exists, process)
    for number in (signal.SIGHUP, signal.SIGCONT, signal.SIGHUP, signal.SIGXCPU, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.2)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGHUP, "")
    assert (tmp_path / "runs" / "mini_vit" / "checkpoint.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_ends_no_process_that_still_saves(rank, start, tmp_path):
    """It does so as soon as one process ends with an error."""
    saving = {
        "    state = trainer.state_dict()": "    time.sleep(3)\n    state = trainer.state_dict()"
    }
    process = start("mini_vit", *FOREVER, processes=2, replacing=saving, start_new_session=True)
    wait_for(log_of(tmp_path).exists, process)
    workers = {}
    for pid in children(process.pid):
        with open(f"/proc/{pid}/environ") as environment:
            variables = dict(line.split("=", 1) for line in environment.read().split("\0") if line)
        workers[int(variables["RANK"])] = pid
    os.kill(workers[rank], signal.SIGUSR1)
    for _ in range(600):
        if not is_running(workers[1]):
            break
        time.sleep(0.1)
    assert {path.name for path in log_of(tmp_path).parent.iterdir()} == {"checkpoint.pt", "log.csv"}
    out, err = process.communicate(timeout=100)
    assert "stopped; to continue: torchrun" in out, err


@pytest.mark.slow
def test_what_nohup_ignores_stays_ignored(start, tmp_path):
    process = start("mini_vit", *FOREVER, preexec_fn=ignore_interrupts)
    wait_for(log_of(tmp_path).exists, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.mark.slow
def test_a_second_signal_of_another_kind_ends_a_run_at_once(start, tmp_path):
    """During a step that never ends: here, a worker is suspended."""
    flags = [*TINY["mini_vit_augment"], *SHORT, "--num_workers", "1", "--max_iters", "1000000"]
    replacing = {"if stop.requested() and not stop.at_once:": "if False:"}
    process = start("mini_vit_augment", *flags, replacing=replacing)
    wait_for(log_of(tmp_path, "mini_vit_augment").exists, process)
    os.kill(children(process.pid)[0], signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_at_once_with_one_line(number, start, tmp_path):
    waiting = {"    trainer = Trainer(config, device, world)": "    say('here'); time.sleep(600)"}
    process = start("mini_vit", *RUN, replacing=waiting)
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err == "mini_vit.py: error: stopped before the first step: nothing to save\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_torchrun_doesn_t_wait_for_a_process_that_starts(tmp_path):
    """One process fails at once; the other is still waiting for it."""
    began = time.monotonic()
    process = torchrun(tmp_path, *RUN, "--batch_size", "63", launch=["--standalone", STATIC[1]])
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "can't be split evenly" in err
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGHUP])
def test_processes_whose_torchrun_is_killed_stop_and_save(number, tmp_path):
    launch = [*STATIC, f"--master_port={free_port()}"]
    process = torchrun(tmp_path, *FOREVER, launch=launch)  # its pipes end with it
    wait_for(log_of(tmp_path).exists, process)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(number)
    process.wait(60)
    for _ in range(300):
        if not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers):
            break
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)
    assert (tmp_path / "runs" / "mini_vit" / "checkpoint.pt").exists()


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_torchrun_starts_a_run_again_when_a_process_dies(with_checkpoint, main, tmp_path):
    """It goes on in the same folder, from the checkpoint or else from the first step."""
    flags = [*TINY["mini_vit"], *LONG, "--max_iters", "400"]
    main("mini_vit", *RUN)  # the default folder is taken, so the run gets runs/mini_vit-2
    text = (ROOT / "mini_vit.py").read_text()
    if with_checkpoint:
        text = text.replace("SAVE_SECONDS = 300", "SAVE_SECONDS = 0")
    (tmp_path / "mini_vit.py").write_text(text)
    launch = [*STATIC, f"--master_port={free_port()}", "--max_restarts=2"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "mini_vit.py"]
    command += [*flags, "--data_dir", str(ROOT / "data")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    folder = tmp_path / "runs" / "mini_vit-2"
    wait_for((folder / ("checkpoint.pt" if with_checkpoint else "log.csv")).exists, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert ("resuming runs/mini_vit-2" in out) == with_checkpoint
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mini_vit", folder.name]
    assert {path.name for path in folder.iterdir()} == {"model.pt", "log.csv"}
    assert [row["iter"] for row in rows(folder)] == [str(n) for n in range(20, 401, 20)]


@pytest.mark.slow
def test_two_runs_of_one_process_are_no_restart(tmp_path):
    """Someone tries several seeds under torchrun."""
    flags = [*RUN, "--data_dir", str(ROOT / "data")]
    code = f"import mini_vit\nfor seed in '12': mini_vit.main([*{flags}, '--seed', seed])\n"
    (tmp_path / "seeds.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "seeds.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=200)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"mini_vit", "mini_vit-2"}


@pytest.mark.slow
def test_a_plain_error_of_one_process_is_not_buried_by_the_others(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.csv").write_text("iter")
    process = torchrun(tmp_path, *RUN, "--out_dir", "mine", launch=["--standalone", STATIC[1]])
    _, err = process.communicate(timeout=100)
    before_torchrun_s = err.partition("torch/distributed/elastic")[0]
    assert "holds a run" in before_torchrun_s
    assert "Connection closed" not in err and 'mini_vit.py", line' not in err, err


@pytest.mark.slow
def test_time_for_which_a_process_is_suspended_is_not_training(start, tmp_path):
    """Also not in log.csv, nor in comparison.png, which is drawn from it."""
    process = start("mini_vit", *FOREVER)
    wait_for(log_of(tmp_path).exists, process)
    began = time.monotonic()
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    state = torch.load(tmp_path / "runs" / "mini_vit" / "checkpoint.pt", weights_only=True)
    assert 1 < state["seconds"] < time.monotonic() - began - 2


# Each is a command of bash, in which TRAIN is `python mini_vit.py` with flags.
@pytest.mark.slow
@pytest.mark.parametrize(
    "command, status",
    [
        ("TRAIN | head -n 1; exit ${PIPESTATUS[0]}", 141),
        ("TRAIN > /dev/full", 0),
        ("TRAIN >&-", 0),
        ("TRAIN 2>&-", 0),
        ("LC_ALL=C PYTHONIOENCODING=ascii TRAIN --out_dir größe", 0),
    ],
)
def test_output_that_cannot_be_written_loses_nothing(command, status, tmp_path):
    train = " ".join([sys.executable, str(ROOT / "mini_vit.py"), *RUN, "--max_iters", "60"])
    command = ["bash", "-c", command.replace("TRAIN", train)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    (folder,) = [path.parent for path in tmp_path.rglob("log.csv")]
    kept = {path.name for path in folder.iterdir()}
    assert kept == {"checkpoint.pt" if status else "model.pt", "log.csv"}
    if "ascii" in command[2]:
        assert "accuracy: " in result.stdout and "gr\\xf6\\xdfe" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
def test_ctrl_c_while_torch_compile_works_is_one_line(start, tmp_path):
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("mini_vit", *RUN, "--compile", "on", env=env, start_new_session=True)
    while "parameters" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    lines = [line for line in err.splitlines() if "CUDA" not in line]  # torch's warning on a CPU
    assert lines == ["mini_vit.py: error: stopped before the first step: nothing to save"]


def test_main_in_a_thread(main, tmp_path):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(main("mini_vit", *RUN).returncode))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_main_puts_handlers_back_and_forgets_the_signal(main, signal_at, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    calm = signal_at(mini_vit, 5, signal.SIGINT)
    main("mini_vit", *RUN, status=130)
    calm()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "accuracy: " in main("mini_vit", *RUN).stdout
    main("mini_vit", "--resume")
    assert_same(weights(tmp_path / "runs/mini_vit"), weights(tmp_path / "runs/mini_vit-2"))


# ---------------------------------------------------------------- notebooks
@pytest.fixture
def cell(tmp_path):
    """Run cells in a real kernel, in tmp_path: cell(source) returns what the cell printed."""
    nbformat = pytest.importorskip("nbformat")
    client_module = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook()
    client = client_module.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    )
    context = client.setup_kernel()
    context.__enter__()

    def cell(source, **options):
        node = nbformat.v4.new_code_cell(source)
        notebook.cells = [node]
        client.execute_cell(node, 0, **options)
        return "".join(output.get("text", "") for output in node.outputs)

    cell.client = client
    yield cell
    context.__exit__(None, None, None)


@pytest.mark.slow
def test_a_notebook_trains_and_looks(cell, tmp_path):
    flags = [*RUN, "--data_dir", str(ROOT / "data")]
    cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})")
    assert "accuracy: " in cell(f"import mini_vit; status = mini_vit.main({flags!r})")
    text = cell("import look; look.main(['runs/mini_vit', '--device', 'cpu'])")
    assert "accuracy of 9" in text and (tmp_path / "runs" / "mini_vit" / "report.png").exists()
    ran = cell(f"%run {ROOT / 'mini_vit.py'} {' '.join(flags)} --out_dir ran")
    assert "python look.py ran" in ran


@pytest.mark.slow
def test_a_notebook_s_interrupt_stops_a_run_and_the_next_cell_trains(cell, tmp_path):
    flags = [*RUN, "--data_dir", str(ROOT / "data")]
    cell(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mini_vit, os, signal, threading")

    def interrupt():
        while not log_of(tmp_path).exists():
            time.sleep(0.05)
        os.kill(int(pid), signal.SIGINT)

    pid = cell("print(os.getpid())")
    thread = threading.Thread(target=interrupt)
    thread.start()
    text = cell(f"print(mini_vit.main({[*flags, '--max_iters', '1000000']!r}))")
    thread.join()
    assert "\n130\n" in text
    assert "to continue: python mini_vit.py --resume --out_dir runs/mini_vit\n" in text
    assert "accuracy: " in cell(f"mini_vit.main({flags!r})")


@pytest.mark.slow
def test_a_script_pasted_into_a_cell_trains(cell, tmp_path):
    """With the data in the working folder."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    text = (ROOT / "mini_vit.py").read_text()
    pasted = text[: text.index('if __name__ == "__main__":')]
    cell(pasted)
    assert "accuracy: " in cell(f"main({RUN!r})")
    state = torch.load(tmp_path / "runs" / "mini_vit" / "model.pt", weights_only=True)
    assert state["script"] == "mini_vit"
