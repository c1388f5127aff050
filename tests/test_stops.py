"""Stopped at any moment and in any way, --resume ends with the weights of an unbroken run."""

import os
import random
import signal
import time

import pytest
from conftest import (
    ROOT,
    SAVE_OFTEN,
    SCRIPTS,
    TINY,
    assert_finished_alike,
    children,
    torchrun,
    wait_for,
)

LONG = "--subset 1000 --batch_size 32 --max_iters 150 --eval_interval 50 --device cpu".split()
LONG += ["--data_dir", str(ROOT / "data")]
RUNS = {script: [*TINY[script], *LONG] for script in SCRIPTS}
RUNS["mini_vit_augment"].append("--num_workers=2")
RUNS["mini_vit_concat"].append("--max_iters=50")  # its steps take longer
ENDLESS = [*RUNS["mini_vit"], "--max_iters=1000000"]
EVERY_WAY = [
    ("mini_vit", signal.SIGKILL),
    ("mini_vit", signal.SIGHUP),
    ("mini_vit_augment", signal.SIGINT),
    ("vit", signal.SIGTERM),
]


@pytest.fixture(scope="module")
def cache() -> dict:
    return {}


@pytest.fixture
def whole(main, tmp_path_factory, cache):
    """Return the folder of a script's run that nobody stopped, and its seconds: whole(script)."""

    def whole(script):
        if script not in cache:
            folder = tmp_path_factory.mktemp(script) / "whole"
            began = time.monotonic()
            main(script, *RUNS[script], "--out_dir", str(folder))
            cache[script] = folder, time.monotonic() - began
        return cache[script]

    return whole


def stop_somewhere(process, number: int, folder, seconds: float, saving: bool) -> None:
    """Send a signal at a random moment within so many seconds of the first step.

    With `saving`, wait for the next moment in which a checkpoint is being written.
    """
    wait_for((folder / "log.csv").exists, process)
    time.sleep(random.uniform(0, seconds))
    if saving:
        wait_for((folder / "saving.tmp").exists, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to a DataLoader's workers, too
    else:
        process.send_signal(number)
    process.communicate(timeout=200)
    # Of Ctrl-C, DataLoader may notice first that its workers have ended: an error, and status 1.
    assert process.returncode in ((1, -number) if number == signal.SIGINT else (-number,))


@pytest.mark.parametrize("script, number", EVERY_WAY, indirect=["script"])
def test_stopped_in_any_way_it_goes_on_as_if_nothing_had_happened(
    script, number, start, main, tmp_path, whole
):
    unbroken, seconds = whole(script)
    flags = [*RUNS[script], "--resume", "--out_dir", "mine"]
    process = start(script, *flags, replacing=SAVE_OFTEN, start_new_session=True)
    stop_somewhere(process, number, tmp_path / "mine", seconds / 2, saving=False)
    main(script, *flags)
    assert_finished_alike(tmp_path / "mine", unbroken)


@pytest.mark.slow
def test_killed_again_and_again(script, start, main, tmp_path, whole):
    unbroken, seconds = whole(script)
    folder = tmp_path / "mine"
    flags = [*RUNS[script], "--resume", "--out_dir", "mine"]
    for n in range(5):
        process = start(script, *flags, replacing=SAVE_OFTEN, start_new_session=True)
        stop_somewhere(process, signal.SIGKILL, folder, seconds / 8, saving=n % 2 == 0)
    main(script, *flags)
    assert_finished_alike(folder, unbroken)


KILL = "os.kill(os.getpid(), 9)"
MOMENTS = {  # the line at which it is killed, and what is in its folder then
    "half a first checkpoint": (
        {"torch.save(state, file)": f"file.write(b'half'); file.flush(); {KILL}"},
        {"log.csv", "saving.tmp", ".lock"},
    ),
    "half a later checkpoint": (
        {
            "torch.save(state, file)": "torch.save(state, file)\n            "
            f"if trainer.step == 50: file.truncate(5000); {KILL}"
        },
        {"log.csv", "checkpoint.pt", "saving.tmp", ".lock"},
    ),
    "a model beside the checkpoint": (
        {'(folder / "checkpoint.pt").unlink(missing_ok=True)': KILL},
        {"log.csv", "checkpoint.pt", "model.pt", ".lock"},
    ),
    "half a log": (
        {"        writer.writerows(log)": f"        if log: {KILL}"},
        {"log.csv", "checkpoint.pt", ".lock"},
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_it_writes(moment, start, main, tmp_path, whole):
    replacing, left = MOMENTS[moment]
    flags = [*RUNS["mini_vit"], "--out_dir", "mine"]
    process = start("mini_vit", *flags, replacing=SAVE_OFTEN | replacing)
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "mine"
    assert {path.name for path in folder.iterdir()} == left
    if "checkpoint.pt" in left:
        flags.append("--resume")  # without a checkpoint, the same command runs again
    main("mini_vit", *flags)
    assert_finished_alike(folder, whole("mini_vit")[0])


@pytest.mark.parametrize(
    "script", ["vit", pytest.param("mini_vit_augment", marks=pytest.mark.slow)], indirect=True
)
def test_torchrun_starts_again_when_a_process_dies(script, start, run, tmp_path):
    flags = [*RUNS[script], "--resume"]
    run(script, *flags, "--out_dir", "whole", launch=torchrun(2), replacing=SAVE_OFTEN)
    options = {"launch": torchrun(2, "--max_restarts=2"), "replacing": SAVE_OFTEN}
    process = start(script, *flags, "--out_dir", "mine", **options)
    wait_for((tmp_path / "mine" / "checkpoint.pt").exists, process)
    os.kill(random.choice(children(process.pid)), signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "going on with mine from step" in out
    assert_finished_alike(tmp_path / "mine", tmp_path / "whole")


def test_two_that_resume_one_run_at_once(start, tmp_path):
    """One of them trains; the other ends with one line. Nothing has been saved yet."""
    flags = [*ENDLESS, "--resume", "--out_dir", "mine"]
    runs = [start("mini_vit", *flags, "--seed", str(seed)) for seed in (1, 2)]
    wait_for(lambda: any(process.poll() for process in runs))
    first, second = sorted(runs, key=lambda process: process.poll() is None)
    _, err = first.communicate()
    assert first.returncode == 1
    assert err == "mini_vit.py: error: another process has begun the run in mine\n"
    time.sleep(0.5)
    assert second.poll() is None
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_two_new_runs_at_once_get_two_folders(start, tmp_path):
    for _ in range(2):
        process = start("mini_vit", *ENDLESS, "--out_dir", "mine")
    wait_for((tmp_path / "mine" / "log.csv").exists, process)
    wait_for((tmp_path / "mine-2" / "log.csv").exists, process)
