"""Loaders: the right pixels, the same for every number of workers, in RandomSampler's order; and what is refused."""

import hashlib
import pickle
import select
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import PYTHON, SHARED_DATA, make_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision import transforms

import datasets
from processes import Ranks


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


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "digits", "cifar10", "cifar100", "folder"])
def test_workers_give_the_same_batches_to_the_bit(name, tmp_path, monkeypatch):
    if name == "folder":
        make_folder(tmp_path, size=(9, 12), mode="RGB")
    elif name.startswith("cifar"):
        write_cifar(tmp_path, monkeypatch, classes=int(name[5:]))
    elif name != "digits":
        write_mnist(tmp_path, name={"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name])
    size = 300 if name == "digits" else 7
    memory, workers = (datasets.create(name, tmp_path, size, j, image_size=8) for j in (0, 2))
    assert memory.classes == workers.classes and memory[3:] == workers[3:]
    for split in ("train", "test"):
        pairs = list(zip(batches(getattr(memory, split)), batches(getattr(workers, split)), strict=True))
        assert len(pairs) == len(getattr(memory, split))
        for (images, labels), (images_j, labels_j) in pairs:
            assert torch.equal(images, images_j) and torch.equal(labels, labels_j)
            assert images.shape[1:] == (memory.in_channels, memory.image_size, memory.image_size)


def test_pixels_are_those_of_torchvisions_transforms(tmp_path):
    write_mnist(tmp_path)
    data = datasets.create("mnist", tmp_path, batch_size=8)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    oracle = torchvision.datasets.MNIST(tmp_path, train=False, transform=transform)
    images = torch.cat([images for images, _, _ in data.test])
    assert torch.equal(images, torch.stack([image for image, _ in oracle]))


@pytest.mark.parametrize("scaling, low, high", [("symmetric", -127.5 / 128, 127.5 / 128), ("unit", 0.0, 1.0)])
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
        (torch.cat(each) for each in zip(*batches(loader), strict=True)) for loader in (data.train, data.test)
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
    ours = DataLoader(TensorDataset(torch.arange(size)), batch_size=None,
                      sampler=datasets.BatchRows(size, batch_size, True, "cpu", Ranks()))  # fmt: skip
    for _ in range(2):  # the second epoch goes on from the first one's random state
        torch.manual_seed(seed)
        expected = [rows.tolist() for _ in range(2) for (rows,) in plain]
        torch.manual_seed(seed)
        assert [rows.tolist() for _ in range(2) for (rows,) in ours] == expected


@given(size=st.integers(1, 60), batch_size=st.integers(1, 20), ranks=st.integers(1, 5))
def test_ranks_share_each_batch_without_loss_or_repetition(size, batch_size, ranks):
    shares = [list(datasets.BatchRows(size, batch_size, False, "cpu", Ranks(rank, ranks))) for rank in range(ranks)]
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
    whole = np.stack([np.asarray(Image.open(path)) for path in sorted((root / "test").rglob("*.png"))])
    assert (data.test.thumbnails([11, 2]) == whole[[11, 2]].transpose(0, 3, 1, 2)).all()
    halves = whole.reshape(12, 8, 2, 8, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert data.test.thumbnails(range(12), largest=8) == pytest.approx(halves, abs=0.51)


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
    assert "bee, cow" in refusal("folder", tmp_path, 4)
    (tmp_path / "file").touch()
    assert "got the file" in refusal("folder", tmp_path / "file", 4)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_8_bits_are_refused(tmp_path, dtype):
    path = make_folder(tmp_path) / "train" / "bee" / "deep.tif"
    Image.fromarray(np.full((8, 8), 1000, dtype)).save(path)
    assert f"at most 8 bits a channel, got mode {Image.open(path).mode} in {path}" in refusal("folder", tmp_path, 4)


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_unreadable_image_is_named(tmp_path, damage):
    bad = make_folder(tmp_path, size=(64, 64)) / "train" / "bee" / "3.png"
    bad.write_bytes(bad.read_bytes()[:2000] if damage is None else damage)
    assert "bee/3.png" in refusal("folder", tmp_path, 4, image_size=8)


def test_a_truncated_image_ends_workers_with_its_name(tmp_path):
    bad = make_folder(tmp_path, size=(64, 64)) / "train" / "bee" / "3.png"
    bad.write_bytes(bad.read_bytes()[:2000])
    loader = datasets.create("folder", tmp_path, 4, workers=1, image_size=8).train
    with pytest.raises(datasets.DatasetError, match="bee/3.png"):
        list(loader)


def test_workers_end_with_a_killed_main_process(folder):
    """Whoever lives holds the standard output open. torch's own watch takes up to five seconds."""
    code = (f"import datasets; batches = iter(datasets.create('folder', {str(folder)!r}, 1, 2, image_size=8).train); "
            "next(batches); print('up', flush=True); input()")  # fmt: skip
    main = subprocess.Popen([PYTHON, "-c", code], cwd=Path(datasets.__file__).parent, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)  # fmt: skip
    assert main.stdout.readline() == b"up\n"
    main.kill()
    main.wait()
    assert select.select([main.stdout], [], [], 2.5)[0] and main.stdout.read() == b""


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
    assert torch.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_order_is_randomsamplers():
    torch.manual_seed(0)
    expected = list(RandomSampler(range(20)))
    torch.manual_seed(0)
    assert torch.cat(list(datasets.BatchRows(20, 6, True, "cpu", Ranks()))).tolist() == expected
