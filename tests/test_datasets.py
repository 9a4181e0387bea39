"""Data sets: the right pixels and classes, the same for every number of workers; refusals."""

import hashlib
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import SHARED_DATA, make_folder
from data_files import batches, refusal
from PIL import Image
from torchvision import transforms

import datasets


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
    assert memory.classes == workers.classes and memory[4:] == workers[4:]
    assert memory.unseen and not set(memory.unseen) & set(memory.classes)
    for split in ("train", "test", "unknown"):
        pairs = list(
            zip(batches(getattr(memory, split)), batches(getattr(workers, split)), strict=True)
        )
        assert len(pairs) == len(getattr(memory, split))
        for (images, labels), (images_j, labels_j) in pairs:
            assert torch.equal(images, images_j) and torch.equal(labels, labels_j)
            assert images.shape[1:] == (memory.in_channels, *memory.image_size)
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


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    assert "train must hold a directory of images" in refusal("folder", tmp_path, 4)
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
    assert "got no images" in refusal("folder", tmp_path, 4)
    for split in ("train", "test"):
        Image.new("L", (8, 8)).save(tmp_path / split / "ant" / "a.png")
    assert "must hold two classes" in refusal("folder", tmp_path, 4)
    (tmp_path / "train" / "bee").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "train" / "bee" / "b.png")
    (tmp_path / "test" / "cow").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "test" / "cow" / "c.png")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "a.jfif").touch()
    expected = "images of each, got none of dog (left out: 1 files .jfif"
    assert expected in refusal("folder", tmp_path, 4)
    (tmp_path / "file").touch()
    assert "no images" in refusal("folder", tmp_path / "file", 4)


def no_network(*arguments, **options):
    raise OSError("Name or service not known")


def test_broken_or_missing_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for name in ("mnist", "fashion-mnist", "cifar10", "cifar100"):
        assert "--dataset digits needs no download" in refusal(name, tmp_path / "new" / "data", 4)
    raw = write_mnist(tmp_path) / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0" * 100)
    assert "MNIST could be neither read" in refusal("mnist", tmp_path, 4)
    assert (raw / "train-labels-idx1-ubyte").exists()


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


def test_digits_are_not_mirrored():
    assert {name for name, spec in datasets.SPECS.items() if not spec.flip} == {
        "mnist",
        "digits",
        "omniglot",
    }


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
    assert "no training image of bee, which has 1" in refusal(
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
    assert data.train is None and data.facts()["classes"] == known["classes"]
    assert "train must hold" in refusal("folder", tmp_path, 4, image_size=8)
    assert "test must hold" in refusal("folder", tmp_path / "test", 4, image_size=8, trained=known)


def labels_of(split) -> list[int]:
    return torch.cat([labels for _, labels, _ in split]).tolist()


def test_classes_that_only_the_test_has_are_unknown(tmp_path):
    """Of ant, bee, cat, dog: ant is trained alone, dog tested alone, and cat left out by name."""
    make_folder(tmp_path, classes=("ant", "bee", "cat", "dog"))
    (tmp_path / "train" / "dog").rename(tmp_path / "dog")
    (tmp_path / "test" / "ant").rename(tmp_path / "ant")
    data = datasets.create("folder", tmp_path, 99, image_size=8)
    assert (data.classes, data.unseen) == (["ant", "bee", "cat"], ["dog"])
    assert labels_of(data.test) == [1] * 4 + [2] * 4 and labels_of(data.unknown) == [3] * 4
    assert data.test_images == 12
    for unseen in (["cat"], ["2"], ["cat", "dog"]):
        data = datasets.create("folder", tmp_path, 99, image_size=8, unseen=unseen)
        assert (data.classes, data.unseen) == (["ant", "bee"], ["cat", "dog"])
        assert labels_of(data.unknown) == [2] * 4 + [3] * 4 and data.train.rows.size == 16
    assert "of the classes ant, bee, cat or their numbers, got eel" in refusal(
        "folder", tmp_path, 9, unseen=["eel"]
    )
    assert "at least two classes, got 1 of 3" in refusal("folder", tmp_path, 9, unseen=["0", "1"])


@pytest.mark.parametrize("workers", [0, 1])
def test_people_who_are_all_new_are_tested_without_training_images(workers, tmp_path):
    make_folder(tmp_path, classes=("ant", "bee", "cat", "dog"))
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).rename(tmp_path / name)
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).rename(tmp_path / f"test-{name}")
    data = datasets.create("folder", tmp_path, 99, workers, image_size=8, val_share=0.25)
    assert data.test is None and data.val.rows.size == 4 and data.unseen == ["ant", "bee"]
    assert labels_of(data.unknown) == [2] * 4 + [3] * 4
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    known = dict(classes=["x", "ant"], in_channels=1)
    data = datasets.create("folder", tmp_path, 99, workers, image_size=8, trained=known)
    assert labels_of(data.test) == [1] * 4 and labels_of(data.unknown) == [2] * 4
    known = dict(classes=["x", "y"], in_channels=1)
    data = datasets.create("folder", tmp_path, 99, workers, image_size=8, trained=known)
    assert data.test is None and data.unseen == ["ant", "bee"]
    assert data.unknown.paths[4] == str(tmp_path / "test" / "bee" / "0.png")
    for path in tmp_path.glob("test/*/[1-9].png"):
        path.unlink()
    assert "two images of another one" in refusal("folder", tmp_path, 9, trained=known)


def test_it_is_said_what_was_read_and_what_was_left_out(tmp_path):
    names = [f"class {number}" for number in range(7)]
    make_folder(tmp_path, classes=names, train=3, test=2)
    (tmp_path / "train" / "class 0" / "a.jfif").touch()
    (tmp_path / "train" / "class 0" / "B.JFIF").touch()
    (tmp_path / "train" / "class 0" / "README").touch()
    for hidden in (".ipynb_checkpoints", "class 1/.ipynb_checkpoints", "class 1/@eaDir"):
        (tmp_path / "train" / hidden).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / hidden / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "class 2" / "._0.png")  # macOS's
    (tmp_path / "test" / "new").mkdir()
    (tmp_path / "test" / "class 6").rename(tmp_path / "test" / "other")
    data = datasets.create("folder", tmp_path, 4, image_size=8)
    assert data.in_channels == 1 and data.classes == names
    assert data.lines() == [
        "train: 21 images of 7 classes: class 0 3, class 1 3, class 2 3, class 3 3, class 4 3 and "
        "2 more",
        "test: 12 images of 6 classes: class 0 2, class 1 2, class 2 2, class 3 2, class 4 2 and "
        "1 more",
        "unknown: 2 images of 1 classes: other 2",
        "train (left out: 4 hidden, 2 files .jfif, 1 files without ending)",
        "test (left out: 1 empty class directories)",
    ]


def test_files_of_a_run_do_not_become_images(tmp_path):
    root = make_folder(tmp_path / "data")
    (tmp_path / "link").symlink_to(root / "train" / "ant")
    for inside in (root / "train", root / "test" / "ant" / "log", tmp_path / "link", root):
        with pytest.raises(datasets.DatasetError, match="--save-dir must not write into"):
            datasets.check_save_dir(root, inside)
    for outside in (root / "log", tmp_path, "log"):
        datasets.check_save_dir(root, outside)


def test_omniglots_test_has_other_characters(tmp_path, monkeypatch):
    """Small archives of its form, with torchvision's MD5 sums set to theirs."""
    source = torchvision.datasets.Omniglot
    for name, alphabet in (("images_background", "Greek"), ("images_evaluation", "Tagalog")):
        archive = tmp_path / source.folder / f"{name}.zip"
        archive.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(archive, "w") as file:
            for path in (f"{character}/000{i}.png" for character in ("a1", "b2") for i in "123"):
                picture = io.BytesIO()
                Image.new("1", (105, 105), 1).save(picture, "png")
                file.writestr(f"{name}/{alphabet}/{path}", picture.getvalue())
        with zipfile.ZipFile(archive) as file:
            file.extractall(archive.parent)
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(source.zips_md5, name, md5)
    data = datasets.create("omniglot", tmp_path, 99, image_size=(8, 6))
    assert (data.classes, data.unseen) == (["Greek/a1", "Greek/b2"], ["Tagalog/a1", "Tagalog/b2"])
    assert data.test is None and labels_of(data.unknown) == [2] * 3 + [3] * 3
    assert (data.in_channels, data.image_size) == (1, (8, 6))


def test_a_pretrained_networks_scaling_is_averaged_for_grey_images():
    colour = (0.2, 0.4, 0.9), (0.1, 0.2, 0.6)
    spec = datasets.SPECS["folder"]
    assert datasets.moments(spec, colour, 3) == colour and datasets.moments(
        spec, "standard", 1
    ) == ((0.5,), (0.5,))
    assert datasets.moments(spec, colour, 1) == (pytest.approx((0.5,)), pytest.approx((0.3,)))
