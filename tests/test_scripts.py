"""The scripts as files: readable, standing alone, sharing their text; and each of them learns."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, STILL, TINY, rows

# What each experiment changes in mini_vit.py: everything else must be the same text.
MODEL = {"Transformer.__init__", "Transformer.initialize", "Transformer.forward"}
CONFIG = {"__doc__", "FILE", "Config", "Config.__post_init__"}
FAST_ATTENTION = {
    "attention_by_the_book",
    "scalar_attention",
    "RankOneAttention",
    "RankOneAttention.forward",
    "RankOneAttention.backward",
    "sums_on_gpu",
    "sums_on_cpu",
}
MAY_DIFFER = {
    "mini_vit_concat": CONFIG | MODEL,
    "mini_vit_augment": CONFIG | {"imports", "training_batches", "Trainer.update"},
    "vit": CONFIG
    | MODEL
    | FAST_ATTENTION
    | {"Transformer", "training_batches", "Block.__init__", "Block.forward"}
    | {"MultiHead", "MultiHead.__init__", "MultiHead.forward", "Trainer.update"},
}
AUGMENTATION = {"augment", "warp_basis", "hardest"}
ADDED = {
    "mini_vit_concat": set(),
    "mini_vit_augment": AUGMENTATION
    | {"ON_CUDA", "ELSEWHERE", "augment_batch", "AugmentedBatches"}
    | {"AugmentedBatches.__init__", "AugmentedBatches.__getitem__", "sigchld_kept"}
    | {"next_batch", "kill_workers", "ignore_signals", "usable_cores"}
    | {"MAY_CHANGE.add('num_workers')"},
    "vit": AUGMENTATION,
}
EVERYTHING = sorted(ROOT.glob("*.py")) + sorted((ROOT / "tests").glob("*.py"))


def definitions(script: str) -> dict[str, str]:
    """Return a script's top-level statements and methods, by the name they define, in order."""
    source = (ROOT / f"{script}.py").read_text()
    lines = source.splitlines()
    found = {"__doc__": "", "imports": ""}

    def text(node) -> str:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(lines[first - 1 : node.end_lineno])

    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found["imports"] += text(node) + "\n"
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = text(node)
        elif isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            others = [text(n) for n in node.body if n not in methods]
            found[node.name] = "\n".join([lines[node.lineno - 1], *others])
            for method in methods:
                found[f"{node.name}.{method.name}"] = text(method)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = text(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found["__doc__"] = text(node)
        else:
            found[ast.unparse(node).splitlines()[0]] = text(node)
    return found


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_the_diff_is_the_experiment(other):
    base, theirs = definitions("mini_vit"), definitions(other)
    assert {name for name in base if base[name] != theirs.get(name)} == MAY_DIFFER[other]
    assert theirs.keys() - base.keys() == ADDED[other]
    in_both = [name for name in base if name in theirs]
    assert [name for name in theirs if name in base] == in_both, (
        "shared definitions must keep their order"
    )


def test_two_scripts_that_augment_do_it_alike():
    for name in AUGMENTATION | {"Trainer.update"}:
        assert definitions("vit")[name] == definitions("mini_vit_augment")[name]


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_shared_hyperparameters_keep_name_type_and_order(other):
    def names(script):
        return re.findall(r"^    (\w+: \w+) =", definitions(script)["Config"], re.MULTILINE)

    shared = [name for name in names("mini_vit") if other != "vit" or name != "d_head: int"]
    assert [name for name in names(other) if name in names("mini_vit")] == shared


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.name)
def test_functions_are_short_and_lines_are_narrow(path):
    source = path.read_text()
    assert max(len(line) for line in source.splitlines()) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (85 if node.name == "train" else 50), node.name


def test_what_is_there_to_be_read_takes_ten_minutes():
    """From Config to the end of train, without the fast kernel."""
    lines = (ROOT / "mini_vit.py").read_text().splitlines()

    def banner(text: str) -> int:
        return next(i for i, line in enumerate(lines) if line.startswith("# --") and text in line)

    to_read = banner("results") - banner("hyperparameters")
    fast = banner("evaluation") - banner("the same attention, faster")
    assert to_read - fast <= 450


def test_no_script_imports_another(script):
    imports = definitions(script)["imports"]
    assert not re.search(r"mini_vit|\bvit\b|look|reference|conftest", imports)


@pytest.mark.slow
def test_it_learns(script, run, tmp_path):
    """Train on a few real images: the loss falls, and the accuracy rises far above chance."""
    shape = "--n_layers 1 --n_head 7 --n_embd 392".split()
    if script == "mini_vit_concat":
        # 16 features and 150 steps are too few for adversarial images.
        shape = [*TINY[script], "--adversarial", "0"]
    elif script == "mini_vit_augment":
        # 150 steps are too few for harder images.
        shape += ["--easy_share", "0", "--adversarial", "0"]
    elif script == "vit":
        shape = ["--patch_size=7", "--n_embd=128", "--n_layers=2", *STILL]
    flags = "--subset 1500 --batch_size 50 --max_iters 150 --eval_interval 75 --warmup_iters 10"
    rate = "2e-3" if script == "vit" else "5e-4"
    flags += f" --device cpu --learning_rate {rate}"
    result = run(script, *shape, *flags.split())
    lines = result.stdout.splitlines()
    correct = int(re.fullmatch(r"accuracy: (\d+\.\d\d)% \((\d+) of 1500\)", lines[-1])[2])
    enough = 750 if script == "vit" else 1050  # 150 is chance; tokens of patches need more steps
    assert correct > enough
    assert lines[-1].startswith(f"accuracy: {correct / 15:.2f}%")
    assert lines[-2] == f"to see what it has learned: python look.py runs/{script}"
    assert lines[0].startswith("device: cpu (")
    assert re.fullmatch(r"parameters: [\d,]+", lines[1])
    examples = r"^test digit +\d+ is a \d, the model says(   \d: +\d+\.\d\d%){3}$"
    assert len(re.findall(examples, result.stdout, re.M)) == 10
    assert "%|" not in result.stderr  # no bar where there is no terminal
    out = tmp_path / "runs" / script
    logged = rows(out)
    assert [row["iter"] for row in logged] == ["75", "150"]
    assert float(logged[1]["train_loss"]) < 0.75 * float(logged[0]["train_loss"])
    assert float(logged[1]["test_accuracy"]) == pytest.approx(correct / 1500)
    assert {path.name for path in out.iterdir()} == {"model.pt", "log.csv"}


@pytest.mark.slow
def test_a_copy_alone_in_a_folder_runs(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path / "alone.py")
    command = [sys.executable, "alone.py", *TINY[script], *SHORT, "--data_dir", str(ROOT / "data")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "alone" / "model.pt").exists()


FIELDS = {
    "label_smoothing: float = 0.0": ("--label_smoothing=0.1", 0.1),
    "label_noise: float = -1.5  # of labels, 100 % or so": ("--label_noise=inf", float("inf")),
    "beam: int = 0": ("--beam=-3", -3),
    "tied: bool = False": ("--tied", True),
    "gated: bool = True  # gates": ("--no-gated", False),
    'note: str = ""': ("--note=mine", "mine"),
}


@pytest.mark.slow
def test_a_field_that_is_added_just_works(script, tmp_path):
    """It is a flag, with or without a comment, and saved; older runs can be resumed."""
    text = (ROOT / f"{script}.py").read_text()
    old, new = tmp_path / "old" / "mine.py", tmp_path / "mine.py"
    old.parent.mkdir()
    stop = "            if stop_number:\n                break\n"
    assert stop in text
    old.write_text(text.replace(stop, "            if step == 10:\n                break\n"))
    added = "".join(f"    {field}\n" for field in FIELDS)
    print_them = (
        "    say(repr([config.label_smoothing, config.tied, config.note]))\n    device, rank, world"
    )
    text = text.replace("    seed: int = 1", f"{added}    seed: int = 1")
    new.write_text(text.replace("    device, rank, world", print_them, 1))

    def run(path, *flags):
        command = [sys.executable, str(path), "--data_dir", str(ROOT / "data"), *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    values = [flag for flag, _ in FIELDS.values()]
    result = run(new, *TINY[script], *SHORT, *values, "--out_dir", "new")
    assert result.returncode == 0, result.stderr
    assert "[0.1, True, 'mine']" in result.stdout
    config = torch.load(tmp_path / "new" / "model.pt", weights_only=True)["config"]
    for field, (_, value) in FIELDS.items():
        assert config[field.split(":")[0]] == value
    result = run(old, *TINY[script], *SHORT, "--out_dir", "resumed")
    assert (tmp_path / "resumed" / "checkpoint.pt").exists(), result.stderr
    result = run(new, "--resume", "--out_dir", "resumed")
    assert result.returncode == 0, result.stderr
    assert "[0.0, False, '']" in result.stdout and "from step 10" in result.stdout
    usage = run(new, "--help").stdout
    assert "--tied, --no-tied" in usage and "of labels, 100 % or so" in usage
