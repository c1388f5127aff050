"""Runs that survive: resuming, signals, several processes, folders that say what they hold."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import (
    LONG,
    ROOT,
    SAVE_OFTEN,
    SCRIPTS,
    SHORT,
    STILL,
    TINY,
    assert_same,
    children,
    free_port,
    one_line,
    rows,
    wait_for,
    weights,
)

import mini_vit

RUN = [*TINY["mini_vit"], *SHORT]


def saved_steps(module, monkeypatch) -> list[int]:
    """Return a list that gets the step of every checkpoint that a script writes from now on."""
    steps = []
    original = module.replacing

    @contextmanager
    def replacing(path):
        with original(path) as file:
            yield file
        if path.name == "checkpoint.pt":
            steps.append(torch.load(path, weights_only=True)["iter"])

    monkeypatch.setattr(module, "replacing", replacing)
    return steps


def assert_finished_alike(folder, other) -> None:
    """See that two runs ended with the same weights and log, and left nothing but those."""
    assert_same(weights(folder), weights(other))
    assert rows(folder) == rows(other)
    assert {path.name for path in folder.iterdir()} == {"model.pt", "log.csv"}


@pytest.fixture
def whole(script, main, tmp_path_factory, cache={}):  # noqa: B006
    """The folder of a run that nobody stopped; one for all tests."""
    if script not in cache:
        folder = tmp_path_factory.mktemp(script) / "whole"
        main(script, *TINY[script], *LONG, "--out_dir", str(folder))
        cache[script] = folder
    return cache[script]


@pytest.mark.slow
def test_kill_9_and_resume_is_as_if_nothing_had_happened(script, start, main, tmp_path, whole):
    killed = start(script, *TINY[script], *LONG, "--out_dir", "killed", replacing=SAVE_OFTEN)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    wait_for(checkpoint.exists, killed)
    killed.kill()
    killed.wait()
    assert torch.load(checkpoint, weights_only=True)["iter"] < 60
    main(script, "--resume", "--out_dir", "killed")
    for leftover in (tmp_path / "killed").glob("*.tmp"):  # of the moment in which it was killed
        leftover.unlink()
    assert_finished_alike(tmp_path / "killed", whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, number, status",
    [(script, signal.SIGINT, 130) for script in SCRIPTS]
    + [("mini_vit_augment", signal.SIGTERM, 143)],
    indirect=["script"],
)
def test_a_signal_saves_and_says_how_to_resume(
    script, number, status, start, main, tmp_path, whole
):
    process = start(script, *TINY[script], *LONG, "--out_dir", "stopped", start_new_session=True)
    wait_for((tmp_path / "stopped" / "log.csv").exists, process)
    os.killpg(process.pid, number)  # as a terminal does: to workers, too, if they were in its group
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert f"{script}.py --resume --out_dir stopped" in out.splitlines()[-1]
    assert err == ""
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"checkpoint.pt", "log.csv"}
    main(script, "--resume", "--out_dir", "stopped")
    assert_finished_alike(tmp_path / "stopped", whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_resuming_on_a_gpu_is_exact(script, module, main, tmp_path, signal_at):
    """Steps before and after the stop are replayed from other CUDA graphs, or run as usual."""
    flags = [*TINY[script], *LONG, "--device", "cuda", "--dropout", "0.1"]
    main(script, *flags, "--out_dir", "whole")
    calm = signal_at(module, 47)
    main(script, *flags, "--out_dir", "stopped", status=143)
    calm()
    main(script, "--resume", "--out_dir", "stopped")
    assert_finished_alike(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_impatient_ctrl_c_stops_at_once_and_harms_nothing(start, tmp_path):
    flags = [*TINY["mini_vit_augment"], *SHORT, "--max_iters", "100000", "--eval_interval", "30"]
    process = start("mini_vit_augment", *flags, replacing=SAVE_OFTEN, start_new_session=True)
    checkpoint = tmp_path / "runs" / "mini_vit_augment" / "checkpoint.pt"
    wait_for(checkpoint.exists, process)
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130)
    assert err == ""
    assert torch.load(checkpoint, weights_only=True)["iter"] >= 10


@pytest.mark.slow
def test_two_processes_compute_what_one_does(script, run, main, tmp_path):
    flags = [*TINY[script], *SHORT, "--dropout", "0", "--seed", "3"]
    # bfloat16 rounds sums over half a batch by other amounts, and adversarial pixels whose gradient
    # is all but 0 may flip.
    flags += ["--precision", "float32", "--adversarial", "0"]
    if script in ("mini_vit_augment", "vit"):  # each process augments its share by itself
        flags += STILL
    if script == "mini_vit_augment":  # and leaves out its easy images
        flags += ["--easy_share", "0"]
    main(script, *flags, "--out_dir", "one")
    result = run(script, *flags, "--out_dir", "two", processes=2)
    assert result.stdout.count("parameters:") == 1
    assert "find_unused_parameters" not in result.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in [name for name in one if name.endswith("qkv.bias")]:
        for model in (one, two):  # a bias of the keys cancels out in the softmax
            q, _, v = model[name].chunk(3)
            model[name] = torch.cat([q, v])
    assert_same(one, two, rtol=1e-3, atol=2e-5)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)


@pytest.mark.slow
def test_two_agents_train_together(start, tmp_path):
    """Two nodes, pretended on one machine: the second writes nothing."""
    agents = []
    port = free_port()
    for rank in (0, 1):
        launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
        launch += [f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        (folder := tmp_path / f"node{rank}").mkdir()
        command = [sys.executable, *launch, str(ROOT / "mini_vit.py"), *RUN]
        agents.append(subprocess.Popen(command, cwd=folder, stdout=-1, stderr=-1, text=True))
    (out, err), (quiet, _) = (agent.communicate(timeout=200) for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], err
    assert "2 processes" in out and "accuracy: " in out and "accuracy" not in quiet
    assert (tmp_path / "node0" / "runs" / "mini_vit" / "model.pt").exists()
    assert not list((tmp_path / "node1").iterdir())


@pytest.mark.parametrize(
    "world, local, launch",
    [
        (1, "1", "python mini_vit.py --resume"),
        (4, "4", "torchrun --standalone --nproc_per_node=4 mini_vit.py --resume"),
        (4, "2", "on every node, torchrun with its flags as before, then mini_vit.py --resume"),
    ],
)
def test_the_command_that_resumes_a_run(world, local, launch, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    command = mini_vit.resume_command(mini_vit.Config(out_dir="runs/my run"), world)
    assert command == f"{launch} --out_dir 'runs/my run'"


@pytest.mark.parametrize(
    "script, flag",
    [(script, "--adversarial=0.1") for script in SCRIPTS]
    + [("mini_vit_augment", "--easy_share=0.75"), ("vit", "--easy_share=0.75")],
)
def test_harder_images_raise_the_training_loss(script, flag, main, tmp_path):
    flags = [
        *TINY[script],
        *SHORT,
        "--learning_rate",
        "1e-9",
    ]  # the losses are those of the first weights
    main(script, *flags, f"{flag.split('=')[0]}=0", "--out_dir", "all")
    main(script, *flags, flag, "--out_dir", "hard")
    for usual, hard in zip(rows(tmp_path / "all"), rows(tmp_path / "hard"), strict=True):
        assert float(hard["train_loss"]) > float(usual["train_loss"]) + 0.05


@pytest.mark.slow
def test_ctrl_c_stops_two_processes_and_one_goes_on(start, main, tmp_path):
    flags = [*TINY["mini_vit"], *LONG, "--dropout", "0", "--learning_rate", "5e-4"]
    main("mini_vit", *flags, "--out_dir", "whole")
    process = start("mini_vit", *flags, "--out_dir", "stopped", processes=2, start_new_session=True)
    wait_for((tmp_path / "stopped" / "log.csv").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert "--nproc_per_node=2" in out and "--resume" in out
    main("mini_vit", "--resume", "--out_dir", "stopped")
    assert_same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(start, tmp_path):
    process = start("mini_vit", *RUN, "--max_iters", "100000", processes=2)
    wait_for((tmp_path / "runs" / "mini_vit" / "log.csv").exists, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_a_seed_repeats_a_run_and_another_does_not(script, main, tmp_path):
    for out, seed in [("a", "1"), ("b", "1"), ("c", "2")]:
        main(script, *TINY[script], *SHORT, "--seed", seed, "--out_dir", out)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_run_again_goes_to_the_next_free_folder(main, tmp_path):
    main("mini_vit", *RUN)
    before = weights(tmp_path / "runs" / "mini_vit")
    for n in (2, 3):
        again = main("mini_vit", *RUN, "--seed", str(n))
        assert "runs/mini_vit holds a run" in again.stdout
        assert f"python look.py runs/mini_vit-{n}" in again.stdout
    heads = [weights(folder)["head.weight"] for folder in (tmp_path / "runs").iterdir()]
    assert len({float(head.double().sum()) for head in heads}) == 3
    assert_same(weights(tmp_path / "runs" / "mini_vit"), before)


def test_a_named_folder_that_holds_a_run_is_refused(main, signal_at, tmp_path):
    main("mini_vit", *RUN, "--out_dir", "mine")
    before = weights(tmp_path / "mine")
    again = main("mini_vit", *RUN, "--seed", "2", "--out_dir", "mine", status=1)
    one_line(again, "mine holds a run: choose another --out_dir")
    assert_same(weights(tmp_path / "mine"), before)
    calm = signal_at(mini_vit, 5)
    main("mini_vit", *RUN, "--out_dir", "stopped", status=143)
    calm()
    again = main("mini_vit", *RUN, "--out_dir", "stopped", status=1)
    one_line(again, "stopped holds a run: add --resume, or choose another --out_dir")


@pytest.mark.parametrize("left", ["model.pt", "checkpoint.pt"])
def test_a_model_that_was_copied_without_its_log_is_not_overwritten(left, main, tmp_path):
    (tmp_path / "runs" / "mini_vit").mkdir(parents=True)
    (tmp_path / "runs" / "mini_vit" / left).write_text("precious")
    assert "runs/mini_vit holds a run" in main("mini_vit", *RUN).stdout
    assert (tmp_path / "runs" / "mini_vit" / left).read_text() == "precious"
    assert (tmp_path / "runs" / "mini_vit-2" / "model.pt").exists()


def test_resume_auto_claims_its_folder_after_the_first_step(main, signal_at, tmp_path):
    """Before the first evaluation, too, nobody else may take it."""
    signal_at(mini_vit, 5)
    main("mini_vit", *RUN, "--eval_interval", "20", "--resume", "auto", status=143)
    assert {path.name for path in (tmp_path / "runs" / "mini_vit").iterdir()} == {
        "checkpoint.pt",
        "log.csv",
    }


def test_resume_auto_refuses_another_seed_when_the_run_is_finished_too(main):
    main("mini_vit", *RUN, "--resume", "auto")
    assert "nothing to do" in main("mini_vit", *RUN, "--resume", "auto").stdout
    again = main("mini_vit", *RUN, "--resume", "auto", "--seed", "2", status=1)
    one_line(again, "--seed can't change", "model.pt has 1")


def test_resume_guesses_nothing(main, signal_at, tmp_path):
    """It continues the run in out_dir, whatever the dates of files say, and hints at others."""
    for out_dir in ("runs/mini_vit", "runs/mini_vit-2"):
        calm = signal_at(mini_vit, 5)
        main("mini_vit", *RUN, status=143)
        calm()
        path = tmp_path / out_dir / "checkpoint.pt"
        assert torch.load(path, weights_only=True)["config"]["out_dir"] == out_dir
    result = main("mini_vit", "--resume")  # not the newer runs/mini_vit-2
    assert "resuming runs/mini_vit from step 5" in result.stdout
    left = {path.parent.name for path in (tmp_path / "runs").glob("*/checkpoint.pt")}
    assert left == {"mini_vit-2"}
    one_line(main("mini_vit", "--resume", status=1), "finished", "runs/mini_vit-2")
    main("mini_vit", "--resume", "--out_dir", "runs/mini_vit-2")
    one_line(main("mini_vit", "--resume", status=1), "finished")
    one_line(main("mini_vit", "--resume", "--out_dir", "x", status=1), "x/checkpoint.pt")


def test_flags_are_checked_together_with_the_checkpoint_s_settings(main, signal_at):
    signal_at(mini_vit, 5)
    main("mini_vit", *RUN, status=143)
    main("mini_vit", "--resume", "--n_head", "4", "--max_iters", "4", status=1)
    result = main("mini_vit", "--resume", "--n_head", "5", status=1)
    one_line(result, "n_head 5 * d_head 14 must be n_embd 56")


def test_resume_auto_starts_continues_and_ends(main, signal_at, tmp_path):
    """The same command, again and again, as a cluster that preempts jobs runs it."""
    command = ["mini_vit", *RUN, "--resume", "auto"]
    calm = signal_at(mini_vit, 5)
    main(*command, status=143)
    calm()
    assert "from step 5" in main(*command).stdout
    assert "finished" in main(*command).stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mini_vit"]


def test_resume_auto_starts_again_what_was_killed_before_its_first_checkpoint(main, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "log.csv").touch()
    main("mini_vit", *RUN, "--resume", "auto", "--out_dir", "mine")
    assert len(rows(folder)) == 3


def test_a_longer_run_keeps_the_blocks_it_has(main, monkeypatch, signal_at, tmp_path):
    """With max_iters raised, the schedule asks for fewer blocks; the network must keep them."""
    calm = signal_at(mini_vit, 24)
    main("mini_vit", *RUN, "--max_iters", "25", "--growth", "0.5", status=143)
    calm()
    state = torch.load(tmp_path / "runs" / "mini_vit" / "checkpoint.pt", weights_only=True)
    assert (state["iter"], state["depth"]) == (24, 2)
    monkeypatch.setattr(mini_vit, "blocks_in_use", lambda step, config: 1)
    main("mini_vit", "--resume", "--max_iters", "48")
    model = torch.load(tmp_path / "runs" / "mini_vit" / "model.pt", weights_only=True)
    assert model["depth"] == 2


def test_a_bar_in_a_terminal_shows_step_and_loss(main, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = main("mini_vit", *RUN).stderr.split("\r")[-1]
    assert bar.startswith("100%|") and "24/24" in bar and "loss" in bar


@pytest.mark.slow
def test_three_scripts_at_once_in_a_fresh_clone(start, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(archive, raw)
    runs = [start(s, *TINY[s], *SHORT, "--data_dir", "data") for s in SCRIPTS]
    for process in runs:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    assert not list(raw.glob("*-ubyte"))  # nothing is unpacked there


def test_a_checkpoint_follows_after_so_many_seconds(main, monkeypatch):
    """Even between evaluations, at steps that check the loss; the end of a run writes none."""
    steps = saved_steps(mini_vit, monkeypatch)
    flags = [*RUN, "--max_iters", "25", "--eval_interval", "1000"]
    main("mini_vit", *flags, save_seconds=0)
    assert steps == [10, 20]
    steps.clear()
    main("mini_vit", *RUN)
    assert steps == []


def test_columns_of_the_log_may_change_before_a_run_is_resumed(module, tmp_path):
    log = [{"iter": 1, "old": 2}, {"iter": 3, "new": 4}]
    module.write_log(log, tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == "iter,old,new\n1,2,\n3,,4\n"


@pytest.mark.slow
def test_each_line_is_in_the_file_when_it_is_printed(start, tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        process = start("mini_vit", *RUN, "--max_iters", "100000", stdout=log)
    wait_for(lambda: "step 8: train loss" in (tmp_path / "log.txt").read_text(), process)
    process.kill()


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
        mini_vit.set_up(mini_vit.Config(device="cpu"))
        print(before, faults())"""
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    before, after = map(int, output.split())
    assert after < before / 10


def test_each_pass_takes_each_image_once(module):
    config = module.Config(batch_size=30, max_iters=20)
    batches = [module.batch_indices(step, 100, config) for step in range(1, 21)]
    indices = torch.cat(batches)
    assert {len(batch) for batch in batches} == {30}
    for one_pass in indices.split(100):
        assert sorted(one_pass.tolist()) == list(range(100))
    assert not torch.equal(indices[:100], indices[100:200])
    large = module.Config(batch_size=250, max_iters=20)
    assert torch.equal(module.batch_indices(2, 100, large), indices[250:500])


def test_importing_a_script_changes_nothing(script):
    """look.py imports it: no signal handler, no folder, no output."""
    before = signal.getsignal(signal.SIGINT)
    importlib.reload(importlib.import_module(script))
    assert signal.getsignal(signal.SIGINT) is before
