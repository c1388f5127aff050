"""bench.py: it finds a difference that is there, and none between equal sides."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import bench

TINY = "--n_embd 32 --n_head 2 --n_layers 1 --max_iters 60 --warmup_iters 10 --subset 2000"
HEADER = "An idea.\nSource: folklore\nScript: vit.py\n"


SIZES = dict(bench.FLAGS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that the tests share: the same base is trained once."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(autouse=True)
def tiny(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FLAGS", dict.fromkeys(bench.FLAGS, TINY))
    monkeypatch.setattr(bench, "RUNS", runs)
    monkeypatch.setattr(bench, "IDEAS", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results.csv")


def lines_of(capsys, *arguments) -> list[str]:
    """Return the last result that bench.py prints."""
    bench.main([*arguments, "--jobs", "1"])
    return capsys.readouterr().out.strip().split("\n\n")[-1].splitlines()


def test_all_10000_held_out_images_count():
    for flags in SIZES.values():
        words = flags.split()
        assert int(words[words.index("--subset") + 1]) >= 10000


def test_equal_sides_have_no_difference_at_all():
    flags = ["--beta2", "0.98"]  # as by default
    base, changed = bench.sides_of_script("vit.py", flags, TINY.split())
    ((before, after),) = bench.compare("equal", base, changed, 1, 1, "")
    assert (before["loss"], before["accuracy"]) == (after["loss"], after["accuracy"])
    text = bench.summary("equal", 3 * [(before, after)])
    assert "+0.0000 ± 0.0000    no clear difference" in text
    assert "+0.00 ± 0.00 %  no clear difference" in text


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--max_iters 120", "better"),
        pytest.param("--learning_rate 1e-5", "worse", marks=pytest.mark.slow),
    ],
)
def test_a_sure_difference_is_found_with_three_seeds(flags, word, capsys):
    _, loss, *_ = lines_of(capsys, "vit.py", *flags.split(), "--seeds", "3")
    assert loss.endswith(f"  {word}")


def test_one_in_twenty_comparisons_of_nothing_is_called_different():
    random = np.random.default_rng(0)
    words = [bench.verdict(list(random.normal(0, 1, 10)), -1) for _ in range(2000)]
    assert 0.03 < sum(word != "no clear difference" for word in words) / len(words) < 0.07
    few = [bench.verdict(list(random.normal(0, 1, 3)), -1) for _ in range(2000)]
    assert 0.03 < sum(word != "no clear difference" for word in few) / len(few) < 0.07


def test_one_in_five_is_called_different_by_who_stops_at_the_first_word():
    random = np.random.default_rng(2)
    n_wrong = 0
    for _ in range(500):
        differences = list(random.normal(0, 1, 10))
        words = {bench.verdict(differences[:n], -1) for n in range(2, 11)}
        n_wrong += words != {"no clear difference"}
    assert 0.15 < n_wrong / 500 < 0.25


def test_the_tables_verdict_allows_for_the_number_of_ideas():
    random = np.random.default_rng(1)
    n_ideas = 50
    tables = [
        [bench.verdict(list(random.normal(0, 1, 10)), -1, 1 - 0.05 / n_ideas)] for _ in range(5000)
    ]
    wrong = sum(words != ["no clear difference"] for words in tables)
    assert wrong / len(tables) < 3 * 0.05 / n_ideas


def test_a_patch_is_recorded_and_its_runs_are_not_repeated(tmp_path, capsys, monkeypatch):
    patch = tmp_path / "more_dropout.patch"
    patch.write_text(f"{HEADER}Flags: --dropout 0.5\n")
    first = lines_of(capsys, str(patch), "--seeds", "1")
    rows = bench.read_rows()
    assert sorted(rows) == [("more_dropout", "base", 1), ("more_dropout", "idea", 1)]
    assert rows["more_dropout", "idea", 1]["torch"]
    monkeypatch.setattr(bench.sys, "executable", "/no/such/python")  # so nothing can train
    assert lines_of(capsys, str(patch), "--seeds", "1") == first
    monkeypatch.setattr(bench, "HERE", tmp_path)
    bench.show_collection()
    table = capsys.readouterr().out
    assert "| more_dropout | An idea. | 1 |" in table
    assert (tmp_path / "docs" / "ideas.png").exists()


def test_rows_of_other_seeds_stay_unless_the_result_has_changed(runs):
    def note(seed, loss):
        base = {"loss": 1.0, "accuracy": 0.5, "seconds": 1.0}
        bench.write_rows("mine", seed, base, base | {"loss": loss})
        return sorted(seed for _, side, seed in bench.read_rows() if side == "idea")

    assert [note(1, 0.5), note(2, 0.6), note(3, 0.7)] == [[1], [1, 2], [1, 2, 3]]
    assert note(1, 0.5) == [1, 2, 3]  # the same run again, as after --seeds 1
    assert note(2, 0.9) == [1, 2]  # another patch: what follows is the old one's
    assert bench.read_rows()["mine", "idea", 2]["loss"] == 0.9


def test_two_at_once_share_a_run(monkeypatch, runs):
    side = bench.Side("vit.py", "text", ["--dropout", "0.4"])
    n_started = []

    def slow_run(side, flags, folder):
        n_started.append(1)
        time.sleep(0.2)
        (folder / "model.pt").touch()
        return {"loss": 1.0, "accuracy": 0.5, "seconds": 1.0}

    monkeypatch.setattr(bench, "run_script", slow_run)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(bench.train, [side, side], [1, 1])
    assert first == second
    assert len(n_started) == 1


def test_a_change_that_fails_counts_as_worse(tmp_path, capsys, monkeypatch):
    patch = tmp_path / "diverges.patch"
    patch.write_text(f"{HEADER}Flags: --learning_rate 1e30\n")
    _, last = lines_of(capsys, str(patch), "--seeds", "1")
    assert last.startswith(
        "worse: with the change, it fails: vit.py: error: the loss is not finite"
    )
    monkeypatch.setattr(bench, "HERE", tmp_path)  # where it draws docs/ideas.png
    bench.show_collection()
    assert "| fails | | | worse |" in capsys.readouterr().out


def test_a_mistyped_flag_is_no_result(capsys):
    with pytest.raises(SystemExit, match="unrecognized arguments: --dropuot"):
        lines_of(capsys, "vit.py", "--dropuot", "0.1", "--seeds", "1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("vit.py --dropout 0.1 --seed 3", "--seed is set by bench.py itself"),
        ("vit.py --out_dir=runs/mine", "--out_dir=runs/mine is set by bench.py itself"),
        ("vit.py --dropout 0.1 --seeds 0", "--seeds and --jobs must be at least 1"),
        ("vit.py --dropout 0.1 --jobs -1", "--seeds and --jobs must be at least 1"),
    ],
)
def test_bad_flags_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_all_targets_are_checked_before_anything_trains(tmp_path, monkeypatch):
    good = tmp_path / "good.patch"
    good.write_text(f"{HEADER}Flags: --dropout 0.5\n")
    monkeypatch.setattr(bench, "compare", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit, match=r"can't read .*missing\.patch"):
        bench.main([str(good), str(tmp_path / "missing.patch")])


def test_an_edit_may_stay_in_the_script_when_its_patch_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    script = tmp_path / "vit.py"
    script.write_text("dropout = 0.0\n")
    for command in ("init", "add .", "-c user.name=a -c user.email=a@b.c commit -m first"):
        bench.git(*command.split(), folder=tmp_path)
    script.write_text("dropout = 0.5\n")
    patch = tmp_path / "mine.patch"
    patch.write_text(f"{HEADER}\n{bench.git('diff', folder=tmp_path)}")
    assert bench.sides_of_patch(patch, []) == bench.sides_of_script("vit.py", [], [])  # no new runs
    base, changed = bench.sides_of_patch(patch, [])
    assert (base.text, changed.text) == ("dropout = 0.0\n", "dropout = 0.5\n")


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, runs, capsys, monkeypatch):
    seen = []
    original = subprocess.run

    def killed_once(command, **options):
        seen.append(command)
        if len(seen) == 1:
            return subprocess.CompletedProcess(command, -9, "", "")
        return original(command, **options)

    monkeypatch.setattr(bench.subprocess, "run", killed_once)
    flags = ("vit.py", "--dropout", "0.3", "--seeds", "1")
    with pytest.raises(SystemExit, match="the same command goes on"):
        bench.main([*flags, "--jobs", "1"])
    lines_of(capsys, *flags)
    assert all("--resume" in command for command in seen)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vit.py"], "is as in the last commit"),
        (["look.py"], "is neither a patch nor"),
        (["missing.patch"], "can't read missing.patch"),
        (["headless.patch"], "needs a line 'Script: '"),
        (["same.patch"], "same.patch changes nothing"),
        (["broken.patch"], "git apply: error: patch failed: vit.py:1"),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    committed = bench.git("show", "HEAD:./vit.py", folder=bench.HERE)
    monkeypatch.setattr(bench, "HERE", tmp_path)
    (tmp_path / "vit.py").write_text(committed)
    monkeypatch.setattr(
        bench, "git", lambda *a, folder: committed if a[0] == "show" else git(*a, folder=folder)
    )
    (tmp_path / "same.patch").write_text(HEADER)
    (tmp_path / "headless.patch").write_text("An idea.\n")
    diff = (
        "diff --git a/vit.py b/vit.py\n--- a/vit.py\n+++ b/vit.py\n@@ -1 +1 @@\n-no such\n+line\n"
    )
    (tmp_path / "broken.patch").write_text(f"{HEADER}\n{diff}")
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert words in stop.value.code
    assert "\n" not in stop.value.code


git = bench.git


def test_without_git_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="this needs git, which is not installed"):
        bench.git("show", "HEAD:./vit.py", folder=bench.HERE)
