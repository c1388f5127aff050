"""tests/ablations.py: what its rows change, and that it can be stopped and goes on."""

import re
import signal
import subprocess
import sys
from pathlib import Path

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
    monkeypatch.setattr(mini_vit, "MultiHead", mini_vit.MultiHead)
    monkeypatch.setattr(mini_vit.Trainer, "update", mini_vit.Trainer.update)
    monkeypatch.setattr(vit, "MultiHead", vit.MultiHead)
    monkeypatch.setattr(vit, "Transformer", vit.Transformer)


def new_trainer(script, **changes):
    """Return a Trainer of a small model, on the CPU, with all its blocks in use."""
    config = small_config(script, **changes)
    trainer = script.Trainer(config, torch.device("cpu"))
    trainer.set_depth(config.n_layers)
    return trainer


@pytest.mark.parametrize("script", [mini_vit, vit])
def test_without_attention_no_block_has_any(script):
    ablations.no_attention(script)
    model = script.Transformer(small_config(script))
    assert all(isinstance(block.attn, NoAttention) for block in model.blocks)
    assert model(torch.rand(3, 784)).shape == (3, 10)


def test_the_head_sees_the_mean_of_all_tokens_which_without_attention_go_their_own_ways():
    ablations.mean_without_attention(vit)
    model = vit.Transformer(small_config(vit))
    out_of_blocks = []
    into_head = []

    def remember_tokens(block, inputs, x):
        out_of_blocks.append(x)

    def remember_mean(ln, inputs):
        into_head.append(inputs[0])

    model.blocks[-1].register_forward_hook(remember_tokens, prepend=True)
    model.ln.register_forward_pre_hook(remember_mean)
    image = torch.rand(1, 784)
    changed = image.clone().view(28, 28)
    changed[:7, :7] = 0  # the first patch: token 1, behind the class token
    model(image)
    model(changed.view(1, 784))
    torch.testing.assert_close(into_head[0], out_of_blocks[0].mean(1))
    others = [0, *range(2, 17)]
    torch.testing.assert_close(out_of_blocks[0][:, others], out_of_blocks[1][:, others])
    assert not torch.allclose(out_of_blocks[0][:, 1], out_of_blocks[1][:, 1])
    assert not torch.allclose(into_head[0], into_head[1])


@pytest.mark.parametrize("with_positions", [True, False])
def test_without_position_embeddings_they_stay_at_zero(with_positions):
    if not with_positions:
        ablations.no_positions(vit)
    trainer = new_trainer(vit)
    for group in trainer.optimizer.param_groups:
        group["lr"].fill_(0.01)
    trainer.update(*random_images(16))
    assert trainer.model.position.any() == with_positions
    assert trainer.model.class_token.any()


def test_the_original_s_loss_is_one_softmax_over_the_whole_batch():
    logits = torch.randn(4, 10)
    labels = torch.tensor([3, 1, 4, 1])
    p = logits.exp() / logits.exp().sum()
    expected = -sum(p[i, label].log() for i, label in enumerate(labels)) / 4
    torch.testing.assert_close(ablations.loss_over_batch(logits, labels), expected)


def test_training_uses_the_original_s_loss_and_evaluation_does_not():
    ablations.original_loss(mini_vit)
    trainer = new_trainer(mini_vit, adversarial=0.0, dropout=0.0)
    images, labels = random_images(16)
    loss, _ = mini_vit.evaluate(trainer.model, images, labels)
    logits = trainer.model(images).detach()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    expected = ablations.loss_over_batch(logits, labels)
    torch.testing.assert_close(trainer.train_on(images, labels), expected)


def finished(folder: Path) -> dict[Path, int]:
    """Return the finished runs below a folder, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("model.pt")}


@pytest.mark.slow
def test_it_stops_goes_on_and_prints_a_table(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "ablations.py"), "--quick", "--script", "vit"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    wait_for(lambda: len(finished(tmp_path)) > 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "stopped; the same command resumes\n"
    first_half = finished(tmp_path)
    assert len(first_half) < len(ablations.ROWS["vit"])

    result = subprocess.run(command, cwd=tmp_path, check=True, **pipes)
    assert first_half.items() <= finished(tmp_path).items()
    _, _, *lines = result.stdout.splitlines()
    assert [line.split(" | ")[0][2:] for line in lines] == list(ablations.ROWS["vit"])
    for line in lines:
        assert re.fullmatch(r"\| .+ \| (\d+\.\d\d) % \| \1 \| \d\.\d{4} \| \d+ \|", line)


def test_of_several_seeds_it_prints_mean_and_standard_deviation():
    assert ablations.spread([0.98, 0.99]) == "98.50 ± 0.71 %"
