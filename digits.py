"""Your own digits: find them in a picture of any kind, and bring them into MNIST's form.

open_picture opens any image file; to_gray makes colour grey; find_ink tells ink from paper;
find_digits makes digits of what is connected; in_rows puts them into reading order; like_mnist
scales them. Lengths in pixels are of the picture scaled to AREA.
"""

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
ImageFile.LOAD_TRUNCATED_IMAGES = True  # most of a picture is there without its last bytes

MOST_PIXELS = 180_000_000  # of a file; in colour they take 0.5 GB
SMALLEST = 4  # pixels of a side; less can't show a digit
AREA = 160_000  # pixels; digits on a page with rows of ten are still 30 pixels high
LEAST_AREA = 112**2  # pixels; MNIST's own 28 x 28 show no more when they are enlarged further
SMOOTH = 0.7  # pixels; the sigma that takes noise away and leaves strokes of two pixels
BACKGROUND = 1 / 16  # of the side; the sigma of a blur in which strokes are gone, light remains
WINDOW = 1 / 4  # of the side; wider than the widest stroke, narrower than most shadows
NARROW_WINDOW = 1 / 8  # of the side; narrower than a page's margin, which isn't light ink
LEAST_CONTRAST = 0.06  # of the range from black to white; people hardly see less
GRAIN = 2  # pixels; the sigma of a blur in which grains are gone
NOISE_RATIO = 20  # contrast over the median grain; blank sheets reach 9, the faintest ink 30
LEFTOVER = 0.35  # of the contrast of all that is narrow; uneven ruled lines leave less
FAINT, STRONG = 0.3, 0.6  # of the ink's contrast; a stroke is FAINT all along, STRONG somewhere
EDGE_PLACES = 6  # a digit that is cut off meets the edge in fewer places than squared paper
EDGE_SHARE = 0.5  # of the edge; a digit covers less, a frame more
DUST = 10  # pixels; a part or a digit that is smaller is dust
GAP_IN_STROKE = 2  # stroke widths; a wider gap is none of a broken stroke ...
GAP_IN_DIGIT = 0.06  # of a digit's height; ... nor is one as wide as the space between digits
DASH = 5.5  # stroke widths; parts no longer than this are the dashes of a dashed stroke
HAT = 0.25  # of a digit's height; so far above the rest can the bar of a 5 stand
TALL = 0.45  # of the tallest digit's height; what is lower is a dash, a dot or an underline
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
    parts = find_parts(ink)
    if not parts.any():
        raise ValueError("there is nothing in it")
    digits = []
    for number, row in enumerate(in_rows(join_parts(parts))):
        for part in row:
            top, left, bottom, right = part.bbox
            box = left * across, top * down, right * across, bottom * down
            pixels = like_mnist(np.where(part.image, ink[part.slice], 0))
            digits.append(Digit(pixels, tuple(round(n) for n in box), number))
    if not digits:
        raise ValueError("there is nothing in it")
    return digits


def open_picture(source: str | Path | BinaryIO, page: int = 0) -> Image.Image:
    """Return one page of an image file as it is shown, that is turned as its EXIF block says."""
    with Image.open(source) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many: make it smaller")
        if min(image.size) < SMALLEST:
            raise ValueError("there is nothing in it")
        image.seek(page)
        image.load()
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # a broken EXIF block says nothing about the pixels
            return image.copy()


def count_pages(source: str | Path | BinaryIO) -> int:
    """Return how many pages or frames an image file has."""
    with Image.open(source) as image:
        return getattr(image, "n_frames", 1)


def to_gray(image: Image.Image) -> np.ndarray:
    """Return a picture, scaled to AREA, as brightness, (height, width), about 0 to 1.

    Colour becomes grey along the direction in which strokes differ most from what surrounds them.
    """
    if image.mode[0] in "IF":  # 16 bits of grey, or floats: any range
        pixels = np.nan_to_num(np.asarray(image, np.float32))
        low, high = np.percentile(pixels, (0.1, 99.9))
        pixels = (pixels - low) / max(high - low, 1e-9) * 255
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.mode == "LAB":
        image = image.getchannel("L")
    area = image.width * image.height
    scale = (min(max(area, LEAST_AREA), AREA) / area) ** 0.5
    size = [max(1, round(n * scale)) for n in image.size]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), np.float32) / 255
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
    if is_light_ink(gray):
        gray = -gray
    window = round(WINDOW * gray.size**0.5)
    narrow = ndimage.grey_closing(gray, (window, window), mode="nearest") - gray
    seed = gray.copy()
    seed[1:-1, 1:-1] = gray.max()  # fills each dark place that doesn't reach the edge
    ink = np.minimum(narrow, reconstruction(seed, gray, method="erosion") - gray)
    if contrast_of(ink) < LEFTOVER * contrast_of(narrow):
        ink = narrow * fills_picture(narrow > FAINT * contrast_of(narrow))
    contrast = contrast_of(ink)
    noise = np.median(abs(gray - ndimage.gaussian_filter(gray, GRAIN)))
    if contrast < max(LEAST_CONTRAST, NOISE_RATIO * noise, 2 * np.median(ink)):  # or covers half
        raise ValueError("there is nothing in it")
    return (ink / contrast).clip(0, 1)


def is_light_ink(gray: np.ndarray) -> bool:
    """Return whether strokes are lighter than paper: by the third moment of what is narrow."""
    gray = gray[::3, ::3]  # enough for a sum
    size = round(NARROW_WINDOW * gray.size**0.5)
    difference = gray - blurred(gray)
    dark = ndimage.grey_closing(gray, (size, size), mode="nearest") - gray
    light = gray - ndimage.grey_opening(gray, (size, size), mode="nearest")
    dark = np.minimum(dark, -difference).clip(0)
    light = np.minimum(light, difference).clip(0)
    return (light**3).sum() > (dark**3).sum()


def contrast_of(ink: np.ndarray) -> float:
    """Return how dark ink is where it is dark."""
    return np.median(ink[ink >= ink.max() / 2])


def fills_picture(ink: np.ndarray) -> bool:
    """Return whether ink is a digit cropped to its outline: it reaches each edge in few places."""
    edges = ink[0], ink[:, -1], ink[-1, ::-1], ink[::-1, 0]
    ring = np.concatenate(edges)
    places = (ring[1:] & ~ring[:-1]).sum()
    return all(edge.any() for edge in edges) and places <= EDGE_PLACES and ring.mean() < EDGE_SHARE


def find_parts(ink: np.ndarray) -> np.ndarray:
    """Return where there is ink of digits: no dust, no boxes or circles around something."""
    labels = label(apply_hysteresis_threshold(ink, FAINT, STRONG))
    parts = [part for part in regionprops(labels) if max(part.image.shape) >= DUST]
    kept = np.isin(labels, [part.label for part in parts])
    for part in parts:
        hole = part.image_filled & ~part.image
        if kept[part.slice][hole].any():
            kept[labels == part.label] = False
    return kept


def join_parts(ink: np.ndarray) -> list:
    """Return the region of each digit. Parts are one digit where the gap between them is small.

    Small means: relative to a stroke's width, as pens leave gaps, and to a digit's height, as
    writers do.
    """
    parts = regionprops(label(ink))
    stroke = 4 * ndimage.distance_transform_edt(ink)[ink].mean() - 1  # across a bar, 1 to w/2 to 1
    tallest = max(len(part.image) for part in parts)
    reach = GAP_IN_STROKE * stroke
    dashes = np.median([part.area for part in parts]) <= DASH * stroke**2
    if not dashes or tallest > TALL * np.ptp(ink.any(1).nonzero()[0]):
        reach = min(reach, GAP_IN_DIGIT * tallest)
    labels = ink * label(ndimage.distance_transform_edt(~ink) <= reach / 2)
    groups = regionprops(labels)
    least = max(DUST, TALL * max(len(group.image) for group in groups))
    digits = [group for group in groups if len(group.image) >= least]
    for small in groups:
        for digit in digits:
            if len(small.image) < least and is_hat(small.bbox, digit.bbox):
                labels[labels == small.label] = digit.label
    kept = [digit.label for digit in digits]
    return [group for group in regionprops(labels) if group.label in kept]


def is_hat(small: tuple, tall: tuple) -> bool:
    """Return whether a small box may be the bar of a 5: in the columns of a tall one, above it."""
    middle = (small[1] + small[3]) / 2
    gap = tall[0] - small[2]
    return tall[1] < middle < tall[3] and small[2] < tall[2] and gap <= HAT * (tall[2] - tall[0])


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


def like_mnist(ink: np.ndarray) -> Tensor:
    """Return ink in MNIST's form, (784,) uint8 (LeCun et al. 1998).

    It is light on dark, scaled into 20 x 20 pixels, its centre of mass in the middle of 28 x 28.
    """
    scale = 20 / max(ink.shape)
    inside = ndimage.distance_transform_edt(np.pad(ink > 0.5, 1))
    stroke = 2 * np.percentile(inside[inside > 0], 90)
    missing = round((MNIST_STROKE / scale - stroke) / 2)
    if missing > 0:  # a thin pen
        ink = ndimage.grey_dilation(np.pad(ink, missing), (2 * missing + 1,) * 2)
    size = [max(1, round(20 * n / max(ink.shape))) for n in ink.shape]
    scaled = Image.fromarray(ink.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)
    ink = np.asarray(scaled)
    centre = ndimage.center_of_mass(ink)
    top, left = (min(max(round(14 - c), 0), 28 - n) for c, n in zip(centre, size, strict=True))
    digit = np.zeros((28, 28), np.uint8)
    digit[top : top + size[0], left : left + size[1]] = (255 * ink / ink.max()).round()
    return torch.from_numpy(digit).flatten()
