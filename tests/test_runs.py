"""Runs: going on with them, their folders, what they print and write, several processes."""

import importlib
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    SAVE_OFTEN,
    SHORT,
    STILL,
    TINY,
    assert_finished_alike,
    assert_same,
    changed_copy,
    load,
    one_line,
    rows,
    torchrun,
    weights,
)

import mini_vit

RUN = [*TINY["mini_vit"], *SHORT]


# ---------------------------------------------------------------- going on
def test_the_same_command_starts_goes_on_and_ends(main, interrupt, tmp_path):
    """As a cluster runs it, again and again."""
    command = ["mini_vit", *RUN, "--resume"]
    interrupt(*command)
    result = main(*command)
    assert "going on with runs/mini_vit from step 8\n" in result.stdout
    assert main(*command).stdout == "runs/mini_vit holds a finished run: there is nothing to do\n"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mini_vit"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_going_on_is_exact_on_a_gpu(script, main, interrupt, tmp_path):
    """Steps before and after the stop are replayed from other CUDA graphs, or run as usual."""
    flags = [*TINY[script], *SHORT, "--device", "cuda", "--dropout", "0.1"]
    interrupt(script, *flags, "--out_dir", "stopped")
    main(script, "--resume", "--out_dir", "stopped")
    main(script, *flags, "--out_dir", "whole")
    assert_finished_alike(tmp_path / "stopped", tmp_path / "whole")


def test_a_command_that_goes_on_is_printed_at_the_first_step(main):
    _, parameters, third, *_ = main("mini_vit", *RUN, "--out_dir", "my run").stdout.splitlines()
    assert parameters.startswith("parameters: ")
    assert third.endswith("the same command with --resume --out_dir 'my run'")


def test_flags_win_and_are_named_where_they_differ(main, interrupt, tmp_path):
    interrupt("mini_vit", *RUN)
    flags = ["--learning_rate", "0.5", "--batch_size", "64", "--max_iters", "30"]
    text = main("mini_vit", "--resume", *flags).stdout.splitlines()[0]
    changed = "learning_rate 0.5 (so far 0.001), max_iters 30 (so far 24)"
    assert sorted(text.partition(", ")[2].split(", ")) == sorted(changed.split(", "))
    state = load(tmp_path / "runs" / "mini_vit" / "model.pt")
    assert (state["iter"], state["config"]["learning_rate"]) == (30, 0.5)


@pytest.mark.parametrize(
    "flags, status, words",
    [
        (["--seed", "2"], 1, "--seed can't change on --resume: the run in runs/mini_vit has 1"),
        (["--n_head", "7", "--d_head", "8"], 1, "--n_head can't change"),
        (["--n_head", "5"], 2, "n_head 5 * d_head 14 must be n_embd 56"),
        (["--max_iters", "8"], 1, "already at step 8: raise --max_iters"),
        (["--n_layers", "3"], 1, "doesn't fit the Transformer in mini_vit.py"),
        (["--n_layers", "3"], 1, '"blocks.2.ln1.weight"'),
    ],
)
def test_what_can_t_change_is_one_line(flags, status, words, main, interrupt):
    interrupt("mini_vit", *RUN)
    one_line(main("mini_vit", "--resume", *flags, status=status), words)


def test_weights_that_do_not_fit_are_named(main, interrupt, monkeypatch):
    def wider(config):
        return torch.nn.Sequential(torch.nn.Linear(config.n_embd, 200))

    interrupt("mini_vit", *RUN)
    monkeypatch.setattr(mini_vit, "FeedForward", wider)
    one_line(main("mini_vit", "--resume", status=1), "blocks.0.ff.0.weight")


def test_a_checkpoint_without_a_key_is_one_line(main, interrupt, tmp_path):
    interrupt("mini_vit", *RUN)
    path = tmp_path / "runs" / "mini_vit" / "checkpoint.pt"
    state = load(path)
    del state["optimizer"]
    torch.save(state, path)
    one_line(main("mini_vit", "--resume", status=1), "runs/mini_vit doesn't fit", "optimizer")


class Malice:
    def __reduce__(self):
        return exec, ("open('harm', 'w').close()",)


CHECKPOINTS = {
    "empty": b"",
    "truncated": None,
    "of another script": {"script": "vit", "config": {}, "iter": 1},
    "of another version": {"script": "mini_vit", "config": {"no_field": 2}, "iter": 1},
    "malicious": {"script": "mini_vit", "config": Malice()},
    "not a dictionary": [1, 2, 3],
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_is_none(case, main, interrupt, tmp_path):
    interrupt("mini_vit", *RUN)
    path = tmp_path / "runs" / "mini_vit" / "checkpoint.pt"
    content = CHECKPOINTS[case]
    if case == "truncated":
        content = path.read_bytes()[:20_000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    one_line(main("mini_vit", "--resume", status=1), "runs/mini_vit/checkpoint.pt is damaged")
    assert not (tmp_path / "harm").exists()


def test_a_longer_run_keeps_the_blocks_it_has(main, interrupt, monkeypatch, tmp_path):
    """With max_iters raised, the schedule asks for fewer blocks; the network must keep them."""
    interrupt("mini_vit", *RUN, "--max_iters", "12", "--growth", "0.5")
    assert load(tmp_path / "runs" / "mini_vit" / "checkpoint.pt")["depth"] == 2
    monkeypatch.setattr(mini_vit, "blocks_in_use", lambda step, config: 1)
    main("mini_vit", "--resume", "--max_iters", "24")
    assert load(tmp_path / "runs" / "mini_vit" / "model.pt")["depth"] == 2


def test_a_project_is_moved_and_its_config_grows(tmp_path):
    """The run that was stopped in the old place goes on in the new one, with the data there."""
    fields = {
        "smoothing: float = 0.5": "--smoothing=0.1",
        "beam: int = 7  # of 100 %, or so": "--beam=-3",
        "tied: bool = False": "--tied",
        "gated: bool = True  # gates": "--no-gated",
        'note: str = "none"': "--note=mine",
        'norm: Literal["layer", "rms"] = "layer"': "--norm=rms",
    }
    lines = "".join(f"    {field}\n" for field in fields)
    names = [field.split(":")[0] for field in fields]
    old, new = tmp_path / "old", tmp_path / "new"
    stop = {"            trainer.step = step\n": "            if step == 12: raise SystemExit(3)\n"}
    stop["            trainer.step = step\n"] += "            trainer.step = step\n"
    changed_copy("mini_vit", old, SAVE_OFTEN | stop)
    (old / "data").symlink_to(ROOT / "data")

    def run(*flags, cwd, status=0):
        command = [sys.executable, "mini_vit.py", *flags]
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert result.returncode == status, result.stderr
        return result.stdout

    run(*RUN, cwd=old, status=3)
    old.rename(new)
    grown = {"    seed: int = 1": f"{lines}    seed: int = 1"}
    grown["    device, rank, world = set_up"] = (
        f"    say(repr([getattr(config, name) for name in {names}]))\n"
        "    device, rank, world = set_up"
    )
    source = changed_copy("mini_vit", new, grown).read_text()
    assert "[0.5, 7, False, True, 'none', 'layer']" in run("--resume", cwd=new)
    state = load(new / "runs" / "mini_vit" / "model.pt")
    assert state["source"] == source
    assert "data_dir" not in state["config"]
    # A new run: the fields are flags, and saved.
    out = run(*RUN, *fields.values(), "--out_dir", "other", cwd=new)
    assert "[0.1, -3, True, False, 'mine', 'rms']" in out
    config = load(new / "other" / "model.pt")["config"]
    assert [config[name] for name in names] == [0.1, -3, True, False, "mine", "rms"]


def test_a_data_dir_that_is_given_is_saved(main, tmp_path):
    (tmp_path / "elsewhere").symlink_to(ROOT / "data")
    main("mini_vit", *RUN, "--data_dir", "elsewhere")
    assert load(tmp_path / "runs" / "mini_vit" / "model.pt")["config"]["data_dir"] == "elsewhere"


# ---------------------------------------------------------------- folders
def test_run_again_goes_to_the_next_free_folder(main, tmp_path):
    main("mini_vit", *RUN, "--out_dir", "mine")
    before = weights(tmp_path / "mine")
    for n in (2, 3):
        again = main("mini_vit", *RUN, "--seed", str(n), "--out_dir", "mine").stdout
        assert f"mine holds another run; this one goes into mine-{n}\n" in again
        assert f"python look.py mine-{n}\n" in again
    heads = [weights(folder)["head.weight"] for folder in tmp_path.iterdir()]
    assert len({float(head.double().sum()) for head in heads}) == 3
    assert_same(weights(tmp_path / "mine"), before)


@pytest.mark.parametrize("left", ["model.pt", "checkpoint.pt"])
def test_weights_that_were_copied_without_their_log_are_not_overwritten(left, main, tmp_path):
    folder = tmp_path / "runs" / "mini_vit"
    folder.mkdir(parents=True)
    (folder / left).write_text("precious")
    main("mini_vit", *RUN)
    assert [path.name for path in folder.iterdir()] == [left]
    assert (tmp_path / "runs" / "mini_vit-2" / "model.pt").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_after_a_run_that_failed_the_same_command_runs_again(resume, main, tmp_path):
    flags = [*RUN, *resume, "--learning_rate", "1e30"]
    for _ in range(2):
        one_line(main("mini_vit", *flags, status=1), "not finite", "lower learning_rate")
    main("mini_vit", *RUN, *resume)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mini_vit"]
    assert len(rows(tmp_path / "runs" / "mini_vit")) == 4


def test_a_run_that_another_process_trains_is_left_alone(start, main, interrupt, monkeypatch):
    """A second --resume waits, for the workers of a killed process, and ends with one line."""
    interrupt("mini_vit", *RUN)
    endless = ["--resume", "--max_iters", "1000000"]
    process = start("mini_vit", *endless)
    assert process.stdout.readline().startswith("going on with runs/mini_vit from step 8")
    original = mini_vit.lock_folder
    monkeypatch.setattr(mini_vit, "lock_folder", lambda folder, seconds: original(folder, 0.1))
    result = main("mini_vit", *endless, status=1)
    one_line(result, "another process is training in runs/mini_vit")


# ---------------------------------------------------------------- what they print and write
def test_evaluations_come_at_step_20_at_intervals_and_at_the_end(main, tmp_path):
    result = main("mini_vit", *RUN, "--max_iters", "35", "--eval_interval", "15")
    steps = ["15", "20", "30", "35"]
    assert [row["iter"] for row in rows(tmp_path / "runs" / "mini_vit")] == steps
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == [f"step {step}" for step in steps]


def test_the_log_averages_the_loss_over_the_steps_since_the_last_row(main, monkeypatch, tmp_path):
    original = mini_vit.Trainer.update
    losses = []

    def update(*args):
        losses.append(original(*args))
        return losses[-1]

    monkeypatch.setattr(mini_vit.Trainer, "update", update)
    main("mini_vit", *RUN)
    for row, (first, last) in zip(
        rows(tmp_path / "runs" / "mini_vit"), [(0, 8), (8, 16), (16, 20), (20, 24)], strict=True
    ):
        assert float(row["train_loss"]) == pytest.approx(sum(losses[first:last]) / (last - first))


def test_checkpoints_take_a_fiftieth_of_the_time(main, monkeypatch):
    """A save lasts two seconds by this clock, and a step one."""
    saved = []
    now = 0

    def passes(seconds):
        nonlocal now
        now += seconds
        return now

    def save(trainer, name):
        saved.append((name, trainer.step))
        passes(2)

    def update(*args):
        passes(1)
        return torch.tensor(0.5)

    monkeypatch.setattr(mini_vit.time, "perf_counter", lambda: now)
    monkeypatch.setattr(mini_vit, "save", save)
    monkeypatch.setattr(mini_vit.Trainer, "update", update)
    main("mini_vit", *RUN, "--max_iters", "300", "--eval_interval", "300")
    checkpoints = [step for name, step in saved if name == "checkpoint.pt"]
    assert checkpoints == [70, 180, 290]  # after 60 seconds, then every 100
    assert saved[-1] == ("model.pt", 300)


def test_a_bar_in_a_terminal_shows_step_and_loss(main, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = main("mini_vit", *RUN).stderr.split("\r")[-1]
    assert bar.startswith("100%|") and "24/24" in bar and "loss" in bar


def test_columns_of_the_log_may_change_before_a_run_goes_on(tmp_path):
    mini_vit.write_log([{"iter": 1, "old": 2}, {"iter": 3, "new": 4}], tmp_path)
    assert (tmp_path / "log.csv").read_bytes() == b"iter,old,new\n1,2,\n3,,4\n"


@pytest.mark.parametrize("script", ["mini_vit", "mini_vit_augment", "vit"], indirect=True)
def test_a_seed_repeats_a_run_and_another_does_not(script, main, tmp_path):
    for out, seed in [("a", "1"), ("b", "1"), ("c", "2")]:
        main(script, *TINY[script], *SHORT, "--max_iters=4", "--seed", seed, "--out_dir", out)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    "script, flag",
    [
        ("mini_vit", "--adversarial=0.1"),
        ("mini_vit_augment", "--easy_share=0.75"),
        ("vit", "--easy_share=0.75"),
        ("vit", "--adversarial=0.1"),
    ],
)
def test_harder_images_raise_the_training_loss(script, flag, main, tmp_path):
    # The losses are those of the first weights.
    flags = [*TINY[script], *SHORT, "--learning_rate=1e-9", "--max_iters=8"]
    main(script, *flags, f"{flag.split('=')[0]}=0", "--out_dir", "all")
    main(script, *flags, flag, "--out_dir", "hard")
    for usual, hard in zip(rows(tmp_path / "all"), rows(tmp_path / "hard"), strict=True):
        assert float(hard["train_loss"]) > float(usual["train_loss"]) + 0.05


@pytest.mark.slow
def test_main_runs_twice_in_a_notebook(tmp_path):
    """Its second cell trains after an interrupt in the first."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "import mini_vit, look\nmini_vit.evaluate, evaluate = None, mini_vit.evaluate",
        f"try:\n    mini_vit.main({RUN!r})\nexcept TypeError:\n    mini_vit.evaluate = evaluate",
        f"for n in range(2):\n    mini_vit.main({RUN!r})",
        "look.main(['runs/mini_vit-2', '--device', 'cpu'])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=place).execute()
    text = ["".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells]
    assert text[3].count("\naccuracy: ") == 2
    assert "accuracy of 9: " in text[4]
    assert (tmp_path / "runs" / "mini_vit-2" / "report.png").exists()


# ---------------------------------------------------------------- data
def test_each_pass_takes_each_image_once(module):
    config = module.Config(batch_size=30)
    batches = [module.batch_indices(step, 100, config) for step in range(1, 21)]
    indices = torch.cat(batches)
    assert {len(batch) for batch in batches} == {30}
    for one_pass in indices.split(100):
        assert sorted(one_pass.tolist()) == list(range(100))
    assert not torch.equal(indices[:100], indices[100:200])
    large = module.Config(batch_size=250)
    assert torch.equal(module.batch_indices(2, 100, large), indices[250:500])


SPLITS = [  # subset, holdout, training images, held-out images
    (0, 10_000, 50_000, 10_000),
    (0, 40_000, 20_000, 40_000),
    (700, 900, 700, 700),
]


def test_held_out_images_are_no_training_images():
    """They are the last of the archive, which holds no image twice."""
    everything, all_labels, *_ = mini_vit.load_mnist(mini_vit.Config())
    assert len({bytes(image) for image in everything.numpy()}) == 60_000
    for subset, holdout, n_train, n_test in SPLITS:
        config = mini_vit.Config(subset=subset, holdout=holdout)
        images, labels, held_out, held_out_labels = mini_vit.load_mnist(config)
        assert torch.equal(images, everything[:n_train])
        assert torch.equal(labels, all_labels[:n_train])
        assert torch.equal(held_out, everything[60_000 - holdout :][:n_test])
        assert torch.equal(held_out_labels, all_labels[60_000 - holdout :][:n_test])


def test_held_out_accuracy_is_called_so(main):
    lines = main("mini_vit", *RUN, "--max_iters=4", "--holdout=100").stdout.splitlines()
    assert lines[-1].startswith("held-out accuracy: ") and lines[-1].endswith(" of 100)")
    results = [line for line in lines if "accuracy" in line or "digit" in line]
    assert len(results) == 12
    assert all("held-out" in line and "test" not in line for line in results)


def test_importing_a_script_changes_nothing(script):
    before = signal.getsignal(signal.SIGINT)
    importlib.reload(importlib.import_module(script))
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- several processes
@pytest.mark.slow
def test_two_processes_compute_what_one_does(script, run, main, tmp_path):
    flags = [*TINY[script], *SHORT, "--dropout", "0", "--seed", "3"]
    # bfloat16 rounds sums over half a batch by other amounts, and adversarial pixels whose gradient
    # is all but 0 may flip.
    flags += ["--precision", "float32", "--adversarial", "0"]
    if script in ("mini_vit_augment", "vit"):  # each process augments its share by itself
        flags += [*STILL, "--easy_share", "0"]  # and leaves out its easy images
    main(script, *flags, "--out_dir", "one")
    result = run(script, *flags, "--out_dir", "two", launch=torchrun(2))
    assert "2 processes" in result.stdout and result.stdout.count("parameters:") == 1
    assert "find_unused_parameters" not in result.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in [name for name in one if name.endswith("qkv.bias")]:
        for model in (one, two):  # a bias of the keys cancels out in the softmax
            q, _, v = model[name].chunk(3)
            model[name] = torch.cat([q, v])
    assert_same(one, two, rtol=1e-3, atol=2e-5)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)
