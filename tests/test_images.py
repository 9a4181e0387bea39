"""Image files: how they are found, what of them is read, and what is refused."""

import numpy as np
import pytest
from conftest import make_folder
from data_files import refusal
from PIL import Image

import datasets


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_of_more_than_8_bits_are_refused_wherever_they_are(tmp_path, mode, dtype):
    path = make_folder(tmp_path, mode=mode) / "test" / "cat" / "zz.tif"
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(path)
    with Image.open(path) as image:
        message = f"at most 8 bits a channel, got mode {image.mode} in {path}"
    for workers in (0, 1):
        assert message in refusal("folder", tmp_path, 4, workers)
    with pytest.raises(
        datasets.DatasetError, match="at most 8 bits"
    ):  # one that came after the scan
        datasets.ReadImage(mode)(path)


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
    assert np.array_equal(datasets.ReadImage("L")(tmp_path / "a.png"), UPRIGHT[orientation])


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_broken_exif_data_change_nothing(tmp_path, exif):
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(datasets.ReadImage("L")(tmp_path / "a.png"), PIXELS)


def test_transparency_is_blended_on_white(tmp_path):
    red = np.full((4, 1, 4), (200, 0, 0, 0), np.uint8)
    red[:, 0, 3] = alpha = [0, 51, 102, 255]
    expected = [
        [round(value * a / 255 + 255 * (1 - a / 255)) for value in (200, 0, 0)] for a in alpha
    ]
    grey = np.stack([np.full((4, 1), 100, np.uint8), red[:, :, 3]], axis=2)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for name, image, options in (
        ("rgba", Image.fromarray(red), {}),
        ("la", Image.fromarray(grey), {}),
        ("p", palette, dict(transparency=0)),
        ("l", Image.fromarray(PIXELS), dict(transparency=40)),
        ("rgb", Image.new("RGB", (2, 2), "red"), {}),
    ):
        image.save(tmp_path / f"{name}.png", **options)
    read = {
        mode: lambda name, mode=mode: np.asarray(
            datasets.ReadImage(mode)(tmp_path / f"{name}.png")
        ).astype(int)
        for mode in ("L", "RGB")
    }
    assert abs(read["RGB"]("rgba")[:, 0] - expected).max() <= 1
    assert (
        abs(
            read["L"]("la")[:, 0] - [round(100 * a / 255 + 255 * (1 - a / 255)) for a in alpha]
        ).max()
        <= 1
    )
    assert read["RGB"]("p").tolist() == [[[255] * 3, [40, 50, 60]]]
    assert np.array_equal(read["L"]("l"), np.where(PIXELS == 40, 255, PIXELS))
    assert (read["RGB"]("rgb") == (255, 0, 0)).all()


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
