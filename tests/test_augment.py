"""mini_vit_augment.py: its images, and the worker processes that make them, or fail to."""

import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import SHORT, TINY, children, one_line, random_images, wait_for

import mini_vit_augment as script

RUN = [*TINY["mini_vit_augment"], *SHORT]
FOREVER = [*RUN, "--max_iters", "99999", "--num_workers", "2"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's children")


def test_augmentation_is_random_per_image_and_repeatable():
    config = script.Config()
    images, *_ = script.load_mnist(script.Config(subset=64))
    one_image = images[:1].expand(64, -1)
    first, again, other = (
        script.augment(one_image, config, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 64
    ink = script.augment(images, config, torch.Generator()).double().sum() / images.double().sum()
    assert 0.85 < ink < 1.15


def test_each_strength_does_its_own_part():
    nothing = {"rotation": 0, "scaling": 0, "shear": 0, "translation": 0, "elastic": 0}
    images, *_ = script.load_mnist(script.Config(subset=64))
    still = script.augment(images, script.Config(**nothing), torch.Generator())
    torch.testing.assert_close(still, images, rtol=0, atol=1)
    one_image = images[:1].expand(64, -1)
    scaling = script.Config(**nothing | {"scaling": 0.17})
    sized = script.augment(one_image, scaling, torch.Generator())
    sized = sized.view(-1, 28, 28).double()
    sized = sized / sized.sum((1, 2), keepdim=True)
    square = (torch.arange(28.0).double() - 13.5).square()
    spread = torch.stack([sized.sum(axis) @ square for axis in (1, 2)])  # of width and of height
    assert abs(torch.corrcoef(spread)[0, 1]) < 0.5
    assert (spread.std(1) > 0.1 * spread.mean(1)).all()
    translation = script.Config(**nothing | {"translation": 1.5})
    shifted = script.augment(images, translation, torch.Generator()).double()
    # 0.97; bilinear interpolation would blur to 0.90.
    assert shifted.square().sum() / images.double().square().sum() > 0.94


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_augments_as_a_cpu_does():
    images, *_ = script.load_mnist(script.Config(subset=300))
    on_cpu = script.augment_batch(images, 1, script.Config(), 0)
    on_gpu = script.augment_batch(images.cuda(), 1, script.Config(), 0)
    assert on_gpu.is_cuda
    difference = (on_gpu.cpu().int() - on_cpu.int()).abs()
    assert difference.max() <= 1  # a gray level, from rounding


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_depend_on_seed_and_step_alone(num_workers):
    images, labels = random_images(40)[0], torch.arange(40)

    def take(n, start=0, workers=0, seed=1):
        config = script.Config(batch_size=20, num_workers=workers, seed=seed, max_iters=6)
        batches = script.training_batches(images, labels, config, start, torch.device("cpu"))
        return [next(batches) for _ in range(n)]

    reference = take(6)
    for (a, b), (c, d) in zip(take(6, workers=num_workers), reference, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert torch.equal(take(1, start=4, workers=num_workers)[0][0], reference[4][0])
    assert not torch.equal(take(1, seed=2)[0][0], reference[0][0])
    flat = torch.cat([batch for batch, _ in reference])
    assert len(flat.unique(dim=0)) == 120  # every pass and every worker draws anew


def test_the_number_of_workers_may_change_on_resume(main, signal_at):
    calm = signal_at(script, 5)
    main("mini_vit_augment", *RUN, "--num_workers", "1", status=143)
    calm()
    main("mini_vit_augment", "--resume", "--num_workers", "0")


@linux
def test_usable_cores_are_those_of_this_process(monkeypatch):
    code = "import os, mini_vit_augment as s; os.sched_setaffinity(0, {0}); print(s.usable_cores())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == "1\n"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for limit, local, cores in [
        ("max 100000", "1", 8),
        ("250000 100000", "1", 3),
        ("max 100000", "4", 2),
        ("", "9", 1),
    ]:
        monkeypatch.setattr(script.Path, "read_text", lambda path, limit=limit: limit)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert script.usable_cores() == cores


def running(start, tmp_path, **options):
    """Return a run with two workers, once it trains."""
    process = start("mini_vit_augment", *FOREVER, start_new_session=True, **options)
    wait_for((tmp_path / "runs" / "mini_vit_augment" / "log.csv").exists, process)
    assert len(children(process.pid)) == 2
    return process


@pytest.mark.slow
@linux
def test_a_run_ends_when_the_system_kills_a_worker(start, tmp_path):
    process = running(start, tmp_path)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    one_line(subprocess.CompletedProcess((), 1, out, err), "num_workers", "DataLoader worker (pid")


@pytest.mark.slow
@linux
def test_a_pipe_that_is_closed_while_the_first_batch_is_slow(start, tmp_path):
    """It stops the run after the first step, not before: nothing could be saved then."""
    slow = {"step, share = key": "step, share = key\n        time.sleep(2.5)"}
    process = start("mini_vit_augment", *FOREVER, replacing=slow)
    process.stdout.close()
    assert process.wait(100) == 128 + signal.SIGPIPE
    assert "Traceback" not in process.stderr.read()
    checkpoint = tmp_path / "runs" / "mini_vit_augment" / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["iter"] >= 1


@pytest.mark.slow
@linux
@pytest.mark.parametrize("to", ["torchrun", "all processes"])
def test_a_process_whose_batches_are_slow_stops_with_the_others(to, start, tmp_path):
    """If the second left its step alone, the first could not save. Clusters signal workers, too."""
    slow = {"step, share = key": "step, share = key\n        time.sleep(2.5 * self.rank)"}
    flags = [*FOREVER, "--num_workers", "1"]
    options = {"processes": 2, "replacing": slow, "start_new_session": True}
    process = start("mini_vit_augment", *flags, **options)
    folder = tmp_path / "runs" / "mini_vit_augment"
    wait_for((folder / "log.csv").exists, process)
    time.sleep(1)
    processes = [process.pid]
    if to == "all processes":
        processes += children(process.pid)
        processes += [worker for pid in processes[1:] for worker in children(pid)]
        assert len(processes) == 5
    for pid in reversed(processes):  # workers first
        os.kill(pid, signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert (folder / "checkpoint.pt").exists(), err
    assert "stopped; to continue: torchrun" in out


def test_a_signal_while_a_batch_is_slow_saves_no_ruined_weights(main, monkeypatch, tmp_path):
    """It ends the batches, here after three, between the steps that look at the loss."""
    batches = script.training_batches
    monkeypatch.setattr(script, "training_batches", lambda *args: islice(batches(*args), 3))
    flags = ["--num_workers", "0", "--learning_rate", "1e30"]
    result = main("mini_vit_augment", *RUN, *flags, status=1)
    one_line(result, "not finite", "lower learning_rate")
    assert not (tmp_path / "runs" / "mini_vit_augment" / "checkpoint.pt").exists()


@pytest.mark.slow
@linux
def test_a_worker_s_bug_ends_the_run(run):
    """At its exit, Python waits for the workers, which ignore the SIGTERM it sends them."""
    bug = {"step, share = key": "raise ValueError('a bug')"}
    assert "a bug" in run("mini_vit_augment", *RUN, status=1, replacing=bug).stderr


@linux
def test_workers_end_with_a_training_process_that_is_killed(start, tmp_path):
    process = running(start, tmp_path)
    workers = children(process.pid)
    process.kill()
    process.wait()
    time.sleep(1)
    states = [Path(f"/proc/{pid}/stat") for pid in workers if os.path.exists(f"/proc/{pid}")]
    # Gone, or zombies that nobody has reaped.
    assert all(state.read_text().split()[2] == "Z" for state in states)


@pytest.mark.slow
@linux
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 1)])
def test_data_that_never_comes_ends_the_run(number, status, start, tmp_path):
    """A signal ends the waiting, and loses nothing; without one, 60 seconds do (here 3)."""
    process = running(start, tmp_path, replacing={} if number else {"range(60)": "range(3)"})
    for pid in children(process.pid):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2)
    if number:
        process.send_signal(number)
    out, err = process.communicate(timeout=90)
    assert process.returncode == status, err
    if number:
        assert "--resume" in out.splitlines()[-1]
        assert (tmp_path / "runs" / "mini_vit_augment" / "checkpoint.pt").exists()
    else:
        one_line(subprocess.CompletedProcess((), 1, out, err), "num_workers")


@linux
@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or os.getuid() != 0, reason="only root may mount a /dev/shm"
)
@pytest.mark.parametrize("megabytes, workers", [(64, 16), (12, 2), (1, 2)])
def test_a_container_with_little_shared_memory(megabytes, workers, tmp_path):
    """Docker gives 64 MB; a batch is 3. Where they don't fit, one line says so."""
    flags = ["--subset", "0", "--batch_size", "4096", "--max_iters", "3"]
    flags += ["--num_workers", str(workers)]
    command = f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm && cd {tmp_path} && exec "
    command += " ".join([sys.executable, script.__file__, *RUN, *flags])
    command = ["unshare", "-m", "bash", "-c", command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if "unshare failed" in result.stderr or "permission denied" in result.stderr:
        pytest.skip("this machine forbids it")
    if megabytes > 1:
        assert re.search(r"^accuracy: ", result.stdout, re.MULTILINE), result.stderr
    else:
        one_line(result, "/dev/shm")


@pytest.mark.slow
@pytest.mark.parametrize("limit, status", [(64, 0), (20, 1)])
def test_few_open_files(limit, status, run):
    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    flags = [*RUN, "--num_workers", "4"]
    result = run("mini_vit_augment", *flags, status=status, preexec_fn=few_files)
    if status:  # torch may tell of its own clean-up, too
        (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
        assert "ulimit -n" in line and "Too many open files" in line


@pytest.mark.slow
def test_a_worker_s_bug_keeps_its_traceback_and_its_lack_of_memory_does_not(main, monkeypatch):
    def raising(error):
        monkeypatch.setattr(script, "augment", lambda *_: (_ for _ in ()).throw(error))

    for error in (ValueError("a bug"), RuntimeError("a bug")):
        raising(error)
        with pytest.raises(type(error), match="a bug"):
            main("mini_vit_augment", *RUN, "--num_workers", "1")
    raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"))
    result = main("mini_vit_augment", *RUN, "--num_workers", "1", status=1)
    one_line(result, "out of memory: start again with a lower batch_size")
    gc.collect()  # DataLoader's iterators end their workers now, not when Python is shutting down
