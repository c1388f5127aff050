"""Runs that survive: resuming, signals, several processes."""

import copy
import csv
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, TINY


def weights(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def assert_same(a, b, exact=True):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **({"rtol": 0, "atol": 0} if exact else {}), msg=name)


def rows(folder, drop=("images_per_second", "seconds")):
    return [
        {k: v for k, v in row.items() if k not in drop}
        for row in csv.DictReader((folder / "log.csv").read_text().splitlines())
    ]


def wait_for(condition, process, seconds=120):
    for _ in range(seconds * 50):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise TimeoutError


LONG = [*SHORT, "--max_iters", "120", "--eval_interval", "30"]


@pytest.fixture
def resumed_like_whole(script, main, tmp_path):
    """Resume the run in a folder; see that it ends as a run that nobody stopped, and kept nothing temporary."""

    def check(folder):
        main(script, *TINY[script], *LONG, "--out_dir", "whole")
        main(script, "--resume", "--out_dir", folder)
        assert_same(weights(tmp_path / folder), weights(tmp_path / "whole"))
        assert rows(tmp_path / folder) == rows(tmp_path / "whole")

    return check


def test_kill_9_and_resume_is_as_if_nothing_had_happened(script, start, tmp_path, resumed_like_whole):
    killed = start(script, *TINY[script], *LONG, "--out_dir", "killed")
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    wait_for(checkpoint.exists, killed)
    time.sleep(0.2)  # somewhere between two checkpoints
    killed.kill()
    killed.wait()
    assert torch.load(checkpoint, weights_only=True)["iter"] in (30, 60, 90)
    resumed_like_whole("killed")


@pytest.mark.parametrize(
    "script, number, status",
    [(script, signal.SIGINT, 130) for script in SCRIPTS] + [("mini_vit_augment", signal.SIGTERM, 143)],
    indirect=["script"],
)
def test_a_signal_saves_and_says_how_to_resume(script, number, status, start, tmp_path, resumed_like_whole):
    process = start(script, *TINY[script], *LONG, "--out_dir", "stopped", start_new_session=True)
    wait_for((tmp_path / "stopped" / "checkpoint.pt").exists, process)
    os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "--resume --out_dir stopped" in out.splitlines()[-1]
    assert err == ""
    resumed_like_whole("stopped")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's children")
def test_a_run_ends_when_the_system_kills_a_worker(start, tmp_path):
    """Python waits at its end for all workers; that error keeps the DataLoader from ending them."""
    process = start("mini_vit_augment", *TINY["mini_vit_augment"], *SHORT, "--max_iters", "99999", "--num_workers", "2")
    wait_for((tmp_path / "runs" / "mini_vit_augment" / "augmented.png").exists, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "mini_vit_augment.py: error: out of memory: lower batch_size"


def test_recorded_steps_train_as_the_usual_ones_do(monkeypatch):
    """CUDA graphs, pretended: recording leaves no trace; a replay runs the step on what the recorded batch holds."""
    import mini_vit

    config = mini_vit.Config(n_layers=2, n_head=4, d_head=14, n_embd=56, dropout=0.0)
    (model, optimizer), usual = (mini_vit.build(config, torch.device("cpu"), {}) for _ in range(2))
    recorded = mini_vit.step_function(model, optimizer, config, torch.device("cuda"), world=1)
    usual_step = mini_vit.step_function(*usual, config, torch.device("cpu"), world=1)
    replays = []

    @contextmanager
    def record(*_, **__):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        yield
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])

    class Graph:
        def __init__(self):
            self.depth = model.depth

        def replay(self):
            recorded.loss.copy_(recorded.step(*recorded.batch))
            replays.append(self.depth)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    for depth in [1] * 6 + [2] * 6:
        images, labels = torch.randint(0, 256, (8, 784), dtype=torch.uint8), torch.randint(0, 10, (8,))
        model.depth = usual[0].depth = depth
        for group in optimizer.param_groups + usual[1].param_groups:
            group["lr"].fill_(1e-3)
        assert recorded(images, labels) == usual_step(images, labels)
    assert replays == [1, 1, 1, 2, 2, 2]
    assert_same(model.state_dict(), usual[0].state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_resuming_on_a_gpu_is_exact(script, module, main, tmp_path, monkeypatch):
    """The steps before and after the stop are replayed from other CUDA graphs, or run one kernel after the other."""
    flags = [*TINY[script], *LONG, "--device", "cuda", "--dropout", "0.1"]
    main(script, *flags, "--out_dir", "whole")
    calls = itertools.count(1)
    with monkeypatch.context() as patched:
        patched.setattr(module, "agree", lambda loss, *_: (loss, signal.SIGTERM if next(calls) == 47 else 0))
        main(script, *flags, "--out_dir", "stopped", status=143)
    main(script, "--resume", "--out_dir", "stopped")
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def test_impatient_ctrl_c_stops_at_once_and_harms_nothing(start, tmp_path):
    flags = [*TINY["mini_vit_augment"], *SHORT, "--max_iters", "100000", "--eval_interval", "30"]
    process = start("mini_vit_augment", *flags, start_new_session=True)
    checkpoint = tmp_path / "runs" / "mini_vit_augment" / "checkpoint.pt"
    wait_for(checkpoint.exists, process)
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.01)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)
    assert err == ""
    assert torch.load(checkpoint, weights_only=True)["iter"] >= 30


def test_two_processes_compute_what_one_does(script, run, main, tmp_path):
    flags = [*TINY[script], *SHORT, "--dropout", "0", "--seed", "3"]
    # bfloat16 rounds sums over half a batch by other amounts; adversarial pixels whose gradient is all but 0 may flip
    flags += ["--precision", "float32", "--adversarial", "0"]
    if script == "mini_vit_augment":  # each process augments its share by itself, and leaves out its easy images
        flags += "--easy_share 0 --rotation 0 --scaling 0 --shear 0 --translation 0 --elastic 0".split()
    main(script, *flags, "--out_dir", "one")
    result = run(script, *flags, "--out_dir", "two", processes=2)
    assert result.stdout.count("parameters:") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)


@pytest.mark.parametrize(
    "script, flag",
    [
        ("mini_vit", "--adversarial=0.1"),
        ("mini_vit_concat", "--adversarial=0.1"),
        ("mini_vit_augment", "--adversarial=0.1"),
        ("mini_vit_augment", "--easy_share=0.75"),
    ],
)
def test_harder_images_raise_the_training_loss(script, flag, main, tmp_path):
    flags = [*TINY[script], *SHORT, "--learning_rate", "1e-9"]  # the losses are those of the first weights
    main(script, *flags, f"{flag.split('=')[0]}=0", "--out_dir", "all")
    main(script, *flags, flag, "--out_dir", "hard")
    for usual, hard in zip(rows(tmp_path / "all"), rows(tmp_path / "hard"), strict=True):
        assert float(hard["train_loss"]) > float(usual["train_loss"]) + 0.05


def test_resume_with_another_number_of_processes(run, main, start, tmp_path):
    flags = [*TINY["mini_vit"], *LONG, "--dropout", "0"]
    main("mini_vit", *flags, "--out_dir", "whole")
    process = start("mini_vit", *flags, "--out_dir", "stopped")
    wait_for((tmp_path / "stopped" / "checkpoint.pt").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    run("mini_vit", "--resume", "--out_dir", "stopped", processes=2)
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "stopped")[name], value, rtol=1e-2, atol=1e-3)


def test_a_process_that_dies_ends_the_run(start, tmp_path):
    flags = [*TINY["mini_vit"], *SHORT, "--max_iters", "100000", "--eval_interval", "20"]
    process = start("mini_vit", *flags, processes=2)
    wait_for((tmp_path / "runs" / "mini_vit" / "checkpoint.pt").exists, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_ctrl_c_stops_two_processes_too(start, run, tmp_path):
    flags = [*TINY["mini_vit"], *SHORT, "--max_iters", "100000", "--eval_interval", "20"]
    process = start("mini_vit", *flags, processes=2, start_new_session=True)
    checkpoint = tmp_path / "runs" / "mini_vit" / "checkpoint.pt"
    wait_for(checkpoint.exists, process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "--nproc_per_node=2" in out and "--resume" in out
    step = torch.load(checkpoint, weights_only=True)["iter"]
    run("mini_vit", "--resume", "--max_iters", str(step + 20), processes=2)


def test_a_seed_repeats_a_run_and_another_does_not(script, main, tmp_path):
    for out, seed in [("a", "1"), ("b", "1"), ("c", "2")]:
        main(script, *TINY[script], *SHORT, "--seed", seed, "--out_dir", out)
    assert_same(weights(tmp_path / "a", "model.pt"), weights(tmp_path / "b", "model.pt"))
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "a", "model.pt"), weights(tmp_path / "c", "model.pt"))


def test_a_second_run_does_not_overwrite_the_first(main, tmp_path):
    flags = [*TINY["mini_vit"], *SHORT]
    main("mini_vit", *flags)
    before = weights(tmp_path / "runs" / "mini_vit")
    refused = main("mini_vit", *flags, "--seed", "2", status=1)
    for way_out in ("--resume", "--overwrite", "--out_dir"):
        assert way_out in refused.stderr
    assert_same(weights(tmp_path / "runs" / "mini_vit"), before)
    finished = main("mini_vit", "--resume", status=1)
    assert "finished" in finished.stderr
    main("mini_vit", "--resume", "--max_iters", "32")  # longer
    assert [row["iter"] for row in rows(tmp_path / "runs" / "mini_vit")] == ["8", "16", "24", "32"]
    main("mini_vit", *flags, "--seed", "2", "--overwrite")
    assert len(rows(tmp_path / "runs" / "mini_vit")) == 3


def test_a_longer_run_keeps_the_blocks_it_has(main, monkeypatch):
    """With max_iters raised, depth_at falls; the network must not."""
    import mini_vit

    main("mini_vit", *TINY["mini_vit"], *SHORT)
    depths, original = {}, mini_vit.save
    monkeypatch.setattr(
        mini_vit, "save", lambda state, path: (depths.update({state["iter"]: state["depth"]}), original(state, path))
    )
    main("mini_vit", "--resume", "--max_iters", "48")
    assert depths == {32: 2, 40: 2, 48: 2}  # depth_at would be 1 at step 32


def test_a_bar_in_a_terminal_counts_blocks_also_of_a_longer_run(main, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for flags, steps in [([*TINY["mini_vit"], *SHORT], 24), (["--resume", "--max_iters", "48"], 48)]:
        bar = main("mini_vit", *flags).stderr.split("\r")[-1]
        assert bar.startswith("100%|") and f"step {steps}, loss" in bar


def test_a_run_under_way_is_evaluated_with_the_blocks_it_has(main, tmp_path, monkeypatch):
    """The second block joins at the last step, 25; the model of step 24 is evaluated without it."""
    import mini_vit

    flags = [*SHORT, "--max_iters", "25", "--eval_interval", "24", "--growth", "20", "--subset", "0"]
    original = mini_vit.save
    monkeypatch.setattr(mini_vit, "save", lambda state, path: original(state, path.with_name(f"{state['iter']}.pt")))
    main("mini_vit", *TINY["mini_vit"], *flags)
    run = tmp_path / "runs" / "mini_vit"
    for step, depth, row in [(24, 1, 0), (25, 2, 1)]:
        (run / f"{step}.pt").rename(run / "model.pt")
        assert torch.load(run / "model.pt", weights_only=True)["depth"] == depth
        loss = float(rows(run)[row]["test_loss"])
        assert f"test loss: {loss:.4f}" in main("mini_vit", "--eval").stdout


def test_three_scripts_at_once_in_a_fresh_clone(start, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(archive, raw)
    runs = [start(s, *TINY[s], *SHORT, "--data_dir", "data", env={"OMP_NUM_THREADS": "1"}) for s in SCRIPTS]
    for process in runs:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err


def test_long_intervals_are_saved_in_between(main, monkeypatch):
    """With no evaluation in sight, a checkpoint is still written."""
    import mini_vit

    monkeypatch.setattr(mini_vit, "SAVE_SECONDS", 0)
    steps = []
    original = mini_vit.save
    monkeypatch.setattr(mini_vit, "save", lambda state, path: (steps.append(state["iter"]), original(state, path)))
    main("mini_vit", *TINY["mini_vit"], *SHORT, "--max_iters", "25", "--eval_interval", "1000")
    assert [step for step, _ in itertools.groupby(steps)] == [10, 20, 25]


def test_saving_takes_little_of_the_time(main, monkeypatch, tmp_path):
    """Evaluations that follow soon are logged, but only the first and the last are saved."""
    import mini_vit

    steps, original = [], mini_vit.save
    monkeypatch.setattr(mini_vit, "save", lambda state, path: (steps.append(state["iter"]), original(state, path)))
    main("mini_vit", *TINY["mini_vit"], *SHORT, save_share=1e-9)
    assert [step for step, _ in itertools.groupby(steps)] == [8, 24]
    assert [row["iter"] for row in rows(tmp_path / "runs" / "mini_vit")] == ["8", "16", "24"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept():
    """Blocks of 64 MB, taken and freed in turns, cost page faults before, and none after."""
    code = """if True:
        import resource, torch, mini_vit
        def faults():
            for _ in range(2):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                for _ in range(10):
                    torch.ones(2**24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        before = faults()
        mini_vit.keep_freed_memory()
        print(before, faults())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10
