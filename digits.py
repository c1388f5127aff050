"""Your own digits: find them in a picture of any kind, and bring them into MNIST's form.

read_digits, at the top, and digits_of show the steps: open_picture opens an image file, however
large or broken; to_gray makes colour grey; find_ink tells ink from paper, shadows and ruled lines;
find_digits joins the parts of a digit and separates neighbours; in_rows puts digits into reading
order; like_mnist scales them. Below, "the side" of a picture means the square root of its area;
lengths in pixels are of the picture scaled to AREA.
"""

import math
import os
import re
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold
from skimage.measure import label, regionprops
from skimage.morphology import disk, reconstruction
from torch import Tensor

# Opening
FORMATS = "PNG JPEG MPO WEBP GIF BMP TIFF PPM AVIF HEIF".split()  # HEIF: with pillow_heif
warnings.filterwarnings("ignore", module="PIL")  # of large pictures, of strange metadata
MOST_MEMORY = 900_000_000  # bytes, while a picture is decoded: 180 megapixels in most formats
BYTES_PER_PIXEL = {"GIF": 12, "WEBP": 16, "AVIF": 12, "HEIF": 12, "TIFF": 8}  # 5 in other formats
MOST_PER_BYTE = 10_000  # pixels; only blank pages are packed more tightly
MOST_SCANS = 30  # of a JPEG; cameras and programs make 1 to 20
MOST_PAGES = 20  # that look.py reads of a file
SHOWN = 1_000_000  # pixels of an opened picture; more would help neither eyes nor the model
SMALLEST = 4  # pixels of a side; less can't show a digit

# How sure a reading is
UNSURE = 0.1  # a probability; a digit that is as likely as this is named, too

# Ink on paper
AREA = 160_000  # pixels; digits on a page with rows of ten are still 30 pixels high
LEAST_AREA = 112**2  # pixels; MNIST's own 28 x 28 show no more when they are enlarged further
SMOOTH = 0.7  # pixels; the sigma that takes noise away and leaves strokes of two pixels
LIGHT = 1 / 10  # of the side; the sigma of a blur in which strokes are gone, light remains
WINDOW = 1 / 4  # of the side; strokes are narrower; frames, desks and most shadows wider
LEAST_CONTRAST = 0.06  # of the range from black to white; people hardly see less
NOISE_RATIO = 20  # least contrast over median noise; most blank sheets have less, faint ink 32
FAINT = 0.3  # of the ink's contrast; all of a stroke is at least this dark ...
STRONG = 0.6  # of the ink's contrast; ... and some of it at least this dark
THIN = 1 / 20  # of the picture's shorter side, or of its own length: a printed line is thinner
DARKER = 0.4  # of the contrast; by so much a digit is darker than the lines that it stands on
DUST = 10  # pixels; a part or a digit that is smaller is dust
INSIDE = 0.2  # of a box's or a line's height; what is taller may be a digit in or beside it
GAP = 0.1  # of a digit's height; a gap in a broken stroke is smaller
DASH = 6  # squares of the stroke's width; dashes are smaller, digits larger
CORE = 0.7  # of the height of a group of parts; what is lower is a piece of a digit
TALL = 0.35  # of the tallest digit's height; what is lower is a dash, a dot or an underline
WIDE = 1.2  # of the height; 3 % of MNIST's digits are wider, and many pairs that touch
BLOCK = 0.5  # of a digit's longer side; the strokes of even the boldest digit are thinner
STROKE = 2.2  # pixels of MNIST's 20; three of four of its digits have wider strokes


class NothingThere(ValueError):
    """There is no digit in a picture."""


class Digits(list):
    """The digits of a picture; note says in a few words what is missing of it, if anything is."""

    def __init__(self, note: str):
        super().__init__()
        self.note = note


class Digit(NamedTuple):
    """One digit of a picture."""

    pixels: Tensor  # (784,) uint8, MNIST's form
    box: tuple[int, int, int, int]  # left, top, right, bottom: pixels of the file, turned upright
    row: int  # row of digits it stands in, from 0 at the top
    hint: str = ""  # what it may be instead of a digit, to judge by its shape


def read_digits(source: str | Path | BinaryIO, page: int = 0) -> Digits:
    """Return the digits of a picture, row by row, each from left to right.

    Raise NothingThere if there are none; ValueError, or one of Pillow's errors, if the picture
    can't be read.
    """
    return digits_of(open_picture(source, page))


def digits_of(image: Image.Image) -> Digits:
    """Return the digits of a picture that open_picture returned; NothingThere if it has none."""
    ink = find_ink(to_gray(image))
    found = find_digits(ink)
    if not found:
        raise NothingThere("there is no digit in it")
    across = image.info["scale"] * image.width / ink.shape[1]
    down = image.info["scale"] * image.height / ink.shape[0]
    digits = Digits(image.info["note"])
    for number, row in enumerate(in_rows(found)):
        for part in row:
            top, left, bottom, right = part.bbox
            box = left * across, top * down, right * across, bottom * down
            pixels = like_mnist(np.where(part.image, ink[part.slice], 0))
            digits.append(Digit(pixels, tuple(round(n) for n in box), number, hint_of(part)))
    return digits


def doubt(digit: Digit, probabilities: Tensor) -> str:
    """Return in a few words why a reading, probabilities (10,), isn't sure; "" if it is."""
    second_and_third = probabilities.argsort(descending=True)[1:3].tolist()
    others = [
        f"{'an' if other == 8 else 'a'} {other}"
        for other in second_and_third
        if probabilities[other] > UNSURE
    ]
    doubts = [digit.hint] if digit.hint else []
    if others:
        doubts.append(f"may also be {' or '.join(others)}")
    return ", ".join(doubts)


# ---------------------------------------------------------------------------- opening
def open_picture(source: str | Path | BinaryIO, page: int = 0) -> Image.Image:
    """Return one page of an image file as it is shown, in RGB, with at most SHOWN pixels.

    info["scale"] says how many of the file's pixels one of its own is wide, and info["note"] what
    is missing of the picture, if anything is.
    """
    with open_file(source) as image:
        if page:
            image.seek(page)
            check_size(image, source)  # the first page may have been smaller
        original = image.size
        scale = max(1, math.sqrt(math.prod(original) / SHOWN))
        size = [max(1, round(n / scale)) for n in original]
        image.draft(None, size)  # a JPEG is reduced while it is decoded
        note = ""
        is_whole = load(image)
        small = shrink(image, size)
        if not is_whole:
            small, note = without_the_missing(small, image.format in ("JPEG", "MPO"))
        if min(small.size) < SMALLEST:
            raise NothingThere("there is nothing in it")
        small.getexif()[ExifTags.Base.Orientation] = orientation(image)
    shown = in_rgb(ImageOps.exif_transpose(small))
    shown.info = {"scale": scale, "note": note}
    return shown


def count_pages(source: str | Path | BinaryIO) -> int:
    """Return how many pages or frames an image file has."""
    with open_file(source) as image:
        if image.format == "MPO":  # a camera's previews are no pages
            return 1
        return getattr(image, "n_frames", 1)


def open_file(source: str | Path | BinaryIO) -> Image.Image:
    """Open an image file; ValueError if it would take too much memory or time."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        image = Image.open(source, formats=formats)
    except Image.DecompressionBombError:
        raise ValueError("it has too many pixels: make it smaller") from None
    check_size(image, source)
    return image


def check_size(image: Image.Image, source: str | Path | BinaryIO) -> None:
    """Raise ValueError if decoding a picture would take too much memory or time."""
    is_path = isinstance(source, str | Path)
    n_bytes = os.path.getsize(source) if is_path else source.seek(0, os.SEEK_END)
    pixels = math.prod(image.size)
    per_pixel = BYTES_PER_PIXEL.get(image.format, 5)
    if image.format in ("JPEG", "MPO"):
        n_scans = count_scans(image.fp)
        if n_scans > MOST_SCANS:
            raise ValueError(f"it is a JPEG of {n_scans} scans: save it once more")
        if n_scans > 1:
            per_pixel = 8  # what all scans add up to is kept until the last one
    if pixels * per_pixel > MOST_MEMORY:
        raise ValueError("it has too many pixels: make it smaller")
    if image.format == "PPM" and image.tile[0].codec_name != "raw" and pixels > SHOWN:
        raise ValueError("it has too many pixels for its format: save it as PNG")  # it is slow
    if pixels > MOST_PER_BYTE * n_bytes:
        width, height = image.size
        raise ValueError(f"{width} x {height} pixels can't be in {n_bytes} bytes")


def count_scans(file: BinaryIO) -> int:
    """Return how many scans a JPEG file has; each goes over all of the picture once more."""
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    n_scans = 0
    place = 2  # after the marker that says that this is a JPEG
    while marker := re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]").search(data, place):
        if marker[0] == b"\xff\xd9":  # the picture's end
            break
        n_scans += marker[0] == b"\xff\xda"
        length = data[marker.end() : marker.end() + 2]
        place = marker.end() + int.from_bytes(length)
    return n_scans


def load(image: Image.Image) -> bool:
    """Decode an opened picture as far as it goes; return whether it is whole."""
    try:
        image.load()
        return True
    except OSError:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        image.load()
        return False
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def orientation(image: Image.Image) -> int:
    """Return how a picture is to be turned, as its EXIF data says."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a picture scaled to a size, in 8 bits of grey, RGBA or floats.

    It is done in bands, because Pillow's steps each need a copy.
    """
    scale = image.height / size[1]
    step = max(1, size[1] // 64)
    bands = []
    for top in range(0, size[1], step):
        bottom = min(top + step, size[1])
        first = math.floor(top * scale)
        last = min(math.ceil(bottom * scale), image.height)
        band = image.crop((0, first, image.width, last))
        if image.mode == "LAB":
            band = band.getchannel("L")
        elif image.mode[0] in "IF":  # 16 bits, or floats
            band = band.convert("F")
        else:
            band = band.convert("RGBA")
        box = 0, top * scale - first, image.width, min(bottom * scale - first, last - first)
        band = band.resize((size[0], bottom - top), Image.Resampling.BOX, box)
        bands.append(np.asarray(band))
    return Image.fromarray(np.concatenate(bands))


def without_the_missing(picture: Image.Image, is_jpeg: bool) -> tuple[Image.Image, str]:
    """Return a picture without the rows that its file lacks, and what there is to say of it."""
    pixels = np.atleast_3d(picture)[..., :3]
    # Of the last blocks of a JPEG, only the left ones may be there; what is missing is grey.
    is_there = (pixels[:, -1] != 128).any(-1) if is_jpeg else (pixels != 0).any((1, 2))
    rows = is_there.nonzero()[0][-1] + 1 if is_there.any() else 0
    share = 1 - rows / picture.height
    note = f"its last {share:.0%} is missing" if share else "the end of its file is missing"
    return picture.crop((0, 0, picture.width, rows)), note.replace("%", " %")


def in_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB: what is transparent contrasts with what is drawn.

    16 bits of grey, or floats, may have any range.
    """
    pixels = np.asarray(picture)
    if pixels.ndim == 2 and pixels.dtype == np.float32:
        pixels = np.nan_to_num(pixels)
        broken = min(0.1, 1000 / pixels.size)  # percent of the pixels, as sensors have them
        low, high = np.percentile(pixels, (broken, 100 - broken))
        pixels = 255 * ((pixels - low) / max(high - low, 1e-9)).clip(0, 1)
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    alpha = picture.getchannel("A")
    drawn = np.asarray(picture.convert("RGBa"))
    is_dark = drawn[..., :3].mean() < np.asarray(alpha).mean() / 2
    paper = Image.new("RGBA", picture.size, "white" if is_dark else "black")
    return Image.alpha_composite(paper, picture).convert("RGB")


# ---------------------------------------------------------------------------- ink
def to_gray(image: Image.Image) -> np.ndarray:
    """Return an RGB picture, scaled to AREA, as brightness, (height, width), in which ink is dark.

    Brightness is measured along the direction of colours in which places differ most from what is
    around them: of red ink on green paper, it keeps the difference.
    """
    small = scaled(image, LEAST_AREA)
    changes = small - ndimage.gaussian_filter(small, LIGHT * math.sqrt(LEAST_AREA), axes=(0, 1))
    flat = changes.reshape(-1, 3)
    direction = np.linalg.eigh(flat.T @ flat)[1][:, -1]
    direction /= abs(direction).sum()
    gray = small @ direction
    change = changes @ direction
    # Most strokes are narrower than half a window, most gaps between them wider. A few strong
    # strokes outweigh much faint noise, because they are cubed.
    dark = np.minimum(strokes(gray, WINDOW / 2, mode="edge"), -change).clip(0)
    light = np.minimum(strokes(-gray, WINDOW / 2, mode="edge"), change).clip(0)
    if (light**3).sum() > (dark**3).sum():
        direction = -direction
    area = image.width * image.height
    return scaled(image, min(max(area, LEAST_AREA), AREA)) @ direction


def scaled(image: Image.Image, area: int) -> np.ndarray:
    """Return an RGB picture scaled to about so many pixels, (height, width, 3) from 0 to 1."""
    scale = math.sqrt(area / (image.width * image.height))
    size = [max(1, round(n * scale)) for n in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BOX), np.float32) / 255


def find_ink(gray: np.ndarray) -> np.ndarray:
    """Return how far each pixel stands out from the paper, as a share of the ink's contrast.

    Raise NothingThere if nothing stands out from the noise.
    """
    gray = ndimage.gaussian_filter(gray, SMOOTH)
    ink = strokes(gray, WINDOW, mode="edge")
    contrast = contrast_of(ink)
    noise = np.median(abs(gray - ndimage.gaussian_filter(gray, 3 * SMOOTH)))
    if contrast < max(LEAST_CONTRAST, NOISE_RATIO * noise, 2 * np.median(ink)):  # or half is ink
        raise NothingThere("there is nothing in it")
    ink = (ink / contrast).clip(0, 1)
    # With paper beyond the edge, strokes that it cuts off are whole, but frames and desks are ink,
    # too. Those have little ink where the picture goes on beyond the edge as it is there.
    on_paper = strokes(gray, WINDOW, mode="constant", constant_values=gray.max())
    whole = (on_paper / contrast).clip(0, 1)
    for part in regionprops(label(whole > FAINT)):
        here = np.zeros(ink.shape, bool)
        here[part.slice] = part.image
        if edge_of(here).any() and ink[here].sum() > whole[here].sum() / 2:
            ink[here] = without_lines(np.where(here, whole, 0))[here]
    return ink


def strokes(gray: np.ndarray, window: float, **beyond) -> np.ndarray:
    """Return how much darker each pixel is than the paper, if that is narrower than a window.

    The window is a share of the side; `beyond` says in np.pad's words what is beyond the edge.
    """
    size = round(window * math.sqrt(gray.size))
    padded = np.pad(gray, size, **beyond)
    darker = ndimage.grey_closing(padded, (size, size)) - padded
    return darker[size:-size, size:-size]


def contrast_of(ink: np.ndarray) -> float:
    """Return the median of ink that is at least half as dark as the darkest."""
    return np.median(ink[ink >= ink.max() / 2])


def edge_of(picture: np.ndarray) -> np.ndarray:
    """Return the pixels along a picture's edge, clockwise."""
    return np.concatenate([picture[0], picture[:, -1], picture[-1, ::-1], picture[::-1, 0]])


def without_lines(ink: np.ndarray) -> np.ndarray:
    """Return ink that touches the edge without lines of ruled or squared paper, if it is such."""
    there = ink > 0
    edge = edge_of(there)
    runs = np.count_nonzero(edge & ~np.roll(edge, 1))
    is_across = (there[0].any() and there[-1].any()) or (there[:, 0].any() and there[:, -1].any())
    if runs <= 4 and not is_across:  # a digit that is cut off meets the edge in few places
        return ink
    seed = ink.copy()
    seed[1:-1, 1:-1] = 0
    darker = ink - reconstruction(seed, ink)  # than the lines, which meet the edge
    rest = np.where(darker > DARKER * ink, ink, 0)
    is_flat = there.any(1).sum() < there.any(0).sum() / 5
    is_thin = stroke_width(there) < THIN * min(ink.shape)
    if rest.max() >= STRONG or is_flat or (runs > 4 and is_thin):
        return rest
    return ink


# ---------------------------------------------------------------------------- digits
def find_digits(ink: np.ndarray) -> list:
    """Return the region of each digit: of parts with small gaps, unless they are neighbours."""
    there = find_parts(ink)
    parts = regionprops(label(there))
    if not parts:
        return []
    height = max(len(part.image) for part in parts)
    size = np.median([part.area for part in parts])
    no_holes = all(part.euler_number == 1 for part in parts)
    if no_holes and size < DASH * stroke_width(there) ** 2:  # a dashed digit
        height = np.ptp(there.nonzero()[0])
    labels = there * label(ndimage.distance_transform_edt(~there) <= GAP * height / 2)
    for _ in range(3):  # a chain of up to eight digits is halved three times
        for group in regionprops(labels):
            pieces = separate(group.image, ink[group.slice])
            labels[group.slice][group.image] = pieces[group.image] + labels.max()
    digits = [group for group in regionprops(labels) if is_like_a_digit(group)]
    least = max(DUST, TALL * max((len(digit.image) for digit in digits), default=0))
    return [digit for digit in digits if len(digit.image) >= least]


def find_parts(ink: np.ndarray) -> np.ndarray:
    """Return where there is ink that people wrote: no dust, and nothing printed beside digits."""
    labels = label(apply_hysteresis_threshold(ink, FAINT, STRONG))
    parts = [part for part in regionprops(labels) if max(part.image.shape) >= DUST]
    tallest = max((len(part.image) for part in parts), default=0)
    least = INSIDE**2 * tallest  # what lies in a box or beside a line is larger
    large = [part for part in parts if len(part.image) > least]
    printed = [part.label for part in large if is_printed(part, large)]
    written = [part.label for part in parts if part.label not in printed]
    return np.isin(labels, written)


def is_printed(part, parts: list) -> bool:
    """Return whether a part is a box or a cell's corner around another one, or a line beside it."""
    height, width = part.image.shape
    top, left, bottom, right = part.bbox
    others = [other for other in parts if other is not part and len(other.image) > INSIDE * height]
    if others and width < height / 5 and CORE * height > max(len(o.image) for o in others):
        return True
    for other in others:
        its_top, its_left, its_bottom, its_right = other.bbox
        if top <= its_top and left <= its_left and its_bottom <= bottom and its_right <= right:
            y, x = other.coords.T
            is_in_hole = part.image_filled[y - top, x - left].all()
            to_ink = ndimage.distance_transform_edt(~part.image)[y - top, x - left].min()
            if is_in_hole or to_ink > GAP * len(other.image):  # or it is a broken stroke's piece
                return True
    return False


def separate(there: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Return where digits are in a group of parts, as numbers: neighbours may touch, or almost."""
    cores = side_by_side(there)
    # Few digits are wider than they are tall, but two that touch are.
    if there.shape[1] > len(there):
        for darkness in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):  # where digits touch, there is less ink
            if cores.max() < 2:
                cores = side_by_side(there & (ink > darkness))
    if cores.max() < 2:
        return there.astype(int)
    nearest = ndimage.distance_transform_edt(
        cores == 0, return_distances=False, return_indices=True
    )
    return cores[tuple(nearest)]


def side_by_side(there: np.ndarray) -> np.ndarray:
    """Return numbers, from 1, of tall parts side by side; those above each other have the same."""
    labels = label(there)
    tall = [part for part in regionprops(labels) if len(part.image) >= CORE * len(there)]
    cores = np.zeros_like(labels)
    number = end = 0
    for part in sorted(tall, key=lambda part: part.bbox[1]):
        _, left, _, right = part.bbox
        if end - left < (right - left) / 2:
            number += 1
        cores[labels == part.label] = number
        end = max(end, right)
    return cores


def is_like_a_digit(part) -> bool:
    """Return whether a part's shape may be a digit's: it is no block, no dash, no scribble."""
    height, width = part.image.shape
    stroke = stroke_width(part.image)
    is_block = stroke > BLOCK * max(height, width)
    # In a row of digits that touch, there is more ink than in a line through it.
    is_dash = height < TALL * width and part.area < 2 * stroke * width
    holes = regionprops(label(part.image_filled & ~part.image))
    n_holes = sum(hole.area > part.image.size / 200 for hole in holes)
    return not is_block and not is_dash and n_holes <= max(3, 2 * width / height)


def hint_of(part) -> str:
    """Return what a part may be, if not a digit, to judge by its shape; "" if there is no doubt."""
    height, width = part.image.shape
    if width > WIDE * height:
        return "may be several digits"
    stroke = stroke_width(part.image)
    # skimage's axis is an ellipse's; a rectangle's side with the same spread is sqrt(3) / 2 of it.
    is_straight = part.axis_minor_length * math.sqrt(3) / 2 < 1.05 * stroke
    if is_straight and stroke < THIN * height:
        return "may be a line"
    y, x = part.image.nonzero()
    row, column = part.image.sum(1).argmax(), part.image.sum(0).argmax()
    on_cross = ((abs(y - row) < stroke) | (abs(x - column) < stroke)).mean()
    in_middle = abs(row / height - 0.5) < 0.15 and abs(column / width - 0.5) < 0.15
    if on_cross > 0.95 and in_middle and 3 * stroke < min(height, width):
        return "may be a plus"
    return ""


def stroke_width(ink: np.ndarray) -> float:
    """Return about one more than the mean width of strokes, as where STROKE is from.

    Across a stroke of 7, distances to paper are 1 2 3 4 3 2 1; 4 times their mean, less 1, is 8.
    """
    padded = np.pad(ink, 1)
    return 4 * ndimage.distance_transform_edt(padded)[padded].mean() - 1


def in_rows(digits: list) -> list[list]:
    """Return the regions of digits in rows from top to bottom, each from left to right."""
    rows = []
    for digit in sorted(digits, key=lambda digit: digit.bbox[1]):
        for row in rows:
            top, _, bottom, _ = row[-1].bbox
            if top < digit.centroid[0] < bottom:
                row.append(digit)
                break
        else:
            rows.append([digit])
    return sorted(rows, key=lambda row: row[0].centroid[0])


def resized(ink: np.ndarray, side: int) -> np.ndarray:
    """Return ink scaled so that its longer side has so many pixels."""
    size = [max(1, round(side * n / max(ink.shape))) for n in ink.shape]
    picture = Image.fromarray(ink.astype(np.float32))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BOX))


def like_mnist(ink: np.ndarray) -> Tensor:
    """Return ink in MNIST's form, (784,) uint8 (LeCun et al. 1998).

    It is light on dark, scaled into 20 x 20 pixels, its centre of mass in the middle of 28 x 28.
    Thin strokes become as wide as most of MNIST's.
    """
    large = resized(ink, 80)  # four times as large as MNIST's
    missing = 4 * STROKE - stroke_width(large > large.max() / 2)
    radius = round(missing / 2)
    if radius > 0:
        ink = ndimage.grey_dilation(np.pad(large, radius), footprint=disk(radius))
    ink = resized(ink, 20)
    centre = ndimage.center_of_mass(ink)
    top, left = (min(max(round(14 - c), 0), 28 - n) for c, n in zip(centre, ink.shape, strict=True))
    digit = np.zeros((28, 28), np.uint8)
    digit[top : top + ink.shape[0], left : left + ink.shape[1]] = (255 * ink / ink.max()).round()
    return torch.from_numpy(digit).flatten()
