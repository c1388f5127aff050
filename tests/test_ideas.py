"""ideas/*.patch: each one applies to its script, trains, and goes on exactly after a stop."""

import copy
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import mini_vit

PATCHES = sorted(ROOT.glob("ideas/*.patch"))
SCRIPTS = {"base": "mini_vit.py", "augment": "mini_vit_augment.py", "vit": "vit.py"}
SMALL = {  # a block joins at the last of four steps, unless a patch's flags say otherwise
    "base": "--n_head 14 --d_head 20 --n_embd 280 --n_layers 2 --first_layers 1 --growth 3",
    "augment": "--n_head 14 --d_head 20 --n_embd 280 --n_layers 1 --num_workers 0",
    "vit": "--n_layers 2 --n_embd 64 --growth 3",
}
LAST = "--max_iters 4 --batch_size 8 --device cpu --precision float32"


def header(patch) -> dict[str, str]:
    """Return a patch's sentence, and what follows Source:, Script: and Flags:."""
    text = patch.read_text().partition("\ndiff --git ")[0]
    sentence, *lines = text.strip().splitlines()
    return {"Sentence": sentence} | dict(line.split(": ", 1) for line in lines)


def patched(patch, folder):
    """Return the patch's script as a module, changed by the patch."""
    script = header(patch)["Script"]
    shutil.copy(ROOT / script, folder)
    if "diff --git" in patch.read_text():
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        subprocess.run(["git", "apply", str(patch)], cwd=folder, env=env, check=True)
        assert (folder / script).read_text() != (ROOT / script).read_text()
    spec = importlib.util.spec_from_file_location(f"idea_{patch.stem}", folder / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclass looks for it
    spec.loader.exec_module(module)
    return module


def train(module, trainer, images, labels, last):
    """Train to step `last`, as the script's train() does; return the last loss."""
    config = trainer.config
    batches = module.training_batches(images, labels, config, trainer.step, trainer.device)
    for step in range(trainer.step + 1, last + 1):
        batch = next(batches)
        torch.manual_seed(hash((config.seed, step, 0)))
        trainer.set_schedules(step)
        loss = trainer.train_on(*batch)
        trainer.loss_sum += loss
        trainer.step = step
    return loss.item()


@pytest.fixture(scope="module")
def mnist():
    """Some images and labels to train on, and some to test on."""
    return mini_vit.load_mnist(mini_vit.Config(subset=400))


def test_there_are_patches_and_their_names_say_of_which_script():
    assert len(PATCHES) >= 30
    assert all(re.fullmatch("(base|augment|vit)_[a-z0-9_]+", patch.stem) for patch in PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_says_what_it_is_and_changes_one_script(patch):
    fields = header(patch)
    assert fields.keys() <= {"Sentence", "Source", "Script", "Flags"}
    assert fields["Sentence"].endswith(".")
    assert fields["Source"]
    script = fields["Script"]
    assert script == SCRIPTS[patch.stem.partition("_")[0]]
    changed = re.findall("^diff --git (.+)$", patch.read_text(), re.MULTILINE)
    assert changed == [f"a/{script} b/{script}"] or (not changed and fields["Flags"])
    added = re.findall(r"^\+(.*)$", patch.read_text(), re.MULTILINE)
    assert max(map(len, added), default=0) <= 100


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_applies_and_its_script_trains_and_goes_on_exactly(patch, tmp_path, mnist):
    module = patched(patch, tmp_path)
    flags = [*SMALL[patch.stem.partition("_")[0]].split()]
    flags += header(patch).get("Flags", "").split() + LAST.split()
    given = vars(module.make_parser().parse_args(flags))
    del given["resume"]
    config = module.Config(**given)
    images, labels, test_images, test_labels = mnist

    unbroken = module.Trainer(config, torch.device("cpu"))
    train(module, unbroken, images, labels, 2)
    checkpoint = copy.deepcopy(unbroken.state_dict())
    assert math.isfinite(train(module, unbroken, images, labels, 4))

    resumed = module.Trainer(config, torch.device("cpu"))
    resumed.load_state_dict(checkpoint)
    train(module, resumed, images, labels, 4)
    weights = unbroken.model.state_dict()
    assert all(value.equal(weights[name]) for name, value in resumed.model.state_dict().items())

    probabilities = module.log_evaluation(unbroken, test_images[:50], test_labels[:50])
    again = module.log_evaluation(resumed, test_images[:50], test_labels[:50])
    assert probabilities.equal(again)
    assert unbroken.log[0]["test_loss"] == resumed.log[0]["test_loss"] < 10
