"""The scripts as files: readable, standing alone, sharing their text; and each of them learns."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, STILL, TINY, rows

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
    | {"Transformer", "read_set", "training_batches", "Block.__init__", "Block.forward"}
    | {"MultiHead", "MultiHead.__init__", "MultiHead.forward", "Trainer.update"},
}
AUGMENTATION = {"augment", "warp_basis", "hardest"}
ADDED = {
    "mini_vit_concat": set(),
    "mini_vit_augment": AUGMENTATION
    | {"AugmentedBatches", "AugmentedBatches.__init__", "AugmentedBatches.__getitem__"},
    "vit": AUGMENTATION,
}


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
        return re.findall(r"^    (\w+: [^=]+) =", definitions(script)["Config"], re.MULTILINE)

    shared = [name for name in names("mini_vit") if other != "vit" or name != "d_head: int"]
    assert [name for name in names(other) if name in names("mini_vit")] == shared


def test_functions_can_be_read_at_once(script):
    for name, text in definitions(script).items():
        if text.lstrip().startswith(("def ", "@")):
            assert text.count("\n") < (85 if name == "train" else 50), name


def test_no_script_imports_another(script):
    imports = definitions(script)["imports"]
    assert not re.search(r"mini_vit|\bvit\b|look|reference|conftest", imports)


@pytest.mark.parametrize(
    "script",
    ["mini_vit", pytest.param("mini_vit_concat", marks=pytest.mark.slow), *SCRIPTS[2:]],
    indirect=True,
)
def test_a_copy_alone_in_a_folder_learns(script, tmp_path):
    """On a few real images, the loss falls, and the accuracy rises far above chance."""
    shape = "--n_layers 1 --n_head 7 --n_embd 392".split()
    enough = 1000  # of 1500; 150 is chance
    if script == "mini_vit_concat":
        # 16 features and 150 steps are too few for adversarial images.
        shape = [*TINY[script], "--adversarial", "0"]
    elif script == "vit":
        shape = "--n_embd 128 --n_layers 2 --learning_rate 2e-3".split() + STILL
        enough = 700  # tokens of patches need more steps
    if script in ("mini_vit_augment", "vit"):
        shape += ["--easy_share", "0"]  # 150 steps are too few for harder images
    flags = "--subset 1500 --batch_size 50 --max_iters 150 --eval_interval 75 --warmup_iters 10"
    flags += " --device cpu --learning_rate 5e-4"
    shutil.copy(ROOT / f"{script}.py", tmp_path / "alone.py")
    (tmp_path / "data").symlink_to(ROOT / "data")
    command = [sys.executable, "alone.py", *flags.split(), *shape]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")  # no bar where there is no terminal
    first, second, *_, last_but_one, last = result.stdout.splitlines()
    assert first.startswith("device: cpu (")
    assert re.fullmatch(r"parameters: [\d,]+", second)
    examples = r"^test digit +\d+ is a \d, the model says(   \d: +\d+\.\d\d%){3}$"
    assert len(re.findall(examples, result.stdout, re.M)) == 10
    assert last_but_one == "to see what it has learned: python look.py runs/alone"
    correct = int(re.fullmatch(r"accuracy: \d+\.\d\d% \((\d+) of 1500\)", last)[1])
    assert last.startswith(f"accuracy: {correct / 15:.2f}%")
    assert correct > enough
    first, middle, end = rows(tmp_path / "runs" / "alone")
    assert [row["iter"] for row in (first, middle, end)] == ["20", "75", "150"]
    assert float(end["train_loss"]) < 0.75 * float(first["train_loss"])
    assert float(end["test_accuracy"]) == pytest.approx(correct / 1500)
