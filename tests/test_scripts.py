"""The scripts as files: small enough to read, standing alone, sharing their text; and each of them learns."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, SHORT, STILL, TINY, rows

LINES = {"mini_vit": 480, "mini_vit_concat": 490, "mini_vit_augment": 580, "vit": 500, "look": 340, "digits": 340}
# What each experiment changes in mini_vit.py: everything else must be the same text.
MAY_DIFFER = {
    "mini_vit_concat": {"__doc__", "Config", "Config.__post_init__", "Transformer.__init__", "Transformer.forward"},
    "mini_vit_augment": {"__doc__", "imports", "Config", "Config.__post_init__", "training_batches", "Trainer.step"},
}
MAY_DIFFER["vit"] = MAY_DIFFER["mini_vit_concat"] | {"training_batches", "Block.__init__"}
MAY_DIFFER["vit"] |= {"MultiHead.__init__", "MultiHead.forward", "weighted_sums", "scalar_attention"}
MAY_DIFFER["vit"] |= {"RankOneAttention", "RankOneAttention.forward", "RankOneAttention.backward"}
ADDED = {
    "vit": {"ELASTIC_BASIS", "augment"},
    "mini_vit_concat": set(),
    "mini_vit_augment": {
        "CUDA",
        "ELASTIC_BASIS",
        "augment",
        "AugmentedBatches",
        "AugmentedBatches.__init__",
        "AugmentedBatches.__getitem__",
        "usable_cores",
        "leave_group",
        "next_batch",
    },
}


def definitions(script: str) -> dict[str, str]:
    """Return every top-level statement and method of a script, by the name that it defines, in order."""
    source = (ROOT / f"{script}.py").read_text()
    lines, found = source.splitlines(), {"__doc__": "", "imports": ""}

    def text(node) -> str:
        return "\n".join(lines[node.lineno - 1 : node.end_lineno])

    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found["imports"] += text(node) + "\n"
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = text(node)
        elif isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            found[node.name] = "\n".join([lines[node.lineno - 1], *(text(n) for n in node.body if n not in methods)])
            found |= {f"{node.name}.{method.name}": text(method) for method in methods}
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = text(node)
        elif isinstance(node, ast.Expr):
            found["__doc__"] = text(node)
        else:
            found[lines[node.lineno - 1]] = text(node)
    return found


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_the_diff_is_the_experiment(other):
    base, theirs = definitions("mini_vit"), definitions(other)
    assert {name for name in base if base[name] != theirs.get(name)} == MAY_DIFFER[other]
    assert theirs.keys() - base.keys() == ADDED[other]
    in_both = [name for name in base if name in theirs]
    assert [name for name in theirs if name in base] == in_both, "shared definitions must keep their order"


def test_two_scripts_that_augment_do_it_alike():
    for name in ADDED["vit"]:
        assert definitions("vit")[name] == definitions("mini_vit_augment")[name]


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_shared_hyperparameters_keep_name_type_and_order(other):
    def names(script):
        return re.findall(r"^    (\w+: \w+) =", definitions(script)["Config"], re.MULTILINE)

    shared = [name for name in names("mini_vit") if other != "vit" or name != "d_head: int"]
    assert [name for name in names(other) if name in names("mini_vit")] == shared


@pytest.mark.parametrize("script", LINES)
def test_a_reader_can_hold_it(script):
    source = (ROOT / f"{script}.py").read_text()
    assert len(source.splitlines()) <= LINES[script]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (58 if node.name == "train" else 40), node.name
            loops = [n for n in ast.walk(node) if isinstance(n, ast.For)] if node.name == "train" else []
            assert all(loop.end_lineno - loop.lineno + 1 <= 38 for loop in loops)


def test_no_script_imports_another(script):
    assert not re.search(r"mini_vit|\bvit\b|look|reference|conftest", definitions(script)["imports"])


def test_it_learns(script, run, tmp_path):
    """Train on a tiny subset of the real images: the loss falls, the accuracy rises far above chance."""
    shape = "--n_layers 1 --n_head 7 --n_embd 392".split()
    if script == "mini_vit_concat":
        shape = [*TINY[script], "--adversarial", "0"]  # 16 features and 150 steps are too few for adversarial images
    elif script == "mini_vit_augment":
        shape += ["--easy_share", "0", "--adversarial", "0"]  # 150 steps are too few for harder images
    elif script == "vit":
        shape = ["--patch_size=7", "--n_embd=128", "--n_layers=2", *STILL]
    flags = "--subset 1500 --batch_size 50 --max_iters 150 --eval_interval 75 --warmup_iters 10 --device cpu"
    result = run(script, "--learning_rate", "2e-3" if script == "vit" else "5e-4", *shape, *flags.split())
    lines = result.stdout.splitlines()
    correct = int(re.fullmatch(r"accuracy: (\d+\.\d\d)% \((\d+) of 1500\)", lines[-1])[2])
    assert correct > (750 if script == "vit" else 1050)  # 150 is chance; tokens of patches need more steps
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


def test_a_copy_alone_in_a_folder_runs(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path / "alone.py")
    command = [sys.executable, "alone.py", *TINY[script], *SHORT, "--data_dir", str(ROOT / "data")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "alone" / "model.pt").exists()
