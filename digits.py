"""Your own digits: find them in a picture of any kind, and bring them into MNIST's form.

open_picture opens any image file; to_gray makes colour grey; find_ink tells ink from paper;
find_parts labels what is connected; join_parts makes digits of parts; in_rows puts them into
reading order; like_mnist scales them. Lengths in pixels are of the picture scaled to AREA.
"""

from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold
from skimage.measure import label, regionprops
from skimage.morphology import reconstruction
from torch import Tensor

Image.MAX_IMAGE_PIXELS = None  # open_picture has its own limit, and says what to do
ImageFile.LOAD_TRUNCATED_IMAGES = (
    True  # without its last bytes a file still shows most of a picture
)

MOST_PIXELS = 180_000_000  # of a file; in colour they take 0.5 GB
SMALLEST = 4  # pixels of a side; less can't show a digit
AREA = 160_000  # pixels; digits on a page with rows of ten are still 30 pixels high
ENLARGE = 4  # times; MNIST's own 28 x 28 pixels show no more when they are enlarged further
SMOOTH = 0.7  # pixels; the sigma that takes noise away and leaves strokes of two pixels
BACKGROUND = 1 / 16  # of the side; the sigma of a blur in which strokes are gone, light remains
WINDOW = 1 / 4  # of the side; wider than the widest stroke, narrower than most shadows
NARROW_WINDOW = 1 / 8  # of the side; narrower than a page's margin, which isn't light ink
LEAST_CONTRAST = 0.06  # of the range from black to white; people hardly see less
GRAIN = 2  # pixels; the sigma of a blur in which grains are gone
NOISE_RATIO = 12  # contrast over the median grain; blank sheets reach 9, the faintest ink 30
LEFTOVER = 0.35  # of the contrast of all that is narrow; uneven ruled lines leave less
FAINT, STRONG = 0.3, 0.6  # of the ink's contrast; a stroke is FAINT all along, STRONG somewhere
EDGE_PLACES = 6  # a digit that is cut off meets the edge in fewer places than squared paper
EDGE_SHARE = 0.5  # of the edge; a digit covers less, a frame more
EDGE_CONTACT = 0.7  # of a part's longer side; less meets the edge of a stroke, more of a shadow
FLAT = 0.2  # height over width; digits are higher, ruled lines are not
SPAN = 0.9  # of the picture; a digit cropped to its outline is as high and as wide
DUST = 0.05  # of the tallest part's height; smaller is dust
INSIDE = 0.15  # of a part's height; if something as tall is in its hole, it is a box or a circle
DASH = 5.5  # stroke widths; parts no longer than this may be the dashes of a dashed stroke ...
DASH_HEIGHT = 0.5  # of the height of all parts together; ... if they are no higher than this
GAP_IN_STROKE = 2  # stroke widths; a wider gap is none of a broken stroke ...
GAP_IN_DIGIT = 0.06  # of a digit's height; ... nor is one as wide as the space between digits
HAT = 0.25  # of a digit's height; so far above the rest can the bar of a 5 stand
HAT_SHARED = 0.3  # of the narrower one's width; a bar above a digit shares as many columns
HAT_WIDTH = 1.3  # of the digit's width; a wider bar belongs to several digits
TALL = 0.45  # of the tallest digit's height; what is lower is a dash, a dot or an underline
SAME_ROW = 0.4  # of the lower one's height; digits of one row overlap by as much
MNIST_STROKE = 2  # pixels of MNIST's 20; a thinner pen is thickened


class Digit(NamedTuple):
    """One digit of a picture."""

    pixels: Tensor  # (784,) uint8, MNIST's form
    box: tuple[int, int, int, int]  # left, top, right, bottom: pixels of the picture as shown
    row: int  # row of digits it stands in, from 0 at the top


def read_digits(source: str | Path | BinaryIO, page: int = 0) -> list[Digit]:
    """Return the digits of a picture, row by row, left to right; ValueError if there are none."""
    image = open_picture(source, page)
    ink = find_ink(to_gray(image))
    across, down = image.width / ink.shape[1], image.height / ink.shape[0]
    digits = []
    for number, row in enumerate(in_rows(join_parts(find_parts(ink)))):
        for part in row:
            top, left, bottom, right = part.bbox
            box = left * across, top * down, right * across, bottom * down
            pixels = like_mnist(np.where(part.image, ink[part.slice], 0))
            digits.append(Digit(pixels, tuple(round(n) for n in box), number))
    return digits


# ---------------------------------------------------------------------------- files
def open_picture(source: str | Path | BinaryIO, page: int = 0) -> Image.Image:
    """Return one page of an image file as it is shown, that is turned as its EXIF block says."""
    image = Image.open(source)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many: make it smaller")
    if min(image.size) < SMALLEST:
        raise ValueError("there is nothing in it")
    image.seek(page)
    image.load()
    with suppress(Exception):  # a broken EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    return image


def count_pages(source: str | Path | BinaryIO) -> int:
    """Return how many pages or frames an image file has."""
    with Image.open(source) as image:
        return getattr(image, "n_frames", 1)


# ---------------------------------------------------------------------------- ink and paper
def to_gray(image: Image.Image) -> np.ndarray:
    """Return a picture of AREA pixels as brightness, (height, width), about 0 to 1.

    Colour becomes grey along the direction in which strokes differ most from what surrounds them.
    """
    if image.mode[0] in "IF":  # 16 bits of grey, or floats: any range
        pixels = np.nan_to_num(np.asarray(image, np.float32))
        low, high = np.percentile(pixels, (0.1, 99.9))
        pixels = (pixels - low) / max(high - low, 1e-9) * 255
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.mode == "LAB":
        image = image.getchannel("L")
    scale = min(ENLARGE, (AREA / (image.width * image.height)) ** 0.5)
    size = [max(1, round(n * scale)) for n in image.size]
    image = image.convert("RGBA").resize(size, Image.Resampling.BOX)
    pixels = np.asarray(image, np.float32) / 255
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    drawn = colour * alpha
    paper = drawn.mean() < 0.5 * alpha.mean()  # what is transparent contrasts with what is drawn
    colour = drawn + paper * (1 - alpha)
    some = colour[::2, ::2]
    strokes = (some - blurred(some)).reshape(-1, 3)
    direction = np.linalg.eigh(strokes.T @ strokes)[1][:, -1]
    return colour @ (direction / abs(direction).sum() * np.sign(direction.sum() or 1))


def blurred(picture: np.ndarray) -> np.ndarray:
    """Return a picture in which strokes are gone and uneven light remains."""
    side = (picture.shape[0] * picture.shape[1]) ** 0.5
    return ndimage.gaussian_filter(picture, BACKGROUND * side, axes=(0, 1), truncate=2)


def find_ink(gray: np.ndarray) -> np.ndarray:
    """Return how far each pixel stands out from the paper, as a share of the ink's contrast.

    Raise ValueError if nothing stands out from the noise.
    """
    gray = ndimage.gaussian_filter(gray, SMOOTH)
    ink = dark_strokes(-gray if is_light_ink(gray) else gray, WINDOW)
    contrast = contrast_of(ink)
    noise = np.median(abs(gray - ndimage.gaussian_filter(gray, GRAIN)))
    if contrast < max(LEAST_CONTRAST, NOISE_RATIO * noise, 2 * np.median(ink)):  # or covers half
        raise ValueError("there is nothing in it")
    return (ink / contrast).clip(0, 1)


def is_light_ink(gray: np.ndarray) -> bool:
    """Return whether strokes are lighter than paper: by the third moment, as they stand out."""
    gray = gray[::3, ::3]  # enough for a sum
    difference = gray - blurred(gray)
    dark = np.minimum(dark_strokes(gray, NARROW_WINDOW), (-difference).clip(0))
    light = np.minimum(dark_strokes(-gray, NARROW_WINDOW), difference.clip(0))
    return (light**3).sum() > (dark**3).sum()


def dark_strokes(gray: np.ndarray, window: float) -> np.ndarray:
    """Return how much darker each pixel is than the paper, where it belongs to a stroke."""
    size = round(window * gray.size**0.5)
    narrow = ndimage.grey_closing(gray, (size, size), mode="nearest") - gray
    seed = gray.copy()
    seed[1:-1, 1:-1] = gray.max()
    # fills each dark place that doesn't reach the edge
    paper = reconstruction(seed, gray, method="erosion")
    contrast = contrast_of(narrow)
    cut = narrow * cut_off(narrow > max(LEAST_CONTRAST, FAINT * contrast), 0.55 * size)
    strokes = np.maximum(cut, np.minimum(narrow, paper - gray))
    if contrast_of(strokes) < LEFTOVER * contrast:
        return np.zeros_like(gray)
    return strokes


def contrast_of(ink: np.ndarray) -> float:
    """Return how dark ink is where it is dark."""
    return np.median(ink[ink >= ink.max() / 2])


def cut_off(mask: np.ndarray, least: float) -> np.ndarray:
    """Return the parts, longer than the least, that may be digits cut off by the edge."""
    labels = label(mask)
    ring = np.concatenate([labels[0], labels[1:, -1], labels[-1, -2::-1], labels[-2:0:-1, 0]])
    kept = []
    for part in regionprops(labels):
        touches = ring == part.label
        places = (touches & ~np.roll(touches, 1)).sum()
        if not 0 < places <= EDGE_PLACES or touches.mean() > EDGE_SHARE:
            continue
        rows, columns = part.image.shape
        spans = rows >= SPAN * mask.shape[0], columns >= SPAN * mask.shape[1]
        longest = max(rows, columns)
        cut = longest > least and rows > FLAT * columns and touches.sum() <= EDGE_CONTACT * longest
        if all(spans) or (cut and not any(spans)):
            kept.append(part.label)
    return np.isin(labels, kept)


# ---------------------------------------------------------------------------- digits
def find_parts(ink: np.ndarray) -> np.ndarray:
    """Return where there is ink of digits: no dust, no boxes or circles around something."""
    labels = label(apply_hysteresis_threshold(ink, FAINT, STRONG))
    parts = regionprops(labels)
    heights = np.array([0, *(len(part.image) for part in parts)])  # by label; 0 is paper
    kept = []
    for part in parts:
        hole = part.image_filled & ~part.image
        inside = np.unique(labels[part.slice][hole])
        is_box = heights[inside].max(initial=0) >= INSIDE * len(part.image)
        if not is_box and max(part.image.shape) >= DUST * heights.max():
            kept.append(part.label)
    return np.isin(labels, kept)


def join_parts(ink: np.ndarray) -> list:
    """Return the region of each digit. Parts are one digit where the gap between them is small.

    Small means: relative to a stroke's width, as pens leave gaps, and to a digit's height, as
    writers do.
    """
    inside = ndimage.distance_transform_edt(ink)[ink]
    stroke = 4 * inside.mean() - 1  # the mean distance to paper is a quarter of the width
    parts = regionprops(label(ink))
    tallest = max(len(part.image) for part in parts)
    short = np.median([part.area for part in parts]) <= DASH * stroke**2
    reach = GAP_IN_STROKE * stroke
    if not short or tallest > DASH_HEIGHT * np.ptp(ink.any(1).nonzero()[0]):
        reach = min(reach, GAP_IN_DIGIT * tallest)
    labels = np.where(ink, label(ndimage.distance_transform_edt(~ink) <= reach / 2), 0)
    groups = regionprops(labels)
    tallest = max(len(group.image) for group in groups)
    digits = [group for group in groups if len(group.image) >= TALL * tallest]
    for group in groups:
        if len(group.image) < TALL * tallest:
            owners = [digit for digit in digits if is_hat(group.bbox, digit.bbox, HAT * tallest)]
            labels[labels == group.label] = owners[0].label if owners else 0
    return regionprops(labels)


def is_hat(small: tuple, tall: tuple, reach: float) -> bool:
    """Return whether a small bbox stands in the columns of a tall one, and not below it."""
    shared = min(small[3], tall[3]) - max(small[1], tall[1])
    small_width, width = small[3] - small[1], tall[3] - tall[1]
    if shared < HAT_SHARED * min(small_width, width) or small_width > HAT_WIDTH * width:
        return False
    return small[2] <= tall[2] and tall[0] - small[2] <= reach


def in_rows(digits: list) -> list[list]:
    """Return the regions of digits in rows from top to bottom, each from left to right."""
    rows = []
    for digit in sorted(digits, key=lambda digit: digit.bbox[1]):
        shares = [shared_height(row[-1].bbox, digit.bbox) for row in rows]
        if max(shares, default=0) > SAME_ROW:
            rows[int(np.argmax(shares))].append(digit)
        else:
            rows.append([digit])
    return sorted(rows, key=lambda row: np.mean([digit.bbox[0] + digit.bbox[2] for digit in row]))


def shared_height(one: tuple, other: tuple) -> float:
    """Return how much of the lower one's height two boxes (top, left, bottom, right) share."""
    shared = min(one[2], other[2]) - max(one[0], other[0])
    return shared / min(one[2] - one[0], other[2] - other[0])


def like_mnist(ink: np.ndarray) -> Tensor:
    """Return ink in MNIST's form, (784,) uint8 (LeCun et al. 1998).

    It is light on dark, scaled into 20 x 20 pixels, its centre of mass in the middle of 28 x 28.
    """
    inside = ndimage.distance_transform_edt(np.pad(ink > 0.5, 1))
    stroke = 20 / max(ink.shape) * 2 * np.percentile(inside[inside > 0], 90) if inside.any() else 1
    missing = round((MNIST_STROKE - stroke) / 2 * max(ink.shape) / 20)
    if missing > 0:  # a thin pen
        ink = ndimage.grey_dilation(np.pad(ink, missing), (2 * missing + 1,) * 2)
    size = [max(1, round(20 * n / max(ink.shape))) for n in ink.shape]
    scaled = Image.fromarray(ink.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)
    ink = np.asarray(scaled)
    centre = [(ink.sum(1 - axis) @ np.arange(n)) / ink.sum() for axis, n in enumerate(size)]
    top, left = (min(max(round(14 - c), 0), 28 - n) for c, n in zip(centre, size, strict=True))
    digit = np.zeros((28, 28), np.uint8)
    digit[top : top + size[0], left : left + size[1]] = (255 * ink / ink.max()).round()
    return torch.from_numpy(digit).flatten()
