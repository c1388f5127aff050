"""The models and their training step: sizes, blocks, schedules, evaluation, CUDA graphs."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import SHORT, TINY, assert_same, random_images, random_model, rows, small_config
from torch.nn.functional import cross_entropy

import mini_vit
import mini_vit_augment
import mini_vit_concat
import vit

PARAMETERS = {
    "mini_vit": 118_148_810,
    "mini_vit_concat": 492_622_490,
    "mini_vit_augment": 118_148_810,
    "vit": 803_338,
}


def test_parameter_count(module):
    with torch.device("meta"):
        model = module.Transformer(module.Config())
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[module.__name__]


def test_other_widths_get_a_linear_layer_first():
    assert isinstance(mini_vit.Transformer(mini_vit.Config(n_layers=1)).embed, torch.nn.Identity)
    narrow = mini_vit.Transformer(mini_vit.Config(n_layers=1, n_head=4, d_head=14, n_embd=56))
    assert narrow.embed.weight.shape == (56, 784)


def test_concat_gives_every_block_the_image():
    model, images = random_model(mini_vit_concat, n_layers=3), torch.rand(4, 784)
    inputs, outputs = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.register_forward_hook(lambda _, args, out: outputs.append(out))
    logits = model(images)
    firsts = [model.embed(images)] + [
        layer(out) for layer, out in zip(model.reduce, outputs, strict=True)
    ]
    expected = [torch.cat([first, images], -1) for first in firsts]
    for x, formula in zip(inputs, expected[:-1], strict=True):
        torch.testing.assert_close(x, formula)
    torch.testing.assert_close(logits, model.head(model.ln(expected[-1])))


def test_a_new_block_of_concat_passes_on_what_it_gets():
    model = mini_vit_concat.Transformer(
        mini_vit_concat.Config(n_layers=2, n_head=8, d_head=100, n_embd=800)
    )
    x = torch.rand(5, 800)
    torch.testing.assert_close(model.reduce[1](x), x[:, :16])


@pytest.mark.parametrize("warmup_iters", [0, 20, 100, 200])
def test_learning_rate_warms_up_and_decays(module, warmup_iters):
    """Also where nothing is left to decay: a run as short as its warmup, or shorter."""
    config = module.Config(learning_rate=1.0, max_iters=100, warmup_iters=warmup_iters)
    rates = [module.learning_rate(step, config) for step in range(1, 101)]
    warmup, decay = rates[:warmup_iters], rates[warmup_iters:]
    assert all(0 <= rate <= 1 for rate in rates)
    assert warmup == sorted(warmup) and decay == sorted(decay, reverse=True)
    if warmup_iters < 100:
        assert max(rates) > 0.999 and rates[-1] == 0
    if warmup_iters == 20:
        assert rates[0] == pytest.approx(2 / 20)
        assert rates[18] == rates[19] == 1  # steps 19 and 20: see the docstring
        assert rates[59] == pytest.approx(0.5)  # the middle of the cosine


def test_depth_grows_from_the_first_blocks_to_all(module):
    config = module.Config(n_layers=4, max_iters=100, first_layers=1, growth=2.0)

    def depths(config):
        return [module.blocks_in_use(step, config) for step in range(1, 101)]

    first = depths(config)
    assert first == sorted(first)
    # The first steps past 100 sqrt((n - 1) / 4).
    assert [first.index(n) + 1 for n in (1, 2, 3, 4)] == [1, 51, 71, 87]
    config.first_layers = 3
    assert depths(config) == [max(3, depth) for depth in first]
    config.first_layers = 5
    assert set(depths(config)) == {4}
    assert set(depths(module.Config(n_layers=4, max_iters=100, growth=0.0))) == {4}


def test_blocks_not_in_use_change_nothing(module):
    """A model at depth 1 is the model of one block."""
    images = torch.rand(50, 784)
    deep, one = random_model(module, n_layers=3), random_model(module, n_layers=1)
    one.load_state_dict({name: deep.state_dict()[name] for name in one.state_dict()})
    deep.depth = 1
    torch.testing.assert_close(deep(images), one(images), rtol=0, atol=0)
    deep.depth = 2
    assert not torch.allclose(deep(images), one(images))


def test_attention_by_the_book_computes_what_the_fast_one_does(module):
    """The same logits, the same gradients."""
    images, labels = random_images(20)
    fast, slow = (random_model(module, attention=way) for way in ("fast", "by the book"))
    slow.load_state_dict(fast.state_dict())
    torch.testing.assert_close(slow(images), fast(images), rtol=1e-4, atol=1e-5)
    for model in (fast, slow):
        cross_entropy(model(images), labels).backward()
    for a, b in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_attention_by_the_book_trains(main, tmp_path):
    """In bfloat16, where hardware has it, too."""
    for way in ("fast", "by the book"):
        main("mini_vit", *TINY["mini_vit"], *SHORT, "--attention", way, "--out_dir", way)
    for a, b in zip(rows(tmp_path / "fast"), rows(tmp_path / "by the book"), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=0.01)


def test_uint8_images_are_pixels_from_0_to_1(module):
    model, (images, _) = random_model(module), random_images(3)
    torch.testing.assert_close(model(images), model(images.float() / 255))


def test_evaluation_counts_each_image_once_whatever_the_batch_size(module):
    model, (images, labels) = random_model(module, dropout=0.5), random_images(103)
    loss, probabilities = module.evaluate(model, images, labels, 103)
    assert probabilities.shape == (103, 10) and not model.training  # as it was
    model.train()
    for batch_size in (1, 10, 1000):
        again, same = module.evaluate(model, images, labels, batch_size)
        assert again == pytest.approx(loss, rel=1e-5) and model.training
        torch.testing.assert_close(same, probabilities, rtol=1e-4, atol=1e-6)


def trained_on(module, images, labels, **changes) -> tuple:
    """Return the model before a training step, and the images of its last forward pass."""
    config = small_config(module, dropout=0.0, **changes)
    trainer = module.Trainer(config, torch.device("cpu"))
    trainer.set_schedules(config.max_iters)
    seen = []
    trainer.model.load_state_dict(random_model(module).state_dict())
    trainer.model.eval().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    before = copy.deepcopy(trainer.model)
    trainer.update(images, labels)
    return before, seen[-1]


def test_adversarial_images_raise_the_loss(module):
    images, labels = random_images(20)
    all_images = {"easy_share": 0.0} if hasattr(module.Config, "easy_share") else {}
    model, adversarial = trained_on(module, images, labels, adversarial=0.01, **all_images)
    change = adversarial - images / 255
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.01))
    before, after, opposite = (
        cross_entropy(model(x), labels, reduction="none").detach()
        for x in (images, adversarial, images / 255 - change)
    )
    assert (after > before).all() and (opposite < before).all()


@pytest.mark.parametrize("share, n", [(0.75, 5), (0.01, 20), (0.99, 1)])
@pytest.mark.parametrize("script", [mini_vit_augment, vit])
def test_the_easy_share_of_a_batch_is_left_out(script, share, n):
    images, labels = random_images(20)
    model, kept = trained_on(script, images, labels, adversarial=0.0, easy_share=share)
    losses = cross_entropy(model(images), labels, reduction="none")
    assert torch.equal(kept, images[losses.argsort(descending=True)[:n]])


def test_recorded_steps_train_as_the_usual_ones_do(monkeypatch):
    """With fake CUDA graphs: recording leaves no trace; a replay runs the update on its batch."""
    config = mini_vit.Config(n_layers=2, n_head=4, d_head=14, n_embd=56, dropout=0.0)
    trainer, usual = (mini_vit.Trainer(config, torch.device("cpu")) for _ in range(2))
    model, optimizer = trainer.model, trainer.optimizer
    replays = []

    @contextmanager
    def record(*_, **__):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        yield
        model.load_state_dict(before[0])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": before[1]})

    class Graph:
        def replay(self):
            recorded = trainer.train_on
            recorded.loss.copy_(recorded.update(recorded.images, recorded.labels))
            replays.append(model.depth)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    for depth in (1, 2):
        for one in (trainer, usual):
            one.set_depth(depth)
            one.optimizer.param_groups[0]["lr"].fill_(1e-3)
        trainer.train_on = mini_vit.RecordedUpdate(trainer.update)
        for _ in range(6):
            images, labels = random_images(8)
            assert trainer.train_on(images, labels) == usual.train_on(images, labels)
    assert replays == [1, 1, 1, 2, 2, 2]
    assert_same(model.state_dict(), usual.model.state_dict())


def test_weight_decay_is_for_matrices_only_and_both_groups_share_the_learning_rate(module):
    config = small_config(module)
    matrices, others = module.Trainer(config, torch.device("cpu")).optimizer.param_groups
    assert {p.dim() for p in matrices["params"]} == {2} and {p.dim() for p in others["params"]} == {
        1
    }
    assert (matrices["weight_decay"], others["weight_decay"]) == (config.weight_decay, 0)
    trainer = module.Trainer(config, torch.device("cpu"))
    trainer.set_schedules(50)
    for group in trainer.optimizer.param_groups:
        assert group["lr"].item() == pytest.approx(module.learning_rate(50, config))


def test_precision_follows_the_device_or_the_flag(module):
    has_it = torch.cpu.get_capabilities().get("avx512_bf16", False)
    expected = {"auto": "bfloat16" if has_it else "float32"}
    expected |= {"float32": "float32", "bfloat16": "bfloat16"}
    for precision, chosen in expected.items():
        config = small_config(module, precision=precision)
        model = module.Trainer(config, torch.device("cpu")).model
        assert model.precision == chosen
        assert model(torch.rand(2, 784)).dtype == torch.float32  # logits and weights always are
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_without_bfloat16_of_its_own_uses_float32(native, monkeypatch):
    """Such as a T4, which emulates it."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    chosen = mini_vit.choose_precision(mini_vit.Config(), torch.device("cuda"))
    assert chosen == ("bfloat16" if native else "float32")
