"""tests/ablations.py: what its rows change, and that it can be stopped and goes on."""

import re
import signal
import subprocess
import sys

import ablations
import pytest
import torch
from conftest import ROOT, random_images, small_config, wait_for
from reference import NoAttention

import mini_vit
import vit


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """Give the scripts back what a row has changed."""
    for script, name in ((mini_vit, "MultiHead"), (mini_vit.Trainer, "step"), (vit, "MultiHead"), (vit, "Transformer")):
        monkeypatch.setattr(script, name, getattr(script, name))


@pytest.mark.parametrize("script", [mini_vit, vit])
def test_without_attention_no_block_has_any(script):
    ablations.no_attention(script)
    model = script.Transformer(small_config(script))
    assert all(isinstance(block.attn, NoAttention) for block in model.blocks)
    assert model(torch.rand(3, 784)).shape == (3, 10)


def test_the_head_sees_the_mean_of_all_tokens_which_without_attention_go_their_own_ways():
    ablations.mean_without_attention(vit)
    model, last, seen = vit.Transformer(small_config(vit)), [], []
    model.blocks[-1].register_forward_hook(lambda block, inputs, x: last.append(x), prepend=True)
    model.ln.register_forward_pre_hook(lambda ln, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 784)
    changed = image.clone().view(28, 28)
    changed[:7, :7] = 0  # the first patch: token 1, behind the class token
    model(image)
    model(changed.view(1, 784))
    torch.testing.assert_close(seen[0], last[0].mean(1))
    torch.testing.assert_close(*(x[:, [0, *range(2, 17)]] for x in last))
    assert not torch.allclose(*seen)


def test_without_position_embeddings_they_stay_at_zero():
    for change, trained in ((lambda script: None, True), (ablations.no_positions, False)):
        change(vit)
        trainer = vit.Trainer(small_config(vit), torch.device("cpu"), 1, {})
        trainer.optimizer.param_groups[0]["lr"].fill_(0.01)
        trainer(*random_images(16))
        assert trainer.model.position.any() == trained and trainer.model.class_token.any()


def test_the_original_s_loss_is_one_softmax_over_the_whole_batch():
    logits, labels = torch.randn(4, 10), torch.tensor([3, 1, 4, 1])
    p = logits.exp() / logits.exp().sum()
    expected = -sum(p[i, label].log() for i, label in enumerate(labels)) / 4
    torch.testing.assert_close(ablations.loss_over_batch(logits, labels), expected)
    ablations.original_loss(mini_vit)
    trainer = mini_vit.Trainer(small_config(mini_vit, adversarial=0.0, dropout=0.0), torch.device("cpu"), 1, {})
    images, labels = random_images(16)
    expected = ablations.loss_over_batch(trainer.model(images), labels)
    torch.testing.assert_close(trainer.step(images, labels), expected.detach())


def test_it_stops_goes_on_and_prints_a_table(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "ablations.py"), "--quick", "--script", "vit"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.rglob("model.pt"))) > 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stopped; the same command goes on\n")
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.pt")}
    assert len(finished) < len(ablations.ROWS["vit"][1])
    table = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.pt")}.items()
    assert [line.split(" | ")[0][2:] for line in table[2:]] == list(ablations.ROWS["vit"][1])
    for line in table[2:]:
        assert re.fullmatch(r"\| .+ \| (\d+\.\d\d) % \| \1 \| \d\.\d{4} \| \d+ \|", line)


def test_of_several_seeds_it_prints_mean_and_standard_deviation():
    assert ablations.spread([0.98, 0.99]) == "98.50 ± 0.71 %"
