"""Image files: how they are found, what of them is read, and what is refused."""

import time

import numpy as np
import pytest
import torch
from conftest import make_folder
from data_files import refusal
from PIL import Image
from torchvision import transforms

import datasets
from engine.images import DatasetError, ReadImage, find_images, in_threads


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_of_more_than_8_bits_are_refused_wherever_they_are(tmp_path, mode, dtype):
    path = make_folder(tmp_path, mode=mode) / "test" / "cat" / "zz.tif"
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(path)
    with Image.open(path) as image:
        message = f"at most 8 bits a channel, got mode {image.mode} in {path}"
    for workers in (0, 1):
        assert message in refusal("folder", tmp_path, 4, workers)
    with pytest.raises(DatasetError, match="at most 8 bits"):  # one that came after the scan
        ReadImage(mode, 8)(path)


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = make_folder(tmp_path / "images")
    (root / "train" / "ant").rename(tmp_path / "elsewhere")
    (root / "train" / "ant").symlink_to(tmp_path / "elsewhere")
    assert datasets.create("folder", root, 4, image_size=8).train.rows.size == 24
    for name in "ab":  # two make 2^40 paths before the system has enough
        (tmp_path / "elsewhere" / name).symlink_to(root / "train")
    assert "must not form a circle" in refusal("folder", root, 4, image_size=8)


PIXELS = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40


# What each EXIF orientation does to the stored pixels so that they stand upright.
UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.T,
    6: PIXELS.T[:, ::-1],
    7: PIXELS.T[::-1, ::-1],
    8: PIXELS.T[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_stand_upright_as_their_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    upright = UPRIGHT[orientation]
    assert np.array_equal(ReadImage("L", upright.shape)(tmp_path / "a.png")[0], upright)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_broken_exif_data_change_nothing(tmp_path, exif):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(ReadImage("L", (2, 3))(tmp_path / "a.png")[0], PIXELS)


def test_transparency_is_blended_on_white(tmp_path):
    red = np.full((4, 1, 4), (200, 0, 0, 0), np.uint8)
    red[:, 0, 3] = alpha = [0, 51, 102, 255]
    grey = np.stack([np.full((4, 1), 100, np.uint8), red[:, :, 3]], axis=2)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)

    def read(image, mode, **options):
        image.save(tmp_path / "a.png", **options)
        return ReadImage(mode, image.size[::-1])(tmp_path / "a.png").permute(1, 2, 0).int().numpy()

    def blended(value):
        return [round(value * a / 255 + 255 - a) for a in alpha]

    seen = read(Image.fromarray(red), "RGB")[:, 0]
    assert abs(seen - np.array([blended(200), blended(0), blended(0)]).T).max() <= 1
    assert abs(read(Image.fromarray(grey), "L")[:, 0, 0] - blended(100)).max() <= 1
    assert read(palette, "RGB", transparency=0).tolist() == [[[255] * 3, [40, 50, 60]]]
    seen = read(Image.fromarray(PIXELS), "L", transparency=40)[:, :, 0]
    assert np.array_equal(seen, np.where(PIXELS == 40, 255, PIXELS))
    assert (read(Image.new("RGB", (2, 2), "red"), "RGB") == (255, 0, 0)).all()


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tmp_path, damage):
    bad = make_folder(tmp_path, size=(64, 64)) / "train" / "bee" / "3.png"
    bad.write_bytes(bad.read_bytes()[:2000] if damage is None else damage)
    assert "bee/3.png" in refusal("folder", tmp_path, 4, image_size=8)


def test_whatever_a_reader_raises_for_a_damaged_file_is_named(folder, monkeypatch):
    def fail(path):
        raise TypeError(
            "'IFDRational' object cannot be interpreted as an integer"
        )  # as Pillow 13 for a damaged TIFF

    monkeypatch.setattr(Image, "open", fail)
    assert "cannot read the image" in refusal("folder", folder, 4)


def test_pictures_of_runs_below_the_data_root_are_no_data(tmp_path):
    make_folder(tmp_path)
    for directory in ("log/train", "log/test", "train", "features/x"):
        (tmp_path / directory).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / directory / "epoch_1.png")
    data = datasets.create("folder", tmp_path, 4, image_size=8)
    assert data.in_channels == 1 and data.train.rows.size == 24


def test_folder_is_grey_only_where_every_image_is(tmp_path):
    make_folder(tmp_path)
    assert datasets.create("folder", tmp_path, 4, image_size=8).in_channels == 1
    Image.new("RGB", (8, 8), "red").save(tmp_path / "test" / "ant" / "red.png")
    assert datasets.create("folder", tmp_path, 4, image_size=8).in_channels == 3


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 96), (48, 32), (40, 400), (33, 71)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_image_is_resized_and_cropped_as_torchvision_would(size, mode, tmp_path):
    """Of noise each pixel; where torchvision rounds what covers the square, a smooth image."""
    shape = size if mode == "L" else (*size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape)
    if size == (33, 71):
        pixels = np.add.outer(2 * np.arange(33), np.arange(71))
        pixels = np.broadcast_to(pixels.reshape(*size, *([1] * (len(shape) - 2))), shape)
    image = Image.fromarray(pixels.astype(np.uint8))
    image.save(tmp_path / "a.png")
    oracle = transforms.Compose(
        [transforms.Resize(32), transforms.CenterCrop(32), transforms.PILToTensor()]
    )
    difference = (ReadImage(mode, 32)(tmp_path / "a.png").int() - oracle(image).int()).abs()
    assert difference.max() <= (2 if size == (33, 71) else 0)


def test_a_portrait_keeps_its_aspect_ratio(tmp_path):
    """A person of 64 x 128: a red head, a green body, blue legs."""
    person = np.zeros((128, 64, 3), np.uint8)
    person[:32] = 255, 0, 0
    person[32:96] = 0, 255, 0
    person[96:] = 0, 0, 255
    Image.fromarray(person).save(tmp_path / "standing.png")
    Image.fromarray(person.transpose(1, 0, 2)).save(tmp_path / "lying.png")
    seen = ReadImage("RGB", (64, 32))(tmp_path / "standing.png")
    assert seen.shape == (3, 64, 32)
    assert torch.equal(seen.argmax(0)[:, 5], torch.tensor([0] * 16 + [1] * 32 + [2] * 16))
    middle = ReadImage("RGB", 64)(tmp_path / "standing.png")
    assert (middle.argmax(0) == 1).all()
    lying = ReadImage("RGB", (32, 64))(tmp_path / "lying.png")
    assert torch.equal(lying, seen.transpose(1, 2))


def test_a_line_of_a_million_pixels_costs_no_more_than_another_image(tmp_path):
    Image.new("RGB", (1_000_000, 1), "red").save(tmp_path / "line.png")
    made = []

    def resize(self, size, *arguments, **options):
        made.append(size)
        return original(self, size, *arguments, **options)

    original, Image.Image.resize = Image.Image.resize, resize
    try:
        seen = ReadImage("RGB", 224)(tmp_path / "line.png")
    finally:
        Image.Image.resize = original
    assert made == [(224, 224)] and seen.shape == (3, 224, 224)
    assert (seen[0] == 255).all() and (seen[1:] == 0).all()


def test_large_images_are_read_up_to_a_limit_that_is_named(tmp_path, monkeypatch):
    """Pillow itself refuses more than 179 million pixels and warns of half of them."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    Image.new("L", (10, 9)).save(tmp_path / "a.png")
    assert ReadImage("L", 4)(tmp_path / "a.png").shape == (1, 4, 4)
    monkeypatch.setattr("engine.images.MOST_PIXELS", 80)
    with pytest.raises(DatasetError, match="got 10 x 9 in .*a.png"):
        ReadImage("L", 4)(tmp_path / "a.png")


def test_many_headers_are_read_with_a_bar_and_an_error_does_not_wait_for_the_rest():
    read = []

    def fail(number):
        read.append(number)
        time.sleep(0.01)
        raise DatasetError("at once")

    with pytest.raises(DatasetError):
        in_threads(fail, range(1000), "Reading")
    assert len(read) < 1000
    assert in_threads(str, range(3), "Reading") == ["0", "1", "2"]


def test_images_beside_the_class_directories_are_counted(tmp_path):
    (tmp_path / "ant").mkdir()
    for name in ("loose.png", "ant/one.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    classes, left_out = find_images(tmp_path)
    assert classes == {"ant": [str(tmp_path / "ant" / "one.png")]}
    assert left_out == {"images in no class": 1, "files .txt": 1}
