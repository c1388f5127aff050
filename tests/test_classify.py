"""--classify brings any picture of a digit into MNIST's form."""

import random

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageFilter


@pytest.fixture(scope="module")
def trained():
    """A model that has seen enough real digits to know them."""
    import mini_vit

    config = mini_vit.Config(
        n_layers=1, n_head=8, d_head=32, n_embd=256, data_dir=str(ROOT / "data"), subset=30000, learning_rate=1e-3
    )
    images, labels, test_images, test_labels = mini_vit.load_mnist(config)
    torch.manual_seed(0)
    model = mini_vit.Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = mini_vit.shuffled_indices(len(images), config, 0)
    for _ in range(400):
        indices = next(batches)
        torch.nn.functional.cross_entropy(model(images[indices]), labels[indices]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), test_images, test_labels


def drawing(digit: np.ndarray, kind: str, rng: random.Random) -> Image.Image:
    """Return a test image as people would bring it: other size, place, stroke, colours."""
    size = rng.randint(20, 300)
    ink = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    if kind == "thick":
        ink = ink.filter(ImageFilter.MaxFilter(2 * (size // 56) + 1))
    if kind == "thin":
        ink = ink.filter(ImageFilter.MinFilter(2 * (size // 84) + 1))
    canvas = Image.new("L", (size + rng.randint(0, 300), size + rng.randint(0, 300)), 0)
    canvas.paste(ink, (rng.randint(0, canvas.width - size), rng.randint(0, canvas.height - size)))
    if kind == "cropped":  # the digit touches all four edges
        canvas = ink.crop(ink.getbbox())
    if kind == "inverted":
        return Image.eval(canvas, lambda x: 255 - x)
    if kind == "transparent":
        drawn = Image.new("RGBA", canvas.size, (20, 20, 90, 255))
        drawn.putalpha(canvas)
        return drawn
    if kind == "photograph":  # blue pen on yellowish paper in uneven light, with noise
        share = np.asarray(canvas, np.float32)[..., None] / 255
        paper, pen = np.float32([230, 220, 190]), np.float32([40, 50, 130])
        light = np.linspace(0.75, 1, canvas.width, dtype=np.float32)[None, :, None]
        noise = np.random.default_rng(rng.randint(0, 999)).normal(0, 4, (canvas.height, canvas.width, 1))
        return Image.fromarray(((paper * (1 - share) + pen * share) * light + noise).clip(0, 255).astype(np.uint8))
    return canvas


@pytest.mark.parametrize("kind", ["plain", "thick", "thin", "inverted", "transparent", "photograph", "cropped"])
def test_transformed_digits_keep_their_label(kind, trained, tmp_path):
    import mini_vit

    model, images, _ = trained
    rng = random.Random(kind)
    chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:200]]
    read = []
    for i, image in enumerate(chosen):
        drawing(image.view(28, 28).numpy(), kind, rng).save(tmp_path / f"{i}.png")
        read.append(mini_vit.read_digit(str(tmp_path / f"{i}.png")))
    with torch.no_grad():
        same = model(torch.stack(read)).argmax(-1) == model(chosen).argmax(-1)
    assert same.double().mean() >= 0.95


def test_mnist_images_come_back_nearly_unchanged(trained, tmp_path):
    import mini_vit

    _, images, _ = trained
    distances = []
    for image in images[:100]:
        Image.fromarray(image.view(28, 28).numpy()).save(tmp_path / "digit.png")
        read = mini_vit.read_digit(str(tmp_path / "digit.png"))
        distances.append((read.float() - image).abs().sum() / image.float().sum())
    assert torch.stack(distances).median() < 0.05
