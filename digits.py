"""Your own digits: find them in a picture of any kind, and bring them into MNIST's form.

read_gray opens any image file; find_ink tells ink from paper, in uneven light, on a desk, in a frame; without_lines
takes the lines of ruled paper away; find_digits tells digits from dust and from each other; like_mnist scales them.
"""

from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor


def read_digits(path: str) -> list[Tensor]:
    """Return the digits of an image file, (784,) uint8 each, from left to right. Raise ValueError if there are none."""
    gray = read_gray(path)
    try:
        found = find_digits(without_lines(find_ink(gray)))
    except ValueError:  # nothing but a shadow, perhaps, and a digit that reaches into it
        found = find_digits(without_lines(find_ink(without_shadows(gray))))
    return [like_mnist(ink) for ink in found]


def read_gray(path: str) -> np.ndarray:
    """Return an image file as brightness, (height, width) from 0 to 1, the longer side at most 400."""
    image = Image.open(path)
    image.load()
    with suppress(Exception):  # a broken EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits of grey, or floats: any range
        pixels = np.nan_to_num(np.asarray(image, np.float32))
        low, high = np.percentile(pixels, (0.1, 99.9))
        image = Image.fromarray(((pixels - low) / max(high - low, 1e-9) * 255).clip(0, 255).astype(np.uint8))
    image.thumbnail((400, 400))
    if image.mode == "LAB":
        return np.asarray(image, np.float32)[..., 0] / 255
    pixels = np.asarray(image.convert("RGBA"), np.float32) / 255
    gray, alpha = pixels[..., :3] @ np.float32([0.299, 0.587, 0.114]), pixels[..., 3]
    paper = (gray * alpha).sum() < 0.5 * alpha.sum()  # what is transparent contrasts with what is drawn
    return gray * alpha + paper * (1 - alpha)


def rectangularity(shape: np.ndarray) -> float:
    """Return the share of the smallest rectangle around a shape, turned at will, that the shape fills."""
    y, x = np.nonzero(shape ^ ndimage.binary_erosion(shape))
    angles = np.deg2rad(np.arange(0, 90, 3))
    turned = np.outer(np.cos(angles), x) + np.outer(np.sin(angles), y)
    across = np.outer(np.cos(angles), y) - np.outer(np.sin(angles), x)
    return shape.sum() / ((np.ptp(turned, 1) + 1) * (np.ptp(across, 1) + 1)).min()


def border(shape: np.ndarray) -> np.ndarray:
    """Return the outermost pixels of an array, as one row."""
    return np.concatenate([shape[0], shape[-1], shape[1:-1, 0], shape[1:-1, -1]])


def find_sheet(gray: np.ndarray) -> np.ndarray:
    """Return where the paper is: inside a frame, or the sheet that lies on a desk; else everywhere."""
    for light in (gray > otsu(gray), gray <= otsu(gray)):
        labels, n = ndimage.label(light)
        if n:
            sheet = ndimage.binary_fill_holes(labels == 1 + np.bincount(labels.flat)[1:].argmax())
            alone = border(sheet).mean() < 0.3 and light[~sheet].mean() < 0.2
            written_on = 0.5 < light[sheet].mean() < 0.997 and sheet.mean() > 0.15
            if alone and written_on and rectangularity(sheet) > 0.87:
                margin = round(0.01 * max(gray.shape)) + (not sheet.all())
                return ndimage.binary_erosion(sheet, iterations=margin, border_value=0)
    return np.ones_like(gray, bool)


def otsu(values: np.ndarray) -> float:
    """Return the threshold between dark and light that leaves the least variance within both (Otsu 1979)."""
    counts, edges = np.histogram(values, 128)
    centres, below = (edges[1:] + edges[:-1]) / 2, np.cumsum(counts)
    above, sums = below[-1] - below, np.cumsum(counts * centres)
    between = below * above * (sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)) ** 2
    return edges[1 + between.argmax()]


def light_on(gray: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """Return the paper's brightness, as if there were no ink: one value or, in uneven light, a smooth surface."""
    rim = sheet & ~ndimage.binary_erosion(sheet, iterations=max(1, min(gray.shape) // 30))
    shares = [np.histogram(gray[place], 64, (0, 1))[0] / place.sum() for place in (sheet, rim)]
    paper = np.median(gray[sheet & (abs(gray - (sum(shares).argmax() + 0.5) / 64) < 1 / 64)])
    if (abs(gray[sheet] - paper) < 0.008).mean() > 0.25:
        return np.full_like(gray, paper)
    step = max(1, max(gray.shape) // 60)
    y, x = np.mgrid[-1 : 1 : gray.shape[0] * 1j, -1 : 1 : gray.shape[1] * 1j]
    few, values = sheet[::step, ::step], gray[::step, ::step]  # enough pixels for a smooth surface
    near = few
    for order in (1, 2, 2, 2, 4, 4, 4, 4):
        terms = polynomial(x[::step, ::step], y[::step, ::step], order)
        weights, *_ = np.linalg.lstsq(terms[near], values[near], rcond=None)
        distance = abs(values - terms @ weights)
        near = few & (distance < max(0.02, 2 * np.median(distance[few])))
    return polynomial(x, y, order) @ weights


def polynomial(x: np.ndarray, y: np.ndarray, order: int) -> np.ndarray:
    """Return the terms x^i y^j of a polynomial, i + j at most its order, in the last dimension."""
    return np.stack([x**i * y**j for i in range(order + 1) for j in range(order + 1 - i)], -1)


def without_shadows(gray: np.ndarray) -> np.ndarray:
    """Return a picture in even light: 1 where a window, wider than a stroke, shows nothing brighter; less is ink."""
    smooth, size = ndimage.gaussian_filter(gray, 1), max(gray.shape) // 4
    paper = ndimage.grey_closing(np.pad(smooth, size, "edge"), (size, size))[size:-size, size:-size]
    return 1 - (paper - smooth)


def find_ink(gray: np.ndarray) -> np.ndarray:
    """Return how far each pixel stands out from the paper, as a share of the ink's contrast; 0 is paper.

    Raise ValueError if nothing stands out from the noise.
    """
    sheet = find_sheet(gray)
    difference = np.where(sheet, gray - light_on(gray, sheet), 0)
    noise = np.percentile(abs(difference[sheet]), 25) / 0.32  # the standard deviation, if at least half is paper
    difference = ndimage.gaussian_filter(difference, max(gray.shape) / 800 if noise > 0.004 else 0)
    away = ndimage.binary_erosion(sheet, iterations=max(1, min(gray.shape) // 14)) if sheet.mean() > 0.5 else sheet
    dark, light = ((np.maximum(sign * difference[away], 0) ** 3).sum() for sign in (-1, 1))
    ink = np.maximum(-difference if dark > light else difference, 0)
    contrast = np.percentile(ink[ink > ink.max() / 2], 50) if ink.any() else 0
    if contrast < max(0.06, 5 * noise):
        raise ValueError("there is nothing in it")
    return np.where(ink > max(0.3 * contrast, 3 * noise), (ink / contrast).clip(0, 1), 0)


def without_lines(ink: np.ndarray) -> np.ndarray:
    """Return ink without the lines of ruled or squared paper, which run from one side to the other."""
    return without_rows(without_rows(ink).T).T


def without_rows(ink: np.ndarray) -> np.ndarray:
    """Return ink without thin lines that run from left to right, turned by at most 3 degrees."""
    (height, width), (y, x) = ink.shape, np.nonzero(ink)

    def rows(slope: float) -> np.ndarray:  # the row of each pixel of ink, on paper sheared by the slope
        return (y - slope * (x - width / 2)).round().astype(int) + height

    def straightness(slope: float) -> float:  # large where rows are full
        return (np.maximum(np.bincount(rows(slope)) - 0.4 * width, 0) ** 2.0).sum()

    row = rows(max(np.linspace(-0.06, 0.06, 41), key=straightness))
    covered = np.zeros((3 * height, width), bool)
    covered[row, x] = True
    full = (covered[1:] | covered[:-1]).mean(1) > 0.75  # two rows, as a line may lie between
    full = (np.pad(full, (0, 1)) | np.pad(full, (1, 0))) & (covered.mean(1) > 0.15)
    bands, n = ndimage.label(full)
    thickness = 3 + 0.02 * height
    thin = [i for i in range(1, n + 1) if (bands == i).sum() < thickness]
    lines = np.zeros_like(ink, bool)
    lines[y, x] = np.isin(bands, thin)[row]
    rest = ink * ~lines
    alone = len(thin) == 1 and rest.any() and not border(rest).any()  # not the bar of a 7 that fills the picture
    if len(thin) < 2 and not alone:
        return ink
    crossing = ndimage.grey_closing(rest, (2 * int(thickness) + 3, 1))  # strokes that cross a line
    return np.where(lines, np.minimum(crossing, ink), ink)


def find_parts(ink: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Return masks of ink that belongs together, the largest first, without dust and what hugs the border, and the
    width of a stroke in pixels, roughly."""
    labels, n = ndimage.label(ink > 0, np.ones((3, 3)))
    if not n:
        raise ValueError("there is nothing in it")
    areas = np.bincount(labels.flat, minlength=n + 1)[1:]
    width = 2 * np.median(ndimage.distance_transform_edt(ink > 0)[ink > 0]) + 1
    sides = labels[0], labels[-1], labels[:, 0], labels[:, -1]
    contact = np.array([[(side == i).mean() for side in sides] for i in range(1, n + 1)])
    hugging = contact.max(1) > 0.15
    fills = contact[:, :2].all(1) & (contact.max(1) < 0.95)  # a digit may reach from top to bottom; shadows hug a side
    areas = areas * (ndimage.maximum(ink, labels, range(1, n + 1)) > 0.75)  # what is left of shadows is faint
    inner, fitting = areas * ~hugging, areas * (~hugging | fills)
    keep = inner if inner.max() > 0.1 * areas.max() else fitting
    if not keep.any():
        raise ValueError("there is nothing in it")
    keep = keep > 0.02 * keep.max()
    kept = np.isin(labels, 1 + np.nonzero(keep)[0])
    dashed = keep.sum() > 3 and areas[keep].max() < 0.5 * areas[keep].sum()
    reach = 0.04 * max(np.ptp(axis) for axis in kept.nonzero()) if dashed else 0.6 * width
    near, n = ndimage.label(ndimage.distance_transform_edt(~kept) <= reach)
    return sorted((kept & (near == i) for i in range(1, n + 1)), key=lambda mask: -mask.sum()), width


def find_digits(ink: np.ndarray) -> list[np.ndarray]:
    """Return the ink of each digit in a picture, from left to right. Raise ValueError if there are none."""
    parts, width = find_parts(ink)
    digits = []  # left, right, top, bottom, mask
    for mask in parts:
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
        if max(right - left, bottom - top) < max(5, 0.03 * max(ink.shape)):
            continue
        tall = bottom - top > 0.5 * max([d[3] - d[2] for d in digits], default=0)
        tall = tall and mask.sum() > 0.1 * max([d[-1].sum() for d in digits], default=0)
        for d in digits:  # a part above or below a digit, or a small one beside it, belongs to it
            overlap = min(right, d[1]) - max(left, d[0])
            if overlap > 0.4 * min(right - left, d[1] - d[0]) or (not tall and overlap > -2 * width):
                if mask.sum() > 0.03 * d[-1].sum():
                    d[:] = min(left, d[0]), max(right, d[1]), min(top, d[2]), max(bottom, d[3]), mask | d[-1]
                break
        else:
            if tall:
                digits.append([left, right, top, bottom, mask])
    if not digits:
        raise ValueError("there is nothing in it")
    return [np.where(ndimage.binary_dilation(d[-1], iterations=2), ink, 0) for d in sorted(digits, key=lambda d: d[0])]


def like_mnist(ink: np.ndarray) -> Tensor:
    """Return ink in MNIST's form, (784,) uint8: light on dark, scaled into 20 x 20 pixels, and its centre of mass in
    the middle of 28 x 28 (LeCun et al. 1998)."""
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = ndimage.distance_transform_edt(np.pad(ink > 0.5, 1))
    stroke = 20 / max(ink.shape) * 2 * np.percentile(inside[inside > 0], 90) if inside.any() else 1  # pixels of MNIST's
    missing = round((2 - stroke) / 2 * max(ink.shape) / 20)
    if missing > 0:  # a thin pen
        ink = ndimage.grey_dilation(np.pad(ink, missing), (2 * missing + 1,) * 2)
    size = [max(1, round(20 * n / max(ink.shape))) for n in ink.shape]
    ink = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR))
    centre = [(ink.sum(1 - axis) @ np.arange(n)) / ink.sum() for axis, n in enumerate(size)]
    top, left = (min(max(round(14 - c), 0), 28 - n) for c, n in zip(centre, size, strict=True))
    digit = np.zeros((28, 28), np.uint8)
    digit[top : top + size[0], left : left + size[1]] = (255 * ink / ink.max()).round()
    return torch.from_numpy(digit).flatten()
