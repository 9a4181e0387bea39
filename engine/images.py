"""How image files are found and read."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.contrib.concurrent import thread_map

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
    return thread_map(function, items, desc=what, leave=False, delay=1, disable=None)


# ---------------------------------------------------------------------------------------- reading


class ReadImage:
    """Reads an image file as a viewer shows it, in `mode`, "L" or "RGB": uint8 (C, H, W).

    Turned as EXIF says, transparency on white, of an animation the first frame, without colour
    profiles; then resized to cover `image_size`, an int or (H, W), and the middle cut out.
    Raises DatasetError, with the path, where the file cannot be decoded or is refused.
    """

    def __init__(self, mode: str, image_size: int | Sequence[int]):
        self.mode = mode
        self.image_size = height_and_width(image_size)

    def __call__(self, path: str | Path) -> torch.Tensor:
        height, width = self.image_size
        with _opened(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF data, which viewers ignore too
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert(self.mode)
            # Computes no more than is cut out, however thin the image is.
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image).reshape(height, width, -1))
        return pixels.permute(2, 0, 1).contiguous()


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator:
    """The image; DatasetError if it cannot be opened, or read in the context."""
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit refuses panoramas
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DatasetError(  # Pillow would clip them
                    f"images must have at most 8 bits a channel, got mode {image.mode} in {path}"
                )
            if image.width * image.height > MOST_PIXELS:
                size = f"{image.width} x {image.height}"
                raise DatasetError(
                    f"images must have at most {MOST_PIXELS:,} pixels, got {size} in {path}"
                )
            yield image
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file raises in Pillow's readers
        raise DatasetError(f"cannot read the image {path}: {one_line(error)}") from error


def is_grey(path: str) -> bool:
    """Whether an image is stored as grey, by its header."""
    with _opened(path) as image:
        return image.mode in ("1", "L")


# ---------------------------------------------------------------------------------------- finding


HIDDEN = (".", "@eaDir", "__MACOSX")  # how names begin that systems and editors leave behind


def find_images(split: Path, levels: int = 1) -> tuple[dict[str, list[str]], Counter]:
    """The paths below each class directory of a split, all in order, and how many of what else.

    With two `levels` a class is a directory within a directory, named "outer/inner".
    """
    classes = {}
    left_out = Counter()
    for base, _, files in os.walk(split, followlinks=True):
        if any(os.path.samefile(base, above) for above in Path(os.path.abspath(base)).parents):
            raise DatasetError(f"symbolic links must not form a circle, got {base}")
        parts = Path(base).relative_to(split).parts
        if any(part.startswith(HIDDEN) for part in parts):
            left_out["hidden"] += len(files)
        elif len(parts) >= levels:
            paths = classes.setdefault("/".join(parts[:levels]), [])
            paths += [os.path.join(base, file) for file in files if _is_image(file, left_out)]
        else:
            left_out["images in no class"] += sum(_is_image(file, left_out) for file in files)
    return {name: sorted(paths) for name, paths in sorted(classes.items())}, left_out


def _is_image(file: str, left_out: Counter) -> bool:
    ending = os.path.splitext(file)[1].lower()
    if file.startswith(HIDDEN):
        left_out["hidden"] += 1
    elif ending not in ENDINGS:
        left_out[f"files {ending}" if ending else "files without ending"] += 1
    else:
        return True
    return False
