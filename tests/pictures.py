"""Pictures of digits as people bring them: on paper, in light, on desks, behind lines; numbers."""

import random

import numpy as np
from PIL import Image, ImageCms, ImageDraw
from scipy import ndimage
from skimage.morphology import skeletonize

PAPER, PEN = np.float32([0.9, 0.86, 0.75]), np.float32([0.16, 0.2, 0.5])
KINDS = (
    "plain inverted as_mnist tiny transparent cropped photograph noisy thick chalkboard "
    "cmyk lab gray16 float one_bit palette webp gif avif frame1 frame20 box desk desk_turned "
    "desk_partly vignette shadow specks ruled ruled_tilted squared baseline "
    "ballpoint ballpoint_photo pencil fine finest dashed "
    "cut_1 cut_2 cut_3 cut_4 line_beside corner_beside seen_through"
).split()
STORED = (
    "plain inverted transparent chalkboard cmyk lab gray16 float one_bit palette webp gif avif"
).split()


def enlarged(digit: np.ndarray, size: int) -> np.ndarray:
    """Return a digit (28, 28) uint8 as ink from 0 to 1, (size, size)."""
    large = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(large, np.float32) / 255


def placed(ink: np.ndarray, rng: random.Random, most: int = 200) -> np.ndarray:
    """Return ink somewhere on a larger sheet, with a margin around it."""
    size, margin = len(ink), most // 10
    height = size + rng.randint(2 * margin, most)
    width = size + rng.randint(2 * margin, most)
    sheet = np.zeros((height, width), np.float32)
    y, x = (rng.randint(margin, n - size - margin) for n in sheet.shape)
    sheet[y : y + size, x : x + size] = ink
    return sheet


def thinned(digit: np.ndarray, size: int, width: int) -> np.ndarray:
    """Return a digit's middle lines, drawn by a pen so many pixels wide."""
    distance = ndimage.distance_transform_edt(~skeletonize(enlarged(digit, size) > 0.5))
    return (distance <= width / 2).astype(np.float32)


def on_paper(ink: np.ndarray, paper=PAPER, pen=PEN) -> np.ndarray:
    """Return ink of a colour on paper of another, (height, width, 3)."""
    return paper * (1 - ink[..., None]) + np.float32(pen) * ink[..., None]


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))


def grain(shape: tuple, strength: float, rng: random.Random) -> np.ndarray:
    """Return noise, the same in all colours."""
    numbers = np.random.default_rng(rng.randint(0, 10**6))
    return numbers.normal(0, strength, (*shape[:2], 1)).astype(np.float32)


def on_desk(page: np.ndarray, turned: bool, rng: random.Random) -> np.ndarray:
    """Return a page in the middle of a dark desk."""
    margin, angle = rng.randint(30, 120), rng.uniform(-12, 12) if turned else 0
    page = np.pad(page, ((margin, margin), (margin, margin), (0, 0)))
    there = np.pad(np.ones([n - 2 * margin for n in page.shape[:2]], np.float32), margin)[..., None]
    page, there = (ndimage.rotate(x, angle, reshape=False, order=1) for x in (page, there))
    desk = np.float32([0.2, 0.16, 0.12]) + grain(page.shape, 0.02, rng)
    return page + desk * (1 - there) + grain(page.shape, 0.01, rng)


def lines(shape: tuple, kind: str, rng: random.Random) -> np.ndarray:
    """Return where ruled or squared paper has its lines."""
    step = rng.randint(30, 60)
    width = rng.randint(1, 2)
    slope = rng.uniform(-0.04, 0.04) * (kind == "ruled_tilted")
    y, x = np.mgrid[: shape[0], : shape[1]]
    there = (y + slope * x).round().astype(int) % step < width
    return there | (x % step < width) if kind == "squared" else there


def cut_off(page: np.ndarray, ink: np.ndarray, n_sides: int, rng: random.Random) -> np.ndarray:
    """Return a page from which so many sides are cut, with a little of the digit."""
    rows, columns = (ink > 0.5).any(1).nonzero()[0], (ink > 0.5).any(0).nonzero()[0]
    smaller = min(np.ptp(rows), np.ptp(columns))
    lost = [round(rng.uniform(0, 0.06) * smaller) for _ in range(4)]
    top, bottom = rows[0] + lost[0], rows[-1] + 1 - lost[1]
    left, right = columns[0] + lost[2], columns[-1] + 1 - lost[3]
    sides = rng.sample(["top", "bottom", "left", "right"], n_sides)
    top = top if "top" in sides else 0
    left = left if "left" in sides else 0
    bottom = bottom if "bottom" in sides else len(ink)
    right = right if "right" in sides else ink.shape[1]
    return page[top:bottom, left:right]


def with_lines_beside(page: np.ndarray, ink: np.ndarray, kind: str, rng: random.Random):
    """Return a page with a printed line at the left of the digit, or with a cell's corner."""
    rows, columns = (ink > 0.5).any(1).nonzero()[0], (ink > 0.5).any(0).nonzero()[0]
    away = round(rng.uniform(0.15, 0.3) * np.ptp(rows))
    width = rng.randint(2, 4)
    x = max(2, columns[0] - away)
    y = max(2, rows[0] - away)
    page = page.copy()
    if kind == "line_beside":
        y = 0
    else:
        page[y : y + width, x:] = 0.2
    page[y:, x : x + width] = 0.2
    return page


def draw_thin(digit: np.ndarray, kind: str, rng: random.Random) -> Image.Image:
    """Return a digit drawn by a thin pen: in a large picture, or dashed."""
    if kind in ("fine", "finest"):  # a pen of 1/100 or 1/300 of the picture
        size = 450
        ink = placed(thinned(digit, size, 9 if kind == "fine" else 3), rng, 700 - size)
        light = np.linspace(0.8, 1, ink.shape[1], dtype=np.float32)[None, :, None]
        return picture(on_paper(ink) * light + grain(ink.shape, 0.01, rng))
    if kind == "dashed":
        y, x = np.mgrid[:200, :200]
        return picture(on_paper(placed(thinned(digit, 200, 8) * ((y + 0.7 * x) % 28 > 8), rng)))
    ink = placed(thinned(digit, rng.randint(300, 600), rng.randint(3, 7)), rng, 600)
    page = on_paper(ink, pen=(0.5, 0.5, 0.52) if kind == "pencil" else PEN)
    light = np.linspace(0.7, 1, ink.shape[1], dtype=np.float32)[None, :, None]
    return picture(page if kind == "ballpoint" else page * light + grain(ink.shape, 0.02, rng))


def draw_marked(page: np.ndarray, ink: np.ndarray, kind: str, rng: random.Random) -> np.ndarray:
    """Return a page with something on it that isn't the digit."""
    if kind in ("frame1", "frame20"):
        n = int(kind[5:])
        page[:n] = page[-n:] = page[:, :n] = page[:, -n:] = 0.05
    if kind == "box":
        inner = page[13:-13, 13:-13].copy()
        page[10:-10, 10:-10] = 0.1
        page[13:-13, 13:-13] = inner
    if kind == "specks":
        for _ in range(6):
            y = rng.randint(0, len(page) - 4)
            x = rng.randint(0, page.shape[1] - 4)
            size = rng.randint(1, 4)
            page[y : y + size, x : x + size] = 0.1
    if kind == "baseline":
        bottom = min(len(page) - 3, ink.any(1).nonzero()[0][-1] + 3)
        page[bottom : bottom + 2] = 0.3
    if kind in ("ruled", "ruled_tilted", "squared"):
        on_line = lines(ink.shape, kind, rng)[..., None]
        paper = np.where(on_line, np.float32([0.45, 0.55, 0.8]), 0.92)
        page = on_paper(ink, paper, (0.15, 0.15, 0.3)) + grain(ink.shape, 0.008, rng)
    if kind == "seen_through":  # the squares of the sheet below
        paper = np.where(lines(ink.shape, "squared", rng)[..., None], 0.82, 0.9)
        page = on_paper(ink, paper, PEN) + grain(ink.shape, 0.008, rng)
    if kind.startswith("cut_"):
        page = cut_off(page, ink, int(kind[-1]), rng)
    if kind.endswith("_beside"):
        page = with_lines_beside(page, ink, kind, rng)
    return page


def draw_lit(page: np.ndarray, kind: str, rng: random.Random) -> np.ndarray:
    """Return a page as a camera sees it."""
    y, x = np.mgrid[-1 : 1 : len(page) * 1j, -1 : 1 : page.shape[1] * 1j].astype(np.float32)
    light = {
        "photograph": 0.875 + 0.125 * x,
        "vignette": 1 - 0.33 * (x * x + y * y),
        "shadow": 1 - 0.5 / (1 + np.exp(-12 * (x + y - 1.1))),
    }.get(kind, np.ones_like(x))
    return page * light[..., None] + grain(page.shape, 0.06 if kind == "noisy" else 0.016, rng)


def draw_stored(ink: np.ndarray, kind: str) -> Image.Image:
    """Return a drawing as programs and scanners store it."""
    gray, colour = picture(1 - 0.8 * ink), picture(on_paper(ink))
    if kind == "transparent":
        drawn = Image.new("RGBA", gray.size, (20, 20, 90, 255))
        drawn.putalpha(picture(ink))
        return drawn
    if kind == "lab":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(colour, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    if kind == "chalkboard":
        return picture(on_paper(ink, np.float32([0.1, 0.25, 0.2]), (0.85, 0.85, 0.8)))
    if kind == "gray16":
        return Image.fromarray(((1 - 0.8 * ink.clip(0, 1)) * 40000 + 5000).astype(np.uint16))
    return {
        "plain": lambda: picture(ink),
        "inverted": lambda: picture(1 - ink),
        "cmyk": lambda: colour.convert("CMYK"),
        "float": lambda: Image.fromarray((1 - 0.8 * ink) * 3.7),
        "one_bit": lambda: gray.convert("1"),
        "palette": lambda: colour.convert("P"),
    }.get(kind, lambda: colour)()


def draw(digit: np.ndarray, kind: str, rng: random.Random) -> Image.Image:
    """Return a digit (28, 28) uint8 in a picture of this kind."""
    if kind == "as_mnist":
        return Image.fromarray(255 - digit)
    if kind in ("ballpoint", "ballpoint_photo", "pencil", "fine", "finest", "dashed"):
        return draw_thin(digit, kind, rng)
    size = rng.randint(20, 40) if kind == "tiny" else rng.randint(120, 300)
    ink = enlarged(digit, size)
    if kind == "cropped":  # the digit touches all four edges
        large = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
        return picture(ink).crop(large.getbbox())
    if kind == "thick":
        ink = ndimage.grey_dilation(ink, (size // 28, size // 28))
    ink = placed(ink, rng, 30 if kind == "tiny" else 200)
    page = on_paper(ink)
    if kind.startswith("desk"):
        page = on_desk(page, kind == "desk_turned", rng)
        return picture(page[:, 60:] if kind == "desk_partly" else page)
    if kind in ("photograph", "vignette", "shadow", "noisy"):
        return picture(draw_lit(page, kind, rng))
    if kind in ("tiny", "thick"):
        return picture(page)
    if kind in STORED:
        return draw_stored(ink, kind)
    return picture(draw_marked(page, ink, kind, rng))


# ---------------------------------------------------------------------------- numbers
NUMBERS = (
    "two_digits row long_row wide_gaps thin_pen thick_pen slanted heights rising "
    "two_rows three_rows rising_rows column telephone date cells circled underlined coloured "
    "unequal close form table"
).split()
LENGTHS = {  # the fewest and the most digits in a line; (2, 8) for kinds not listed
    "two_digits": (2, 2),
    "long_row": (10, 12),
    "column": (3, 5),
    "telephone": (10, 10),
    "date": (8, 8),
    "cells": (1, 4),
    "circled": (1, 1),
    "underlined": (1, 1),
    "coloured": (1, 1),
    "form": (2, 6),
    "table": (1, 4),
}
INK_AND_PAPER = {  # of equal brightness: what a person tells apart by colour alone
    "red on green": ((0.96, 0.57, 0.53), (0.56, 0.8, 0.57)),
    "plum on sky blue": ((0.87, 0.63, 0.87), (0.53, 0.81, 0.92)),
    "blue on lilac": ((0.4, 0.62, 0.95), (0.75, 0.55, 0.85)),
}


def trimmed(ink: np.ndarray) -> np.ndarray:
    """Return ink without the empty rows and columns around it."""
    rows, columns = (ink > 0.3).any(1).nonzero()[0], (ink > 0.3).any(0).nonzero()[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def glyph(digit: np.ndarray, height: int, kind: str, slant: float) -> np.ndarray:
    """Return a digit's ink, about this high, with a slant and with the pen of this kind."""
    size = round(1.4 * height)  # a digit fills 20 of MNIST's 28 pixels
    ink = enlarged(digit, size)
    if kind == "thin_pen":  # finding the middle lines needs a large image
        large = Image.fromarray(thinned(digit, 4 * size, 14))
        ink = np.array(large.resize((size, size), Image.Resampling.BOX))
    if kind == "thick_pen":
        ink = ndimage.grey_dilation(ink, (size // 14, size // 14))
    ink = np.pad(ink, ((0, 0), (size // 3, size // 3)))
    shear, middle = np.float32([[1, 0], [slant, 1]]), ink.shape[0] / 2
    return trimmed(ndimage.affine_transform(ink, shear, (0, -slant * middle), order=1))


def sign(height: int, kind: str) -> np.ndarray:
    """Return the ink of a dash or, with the space above it, of a full stop."""
    thickness = max(3, height // 10)
    if kind == "telephone":
        return np.ones((thickness, height // 2), np.float32)
    return np.pad(np.ones((thickness, thickness), np.float32), ((height - thickness, 0), (0, 0)))


def in_line(glyphs: list[np.ndarray], gaps: list[int], rise: float) -> np.ndarray:
    """Return pieces of ink side by side, on a line that rises by so much a pixel of width."""
    width = sum(ink.shape[1] for ink in glyphs) + sum(gaps)
    highest = max(len(ink) for ink in glyphs)
    line = np.zeros((highest + round(abs(rise) * width) + 2, width), np.float32)
    middle = highest / 2
    start = max(0, rise * width)
    left = 0
    for ink, gap in zip(glyphs, [*gaps, 0], strict=True):
        top = round(start + middle - len(ink) / 2 - rise * left)
        top = min(max(top, 0), len(line) - len(ink))
        line[top : top + len(ink), left : left + ink.shape[1]] = ink
        left += ink.shape[1] + gap
    return line


def below(lines: list[np.ndarray], gap: int) -> np.ndarray:
    """Return pieces of ink one below the other."""
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, gap), (0, width - line.shape[1]))) for line in lines]
    return np.concatenate(padded)[:-gap]


def write_line(digits: list[np.ndarray], kind: str, height: int, rng: random.Random) -> np.ndarray:
    """Return the ink of a row of digits (28, 28), with gaps, signs, slant, rise of its kind."""
    slant = rng.uniform(-0.4, 0.4) if kind == "slanted" else 0
    rise = rng.choice((-1, 1)) * rng.uniform(0.04, 0.12) if kind.startswith("rising") else 0
    glyphs = []
    for n, digit in enumerate(digits):
        if (kind == "telephone" and n in (3, 6)) or (kind == "date" and n in (2, 4)):
            glyphs.append(sign(height, kind))
        least, most = {"heights": (0.7, 1.1), "unequal": (0.45, 1)}.get(kind, (1, 1))
        factor = rng.uniform(least, most)
        glyphs.append(glyph(digit, round(factor * height), kind, slant))
    least, most = {"wide_gaps": (0.5, 1.5), "close": (0.04, 0.08)}.get(kind, (0.15, 0.5))
    if kind in ("slanted", "telephone", "date"):
        least = 0.3
    gaps = [round(height * rng.uniform(least, most)) for _ in glyphs[1:]]
    return in_line(glyphs, gaps, rise)


def around(ink: np.ndarray, kind: str, rng: random.Random) -> np.ndarray:
    """Return a digit's ink in a printed cell, in a circle drawn by hand, or underlined."""
    margin = round(rng.uniform(0.2, 0.5) * len(ink))
    side = max(ink.shape) + 2 * margin
    if kind == "circled":
        side = round(1.2 * side)
    top, left = (side - ink.shape[0]) // 2, (side - ink.shape[1]) // 2
    ink = np.pad(ink, ((top, side - top - ink.shape[0]), (left, side - left - ink.shape[1])))
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    thickness = rng.uniform(3, 8) / side
    if kind == "cells":
        return np.maximum(ink, np.maximum(abs(x), abs(y)) > 1 - thickness)
    if kind == "circled":
        return np.maximum(ink, abs(np.hypot(x, y) - 0.95) < thickness)
    bottom = ink.any(1).nonzero()[0][-1] + round(rng.uniform(0.1, 0.2) * side)
    ink[bottom : bottom + rng.randint(4, 8), side // 10 : -side // 10] = 1
    return ink


def in_form(inks: list[np.ndarray], rng: random.Random) -> np.ndarray:
    """Return digits' ink in a form's row of cells, whose walls they share."""
    side = max(max(ink.shape) for ink in inks)
    side += round(rng.uniform(0.3, 0.6) * side)
    width = rng.randint(2, 4)
    cells = []
    for ink in inks:
        cell = np.zeros((side, side), np.float32)
        top = rng.randint(width + 4, side - len(ink) - width - 4)
        left = (side - ink.shape[1]) // 2
        cell[top : top + len(ink), left : left + ink.shape[1]] = ink
        cell[:, :width] = cell[:width] = cell[-width:] = 1
        cells.append(cell)
    form = np.concatenate(cells, 1)
    form[:, -width:] = 1
    return form


def in_table(ink: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return a number's ink in one cell of a printed table that goes on beyond the picture."""
    above, below, left, right = (round(rng.uniform(0.15, 0.4) * len(ink)) for _ in range(4))
    cell = np.pad(ink, ((above, below), (left, right)))
    height, length = cell.shape
    table = np.pad(cell, ((height // 2, height // 3), (length // 3, height // 3)))
    width = rng.randint(2, 4)
    for y in (height // 2, height // 2 + height):
        table[y : y + width] = 1
    for x in (length // 3, length // 3 + length):
        table[:, x : x + width] = 1
    return table


def draw_number(
    images: np.ndarray, kind: str, rng: random.Random
) -> tuple[Image.Image, list[list[int]]]:
    """Return a picture of digits from images (N, 28, 28), and which they are, line by line."""
    least, most = LENGTHS.get(kind, (2, 8))
    n_lines = {"two_rows": 2, "three_rows": 3, "rising_rows": 2}.get(kind, 1)
    height = rng.randint(60, 110)
    chosen = []
    for _ in range(n_lines):
        length = rng.randint(least, most)
        chosen.append([rng.randrange(len(images)) for _ in range(length)])
    written = [[images[i] for i in line] for line in chosen]
    if kind == "column":
        inks = [glyph(digit, height, kind, 0) for digit in written[0]]
        ink = below(inks, round(height * rng.uniform(0.2, 0.5)))
        chosen = [[i] for i in chosen[0]]
    elif kind in ("cells", "circled", "underlined"):
        inks = [around(glyph(digit, height, kind, 0), kind, rng) for digit in written[0]]
        ink = in_line(inks, [rng.randint(10, 40) for _ in inks[1:]], 0)
    elif kind == "form":
        ink = in_form([glyph(digit, height, kind, 0) for digit in written[0]], rng)
    else:
        inks = [write_line(digits, kind, height, rng) for digits in written]
        ink = below(inks, round(height * rng.uniform(0.3, 0.8)))
    ink = in_table(ink, rng) if kind == "table" else np.pad(ink, rng.randint(30, 80))
    pen, paper = rng.choice(list(INK_AND_PAPER.values())) if kind == "coloured" else (PEN, PAPER)
    page = on_paper(ink, np.float32(paper), pen)
    return picture(draw_lit(page, "photograph", rng)), chosen


def blank(light=lambda x, y: 0.8 + 0 * x, strength: float = 0.02) -> Image.Image:
    """Return an empty page in some light."""
    y, x = np.mgrid[-1:1:300j, -1:1:400j].astype(np.float32)
    return picture(light(x, y) + grain(x.shape, strength, random.Random(1))[..., 0])


def in_shadow(rng: random.Random) -> Image.Image:
    """Return an empty page, a part of which is in a shadow, more or less sharp."""
    angle, edge, sharpness = rng.uniform(0, 7), rng.uniform(-0.9, 0.9), rng.choice((4, 10, 30, 100))
    depth = rng.uniform(0.1, 0.3)

    def light(x, y):
        distance = np.cos(angle) * x + np.sin(angle) * y - edge
        return 0.8 - 0.8 * depth * (1 + np.tanh(sharpness * distance))

    return blank(light)


def ruled(n: np.ndarray) -> np.ndarray:
    """Return which rows or columns, from 0 at the middle, lie on a line of ruled paper."""
    return n.astype(int) % 40 < 2


BLANK = {
    "even": lambda: blank(strength=0),
    "noisy": lambda: blank(strength=0.06),
    "dark": lambda: blank(lambda x, y: 0.1 + 0 * x),
    "vignette": lambda: blank(lambda x, y: 0.8 * (1 - 0.3 * (x * x + y * y))),
    "uneven": lambda: blank(lambda x, y: 0.5 + 0.3 * x),
    "ruled": lambda: blank(lambda x, y: 0.9 - 0.4 * ruled(y * 150)),
    "squared": lambda: blank(lambda x, y: 0.9 - 0.4 * (ruled(y * 150) | ruled(x * 200))),
    "framed": lambda: blank(lambda x, y: np.where((abs(x) > 0.95) | (abs(y) > 0.95), 0.1, 0.9)),
}


def sheet_with(draw) -> Image.Image:
    """Return a blank sheet on which something is drawn by a function of ImageDraw's pen."""
    sheet = Image.new("L", (400, 300), 230)
    draw(ImageDraw.Draw(sheet))
    return sheet


def scribble(pen: ImageDraw.ImageDraw) -> None:
    rng = random.Random(1)
    pen.line([(rng.randint(100, 300), rng.randint(50, 250)) for _ in range(30)], 20, 5)


SHAPES = {
    "block": lambda: sheet_with(lambda pen: pen.rectangle((150, 100, 230, 180), 20)),
    "disk": lambda: sheet_with(lambda pen: pen.ellipse((150, 100, 230, 180), 20)),
    "dot": lambda: sheet_with(lambda pen: pen.ellipse((196, 146, 204, 154), 20)),
    "line": lambda: sheet_with(lambda pen: pen.line((100, 170, 300, 130), 20, 5)),
    "scribble": lambda: sheet_with(scribble),
}
