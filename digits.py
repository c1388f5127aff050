"""Your own digits: find them in a picture of any kind, and bring them into MNIST's form.

open_picture opens any image file; to_gray makes colour grey; find_ink tells ink from paper; find_parts
labels what is connected; join_parts makes digits of parts; in_rows puts them into reading order; like_mnist
scales them. Lengths are in pixels of the picture when it is scaled to AREA, unless they say otherwise.
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
ImageFile.LOAD_TRUNCATED_IMAGES = True  # a file that lacks its last bytes still shows most of the picture

MOST_PIXELS = 180_000_000  # of a file; Pillow's own limit, about 0.5 GB of memory for a picture in colour
SMALLEST = 4  # pixels of a side; less can't show a digit
AREA = 160_000  # pixels; a digit needs about 30 of height, and a page of three rows of ten still has that
ENLARGE = 4  # times; MNIST's own 28 x 28 pixels show no more when they are enlarged further
SMOOTH = 0.7  # pixels; the sigma that takes noise away and leaves strokes of two pixels
BACKGROUND = 1 / 16  # of the side; the sigma of a blur in which strokes are gone and light remains
WINDOW = 1 / 4  # of the side; wider than the widest stroke, narrower than most shadows
NARROW_WINDOW = 1 / 8  # of the side; narrower than the margin of a page on a desk, which isn't light ink
LEAST_CONTRAST = 0.06  # of the range from black to white; less is not seen as ink by people, either
GRAIN = 2  # pixels; the sigma of a blur in which grains are gone
NOISE_RATIO = 12  # contrast over the median grain; grains of a blank sheet reach 9, the faintest ink 30
LEFTOVER = 0.35  # of the contrast of all that is narrow; ruled lines leave less where their darkness varies
FAINT, STRONG = 0.3, 0.6  # of the ink's contrast; a stroke is as dark as FAINT all along, and STRONG somewhere
EDGE_PLACES = 6  # a digit that is cut off meets the edge in so many places at most; squared paper in more
EDGE_SHARE = 0.5  # of the edge; a digit covers less, a frame more
EDGE_CONTACT = 0.7  # of a part's longer side; a cut stroke meets the edge with less, a shadow or a desk with more
FLAT = 0.2  # height over width; digits are higher, ruled lines are not
SPAN = 0.9  # of the picture; a digit cropped to its outline is as high and as wide
DUST = 0.05  # of the largest part's longer side; smaller is dust
INSIDE = 0.15  # of a part's height; if something as tall lies in its hole, it is a box or a circle
DASH = 5.5  # stroke widths; parts no longer than this may be the dashes of a dashed stroke ...
DASH_HEIGHT = 0.5  # of the height of all parts together; ... if they are no higher than this
GAP_IN_STROKE = 2  # stroke widths; a wider gap is none of a broken stroke ...
GAP_IN_DIGIT = 0.06  # of a digit's height; ... nor is one that is as wide as the space between digits
HAT = 0.25  # of a digit's height; so far above the rest can the bar of a 5 stand
HAT_SHARED = 0.3  # of the narrower one's width; a bar above a digit shares as many columns with it
HAT_WIDTH = 1.3  # of the digit's width; a wider bar belongs to the line, or to several digits
TALL = 0.45  # of the tallest digit's height; what is lower is a dash, a dot or an underline
SAME_ROW = 0.4  # of the lower one's height; digits of one row overlap by as much
MNIST_STROKE = 2  # pixels of MNIST's 20; a thinner pen is thickened


class Digit(NamedTuple):
    """One digit of a picture."""

    pixels: Tensor  # (784,) uint8, MNIST's form
    box: tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the picture as it is shown
    row: int  # row of digits it stands in, from 0 at the top


def read_digits(source: str | Path | BinaryIO, page: int = 0) -> list[Digit]:
    """Return the digits of a picture, row by row, from left to right. Raise ValueError if there are none."""
    image = open_picture(source, page)
    ink = find_ink(to_gray(image))
    digits = []
    for row, masks in enumerate(in_rows(join_parts(find_parts(ink)))):
        for mask in masks:
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            scale = [image.width / ink.shape[1], image.height / ink.shape[0]] * 2
            box = tuple(round(float(n * s)) for n, s in zip(box, scale, strict=True))
            digits.append(Digit(like_mnist(np.where(mask, ink, 0)), box, row))
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
    paper = (colour * alpha).mean() < 0.5 * alpha.mean()  # what is transparent contrasts with what is drawn
    colour = colour * alpha + paper * (1 - alpha)
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
    """Return whether strokes are lighter than paper, by the third moment: they are few, and stand out."""
    gray = gray[::3, ::3]  # enough for a sum
    difference = gray - blurred(gray)
    dark = np.minimum(dark_strokes(gray, NARROW_WINDOW), (-difference).clip(0))
    light = np.minimum(dark_strokes(-gray, NARROW_WINDOW), difference.clip(0))
    return (light**3).sum() > (dark**3).sum()


def dark_strokes(gray: np.ndarray, window: float) -> np.ndarray:
    """Return how much darker each pixel is than the paper around it, where it belongs to a stroke."""
    size = round(window * gray.size**0.5)
    narrow = ndimage.grey_closing(gray, (size, size), mode="nearest") - gray
    seed = np.full_like(gray, gray.max())
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        seed[edge] = gray[edge]
    paper = reconstruction(seed, gray, method="erosion")  # fills each dark place that doesn't reach the edge
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
    """Return the parts of a mask, larger than the least side, that the edge cuts off and that may be digits."""
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
    """Return where there is ink that may be a digit's: no dust, no boxes or circles around something."""
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


def height(part) -> int:
    return len(part.image)


def join_parts(ink: np.ndarray) -> list[np.ndarray]:
    """Return the mask of each digit. Parts are one digit where the gap between them is small.

    Small means: relative to a stroke's width, as pens leave gaps, and to a digit's height, as writers do.
    """
    stroke = 4 * ndimage.distance_transform_edt(ink)[ink].mean() - 1  # the mean distance is a quarter of the width
    parts = regionprops(label(ink))
    tallest = max(height(part) for part in parts)
    short = np.median([part.area for part in parts]) <= DASH * stroke**2
    reach = GAP_IN_STROKE * stroke
    if not short or tallest > DASH_HEIGHT * np.ptp(ink.any(1).nonzero()[0]):
        reach = min(reach, GAP_IN_DIGIT * tallest)
    near = label(ndimage.distance_transform_edt(~ink) <= reach / 2)
    labels = np.where(ink, near, 0)
    groups = sorted(regionprops(labels), key=height, reverse=True)
    least = TALL * height(groups[0])
    digits = [group for group in groups if height(group) >= least]
    for group in groups[len(digits) :]:
        for digit in digits:
            if is_hat(group.bbox, digit.bbox, HAT * height(groups[0])):
                labels[labels == group.label] = digit.label
                break
    return [labels == digit.label for digit in digits]


def is_hat(small: tuple, tall: tuple, reach: float) -> bool:
    """Return whether a small box (top, left, bottom, right) stands in the columns of a tall one, not below it."""
    shared = min(small[3], tall[3]) - max(small[1], tall[1])
    width = min(small[3] - small[1], tall[3] - tall[1])
    if shared < HAT_SHARED * width or small[3] - small[1] > HAT_WIDTH * (tall[3] - tall[1]):
        return False
    return small[2] <= tall[2] and tall[0] - small[2] <= reach


def in_rows(masks: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Return digits in rows from top to bottom, each from left to right."""
    rows = []
    for mask in sorted(masks, key=lambda mask: mask.any(0).argmax()):
        top, bottom = extent(mask)
        shares = []
        for row in rows:
            last_top, last_bottom = extent(row[-1])
            overlap = min(bottom, last_bottom) - max(top, last_top)
            shares.append(overlap / min(bottom - top, last_bottom - last_top))
        if max(shares, default=0) > SAME_ROW:
            rows[int(np.argmax(shares))].append(mask)
        else:
            rows.append([mask])
    return sorted(rows, key=lambda row: np.mean([extent(mask) for mask in row]))


def extent(mask: np.ndarray) -> tuple[int, int]:
    """Return the first row of a mask, and the one after its last."""
    rows = mask.any(1).nonzero()[0]
    return rows[0], rows[-1] + 1


def like_mnist(ink: np.ndarray) -> Tensor:
    """Return ink in MNIST's form, (784,) uint8: light on dark, scaled into 20 x 20 pixels, and its centre of mass
    in the middle of 28 x 28 (LeCun et al. 1998)."""
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = ndimage.distance_transform_edt(np.pad(ink > 0.5, 1))
    stroke = 20 / max(ink.shape) * 2 * np.percentile(inside[inside > 0], 90) if inside.any() else 1
    missing = round((MNIST_STROKE - stroke) / 2 * max(ink.shape) / 20)
    if missing > 0:  # a thin pen
        ink = ndimage.grey_dilation(np.pad(ink, missing), (2 * missing + 1,) * 2)
    size = [max(1, round(20 * n / max(ink.shape))) for n in ink.shape]
    ink = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX))
    centre = [(ink.sum(1 - axis) @ np.arange(n)) / ink.sum() for axis, n in enumerate(size)]
    top, left = (min(max(round(14 - c), 0), 28 - n) for c, n in zip(centre, size, strict=True))
    digit = np.zeros((28, 28), np.uint8)
    digit[top : top + size[0], left : left + size[1]] = (255 * ink / ink.max()).round()
    return torch.from_numpy(digit).flatten()
