"""mini_vit_augment.py: its images, and its batches, whichever worker makes them."""

import pytest
import torch
from conftest import SHORT, TINY, random_images

import mini_vit_augment as script


def test_augmentation_is_random_per_image_and_repeatable():
    config = script.Config()
    images, *_ = script.load_mnist(script.Config(subset=64))
    one_image = images[:1].expand(64, -1)
    first, again, other = (
        script.augment(one_image, config, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 64
    ink = script.augment(images, config, torch.Generator()).double().sum() / images.double().sum()
    assert 0.85 < ink < 1.15


def test_each_strength_does_its_own_part():
    nothing = {"rotation": 0, "scaling": 0, "shear": 0, "translation": 0, "elastic": 0}
    images, *_ = script.load_mnist(script.Config(subset=64))
    still = script.augment(images, script.Config(**nothing), torch.Generator())
    torch.testing.assert_close(still, images, rtol=0, atol=1)
    one_image = images[:1].expand(64, -1)
    scaling = script.Config(**nothing | {"scaling": 0.17})
    sized = script.augment(one_image, scaling, torch.Generator())
    sized = sized.view(-1, 28, 28).double()
    sized = sized / sized.sum((1, 2), keepdim=True)
    square = (torch.arange(28.0).double() - 13.5).square()
    spread = torch.stack([sized.sum(axis) @ square for axis in (1, 2)])  # of width and of height
    assert abs(torch.corrcoef(spread)[0, 1]) < 0.5
    assert (spread.std(1) > 0.1 * spread.mean(1)).all()
    translation = script.Config(**nothing | {"translation": 1.5})
    shifted = script.augment(images, translation, torch.Generator()).double()
    # 0.97; bilinear interpolation would blur to 0.90.
    assert shifted.square().sum() / images.double().square().sum() > 0.94


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_augments_as_a_cpu_does():
    images, *_ = script.load_mnist(script.Config(subset=300))
    on_cpu, on_gpu = (
        script.augment(there, script.Config(), torch.Generator().manual_seed(1))
        for there in (images, images.cuda())
    )
    assert on_gpu.is_cuda
    difference = (on_gpu.cpu().int() - on_cpu.int()).abs()
    assert difference.max() <= 1  # a gray level, from rounding


def test_batches_depend_on_seed_and_step_alone():
    images, labels = random_images(40)[0], torch.arange(40)

    def take(n, start=0, workers=0, seed=1):
        config = script.Config(batch_size=20, num_workers=workers, seed=seed, max_iters=6)
        batches = script.training_batches(images, labels, config, start, torch.device("cpu"))
        return [next(batches) for _ in range(n)]

    reference = take(6)
    for workers in (1, 2):
        for (a, b), (c, d) in zip(take(6, workers=workers), reference, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
    assert torch.equal(take(1, start=4)[0][0], reference[4][0])
    assert not torch.equal(take(1, seed=2)[0][0], reference[0][0])
    flat = torch.cat([batch for batch, _ in reference])
    assert len(flat.unique(dim=0)) == 120  # every pass and every worker draws anew


def test_a_worker_s_bug_keeps_its_traceback(main, monkeypatch):
    def augment(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(script, "augment", augment)
    with pytest.raises(ValueError, match="a bug"):
        main("mini_vit_augment", *TINY["mini_vit_augment"], *SHORT, "--num_workers", "1")
