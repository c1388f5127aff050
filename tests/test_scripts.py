"""The three scripts: standing alone, sharing their text, learning."""

import ast
import csv
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHORT, TINY

PARAMETERS = {"mini_vit": 118_148_810, "mini_vit_concat": 492_622_490, "mini_vit_augment": 118_148_810}
# What each experiment changes in mini_vit.py: everything else at the top level must be the same text.
MAY_DIFFER = {
    "mini_vit_concat": {"__doc__", "Config", "Transformer"},
    "mini_vit_augment": {"__doc__", "imports", "Config", "BELOW_ONE", "training_batches", "training_step"},
}
ADDED = {
    "mini_vit_concat": set(),
    "mini_vit_augment": {"ELASTIC_BASIS", "augment", "AugmentedBatches", "ignore_signals", "without_easy"},
}


def definitions(script: str) -> dict[str, str]:
    """Return every top-level statement of a script, by the name that it defines, in order."""
    source = (ROOT / f"{script}.py").read_text()
    found = {"__doc__": "", "imports": ""}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found["imports"] += text + "\n"
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = text
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = text
        elif isinstance(node, ast.Expr):
            found["__doc__"] = text
        else:
            found[text.splitlines()[0]] = text
    return found


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_the_diff_is_the_experiment(other):
    base, theirs = definitions("mini_vit"), definitions(other)
    differing = {name for name in base if base[name] != theirs.get(name)}
    assert differing == MAY_DIFFER[other]
    assert theirs.keys() - base.keys() == ADDED[other]
    assert [name for name in theirs if name in base] == list(base), "shared definitions must keep their order"


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_shared_hyperparameters_keep_name_type_and_order(other):
    def names(script):
        return re.findall(r"^    (\w+: \w+) =", definitions(script)["Config"], re.MULTILINE)

    assert [name for name in names(other) if name in names("mini_vit")] == names("mini_vit")


def random_model(module, **changes) -> torch.nn.Module:
    """Return a small Transformer, all of whose weights are random: of a new one's, some are 0 or 1."""
    embd = 800 if module.__name__ == "mini_vit_concat" else 56
    shape = {"n_layers": 1, "n_head": 4, "d_head": embd // 4, "n_embd": embd}
    model = module.Transformer(module.Config(**shape | {"precision": "float32"} | changes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def test_no_script_imports_another(script):
    imports = definitions(script)["imports"]
    assert not re.search("mini_vit|reference|conftest", imports)


def test_parameter_count(module):
    with torch.device("meta"):
        model = module.Transformer(module.Config())
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[module.__name__]


def test_other_widths_get_a_linear_layer_first():
    import mini_vit

    assert isinstance(mini_vit.Transformer(mini_vit.Config(n_layers=1)).embed, torch.nn.Identity)
    narrow = mini_vit.Transformer(mini_vit.Config(n_layers=1, n_head=4, d_head=14, n_embd=56))
    assert narrow.embed.weight.shape == (56, 784)


def test_concat_gives_every_block_the_image():
    import mini_vit_concat

    model, images = random_model(mini_vit_concat, n_layers=3), torch.rand(4, 784)
    inputs, outputs = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.register_forward_hook(lambda _, args, out: outputs.append(out))
    logits = model(images)
    firsts = [model.embed(images)] + [layer(out) for layer, out in zip(model.reduce, outputs, strict=True)]
    expected = [torch.cat([first, images], -1) for first in firsts]
    for x, formula in zip(inputs, expected[:-1], strict=True):
        torch.testing.assert_close(x, formula)
    torch.testing.assert_close(logits, model.head(model.ln(expected[-1])))


@pytest.mark.parametrize("warmup_iters", [0, 20, 100, 200])
def test_learning_rate_warms_up_and_decays(module, warmup_iters):
    """Also where nothing is left to decay: a run as short as its warmup, or shorter."""
    config = module.Config(learning_rate=1.0, max_iters=100, warmup_iters=warmup_iters)
    rates = [module.learning_rate_at(step, config) for step in range(1, 101)]
    warmup, decay = rates[:warmup_iters], rates[warmup_iters:]
    assert all(0 <= rate <= 1 for rate in rates)
    assert warmup == sorted(warmup) and decay == sorted(decay, reverse=True)
    if warmup_iters < 100:
        assert max(rates) > 0.999 and rates[-1] == 0
    if warmup_iters == 20:  # the middle of the cosine
        assert rates[59] == pytest.approx(0.5)


def test_depth_grows_from_the_first_blocks_to_all(module):
    config = module.Config(n_layers=4, max_iters=100, first_layers=1, growth=2.0)
    depths = [module.depth_at(step, config) for step in range(1, 101)]
    assert depths == sorted(depths)
    assert [depths.index(n) + 1 for n in (1, 2, 3, 4)] == [1, 51, 71, 87]  # the first steps past 100 sqrt((n - 1) / 4)
    config.first_layers = 3
    assert [module.depth_at(step, config) for step in range(1, 101)] == [max(3, depth) for depth in depths]
    config.first_layers = 5
    assert {module.depth_at(step, config) for step in range(1, 101)} == {4}
    at_once = module.Config(n_layers=4, max_iters=100, growth=0.0)
    assert {module.depth_at(step, at_once) for step in range(1, 101)} == {4}


def test_blocks_not_in_use_change_nothing(module):
    """A model at depth 1 is the model of one block."""
    images = torch.rand(50, 784)
    deep, one = random_model(module, n_layers=3), random_model(module)
    one.load_state_dict({name: deep.state_dict()[name] for name in one.state_dict()})
    deep.depth = 1
    torch.testing.assert_close(deep(images), one(images), rtol=0, atol=0)
    deep.depth = 2
    assert not torch.allclose(deep(images), one(images))


def test_a_new_block_of_concat_passes_on_what_it_gets():
    import mini_vit_concat

    model = mini_vit_concat.Transformer(mini_vit_concat.Config(n_layers=2, n_head=8, d_head=100, n_embd=800))
    x = torch.rand(5, 800)
    torch.testing.assert_close(model.reduce[1](x), x[:, :16])


def test_uint8_images_are_pixels_from_0_to_1(module):
    model, images = random_model(module), torch.randint(0, 256, (3, 784), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(images.float() / 255))


def test_smoke(script, run, tmp_path):
    """Train on a tiny subset of the real images: the loss falls, the accuracy rises far above chance."""
    shape = "--n_layers 2 --n_head 8 --d_head 98 --n_embd 784".split()
    if script == "mini_vit_concat":
        shape = [*TINY[script], "--adversarial", "0"]  # 16 features and 150 steps are too few for adversarial images
    elif script == "mini_vit_augment":
        shape += ["--easy_share", "0"]  # 150 steps are too few to learn the hardest images
    flags = "--subset 1500 --batch_size 50 --max_iters 150 --eval_interval 75 --warmup_iters 10 --learning_rate 5e-4"
    result = run(script, *shape, *flags.split(), "--device", "cpu", report=True)
    lines = result.stdout.splitlines()
    correct = int(re.fullmatch(r"accuracy: (\d+\.\d\d)% \((\d+) of 1500\)", lines[-1])[2])
    assert correct > 1050  # 150 is chance
    assert lines[-1].startswith(f"accuracy: {correct / 15:.2f}%")
    assert lines[0].startswith("device: cpu (")
    assert re.fullmatch(r"parameters: [\d,]+", lines[1])
    assert (
        len(re.findall(r"^test digit +\d+ is a \d, the model says(   \d: +\d+\.\d\d%){3}$", result.stdout, re.M)) == 10
    )
    assert "%|" not in result.stderr  # no bar where there is no terminal
    out = tmp_path / "runs" / script
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert [row["iter"] for row in rows] == ["75", "150"]
    assert float(rows[1]["train_loss"]) < 0.75 * float(rows[0]["train_loss"])
    assert float(rows[1]["test_accuracy"]) == pytest.approx(correct / 1500)
    wanted = {"checkpoint.pt", "model.pt", "log.csv", "report.png"}
    assert {path.name for path in out.iterdir()} == wanted | ({"augmented.png"} if "augment" in script else set())

    result = run(script, "--eval")  # on all 10,000 test images, architecture from the file
    lines = result.stdout.splitlines()
    correct = int(re.fullmatch(r"accuracy: \d+\.\d\d% \((\d+) of 10000\)", lines[-1])[1])
    assert correct > 7000
    assert len(re.findall(r"^accuracy of \d: ", result.stdout, re.M)) == 10


def test_a_copy_alone_in_a_folder_runs(script, run, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path / "alone.py")
    command = [sys.executable, "alone.py", *TINY[script], *SHORT, "--data_dir", str(ROOT / "data")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "alone" / "model.pt").exists()


def test_evaluation_counts_each_image_once_whatever_the_batch_size(module):
    model = random_model(module, dropout=0.5)
    images, labels = torch.randint(0, 256, (103, 784), dtype=torch.uint8), torch.randint(0, 10, (103,))
    loss, probabilities = module.evaluate(model, images, labels, 103)
    assert probabilities.shape == (103, 10) and model.training
    for batch_size in (1, 10, 1000):
        again, same = module.evaluate(model, images, labels, batch_size)
        assert again == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(same, probabilities, rtol=1e-4, atol=1e-6)


def model_and_images(module) -> tuple:
    images, labels = torch.randint(0, 256, (20, 784), dtype=torch.uint8), torch.randint(0, 10, (20,))
    return random_model(module, dropout=0.0), images, labels


def test_the_easy_share_of_a_batch_is_left_out():
    import mini_vit_augment as script

    model, images, labels = model_and_images(script)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")
    for share, n in ((0.75, 5), (0.01, 20), (0.99, 1)):
        kept_images, kept_labels = script.without_easy(model, images, labels, share)
        hardest = losses.argsort(descending=True)[:n]
        assert torch.equal(kept_images, images[hardest]) and torch.equal(kept_labels, labels[hardest])


def test_adversarial_images_raise_the_loss(module):
    model, images, labels = model_and_images(module)
    adversarial = module.adversarial(model, images, labels, 0.01)
    change = adversarial - images / 255
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.01))
    before, after, opposite = (
        torch.nn.functional.cross_entropy(model(x), labels, reduction="none").detach()
        for x in (images, adversarial, images / 255 - change)
    )
    assert (after > before).all() and (opposite < before).all()
    assert not adversarial.requires_grad and all(p.grad is None for p in model.parameters())


def test_each_pass_takes_each_image_once(module):
    config = module.Config(batch_size=30)
    batches = module.shuffled_indices(100, config, 0)
    indices = torch.cat([next(batches) for _ in range(20)])
    for one_pass in indices.split(100):
        assert sorted(one_pass.tolist()) == list(range(100))
    assert not torch.equal(indices[:100], indices[100:200])
    later = module.shuffled_indices(100, config, 7)
    assert torch.equal(next(later), indices[7 * 30 : 8 * 30])


def test_augmentation_is_random_per_image_and_repeatable():
    import mini_vit_augment as script

    config = script.Config()
    images, *_ = script.load_mnist(script.Config(data_dir=str(ROOT / "data"), subset=64))
    one_image = images[:1].expand(64, -1)
    first, again, other = (script.augment(one_image, config, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 64
    still = script.Config(rotation=0, scaling=0, shear=0, translation=0, elastic=0)
    torch.testing.assert_close(script.augment(images, still, torch.Generator()), images, rtol=0, atol=1)
    ink = script.augment(images, config, torch.Generator()).double().sum() / images.double().sum()
    assert 0.85 < ink < 1.15
    sized = script.augment(one_image, script.replace(still, scaling=0.17), torch.Generator()).view(-1, 28, 28).double()
    sized, square = sized / sized.sum((1, 2), keepdim=True), (torch.arange(28.0).double() - 13.5).square()
    spread = torch.stack([sized.sum(axis) @ square for axis in (1, 2)])
    assert abs(torch.corrcoef(spread)[0, 1]) < 0.5 and (spread.std(1) > 0.1 * spread.mean(1)).all()  # width, height
    shifted = script.augment(images, script.replace(still, translation=1.5), torch.Generator()).double()
    assert shifted.square().sum() / images.double().square().sum() > 0.94  # 0.97; bilinear interpolation blurs to 0.90


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_augmented_batches_depend_on_seed_and_step_alone(num_workers, tmp_path):
    import mini_vit_augment as script

    images, labels = torch.randint(0, 256, (40, 784), dtype=torch.uint8), torch.arange(40)

    def take(n, start=0, workers=0, seed=1):
        config = script.Config(batch_size=20, num_workers=workers, seed=seed, out_dir=str(tmp_path), max_iters=6)
        batches = script.training_batches(images, labels, config, start, torch.device("cpu"), 0, 1)
        return [next(batches) for _ in range(n)]

    reference = take(6)
    for (a, b), (c, d) in zip(take(6, workers=num_workers), reference, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert torch.equal(take(1, start=4, workers=num_workers)[0][0], reference[4][0])
    assert not torch.equal(take(1, seed=2)[0][0], reference[0][0])
    flat = torch.cat([batch for batch, _ in reference])
    assert len(flat.unique(dim=0)) == 120  # every pass and every worker draws anew


@pytest.fixture
def default_precision():
    """Have torch multiply as it does by default, again, once a test is done that may change it."""
    yield
    torch.set_float32_matmul_precision("highest")


def test_precision_follows_the_device_or_the_flag(module, default_precision):
    device = torch.device("cpu")
    small = {"n_layers": 1, "n_head": 8, "d_head": 100, "n_embd": 800}
    made_for_it = torch.cpu.get_capabilities().get("avx512_bf16", False)
    for precision, expected in {"auto": made_for_it, "float32": False, "bfloat16": True}.items():
        model = module.new_model(module.Config(**small, precision=precision), device)
        assert model.mixed_precision == expected
        assert model(torch.rand(2, 784)).dtype == torch.float32  # logits and weights always are
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_float32_keeps_its_precision(module, default_precision):
    """Also where a script has another library multiply."""
    config = module.Config(n_layers=1, n_head=8, d_head=100, n_embd=800, precision="float32")
    layer, x = module.new_model(config, torch.device("cpu")).blocks[0].ff[0], torch.randn(512, 800)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert (layer(x) - exact).norm() < 1e-5 * exact.norm()  # bfloat16: 3e-3
