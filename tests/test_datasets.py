"""Loaders: the right pixels, the same for every number of workers, in a DataLoader's order; and what is refused."""

import hashlib
import multiprocessing
import os
import pickle
import select
import signal
import struct
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import PYTHON, SHARED_DATA, make_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torchvision import transforms

import datasets
from engine.ranks import Ranks


def batches(loader, seed=1):
    torch.manual_seed(seed)
    return [(images.clone(), labels.clone()) for images, labels, _ in loader]


def write_mnist(root, train=32, test=16, size=28, name="MNIST"):
    """Small files in MNIST's format (IDX, big-endian)."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images, labels = random.integers(0, 256, (count, size, size)), np.arange(count) % 10
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, count, size, size) + images.astype(np.uint8).tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, count) + labels.astype(np.uint8).tobytes()
        )
    return root


def write_cifar(root, monkeypatch, classes):
    """Small files in CIFAR's format (pickles), with torchvision's MD5 sums set to theirs."""
    source = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    base = root / source.base_folder
    base.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name, contents):
        data = pickle.dumps(contents)
        (base / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    key = "labels" if classes == 10 else "fine_labels"
    names = [f"class {index}" for index in range(classes)]
    meta, md5 = write("meta", {source.meta["key"]: names})
    monkeypatch.setattr(source, "meta", {"filename": meta, "key": source.meta["key"], "md5": md5})
    for attribute, count in (("train_list", 16), ("test_list", 8)):
        pixels = random.integers(0, 256, (count, 3072)).astype(np.uint8)
        file = write(attribute, {"data": pixels, key: [index % classes for index in range(count)]})
        monkeypatch.setattr(source, attribute, [list(file)])
    return source


@pytest.mark.parametrize(
    "name", ["mnist", "fashion-mnist", "digits", "cifar10", "cifar100", "folder"]
)
def test_workers_give_the_same_batches_to_the_bit(name, tmp_path, monkeypatch):
    if name == "folder":
        make_folder(tmp_path, size=(9, 12), mode="RGB")
    elif name.startswith("cifar"):
        write_cifar(tmp_path, monkeypatch, classes=int(name[5:]))
    elif name != "digits":
        write_mnist(tmp_path, name={"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name])
    size = 300 if name == "digits" else 7
    memory, workers = (
        datasets.create(name, tmp_path, size, j, image_size=8, unseen=["1"]) for j in (0, 2)
    )
    assert memory.classes == workers.classes and memory[3:] == workers[3:]
    assert memory.unseen and not set(memory.unseen) & set(memory.classes)
    for split in ("train", "test", "unknown"):
        pairs = list(
            zip(batches(getattr(memory, split)), batches(getattr(workers, split)), strict=True)
        )
        assert len(pairs) == len(getattr(memory, split))
        for (images, labels), (images_j, labels_j) in pairs:
            assert torch.equal(images, images_j) and torch.equal(labels, labels_j)
            assert images.shape[1:] == (memory.in_channels, memory.image_size, memory.image_size)
            assert ((labels >= len(memory.classes)) == (split == "unknown")).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_unseen_classes_are_the_images_and_labels_that_the_others_leave(workers, tmp_path):
    make_folder(tmp_path, classes=("10", "2", "ant", "bee"), train=3, test=2)
    whole = datasets.create("folder", tmp_path, 4, image_size=8)
    data = datasets.create(
        "folder", tmp_path, 4, workers, image_size=8, unseen=["bee", "2"]
    )  # a name, not a number
    assert (data.classes, data.unseen) == (["10", "ant"], ["2", "bee"])
    images, labels = (torch.cat(each) for each in zip(*batches(whole.test), strict=True))
    for split, numbers in ((data.test, {0: 0, 2: 1}), (data.unknown, {1: 2, 3: 3})):
        some_images, some_labels = (torch.cat(each) for each in zip(*batches(split), strict=True))
        chosen = [row for row, label in enumerate(labels.tolist()) if label in numbers]
        assert torch.equal(some_images, images[chosen])
        assert some_labels.tolist() == [numbers[label] for label in labels[chosen].tolist()]
    assert data.train.rows.size == 6


def test_pixels_are_those_of_torchvisions_transforms(tmp_path):
    write_mnist(tmp_path)
    data = datasets.create("mnist", tmp_path, batch_size=8)
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    oracle = torchvision.datasets.MNIST(tmp_path, train=False, transform=transform)
    images = torch.cat([images for images, _, _ in data.test])
    assert torch.equal(images, torch.stack([image for image, _ in oracle]))


@pytest.mark.parametrize(
    "scaling, low, high", [("symmetric", -127.5 / 128, 127.5 / 128), ("unit", 0.0, 1.0)]
)
def test_scalings_map_0_and_255_to_their_formula(scaling, low, high):
    normalise = datasets.Normalise(*datasets.SCALINGS[scaling](datasets.SPECS["mnist"]))
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert normalise(pixels).flatten().tolist() == pytest.approx([low, high], abs=1e-6)


def test_standard_scaling_of_digits_has_mean_0_and_deviation_1():
    images = torch.cat([images for images, _, _ in datasets.create("digits", "nowhere", 500).train])
    assert images.mean().item() == pytest.approx(0, abs=2e-3)
    assert images.std().item() == pytest.approx(1, abs=2e-3)


def test_digits_are_split_by_class_and_without_overlap():
    data = datasets.create("digits", "nowhere", 500)
    (train, train_labels), (test, test_labels) = (
        (torch.cat(each) for each in zip(*batches(loader), strict=True))
        for loader in (data.train, data.test)
    )
    assert (len(train), len(test)) == (1437, 360)
    shares = [torch.bincount(labels) / len(labels) for labels in (train_labels, test_labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.005
    # The source holds a few equal pictures; across the split there are no more than within it.
    rows = {image.numpy().tobytes() for image in train}
    assert sum(image.numpy().tobytes() in rows for image in test) < 10


@given(size=st.integers(1, 70), batch_size=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_batches_are_those_of_a_shuffling_dataloader(size, batch_size, seed):
    plain = DataLoader(TensorDataset(torch.arange(size)), batch_size, shuffle=True)
    ours = datasets.BatchRows(size, batch_size, True, "cpu", Ranks())
    for _ in range(2):  # the second epoch goes on from the first one's random state
        torch.manual_seed(seed)
        expected = [rows.tolist() for _ in range(2) for (rows,) in plain]
        torch.manual_seed(seed)
        assert [rows.tolist() for _ in range(2) for rows in ours] == expected


@given(size=st.integers(1, 60), batch_size=st.integers(1, 20), ranks=st.integers(1, 5))
def test_ranks_share_each_batch_without_loss_or_repetition(size, batch_size, ranks):
    shares = [
        list(datasets.BatchRows(size, batch_size, False, "cpu", Ranks(rank, ranks)))
        for rank in range(ranks)
    ]
    whole = list(BatchSampler(range(size), batch_size, drop_last=False))
    assert [sorted(torch.cat(parts).tolist()) for parts in zip(*shares, strict=True)] == whole
    assert len({len(share) for share in shares}) == 1


def test_the_rest_of_a_pass_is_what_the_whole_one_would_have_gone_on_with():
    train = datasets.create("digits", "nowhere", 500).train
    whole = batches(train)
    torch.manual_seed(1)
    rest = list(train.after(2))
    assert [size for _, _, size in rest] == [437] and torch.equal(rest[0].labels, whole[2][1])
    assert torch.equal(rest[0].images, whole[2][0]) and len(list(train)) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_thumbnails_are_the_images_of_the_data_set_and_no_larger_than_asked(workers, tmp_path):
    root = make_folder(tmp_path / "images", size=(16, 16), mode="RGB")
    data = datasets.create("folder", root, 4, workers, image_size=16)
    whole = np.stack(
        [np.asarray(Image.open(path)) for path in sorted((root / "test").rglob("*.png"))]
    )
    assert (data.test.thumbnails([11, 2]) == whole[[11, 2]].transpose(0, 3, 1, 2)).all()
    halves = whole.reshape(12, 8, 2, 8, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert data.test.thumbnails(range(12), largest=8) == pytest.approx(halves, abs=0.51)
    data = datasets.create("folder", root, 4, workers, image_size=16, unseen=["bee"], val_share=0.5)
    assert (data.unknown.thumbnails([3, 0]) == whole[[7, 4]].transpose(0, 3, 1, 2)).all()
    validation = np.stack([np.asarray(Image.open(path)) for path in data.val.paths])
    assert (data.val.thumbnails(range(8)) == validation.transpose(0, 3, 1, 2)).all()


def test_testing_draws_nothing_from_the_training_randomness():
    data = datasets.create("digits", "nowhere", 500)
    torch.manual_seed(3)
    list(data.test)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(after, torch.get_rng_state())


def test_folder_is_grey_only_where_every_image_is(tmp_path):
    make_folder(tmp_path)
    assert datasets.create("folder", tmp_path, 4, image_size=8).in_channels == 1
    Image.new("RGB", (8, 8), "red").save(tmp_path / "test" / "ant" / "red.png")
    assert datasets.create("folder", tmp_path, 4, image_size=8).in_channels == 3


def refusal(*arguments, **options) -> str:
    with pytest.raises(datasets.DatasetError) as error:
        datasets.create(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    assert "train is missing" in refusal("folder", tmp_path, 4)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert "directory of images for each class" in refusal("folder", tmp_path, 4)
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir()
    assert "ant" in refusal("folder", tmp_path, 4)  # no image
    for split in ("train", "test"):
        Image.new("L", (8, 8)).save(tmp_path / split / "ant" / "a.png")
    assert "at least two classes" in refusal("folder", tmp_path, 4)
    (tmp_path / "train" / "bee").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "train" / "bee" / "b.png")
    (tmp_path / "test" / "cow").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "test" / "cow" / "c.png")
    assert "only train has bee and only test has cow" in refusal("folder", tmp_path, 4)
    (tmp_path / "file").touch()
    assert "got the file" in refusal("folder", tmp_path / "file", 4)


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


def test_pictures_of_runs_below_the_data_root_are_no_data(tmp_path):
    make_folder(tmp_path)
    for directory in ("log/train", "log/test", "train", "features/x"):
        (tmp_path / directory).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / directory / "epoch_1.png")
    data = datasets.create("folder", tmp_path, 4, image_size=8)
    assert data.in_channels == 1 and data.train.rows.size == 24


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


def test_workers_live_as_long_as_the_run_and_are_forked_from_a_process_without_threads(
    run, monkeypatch
):
    """Also where a progress bar is shown, and where an epoch's rest and tests come in between."""
    starts, start, before = [], multiprocessing.Process.start, set(threading.enumerate())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        multiprocessing.Process,
        "start",
        lambda process: (
            starts.append((process, set(threading.enumerate()) - before)),
            start(process),
        ),
    )
    status, _, err = run("-j", "2", "--max-iter", "5", "--eval-freq", "1")
    assert status == 0 and "epoch 2" in err  # the bar
    assert len(starts) == 2 and not any(threads for _, threads in starts)
    assert not any(process.is_alive() for process, _ in starts)


def test_whatever_a_reader_raises_for_a_damaged_file_is_named(folder, monkeypatch):
    def fail(path):
        raise TypeError(
            "'IFDRational' object cannot be interpreted as an integer"
        )  # as Pillow 13 for a damaged TIFF

    monkeypatch.setattr(Image, "open", fail)
    assert "cannot read the image" in refusal("folder", folder, 4)


def test_a_truncated_image_ends_workers_with_its_name(tmp_path):
    bad = make_folder(tmp_path, size=(64, 64)) / "train" / "bee" / "3.png"
    bad.write_bytes(bad.read_bytes()[:2000])
    others, loader = (
        multiprocessing.active_children(),
        datasets.create("folder", tmp_path, 4, workers=1, image_size=8),
    )
    try:
        list(loader.train)
    except datasets.DatasetError as error:
        assert str(error).startswith("cannot read the image ") and "bee/3.png" in str(error)
    del loader
    assert (
        multiprocessing.active_children() == others
    )  # one that is left would delay the interpreter's end


def test_workers_end_with_a_killed_main_process(folder):
    """Whoever lives holds the standard output open. torch's own watch takes up to five seconds."""
    code = (
        f"import datasets; batches = iter(datasets.create('folder', {str(folder)!r}, 1, 2, image_size=8).train); "
        "next(batches); print('up', flush=True); input()"
    )
    main = subprocess.Popen(
        [PYTHON, "-c", code],
        cwd=Path(datasets.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert main.stdout.readline() == b"up\n"
    main.kill()
    main.wait()
    assert select.select([main.stdout], [], [], 2.5)[0] and main.stdout.read() == b""


def test_a_signal_that_comes_while_workers_start_does_not_end_them(folder, monkeypatch):
    original = datasets._start_worker

    def start_worker(worker):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        original(worker)

    monkeypatch.setattr(datasets, "_start_worker", start_worker)
    assert len(list(datasets.create("folder", folder, 10, workers=1, image_size=8).train)) == 3


def test_a_set_too_large_for_memory_names_the_way_out(folder, monkeypatch):
    monkeypatch.setattr(datasets, "_free_memory", lambda device: 1000)
    assert "-j 4" in refusal("folder", folder, 4, image_size=8)
    datasets.create("folder", folder, 4, workers=1, image_size=8)


def no_network(*arguments, **options):
    raise OSError("Name or service not known")


def test_broken_or_missing_files_are_refused_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for name in ("mnist", "fashion-mnist", "cifar10", "cifar100"):
        assert "--dataset digits needs no download" in refusal(name, tmp_path / "new" / "data", 4)
        assert not list(tmp_path.iterdir())
    raw = write_mnist(tmp_path) / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0" * 100)
    assert "MNIST could be neither read" in refusal("mnist", tmp_path, 4)
    assert (raw / "train-labels-idx1-ubyte").exists()


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    raw = write_mnist(tmp_path) / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes(3))
    assert "16, 28, 28), 3 labels" in refusal("mnist", tmp_path, 4)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 16) + bytes([77] * 16))
    assert "labels from 77 to 77" in refusal("mnist", tmp_path, 4)


@pytest.mark.mnist
def test_real_mnist():
    data = datasets.create("mnist", SHARED_DATA, 1000)
    images, labels = (torch.cat(each) for each in zip(*batches(data.train), strict=True))
    assert images.shape == (60000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def variants(image, flip):
    """All that Augment may make of an image of 8 pixels: shifted by -1 to 1 with mirrored borders, and mirrored."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    shifted = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    return [*shifted, *(each[:, :, ::-1] for each in shifted)] if flip else shifted


@pytest.mark.parametrize("flip", [False, True])
def test_each_image_is_shifted_and_mirrored_by_itself(flip):
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    changed, drawn = datasets.Augment(1, shift=True, flip=flip)(images, 400), []
    for before, after in zip(images.numpy(), changed.numpy(), strict=True):
        matches = [np.array_equal(after, each) for each in variants(before, flip)]
        assert sum(matches) == 1
        drawn.append(matches.index(True))
    assert set(drawn) == set(range(18 if flip else 9))
    assert changed.dtype == torch.uint8 and changed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("erase, sides", [(0.25, {1}), (0.5, {2, 3}), (1.0, {4, 5, 6, 7})])
def test_a_grey_square_is_erased_anywhere_in_each_image(erase, sides):
    images = torch.randint(0, 128, (400, 3, 8, 8), dtype=torch.uint8)
    changed, seen = datasets.Augment(1, erase=erase)(images, 400), torch.zeros(8, 8)
    found = set()
    for before, after in zip(images, changed, strict=True):
        grey = (after == 128).all(0)
        rows, columns = (grey.any(dim) for dim in (1, 0))
        assert torch.equal(grey, rows.outer(columns)) and torch.equal(
            after[:, ~grey], before[:, ~grey]
        )
        found |= {int(each.sum()) for each in (rows, columns)}
        seen += grey
    assert seen.min() > 0 and found == sides


def test_augmentation_goes_by_its_seed_alone_is_resumed_and_the_same_over_ranks():
    images = torch.randint(0, 256, (3, 7, 1, 8, 8), dtype=torch.uint8)
    changes = dict(shift=True, flip=True, erase=0.25)
    augment, again = (datasets.Augment(seed, **changes) for seed in (5, 6))
    global_state = torch.get_rng_state()
    first, state = augment(images[0], 7), augment.state_dict()
    rest = [augment(each, 7) for each in images[1:]]
    assert torch.equal(torch.get_rng_state(), global_state)
    assert not torch.equal(again(images[0], 7), first)
    again.load_state_dict(state)
    assert all(map(torch.equal, [again(each, 7) for each in images[1:]], rest))
    for rank in range(3):
        ranks = Ranks(rank, 3)
        shared = datasets.Augment(5, **changes, ranks=ranks)
        assert torch.equal(shared(ranks.share(images[0]), 7), ranks.share(first))
        assert torch.equal(shared(ranks.share(images[1]), 7), ranks.share(rest[0]))
    assert datasets.Augment(5, **changes, ranks=Ranks(2, 3))(images[0, :0], 2).shape == (0, 1, 8, 8)


def test_digits_are_not_mirrored():
    assert {name for name, spec in datasets.SPECS.items() if not spec.flip} == {"mnist", "digits"}


def test_augmented_batches_are_the_same_for_every_number_of_workers(folder):
    loaded = []
    for workers in (0, 1):
        train = datasets.create("folder", folder, 7, workers, image_size=8).train
        plain = torch.cat([images for images, _ in batches(train)])
        train.augment = datasets.Augment(1, shift=True, flip=True, erase=0.25)
        loaded.append(torch.cat([images for images, _ in batches(train)]))
        assert not torch.equal(loaded[-1], plain)
    assert torch.equal(*loaded)


@pytest.mark.parametrize("name", ["digits", "folder", "mnist"])
def test_validation_images_are_a_share_of_each_class_drawn_by_seed(name, folder, tmp_path):
    root = folder if name == "folder" else write_mnist(tmp_path, train=40)
    one, same, other, whole = (
        datasets.create(name, root, 2000, image_size=8, val_share=share, seed=seed)
        for share, seed in ((0.25, 1), (0.25, 1), (0.25, 2), (0, 1))
    )
    train, val, everything = (next(iter(each)) for each in (one.train, one.val, whole.train))
    rows = {
        split: {image.numpy().tobytes() for image in split.images}
        for split in (train, val, everything)
    }
    assert not rows[train] & rows[val] and rows[train] | rows[val] == rows[everything]
    assert torch.bincount(val.labels).tolist() == [
        round(0.25 * n) for n in torch.bincount(everything.labels).tolist()
    ]
    assert torch.equal(next(iter(same.val)).images, val.images)
    assert not torch.equal(next(iter(other.val)).images, val.images)
    assert whole.val is None and one.facts()["images"] == len(train.labels)
    assert torch.equal(next(iter(one.test)).images, next(iter(whole.test)).images)


def test_a_class_of_one_image_cannot_be_divided(tmp_path):
    make_folder(tmp_path, train=2)
    data = datasets.create("folder", tmp_path, 9, image_size=8, val_share=0.01)
    assert (data.train.rows.size, data.val.rows.size) == (3, 3)
    (tmp_path / "train" / "bee" / "0.png").unlink()
    assert "no training image of class bee, which has 1" in refusal(
        "folder", tmp_path, 9, image_size=8, val_share=0.1
    )


def test_a_trained_networks_test_images_need_no_training_images(tmp_path):
    (make_folder(tmp_path, classes=("bee", "cow"), mode="RGB") / "train").rename(
        tmp_path / "elsewhere"
    )
    known = dict(classes=["ant", "bee", "cow"], in_channels=1)
    data = datasets.create("folder", tmp_path, 99, image_size=8, trained=known)
    images, labels, _ = next(iter(data.test))
    assert (
        labels.tolist() == [1] * 4 + [2] * 4
        and images.shape == (8, 1, 8, 8)
        and data.classes == known["classes"]
    )
    assert data.test.paths[0] == str(tmp_path / "test" / "bee" / "0.png")
    assert "but it has cow" in refusal(
        "folder", tmp_path, 4, image_size=8, trained=known | dict(classes=["bee"])
    )
    assert "train is missing" in refusal("folder", tmp_path, 4, image_size=8)
    assert "must hold test/<class>/*" in refusal(
        "folder", tmp_path / "test", 4, image_size=8, trained=known
    )


def test_unseen_classes_keep_their_names_where_some_have_no_test_images(tmp_path):
    make_folder(tmp_path, classes=("ant", "bee", "cow"))
    known = datasets.create("folder", tmp_path, 99, image_size=8, unseen=["0"]).facts()
    assert (known["classes"], known["unseen"]) == (["bee", "cow"], ["ant"])
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "test" / "bee").rename(tmp_path / "test-bee")
    data = datasets.create("folder", tmp_path, 99, image_size=8, unseen=["0"], trained=known)
    assert (
        next(iter(data.test)).labels.tolist() == [1] * 4
        and next(iter(data.unknown)).labels.tolist() == [2] * 4
    )
    (tmp_path / "test" / "ant").rename(tmp_path / "test-ant")
    assert (
        datasets.create("folder", tmp_path, 99, image_size=8, unseen=["0"], trained=known).unknown
        is None
    )
    (tmp_path / "test" / "cow").rename(tmp_path / "test-cow")
    (tmp_path / "test-ant").rename(tmp_path / "test" / "ant")
    assert "got none" in refusal("folder", tmp_path, 99, image_size=8, trained=known)


def test_a_pretrained_networks_scaling_is_averaged_for_grey_images():
    colour = (0.2, 0.4, 0.9), (0.1, 0.2, 0.6)
    spec = datasets.SPECS["folder"]
    assert datasets.moments(spec, colour, 3) == colour and datasets.moments(
        spec, "standard", 1
    ) == ((0.5,), (0.5,))
    assert datasets.moments(spec, colour, 1) == (pytest.approx((0.5,)), pytest.approx((0.3,)))
