"""digits.py finds digits in pictures of any kind, and says where they stand."""

import io
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from pictures import BLANK, KINDS, NUMBERS, SHAPES, draw, draw_number, in_shadow
from PIL import Image

import digits
import mini_vit

FILES = {"cmyk": "tif", "lab": "tif", "float": "tif", "webp": "webp", "gif": "gif", "avif": "avif"}
LEAST = {"dashed": 15, "cut_4": 16}  # of 20; 18 of the others


@pytest.fixture(scope="module")
def trained():
    """A model that knows real digits, and test images that it is sure of, with their labels."""
    torch.manual_seed(1)
    images, labels, test_images, test_labels = mini_vit.load_mnist(mini_vit.Config(device="cpu"))
    layers = torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for chosen in torch.randperm(len(images)).split(150):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[chosen] / 255), labels[chosen])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        probabilities, predicted = model(test_images[:2000] / 255).softmax(-1).max(-1)
    sure = (predicted == test_labels[:2000]) & (probabilities > 0.99)
    images = test_images[:2000][sure].view(-1, 28, 28).numpy()
    return model, images, test_labels[:2000][sure].tolist()


def save(picture: Image.Image, path) -> str:
    """Save a picture, in less time if it is a PNG, and return its path."""
    picture.save(path, **{"compress_level": 1} if path.suffix == ".png" else {})
    return str(path)


def in_bytes(picture: Image.Image, format: str, **options) -> bytes:
    """Return the content of an image file."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


@torch.no_grad()
def recognize(model, found: list[digits.Digit]) -> list[int]:
    """Return what the model takes digits for."""
    return [model(digit.pixels / 255).argmax().item() for digit in found]


def read(model, picture: Image.Image, path) -> list[int]:
    """Return the digits that the model finds in a picture that is saved and opened again."""
    try:
        return recognize(model, digits.read_digits(save(picture, path)))
    except digits.NothingThere:
        return []


def count_right(kind: str, n: int, trained, tmp_path) -> int:
    """Return how many of n pictures of a kind are read right, all digits of each."""
    model, images, labels = trained
    rng = random.Random(kind)
    path = tmp_path / f"picture.{FILES.get(kind, 'png')}"
    right = 0
    for _ in range(n):
        if kind in NUMBERS:
            picture, lines = draw_number(images, kind, rng)
        else:
            lines = [[rng.randrange(len(images))]]
            picture = draw(images[lines[0][0]], kind, rng)
        right += read(model, picture, path) == [labels[i] for line in lines for i in line]
    return right


def test_digits_are_read_from_any_kind_of_picture(trained, tmp_path):
    right = {kind: count_right(kind, 1, trained, tmp_path) for kind in KINDS}
    assert sum(right.values()) >= len(KINDS) - 3, right


def test_numbers_are_read_digit_by_digit(trained, tmp_path):
    right = {kind: count_right(kind, 1, trained, tmp_path) for kind in NUMBERS}
    assert sum(right.values()) >= len(NUMBERS) - 2, right


@pytest.mark.parametrize("path", sorted((ROOT / "tests/cases").iterdir()), ids=lambda p: p.stem)
def test_a_picture_that_was_misread_once(path, trained):
    """Its name begins with the digits in it."""
    found = digits.read_digits(path)
    number = path.stem.partition("_")[0]
    assert len(found) == len(number)
    read = "".join(map(str, recognize(trained[0], found)))
    assert sum(a != b for a, b in zip(read, number, strict=True)) <= len(number) // 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *NUMBERS])
def test_most_pictures_of_a_kind_are_read(kind, trained, tmp_path):
    assert count_right(kind, 20, trained, tmp_path) >= LEAST.get(kind, 18)


@pytest.mark.slow
def test_rows_are_told_apart(trained, tmp_path):
    rng = random.Random(1)
    for kind in ("two_rows", "three_rows", "rising_rows", "column", "row") * 4:
        picture, lines = draw_number(trained[1], kind, rng)
        found = digits.read_digits(save(picture, tmp_path / "number.png"))
        assert [digit.row for digit in found] == [n for n, line in enumerate(lines) for _ in line]


@pytest.mark.parametrize("kind", SHAPES)
def test_what_has_no_digit_s_shape_is_none(kind, tmp_path):
    with pytest.raises(digits.NothingThere, match="no digit in it"):
        digits.read_digits(save(SHAPES[kind](), tmp_path / "shape.png"))


@pytest.mark.parametrize("kind", BLANK)
def test_there_is_nothing_in_a_blank_sheet(kind, tmp_path):
    with pytest.raises(digits.NothingThere):
        digits.read_digits(save(BLANK[kind](), tmp_path / "blank.png"))


@pytest.mark.slow
def test_a_shadow_on_a_blank_sheet_is_nothing(tmp_path):
    rng, nothing = random.Random(1), 0
    for _ in range(120):
        path = save(in_shadow(rng), tmp_path / "shadow.png")
        try:
            digits.read_digits(path)
        except digits.NothingThere:
            nothing += 1
    assert nothing == 120


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 300), (300, 3)])
def test_there_is_nothing_in_a_picture_of_a_few_pixels(size, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, size[::-1], np.uint8)
    with pytest.raises(digits.NothingThere, match="nothing in it"):
        digits.read_digits(save(Image.fromarray(pixels), tmp_path / "few.png"))


def test_a_huge_picture_is_to_be_made_smaller(tmp_path):
    path = save(Image.new("1", (16_000, 16_000)), tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"too many pixels: make it smaller"):
        digits.read_digits(path)


def test_no_later_page_hides_a_huge_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "MOST_MEMORY", 100_000)
    pages = [Image.new("L", (20, 20)), Image.new("L", (300, 300))]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(digits.NothingThere):
        digits.read_digits(tmp_path / "pages.tif")
    with pytest.raises(ValueError, match="too many pixels"):
        digits.read_digits(tmp_path / "pages.tif", 1)


@pytest.mark.parametrize(
    "header", ["P5 {} {} 65535", "P5 {} {} 255", "Pf {} {} -1.0", "P6 {} {} 255"]
)
@pytest.mark.parametrize("side", [13_000, 14_000])
def test_a_few_bytes_that_claim_a_huge_picture_are_refused_at_once(header, side):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="pixels"):
        digits.read_digits(io.BytesIO(f"{header.format(side, side)}\n...............".encode()))
    assert time.perf_counter() - start < 1


def many_scans(side: int, n: int) -> bytes:
    """Return a JPEG whose last scan is there n times more."""
    whole = in_bytes(Image.new("L", (side, side), 200), "JPEG", progressive=True)
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + n * scan + whole[-2:]


def test_a_jpeg_of_a_thousand_scans_is_refused():
    with pytest.raises(ValueError, match="1006 scans"):
        digits.read_digits(io.BytesIO(many_scans(500, 1000)))
    with pytest.raises(digits.NothingThere):  # six are usual
        digits.read_digits(io.BytesIO(many_scans(500, 0)))


def test_only_formats_of_the_list_are_opened(tmp_path):
    Image.new("L", (50, 50)).save(tmp_path / "icon.ico")
    with pytest.raises(Image.UnidentifiedImageError):
        digits.read_digits(tmp_path / "icon.ico")


MEASURE = """
import resource, sys
import digits
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
digits.open_picture(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, ru_maxrss has other units")
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "F", "jpg"])
def test_a_picture_takes_at_most_five_bytes_a_pixel(mode, tmp_path):
    """This includes what was drawn from it, and Pillow's plugins."""
    side = 7000
    if mode == "jpg":
        path = tmp_path / "large.jpg"
        Image.effect_noise((side, side), 50).convert("RGB").save(path)
    else:
        path = tmp_path / ("large.tif" if mode in ("CMYK", "F") else "large.png")
        image = Image.new(mode, (side, side))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, **({"exif": exif, "compress_level": 1} if path.suffix == ".png" else {}))
    command = [sys.executable, "-c", MEASURE, str(path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(out) * 1024 < (1 if mode == "jpg" else 5) * side**2 + 20e6


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


@pytest.mark.parametrize("lost", [2, 0.25])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_file_that_lacks_its_end_is_read_as_far_as_it_goes(format, lost, trained):
    """The digit is in a noisy photograph's upper half; `lost` is bytes or else a share of them."""
    model, images, labels = trained
    page = np.random.default_rng(1).integers(200, 215, (400, 300, 3), np.uint8)
    page[30:170, 80:220] -= (np.kron(images[1], np.ones((5, 5))) / 2).astype(np.uint8)[..., None]
    whole = in_bytes(Image.fromarray(page), format)
    if format == "PNG":
        lost = lost if lost < 1 else 30  # an empty chunk ends the file
    part = whole[: -lost if lost >= 1 else -round(lost * len(whole))]
    found = digits.read_digits(io.BytesIO(part))
    assert recognize(model, found) == [labels[1]]
    if lost < 1:
        missing = int(found.note.removeprefix("its last ").removesuffix(" % is missing"))
        assert abs(missing - 25) < 10
    else:
        assert "missing" in found.note
    assert digits.read_digits(io.BytesIO(whole)).note == ""


def test_digits_that_touch_are_separated_or_doubted(trained, tmp_path):
    """Pairs of MNIST's digits overlap by two of its pixels."""
    n_plain = 0
    for left, right in zip(trained[1][:20], trained[1][20:40], strict=True):
        left, right = (image[:, (image > 60).any(0)] for image in (left, right))
        pair = np.zeros((28, left.shape[1] + right.shape[1] - 2), np.uint8)
        pair[:, : left.shape[1]] = left
        pair[:, -right.shape[1] :] |= right
        page = np.pad(np.kron(pair, np.ones((6, 6), np.uint8)), 60)
        found = digits.read_digits(save(Image.fromarray(255 - page), tmp_path / "pair.png"))
        n_plain += len(found) == 1 and not found[0].hint
    assert n_plain <= 8


def test_why_a_reading_is_not_sure(tmp_path):
    def with_lines(*lines):
        page = np.full((300, 300), 230, np.uint8)
        for top, left, bottom, right in lines:
            page[top:bottom, left:right] = 20
        (digit,) = digits.read_digits(save(Image.fromarray(page), tmp_path / "lines.png"))
        return digit

    sure = torch.zeros(10)
    sure[1] = 1
    assert digits.doubt(with_lines((50, 140, 250, 160)), sure) == ""
    assert digits.doubt(with_lines((50, 148, 250, 152)), sure) == "may be a line"
    plus = with_lines((100, 142, 200, 158), (142, 100, 158, 200))
    assert digits.doubt(plus, sure) == "may be a plus"
    unsure = torch.tensor([0, 0.7, 0, 0, 0.05, 0, 0, 0.2, 0.05, 0])
    blank = digits.Digit(torch.zeros(784, dtype=torch.uint8), (0, 0, 28, 28), 0)
    assert digits.doubt(blank, unsure) == "may also be a 7"


@pytest.mark.slow
def test_mnist_images_come_back_nearly_unchanged(trained, tmp_path):
    distances = []
    for image in trained[1][:100]:
        (read,) = digits.read_digits(save(Image.fromarray(image), tmp_path / "digit.png"))
        image = torch.from_numpy(image).flatten().float()
        distances.append((read.pixels.float() - image).abs().sum() / image.sum())
    assert torch.stack(distances).median() < 0.1
