"""How image files are found and read."""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class DatasetError(Exception):
    """The data cannot be used as given; the message is one line for the user."""


MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


def square(image_size: int) -> Callable:
    """From a PIL image to uint8 (C, image_size, image_size): resized by its shorter side and cropped to the middle."""
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    return Compose([Resize(image_size), CenterCrop(image_size), PILToTensor()])


class ReadImage:
    """An image file as PIL image of `mode`, "L" or "RGB": what an image viewer shows of it.

    Turned as its EXIF orientation says, transparency blended on white, of an animation the first frame, CMYK and other
    colour models converted by Pillow, without colour profiles. More than 8 bits a channel are refused where Pillow
    would clip them (grey; of 16-bit colours it takes the upper 8 bits).
    Raises DatasetError, with the path, where the file cannot be decoded or is refused.
    """

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, path: str):
        from PIL import Image, ImageOps

        with _opened(path) as image:
            image.load()
            with contextlib.suppress(
                Exception
            ):  # whatever broken EXIF data raise; viewers ignore these too
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.upper().endswith("A") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(self.mode)


@contextlib.contextmanager
def _opened(path: str):
    """The image, opened; DatasetError if it or what is done with it in the context fails."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(
                ("I", "F")
            ):  # a conversion would clip all but the darkest pixels to white
                raise DatasetError(
                    f"images must have at most 8 bits a channel, got mode {image.mode} in {path}"
                )
            yield image
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file raises in Pillow's readers
        raise DatasetError(f"cannot read the image {path}: {one_line(error)}") from error


def scan_folder(root: Path) -> str:
    """Opens each image's header, which refuses what ReadImage does: "L" where all are grey, else "RGB"."""

    def is_grey(path: str) -> bool:
        with _opened(path) as image:
            return image.mode in ("1", "L")

    paths = [path for split in ("train", "test") for path in _image_paths(root / split)]
    with ThreadPoolExecutor() as pool:
        return "L" if all(list(pool.map(is_grey, paths))) else "RGB"


def _image_paths(split: Path) -> Iterator[str]:
    """The images below the class directories of a split, as ImageFolder finds them: through symbolic links.

    Raises DatasetError if links form a circle, in which ImageFolder would find the same images again and again.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not split.is_dir():
        raise DatasetError(
            f"--data-root must hold train/<class>/* and test/<class>/*, but {split} is missing"
        )
    for each in (each for each in split.iterdir() if each.is_dir()):
        for base, _, files in os.walk(each, followlinks=True):
            above = Path(base).absolute().parents
            if os.path.islink(base) and any(os.path.samefile(base, parent) for parent in above):
                raise DatasetError(
                    f"symbolic links below {split} must not form a circle: {base} links to one above it"
                )
            yield from (
                os.path.join(base, file) for file in files if file.lower().endswith(IMG_EXTENSIONS)
            )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
