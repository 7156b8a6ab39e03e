"""Find the digit in the pixels of any picture: the page, its paper, the ink on it, and which ink is the digit.

It loads SciPy, so that mnist_preprocess.py imports it only when a picture needs it.
"""

from contextlib import suppress

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from picture_file import NoDigitError, as_image, as_pixels, four_sided

# A picture with more pixels than this along both sides is looked at in half its size first, in half the time. That is
# enough for a digit which is at least so large then, in pixels, and is so much of all ink that it is nearly alone.
FULL_SIDE, LARGE_DIGIT, ALONE = 256, 40, 0.9
SMALL_PAGE = 20  # Pixels along its shorter side, at least.
PAPER_GRID = 24  # Cells along the longer side of the grid on which the paper's brightness is estimated.


def find_digit(pixels: np.ndarray) -> np.ndarray:
    """Return the ink of the digit on a picture of (height, width, 1 or 3) uint8, cut to the digit's box.

    The ink is (height, width) float32, from 0 on paper to 1. Raises NoDigitError when there is none.
    """
    if min(pixels.shape[:2]) > FULL_SIDE:
        with suppress(NoDigitError):
            ink, share = digit_and_share(as_pixels(as_image(pixels).reduce(2)))
            if max(ink.shape) >= LARGE_DIGIT and share > ALONE:
                return ink
    return digit_and_share(pixels)[0]


def digit_and_share(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the ink of the digit as find_digit() does, and its share of all ink that is left when lines are gone."""
    pixels, inside = page(pixels)
    ink, noise = denoised(ink_on_paper(pixels, inside))
    ink = without_frames(without_ruled_lines(ink, noise), noise)
    ink, digit, share = digit_in(ink, noise)
    ((rows, columns),) = ndimage.find_objects(digit.astype(np.uint8))
    if is_small_page(digit[rows, columns]):
        rim = max(2, max(rows.stop - rows.start, columns.stop - columns.start) // 20)
        with suppress(NoDigitError):
            return digit_and_share(pixels[rows, columns][rim:-rim, rim:-rim])
    return strokes(ink, digit), share


def is_small_page(shape: np.ndarray) -> bool:
    """Tell whether a shape has no strokes, but four sides, and perhaps a digit in it: a note, a display, a cell."""
    hull = filled(shape)
    is_solid = stroke_thickness(hull) > 0.35 * max(hull.shape) and shape.sum() > 0.75 * hull.sum()
    return min(shape.shape) >= SMALL_PAGE and is_solid and four_sided(hull)


# 1. The page: what surrounds it (a table, a frame, a window) has edges that are stronger than any ink's.


def page(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels cut to the page, if one is seen, and a boolean array of what belongs to it.

    A page is a region of one brightness with four sides and something in it, that does not fill the picture.
    """
    factor = -(-max(pixels.shape) // 128)
    small = as_colours(as_image(pixels).reduce(factor))
    small -= small.mean(axis=(0, 1))
    value = small @ main_axis(small)
    middle, separation = otsu(value)
    splits = [middle]
    if separation < 0.95:  # More than two kinds of brightness: table, page and ink.
        splits += [otsu(value[value > middle])[0], otsu(value[value <= middle])[0]]
    largest, found = 0, None
    for split in splits:
        for side in (value > split, value <= split):
            hull, content = page_in(value, side)
            if content > largest:
                largest, found = content, hull
    if found is None:
        return pixels, np.ones(pixels.shape[:2], bool)
    rows, columns = np.flatnonzero(found.any(1)) * factor, np.flatnonzero(found.any(0)) * factor
    cut = slice(rows[0], rows[-1] + factor), slice(columns[0], columns[-1] + factor)
    # The outermost cells are blurred with what surrounds the page.
    found = ndimage.minimum_filter(found, 3)
    inside = found.repeat(factor, 0).repeat(factor, 1)[: pixels.shape[0], : pixels.shape[1]]
    paper = np.uint8(np.median(pixels[inside], axis=0))
    return np.where(inside[..., None], pixels, paper)[cut], inside[cut]


def page_in(value: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the largest region of `side`, its bays filled, and how large the largest thing in it is; 0 for no page."""
    if side.sum() < 0.2 * side.size:
        return side, 0
    regions = Parts(side, FOUR_NEIGHBOURS)
    region = regions.labels == regions.largest()
    hull = filled(region)
    covered = hull.sum() / hull.size
    if not 0.2 < covered < 0.97 or region.sum() < 0.6 * hull.sum() or not four_sided(hull):
        return hull, 0
    others = Parts(~region)
    outside = np.bincount(others.labels[~hull], minlength=len(others.area)) > 0
    holes = np.where(outside | others.touch_edge, 0, others.area)
    content = holes.argmax()
    bays = hull.sum() - region.sum() - holes.sum()  # What crosses the border would be cut off.
    if holes[content] == 0 or others.side[content] < 0.08 * min(hull.shape) or bays > 0.01 * hull.sum():
        return hull, 0
    # The page ends at once, unlike light that fades.
    contrast = abs(np.median(value[region]) - np.median(value[others.labels == content]))
    near, far = (step_at_border(value, hull, reach) for reach in (2, 6))
    return hull, int(holes[content]) if near > max(0.12 * contrast, 0.75 * far) else 0


def step_at_border(value: np.ndarray, region: np.ndarray, reach: int) -> float:
    """Return how much the values differ between the two sides of a region's border, within `reach` pixels of it."""
    size = 2 * reach + 1
    within = value[region & ~ndimage.minimum_filter(region, size)]
    beyond = value[~region & ndimage.maximum_filter(region, size)]
    return abs(np.median(within) - np.median(beyond)) if within.size and beyond.size else 0.0


# 2. Ink: how far every pixel is from the paper around it, along the colour axis on which they differ most.


def ink_on_paper(pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the ink, (height, width) float32 in gray levels, near 0 on paper and 0 outside of the page."""
    image = as_image(pixels)
    scale = PAPER_GRID / max(image.size)
    grid = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    cells = as_colours(grid)
    step = -(-max(image.size) // 128)
    sharp, smooth = pixels[::step, ::step].astype(np.float32), as_colours(image.reduce(step))
    # A median keeps slopes and straight edges of light and shadow, and takes out strokes, which fill less than half.
    uneven = Paper(as_colours(grid.filter(ImageFilter.MedianFilter(15))), sharp)
    best = uneven
    # Thick strokes fill more than half somewhere: then even paper separates better, with a little more ink, not a
    # shadow's worth of it. Where light is uneven, less of the rim, or nearly nothing inside, is as bright as the paper.
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    even = Paper(np.broadcast_to(np.median(rim, axis=0).astype(np.float32), cells.shape), sharp)
    at_rim, anywhere = (np.abs((colours - even.cells[0, 0]) @ even.axis) for colours in (rim, sharp))
    as_paper = 0.1 * anywhere.max()
    is_even = (at_rim < as_paper).mean() > 0.75 and (anywhere < as_paper).mean() > 0.25
    if is_even and even.separation > uneven.separation and even.ink.sum() < 2.5 * uneven.ink.sum():
        best = even
    else:
        # Light that falls off smoothly is smooth below broad strokes, too. A shadow's edge would be left over as ink,
        # which would reach the rim.
        uneven = sloping = Paper(uneven.cells, smooth)
        # Where light falls off all around, the median is too bright in the corners: most of the paper looks like ink.
        is_wrong = uneven.ink.mean() > 0.5
        paper = np.ones(cells.shape[:2], bool) if is_wrong else uneven.covers(cells)
        for _ in range(3 if is_wrong else 2):
            sloping = Paper(surface(cells, paper), smooth)
            paper = sloping.covers(cells)
        little_more = sloping.ink.sum() < 1.5 * uneven.ink.sum() and sloping.at_rim < min(0.2, uneven.at_rim + 0.01)
        is_better = sloping.separation > uneven.separation and little_more
        if sloping.at_rim < 0.01 if is_wrong else is_better:
            best = sloping
    return (pixels @ best.axis - enlarged((best.cells @ best.axis)[..., None], image.size)[..., 0]) * inside


class Paper:
    """One guess at the paper's colours, and how well it tells ink from paper in a sample of the picture.

    cells: the colours, (rows, columns, channels); axis: the colour axis from paper to ink; threshold: on that axis;
    ink: where the sample is beyond it; at_rim: the share of ink along the sample's sides; separation: see otsu().
    """

    def __init__(self, cells: np.ndarray, sample: np.ndarray):
        """Separate ink from paper in the sample, (height, width, channels) float32."""
        self.cells = cells
        difference = sample - enlarged(cells, sample.shape[1::-1])
        axis = main_axis(difference)
        value = difference @ axis
        sign = 1 if (value * value * value).sum() > 0 else -1  # Ink is the side with the few large values.
        self.axis = sign * axis
        self.threshold, self.separation = otsu(sign * value)
        self.ink = sign * value > self.threshold
        self.at_rim = np.concatenate([self.ink[0], self.ink[-1], self.ink[:, 0], self.ink[:, -1]]).mean()

    def covers(self, cells: np.ndarray) -> np.ndarray:
        """Tell which of the picture's cells are paper."""
        return (cells - self.cells) @ self.axis < self.threshold / 2


def surface(cells: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """Return the surface of second order that fits best to those cells that are paper."""
    y, x = (place / np.float32(PAPER_GRID) for place in np.indices(paper.shape))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    return terms @ np.linalg.lstsq(terms[paper], cells[paper], rcond=None)[0]


def as_colours(image: Image.Image) -> np.ndarray:
    """Return a picture as (height, width, 1 or 3) float32."""
    return np.asarray(image, np.float32).reshape(image.height, image.width, -1)


def enlarged(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return (rows, columns, channels) float32 resized smoothly to (width, height)."""
    # Channel by channel, because Pillow resizes several in whole gray levels only, which faint pencil is near to.
    channels = [Image.fromarray(grid[..., i]).resize(size, Image.Resampling.BILINEAR) for i in range(grid.shape[2])]
    return np.stack(channels, axis=-1)


def main_axis(colours: np.ndarray) -> np.ndarray:
    """Return the unit vector along which colours differ most from 0, float32 (channels,)."""
    flat = colours.reshape(-1, colours.shape[-1])
    return np.linalg.eigh(flat.T @ flat)[1][:, -1].astype(np.float32)


def otsu(values: np.ndarray) -> tuple[float, float]:
    """Return the threshold that splits values best into two classes, and the share of the variance that it explains.

    Otsu, A Threshold Selection Method from Gray-Level Histograms, IEEE Transactions on Systems, Man, and Cybernetics
    9, 1979.
    """
    if values.size == 0 or values.max() <= values.min():
        return float(values.max(initial=0)), 0.0
    low, width = float(values.min()), float(np.ptp(values)) / 63.99
    share = np.bincount(((values - low) / width).astype(np.uint8).ravel(), minlength=64) / values.size
    level = np.arange(64)
    below, mass = np.cumsum(share)[:-1], np.cumsum(share * level)
    mean = mass[-1]
    between = (mean * below - mass[:-1]) ** 2 / (below * (1 - below)).clip(1e-9)
    best = between.argmax()
    return low + (best + 1) * width, float(between[best] / (share @ (level - mean) ** 2).clip(1e-9))


# 3. The digit: without the paper's ruled lines and without dirt, and with all of its strokes.


def ink_level(ink: np.ndarray, noise: float) -> tuple[float, float]:
    """Return the typical strength of the ink, and the threshold above which a pixel is ink, not less than `noise`."""
    strong = ink[ink > noise]
    for _ in range(6):
        if not strong.size:
            raise NoDigitError("no digit to be seen: the picture shows no ink that differs from its paper")
        level = float(strong @ strong / strong.sum())
        threshold = max(noise, 0.45 * level)
        strong = strong[strong > threshold]
    return level, threshold


def noise_of(ink: np.ndarray) -> float:
    """Return three standard deviations of the noise, and not less than 8 gray levels."""
    # Of normal noise, a quarter is within 0.32 standard deviations; a quarter of the picture or more is paper, which
    # may be beside 0 a little, so that it is the median; where ink is half of all, it is not.
    step = max(2, max(ink.shape) // 64)  # So many values tell it as well as all.
    values = np.sort(ink[::step, ::step], axis=None)
    quarter = min(np.sort(np.abs(values - level))[values.size // 4] for level in (0, values[values.size // 2]))
    return max(9.4 * float(quarter), 8.0)


def denoised(ink: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the ink, smoothed where it is so faint that a sensor's noise tears it, and the noise_of() it then."""
    noise = noise_of(ink)
    strong = ink[ink > noise]
    if not strong.size or min(ink.shape) < 32:  # In a small picture, most of the steps are those of edges.
        return ink, noise
    level = float(strong @ strong / strong.sum())
    deviation = np.median(np.abs(np.diff(ink[::4]))) / 0.954  # Of normal noise: 0.6745 times the square root of 2.
    if level >= 16 * deviation:
        return ink, noise
    ink = ndimage.gaussian_filter(ink, 1.5)
    return ink, noise_of(ink)


def without_ruled_lines(ink: np.ndarray, noise: float) -> np.ndarray:
    """Return the ink without lines that run from one side of the page to the other."""
    threshold = ink_level(ink, noise)[1]
    mask = ink > max(threshold / 2, noise)  # Faint lines too: what is left of them would join the digit.
    across = ruled_lines(mask)
    down = ruled_lines((mask & ~across).T).T
    return np.where(across | down, 0, ink)


def ruled_lines(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of thin straight lines from the left to the right; strokes that cross them are not theirs."""
    lines = np.zeros_like(mask)
    width = mask.shape[1]
    if mask.any(axis=0).mean() < 0.8:
        return lines
    thick = max(3, width // 80)
    length = run_lengths(mask)
    thin = mask & (length <= thick)
    bridged = thin.copy()  # Lines the other way cut these.
    for shift in range(1, min(thick, width - 1) + 1):
        bridged[:, shift:] |= thin[:, :-shift]
    parts = Parts(bridged)
    y, x = np.nonzero(thin)
    owner = parts.labels[y, x]
    wide, high = parts.right - parts.left, parts.bottom - parts.top
    waiting = (wide > max(0.12 * width, 4)) & (high < 0.3 * wide)
    waiting[0] = False
    for part in np.flatnonzero(waiting):
        if not waiting[part]:
            continue
        own_x, own_y = x[owner == part], y[owner == part]
        centred = own_x - own_x.mean()
        slope = centred @ own_y / max(centred @ centred, 1)
        near = np.abs(y - own_y.mean() - slope * (x - own_x.mean())) <= 0.75 * thick + 0.5
        covered = np.bincount(x[near], minlength=width) > 0
        end = width // 8 + 1
        if covered.mean() > 0.5 and covered[:end].mean() > 0.4 and covered[-end:].mean() > 0.4:
            lines[y[near], x[near]] = True
            waiting[owner[near]] = False
    return lines


def without_frames(ink: np.ndarray, noise: float) -> np.ndarray:
    """Return the ink without what frames a digit, and without cells and lines beside it: straight, thin and long."""
    threshold = ink_level(ink, noise)[1]
    mask = ink > max(threshold / 2, noise)
    parts = Parts(mask)
    dark = np.bincount(parts.labels[ink > threshold], minlength=len(parts.area))
    smallest = max(8, min(0.05 * max(mask.shape), 0.1 * min(mask.shape)))
    large = np.flatnonzero((parts.side > smallest) & (dark > 0.3 * parts.area))
    large = large[np.argsort(-parts.side[large])][:40]
    shapes = {part: parts.labels[parts.boxes[part - 1]] == part for part in large}
    thickness = {part: stroke_thickness(shape) for part, shape in shapes.items()}
    beside = np.zeros(len(parts.area), bool)
    beside[[part for part in large if len(large) > 1 and goes_around(part, large, parts, thickness[part])]] = True
    large = large[~beside[large]]
    lines = {part: straight_lines(shape) for part, shape in shapes.items()}
    flat = {part: shape.shape[1] > 3 * shape.shape[0] for part, shape in shapes.items()}
    candidates = [part for part in large if not lines[part] and parts.side[part] > 2.5 * thickness[part]]
    if not candidates:  # A 1 or a 4 may be as straight as what is beside it: then it is thicker, or of fewer lines.
        upright = [part for part in large if not flat[part]]
        candidates = sorted(upright, key=lambda part: thickness[part] ** 2 / max(lines[part], 1))[-1:]
    if not candidates:
        return ink
    digit = max(candidates, key=lambda part: dark[part] * (0.3 if parts.touch_edge[part] else 1))
    side = parts.side[digit]
    for part in large:
        is_thin = thickness[part] < 0.5 * thickness[digit]
        if part == digit or not lines[part] or (parts.side[part] < 0.95 * side and not is_thin):
            continue
        across = max(parts.left[part] - parts.right[digit], parts.left[digit] - parts.right[part])
        down = max(parts.top[part] - parts.bottom[digit], parts.top[digit] - parts.bottom[part])
        if is_thin or lines[part] > 2:
            beside[part] = True
        elif lines[part] == 2:  # A 7 in two parts is not thin.
            beside[part] = max(across, down) < -side / 2 or parts.side[part] > 15 * thickness[part]
        else:  # As thick as the pen, it may be the stem of a 4, or a stroke from which the pen was lifted.
            gap, least, enough = (down, 0.04, 1.3) if flat[part] else (across, 0.1, 1.6)
            beside[part] = gap > least * side or parts.side[part] > enough * side
    return np.where(ndimage.maximum_filter(beside[parts.labels], 3), 0, ink) if beside.any() else ink


def goes_around(part: int, others: np.ndarray, parts: "Parts", thickness: float) -> bool:
    """Tell whether a part is a frame or a circle: it has another inside, more than the dot that some put into a 0."""
    labels = parts.labels[parts.boxes[part - 1]]
    hull = filled(labels == part)
    within = np.bincount(labels[hull], minlength=len(parts.area)) > 0.95 * parts.area
    within &= parts.side > min(0.3 * parts.side[part], 4 * thickness)
    within[part] = False
    return bool(within[others].any()) and parts.area[part] < 0.7 * hull.sum()


def straight_lines(shape: np.ndarray) -> int:
    """Return of how many thin, straight, level or upright lines a shape is made; 0 when there is more to it."""
    count = covered = 0
    thickness = stroke_thickness(shape)
    if thickness > max(shape.shape) / 10:
        return 0
    for mask in (shape, shape.T):
        pieces = Parts(mask & (run_lengths(mask) <= 1.6 * thickness + 1))
        wide, high = pieces.right - pieces.left, pieces.bottom - pieces.top
        straight = (wide > 4 * thickness) & (high <= 0.14 * wide + 1.5 * thickness + 1)
        count += straight.sum()
        covered += pieces.area[straight].sum()
    return int(count) if covered > 0.8 * shape.sum() else 0


def stroke_thickness(shape: np.ndarray) -> float:
    """Return how thick the strokes of a shape are, on average: a long stroke has two sides."""
    padded = np.pad(shape, 1).astype(np.int8)
    return 2 * shape.sum() / (np.pi / 4 * sum(np.abs(np.diff(padded, axis=axis)).sum() for axis in (0, 1)))


def digit_in(ink: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the ink from 0 to 1, the pixels of the largest shape with the parts that belong to it, and their share."""
    level, threshold = ink_level(ink, noise)
    mask = ink > threshold
    parts = Parts(mask)
    # What lies along a whole side is more likely a shadow or a table, and what touches a side may be one.
    along = (parts.bottom - parts.top > 0.95 * mask.shape[0]) | (parts.right - parts.left > 0.95 * mask.shape[1])
    sides = (parts.labels[0], parts.labels[-1], parts.labels[:, 0], parts.labels[:, -1])
    along &= np.max([np.bincount(side, minlength=len(along)) > 0.3 * len(side) for side in sides], axis=0)
    main = parts.largest(np.where(along, 0.02, np.where(parts.touch_edge, 0.3, 1)))
    if parts.side[main] < 5 or parts.area[main] < 8:
        raise NoDigitError("no digit to be seen: the picture shows nothing but specks")
    digit = np.arange(len(parts.area)) == main
    # Many parts of one size are the dashes of a line, if they are not the digit: a display's are of up to seven.
    area = np.sort(parts.area[1:])
    dashes = np.searchsorted(area, 1.4 * parts.area) - np.searchsorted(area, parts.area / 1.4) > 5
    dashes &= ~dashes[main]
    while True:
        top, bottom = parts.top[digit].min(), parts.bottom[digit].max()
        left, right = parts.left[digit].min(), parts.right[digit].max()
        side = max(bottom - top, right - left)
        gap = np.max([parts.top - bottom, top - parts.bottom, parts.left - right, left - parts.right], axis=0)
        more = ~digit & ~along & ~dashes & (gap < 0.2 * side) & (parts.side > 0.15 * side) & (parts.area > 0)
        if not more.any():
            return np.clip(ink / level, 0, 1), digit[parts.labels], parts.area[digit].sum() / parts.area.sum()
        digit |= more


def strokes(ink: np.ndarray, digit: np.ndarray) -> np.ndarray:
    """Return the ink of the digit's strokes with their soft edges, cut to the digit's box.

    Strokes become at least 1/11 as thick as the digit is large; MNIST's are 1/10 to 1/5.
    """
    (cut,) = ndimage.find_objects(digit.astype(np.uint8))
    digit = digit[cut]
    ink = np.where(ndimage.maximum_filter(digit, 3), ink[cut], 0)
    missing = round((max(digit.shape) / 11 - stroke_thickness(digit)) / 2)
    return ndimage.maximum_filter(np.pad(ink, missing), 2 * missing + 1) if missing > 0 else ink


# Shapes.

FOUR_NEIGHBOURS, EIGHT_NEIGHBOURS = (ndimage.generate_binary_structure(2, reach) for reach in (1, 2))


class Parts:
    """The connected parts of a boolean array; label 0 is the background.

    labels: (height, width) int; area, top, bottom, left, right, side (the longer one), touch_edge: one of each a label.
    """

    def __init__(self, mask: np.ndarray, neighbours: np.ndarray = EIGHT_NEIGHBOURS):
        """Find the parts of pixels that touch each other."""
        height, width = mask.shape
        self.labels, count = ndimage.label(mask, neighbours)
        self.boxes = ndimage.find_objects(self.labels)
        limits = [(height, 0, width, 0)]  # Nothing, for the background.
        limits += [(y.start, y.stop, x.start, x.stop) for y, x in self.boxes]
        self.top, self.bottom, self.left, self.right = np.array(limits).T
        self.area = np.bincount(self.labels[mask], minlength=count + 1)
        self.side = np.maximum(self.bottom - self.top, self.right - self.left)
        self.touch_edge = (self.top == 0) | (self.left == 0) | (self.bottom == height) | (self.right == width)

    def largest(self, weight=1) -> int:
        """Return the label of the part with the largest weighted area."""
        return int((self.area * weight).argmax())


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Return for every pixel how long its run of True along the column is."""
    labels, _ = ndimage.label(mask, [[0, 1, 0], [0, 1, 0], [0, 1, 0]])
    return np.bincount(labels.ravel())[labels] * mask


def filled(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that have pixels of the mask on both sides in their row, or in their column."""
    reached = np.logical_or.accumulate
    in_row = reached(mask, 1) & reached(mask[:, ::-1], 1)[:, ::-1]
    return in_row | reached(mask, 0) & reached(mask[::-1], 0)[::-1]
