"""How image files are found and read."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
MOST_PIXELS = 500_000_000  # in one file; an RGB image of these takes 1.5 GB while it is read


class DatasetError(Exception):
    """The data cannot be used as given; the message is one line for the user."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def some(names: Sequence[str]) -> str:
    """The names, at most five of them, and how many more there are."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """One number is a square's."""
    if isinstance(image_size, int):
        return image_size, image_size
    height, width = image_size
    return height, width


def in_threads(function: Callable, items: Sequence, what: str) -> list:
    """The function's results, with a progress bar on a terminal where they take over a second."""
    pool = ThreadPoolExecutor()
    try:
        results = pool.map(function, items)
        return list(tqdm(results, what, len(items), leave=False, delay=1, disable=None))
    finally:  # an error or Ctrl-C does not wait for the rest
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------- reading


class ReadImage:
    """Reads an image file as a viewer shows it, in `mode`, "L" or "RGB".

    Turned as its EXIF orientation says, transparency blended on white, of an animation the first
    frame, other colour models converted by Pillow, without colour profiles. Grey of more than 8
    bits is refused, since Pillow would clip it; of 16-bit colours it takes the upper 8 bits.
    Returns uint8 (C, H, W) of `image_size`, an int or (H, W), or, without, a PIL image.
    Raises DatasetError, with the path, where the file cannot be decoded or is refused.
    """

    def __init__(self, mode: str, image_size: int | Sequence[int] | None = None):
        self.mode = mode
        self.image_size = height_and_width(image_size) if image_size else None

    def __call__(self, path: str | Path):
        from PIL import Image, ImageOps

        with _opened(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF data, which viewers ignore too
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.upper().endswith("A") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert(self.mode)
            return crop(image, self.image_size) if self.image_size else image


def crop(image, image_size: Sequence[int]) -> torch.Tensor:
    """From a PIL image to uint8 (C, H, W): resized to cover H x W, and the middle cut out.

    Only what is cut out is computed: a line of a million pixels costs no more than another image.
    """
    high, wide = image_size
    width, height = image.size
    if high * width >= wide * height:
        covering = high * width // height, high
    else:
        covering = wide, wide * height // width
    left = round((covering[0] - wide) / 2)
    top = round((covering[1] - high) / 2)
    box = (
        left * width / covering[0],
        top * height / covering[1],
        (left + wide) * width / covering[0],
        (top + high) * height / covering[1],
    )
    pixels = np.array(image.resize((wide, high), 2, box))  # 2: bilinear, antialiased
    return torch.from_numpy(pixels.reshape(high, wide, -1)).permute(2, 0, 1).contiguous()


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator:
    """The image; DatasetError if opening it or what is done with it in the context fails."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit refuses panoramas, without a remedy
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DatasetError(
                    f"images must have at most 8 bits a channel, got mode {image.mode} in {path}"
                )
            if image.width * image.height > MOST_PIXELS:
                raise DatasetError(
                    f"images must have at most {MOST_PIXELS // 10**6} million pixels, got "
                    f"{image.width} x {image.height} in {path}"
                )
            yield image
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file raises in Pillow's readers
        raise DatasetError(f"cannot read the image {path}: {one_line(error)}") from error


def is_grey(path: str) -> bool:
    """Whether an image is stored as grey. Reads its header, and refuses what ReadImage refuses."""
    with _opened(path) as image:
        return image.mode in ("1", "L")


# ---------------------------------------------------------------------------------------- finding


class Found(NamedTuple):
    """The images of a split."""

    classes: dict[str, list[str]]  # the paths of each, all in order
    left_out: Counter  # how many of what

    def paths(self) -> list[str]:
        return [path for paths in self.classes.values() for path in paths]


def find_images(split: Path, levels: int = 1) -> Found:
    """The images below each class directory of a split, through symbolic links.

    Names that begin with a dot and the like are neither classes nor images; files of other endings
    are counted. With two `levels` a class is a directory within a directory, named "outer/inner".
    Raises DatasetError if links form a circle.
    """
    found = Found({}, Counter())
    directories = [""]
    for _ in range(levels):
        directories = [
            os.path.join(outer, inner)
            for outer in directories
            for inner in sorted(os.listdir(split / outer))
            if _is_seen(inner, found) and (split / outer / inner).is_dir()
        ]
    for name in directories:
        images = found.classes[name.replace(os.sep, "/")] = []
        for base, file in sorted(_files(split / name)):
            path = os.path.join(base, file)
            ending = os.path.splitext(file)[1].lower()
            if not all(_is_seen(each, found) for each in Path(path).relative_to(split).parts):
                continue
            if ending in ENDINGS:
                images.append(path)
            else:
                found.left_out[f"files {ending}" if ending else "files without ending"] += 1
    return found


def _is_seen(name: str, found: Found) -> bool:
    """Whether a name is not one of those that systems and editors leave behind; counts these."""
    hidden = name.startswith((".", "@eaDir", "__MACOSX"))
    found.left_out["hidden"] += hidden
    return not hidden


def _files(directory: Path) -> Iterator[tuple[str, str]]:
    """Directory and name of each file below a directory."""
    for base, _, files in os.walk(directory, followlinks=True):
        above = Path(base).absolute().parents
        if os.path.islink(base) and any(os.path.samefile(base, parent) for parent in above):
            raise DatasetError(
                f"symbolic links must not form a circle: {base} links to a directory above it"
            )
        for file in files:
            yield base, file
