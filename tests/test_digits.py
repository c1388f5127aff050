"""digits.py finds digits in pictures of any kind, and says where they stand."""

import contextlib
import io
import random
import struct

import numpy as np
import pytest
import torch
from pictures import BLANK, CHANCY, KINDS, NUMBERS, draw, draw_number, in_shadow
from PIL import Image

import digits
import mini_vit

FILES = {"cmyk": "tif", "lab": "tif", "float": "tif", "webp": "webp", "gif": "gif", "avif": "avif"}


@pytest.fixture(scope="module")
def trained():
    """A model that knows real digits, and test images that it is sure of, with their labels."""
    config = mini_vit.Config(
        n_layers=1, n_head=8, d_head=32, n_embd=256, max_iters=600, device="cpu", dropout=0
    )
    images, labels, test_images, test_labels = mini_vit.load_mnist(config)
    trainer = mini_vit.Trainer(config, torch.device("cpu"))
    for step in range(1, config.max_iters + 1):
        trainer.set_schedules(step)
        indices = mini_vit.batch_indices(step, len(images), config)
        trainer.train_on(images[indices], labels[indices])
    with torch.no_grad():
        probabilities, predicted = trainer.model.eval()(test_images[:2000]).softmax(-1).max(-1)
    sure = (predicted == test_labels[:2000]) & (probabilities > 0.99)
    images = test_images[:2000][sure].view(-1, 28, 28).numpy()
    return trainer.model, images, test_labels[:2000][sure].tolist()


def save(picture: Image.Image, path) -> str:
    """Save a picture, in less time if it is a PNG, and return its path."""
    picture.save(path, **{"compress_level": 1} if path.suffix == ".png" else {})
    return str(path)


def recognize(model, found: list[digits.Digit]) -> list[int]:
    """Return what the model takes digits for."""
    with torch.no_grad():
        return [model(digit.pixels[None]).argmax(-1).item() for digit in found]


def read(model, picture: Image.Image, path) -> list[int]:
    """Return the digits that the model finds in a picture that is saved and opened again."""
    return recognize(model, digits.read_digits(save(picture, path)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_digit_is_read_from_any_kind_of_picture(kind, trained, tmp_path):
    model, images, labels = trained
    rng, suffix = random.Random(kind), FILES.get(kind, "png")
    right = 0
    for image, label in zip(images[:20], labels[:20], strict=True):
        with contextlib.suppress(ValueError):
            right += read(model, draw(image, kind, rng), tmp_path / f"digit.{suffix}") == [label]
    assert right >= (18 if kind in CHANCY else 19)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_is_read_digit_by_digit(kind, trained, tmp_path):
    model, images, labels = trained
    rng, right, counted = random.Random(kind), 0, 0
    for _ in range(20):
        picture, lines = draw_number(images, kind, rng)
        found = digits.read_digits(save(picture, tmp_path / "number.png"))
        rows = [row for row, line in enumerate(lines) for _ in line]
        counted += [digit.row for digit in found] == rows
        right += recognize(model, found) == [labels[i] for line in lines for i in line]
    assert counted == 20
    assert right >= (19 if kind == "two_digits" else 18)


@pytest.mark.parametrize("kind", BLANK)
def test_there_is_nothing_in_a_blank_sheet(kind, tmp_path):
    with pytest.raises(ValueError, match="nothing in it"):
        digits.read_digits(save(BLANK[kind](), tmp_path / "blank.png"))


@pytest.mark.slow
def test_a_shadow_on_a_blank_sheet_is_nothing(tmp_path):
    rng, nothing = random.Random(1), 0
    for _ in range(60):
        path = save(in_shadow(rng), tmp_path / "shadow.png")
        try:
            digits.read_digits(path)
        except ValueError:
            nothing += 1
    assert nothing == 60


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 300), (300, 3)])
def test_there_is_nothing_in_a_picture_of_a_few_pixels(size, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, size[::-1], np.uint8)
    with pytest.raises(ValueError, match="nothing in it"):
        digits.read_digits(save(Image.fromarray(pixels), tmp_path / "few.png"))


def test_a_huge_picture_is_to_be_made_smaller(tmp_path):
    path = save(Image.new("1", (20_000, 20_000)), tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"too many pixels: make it smaller"):
        digits.read_digits(path)


def test_neither_an_icon_nor_a_later_page_hides_a_huge_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "MOST_PIXELS", 10_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    inside = io.BytesIO()
    Image.new("1", (300, 300)).save(inside, "PNG")
    inside = inside.getvalue()
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22) + inside
    for count_or_read in (digits.count_pages, digits.read_digits):
        with pytest.raises(ValueError, match="too many pixels"):
            count_or_read(io.BytesIO(icon))
    pages = [Image.new("L", (20, 20)), Image.new("L", (300, 300))]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="too many pixels"):
        digits.read_digits(tmp_path / "pages.tif", 1)


def test_a_camera_s_preview_is_no_page(tmp_path):
    photo, preview = Image.new("RGB", (90, 90)), Image.new("RGB", (30, 30))
    photo.save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "photo.jpg") as image:
        assert image.n_frames == 2
    assert digits.count_pages(tmp_path / "photo.jpg") == 1


@pytest.mark.slow
def test_boxes_and_rows_say_where_digits_stand(trained, tmp_path):
    """The picture is larger than what digits.py works on, and its aspect ratio differs."""
    _, images, _ = trained
    page = np.zeros((1000, 1800), np.uint8)
    places = [(90, 200), (100, 1200), (600, 250), (590, 1300)]
    for image, (top, left) in zip(images, places, strict=False):
        page[top : top + 280, left : left + 280] = np.kron(image, np.ones((10, 10), np.uint8))
    found = digits.read_digits(save(Image.fromarray(255 - page), tmp_path / "four.png"))
    assert [digit.row for digit in found] == [0, 0, 1, 1]
    for digit, image, (top, left) in zip(found, images, places, strict=False):
        rows, columns = (image > 128).any(1).nonzero()[0], (image > 128).any(0).nonzero()[0]
        drawn = 10 * columns[0], 10 * rows[0], 10 * columns[-1] + 10, 10 * rows[-1] + 10
        assert np.abs(np.subtract(digit.box, np.add(drawn, (left, top, left, top)))).max() <= 15


@pytest.mark.slow
def test_a_picture_is_turned_as_its_exif_block_says(trained, tmp_path):
    """Boxes are in pixels of the picture that open_picture returns."""
    model, images, labels = trained
    picture = draw(images[0], "photograph", random.Random(1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    assert digits.open_picture(tmp_path / "turned.jpg").size == picture.size
    found = digits.read_digits(tmp_path / "turned.jpg")
    assert recognize(model, found) == [labels[0]]
    assert found[0].box[2] <= picture.width and found[0].box[3] <= picture.height


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_broken_exif_block_is_ignored(suffix, trained, tmp_path):
    model, images, labels = trained
    picture = draw(images[0], "photograph", random.Random(1))
    picture.save(tmp_path / f"digit.{suffix}", exif=b"Exif\x00\x00not at all")
    assert recognize(model, digits.read_digits(tmp_path / f"digit.{suffix}")) == [labels[0]]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_each_page_is_read(suffix, trained, tmp_path):
    model, images, labels = trained
    pages = [draw(image, "plain", random.Random(1)).convert("L") for image in images[:3]]
    path = tmp_path / f"pages.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert digits.count_pages(path) == 3
    for page in range(3):
        assert recognize(model, digits.read_digits(path, page)) == [labels[page]]
    pages[0].save(tmp_path / "one.png")
    assert digits.count_pages(tmp_path / "one.png") == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", [2, 200, 0.2])
def test_a_jpeg_that_lacks_its_last_bytes_is_read(lost, trained, tmp_path):
    """Bytes or, below 1, a share of the file."""
    model, images, labels = trained
    file = io.BytesIO()
    draw(images[1], "photograph", random.Random(1)).save(file, "JPEG")
    whole = file.getvalue()
    part = whole[: -lost if lost >= 1 else -round(lost * len(whole))]
    assert recognize(model, digits.read_digits(io.BytesIO(part))) == [labels[1]]


@pytest.mark.slow
def test_mnist_images_come_back_nearly_unchanged(trained, tmp_path):
    distances = []
    for image in trained[1][:100]:
        (read,) = digits.read_digits(save(Image.fromarray(image), tmp_path / "digit.png"))
        image = torch.from_numpy(image).flatten().float()
        distances.append((read.pixels.float() - image).abs().sum() / image.sum())
    assert torch.stack(distances).median() < 0.1
