"""A trained network without its data set: classes, features and comparisons of image files."""

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder
from PIL import Image

import models
import predict
import utils
from engine.images import ReadImage

ROOT = Path(predict.__file__).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint as main.py writes them, for colour images, and a directory of such images."""
    base = tmp_path_factory.mktemp("trained")
    root = make_folder(base / "images", mode="RGB", size=(9, 12))
    torch.manual_seed(3)
    model = models.create("cnn", 3, 3, 8, 3, "xavier")
    args = dict(recipe="zhou2018", dataset="folder", model="cnn", feat_dim=3, amp=False)
    args |= dict(mirror=False, scaling="standard", pretrained=False)
    data = dict(classes=["ant", "bee", "cat"], unseen=[], images=24, in_channels=3)
    data["image_size"] = [8, 8]
    state = dict(epoch=2, history=[], centers=torch.randn(3, 3), rng=torch.get_rng_state())
    state |= dict(center_loss={}, scheduler={}, optimizer_model={}, model=model.state_dict())
    torch.save(dict(args=args, data=data, **state), base / "checkpoint.pt")
    return base / "checkpoint.pt", root


@pytest.fixture
def pictures(tmp_path):
    """Images of other sizes and modes, in a directory without classes, and one beside it."""
    random = np.random.default_rng(1)
    directory = tmp_path / "new"
    (directory / "deep").mkdir(parents=True)
    for name, shape in (("b.jpg", (30, 20, 3)), ("deep/a.PNG", (8, 8)), ("c.webp", (12, 50, 3))):
        Image.fromarray(random.integers(0, 256, shape).astype(np.uint8)).save(directory / name)
    (directory / "notes.txt").write_text("no image")
    (directory / "._b.jpg").write_bytes(b"of macOS")
    (directory / ".trash").mkdir()
    (directory / ".trash" / "old.png").write_bytes(b"no image")
    Image.new("CMYK", (9, 9), (10, 200, 30, 40)).save(tmp_path / "alone.tif")
    return [directory, tmp_path / "alone.tif"]


@pytest.fixture
def command(capsys):
    """command(*argv): exit status, standard output and standard error of predict.py."""

    def call(*argv):
        try:
            status = predict.main([*map(str, argv), "--use-cpu"])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outputs_by_hand(checkpoint, path, views):
    """Features and logits of one image, the means over so many views of it."""
    saved = torch.load(checkpoint, weights_only=True)
    model = models.create("cnn", 3, 3, 8, 3).eval()
    model.load_state_dict(saved["model"])
    image = ReadImage("RGB", 8)(str(path)) / 255
    images = [(each[None] - 0.5) / 0.5 for each in (image, image.flip(-1))][:views]
    with torch.no_grad():
        outputs = list(zip(*map(model, images), strict=True))
    return [sum(each) / views for each in outputs], saved["centers"]


@pytest.mark.parametrize("flags", [[], ["--mirror"]])
def test_predictions_are_those_of_each_image_by_itself(
    flags, trained, pictures, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(predict, "PIXELS", 3 * 8 * 8)  # batches of three images
    directory, alone = pictures
    out = tmp_path / "out"
    status, told, err = command(trained[0], *pictures, "--save-dir", out, *flags)
    assert (status, err) == (0, "")
    found = rows(out / "predictions.csv")
    names = ("b.jpg", "c.webp", "deep/a.PNG")
    assert [row["path"] for row in found] == [
        *(f"{directory}/{name}" for name in names),
        str(alone),
    ]
    classes = ("ant", "bee", "cat")
    for row in found:
        (features, logits), centers = outputs_by_hand(trained[0], row["path"], 1 + len(flags))
        label = logits[0].argmax().item()
        distances = (features - centers).norm(dim=1)
        probability = logits[0].softmax(0)[label].item()
        assert row["class"] == classes[label] and row["error"] == ""
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-4)
        assert row["nearest_center"] == classes[distances.argmin()]
        assert float(row["distance"]) == pytest.approx(distances.min().item(), abs=1e-4)
    counts = {name: [row["class"] for row in found].count(name) for name in classes}
    assert "4 images: " in told
    assert all(f"{name} {count}" in told for name, count in counts.items() if count)


def test_files_that_cannot_be_read_have_a_row_with_the_reason(
    trained, pictures, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(predict, "PIXELS", 1)  # batches of one image
    directory, _ = pictures
    whole = (directory / "b.jpg").read_bytes()
    (directory / "a.png").write_bytes(b"no image")
    (directory / "d.jpg").write_bytes(whole[: len(whole) // 2])
    status, out, err = command(trained[0], directory, "--save-dir", tmp_path)
    assert status == 1 and out.startswith("3 images: ")
    assert err.startswith("2 could not be read; the first: cannot read the image ")
    assert err.count("\n") == 1
    found = {Path(row["path"]).name: row for row in rows(tmp_path / "predictions.csv")}
    assert sorted(found) == ["a.PNG", "a.png", "b.jpg", "c.webp", "d.jpg"]
    for name, row in found.items():
        assert ("cannot read the image" in row["error"]) == (name in ("a.png", "d.jpg"))
        assert bool(row["class"]) == bool(row["probability"]) == (not row["error"])
    status, _, _ = command(trained[0], directory, "--embed", tmp_path / "out.npz")
    assert status == 1 and len(np.load(tmp_path / "out.npz")["paths"]) == 3
    (tmp_path / "alone.tif").write_bytes(b"")
    status, out, _ = command(trained[0], tmp_path / "alone.tif", "--save-dir", tmp_path)
    assert status == 1 and out.startswith("0 images: ")


def test_the_distance_is_exact_in_a_large_batch():
    """Where |x|² + |c|² - 2xc, to which torch.cdist goes over at 26 rows, would lose it."""

    class Network:
        centers = torch.tensor([[60.0, 80.0], [-50.0, 0.0]])
        classes = ["ant", "bee"]

    offsets = 0.01 * torch.arange(64.0)[:, None].expand(-1, 2)
    paths = list(map(str, range(64)))
    features = Network.centers[:1] + offsets
    rows = predict.predictions(Network, paths, features, torch.zeros(64, 2))
    found = [float(row[4]) for row in rows]
    assert found == pytest.approx([0.01 * 2**0.5 * number for number in range(64)], abs=1e-4)


def test_paths_are_written_as_they_are_and_run_in_no_spreadsheet(
    trained, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    odd = b"\xff \xe6\x97\xa5.png"
    for name in (odd, b"=1+1.png"):
        with open(name, "wb") as file:
            Image.new("RGB", (8, 8)).save(file, "PNG")
    assert command(trained[0], os.fsdecode(odd), "=1+1.png", "--save-dir", "out")[0] == 0
    written = Path("out/predictions.csv").read_bytes()
    assert b"\n" + odd + b"," in written and b"\n'=1+1.png," in written


def test_features_are_embedded_with_paths_and_the_labels_of_a_directory(
    trained, pictures, tmp_path, command
):
    checkpoint, root = trained
    target = tmp_path / "out.npz"
    status, out, err = command(checkpoint, root / "test", "--embed", target)
    saved = np.load(target)
    assert (status, err) == (0, "") and out == f"12 images\nFeatures: {target}\n"
    assert saved["features"].shape == (12, 3)
    assert saved["classes"].tolist() == ["ant", "bee", "cat"]
    names = [Path(path).parent.name for path in saved["paths"]]
    assert [saved["classes"][label] for label in saved["labels"]] == names
    for path, features in zip(saved["paths"], saved["features"], strict=True):
        (expected, _), _ = outputs_by_hand(checkpoint, path, 1)
        assert features == pytest.approx(expected[0].numpy(), abs=1e-4)
    assert command(checkpoint, *pictures, "--embed", target, "--overwrite")[0] == 0
    assert np.load(target).files == ["paths", "features"]


def test_two_images_are_compared_by_the_thresholds_that_were_measured(
    trained, pictures, tmp_path, command
):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(trained[0].read_bytes())
    pair = [pictures[0] / "b.jpg", pictures[1]]
    status, out, err = command(path, *pair, "--same")
    features = [outputs_by_hand(path, each, 1)[0][0][0] for each in pair]
    distance = (features[0] - features[1]).norm().item()
    cosine = torch.cosine_similarity(*features, dim=0).item()
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"L2 distance: {distance:.4f}\t cosine: {cosine:.4f}"
    assert "no thresholds in " in out
    verification = dict(
        l2={
            "eer": 1.0,
            "threshold_at_eer": distance + 0.1,
            "threshold_at_far_1e-2": distance - 0.1,
        },
        cosine={"threshold_at_eer": cosine - 0.1, "threshold_at_far_1e-3": None},
    )
    measured = dict(verification=dict(images=1), unknown=dict(verification=verification))
    (tmp_path / "evaluation.json").write_text(json.dumps(measured | dict(mirror=False)))
    lines = command(path, *pair, "--same")[1].splitlines()[1:]
    assert lines == [
        f"By the thresholds of the unknown classes in {tmp_path / 'evaluation.json'}:",
        f"l2, threshold_at_eer {distance + 0.1:.4f}: the same",
        f"l2, threshold_at_far_1e-2 {distance - 0.1:.4f}: different",
        f"cosine, threshold_at_eer {cosine - 0.1:.4f}: the same",
    ]
    measured["pairs"] = dict(l2=verification["l2"], cosine={})
    (tmp_path / "evaluation.json").write_text(json.dumps(measured | dict(mirror="concat")))
    lines = command(path, *pair, "--same")[1].splitlines()
    views = [torch.cat([predict.load(path)(each)[0], mirror_of(path, each)], 1) for each in pair]
    assert lines[0].startswith(f"L2 distance: {(views[0] - views[1]).norm().item():.4f}\t")
    assert lines[1].startswith("By the thresholds of the pairs in ")


def mirror_of(checkpoint, path):
    """The features of the mirror image alone."""
    plain = predict.load(checkpoint)
    return plain.net(plain.scale([plain.read(path).flip(-1)]))[0].detach()


def test_what_is_no_use_is_one_line(trained, pictures, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([trained[0], "nowhere"], "there is no image nowhere"),
        ([trained[0], "nowhere", pictures[1], "--same"], "there is no image nowhere"),
        ([trained[0], tmp_path / "empty"], f"there is no image {tmp_path / 'empty'}"),
        ([tmp_path / "none.pt", pictures[1]], "there is no checkpoint"),
        ([trained[0], ""], "must be a path, got an empty one"),
        ([trained[0], pictures[1], "--save-dir", ""], "must be a path, got an empty one"),
        ([trained[0], pictures[1], "--same"], "--same must have two images, got 1"),
        ([trained[0], pictures[0], pictures[1], "--same"], "--same must have two images, got 4"),
        ([trained[0], *pictures, "--same", "--embed", "x.npz"], "not allowed with"),
        ([trained[0]], "the following arguments are required: paths"),
    ):
        status, out, err = command(*argv)
        assert (status, out) == (2, "") and message in err
        assert err.startswith("predict.py: error: ") and err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["alone.tif", "empty", "new"]


def test_only_what_predict_has_written_is_replaced(trained, pictures, tmp_path, command):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(trained[0].read_bytes())
    table = tmp_path / "predictions.csv"
    assert command(path, pictures[1])[0] == command(path, pictures[1])[0] == 0
    (tmp_path / "files.txt").write_text("of somebody else\n")
    for target, flags in ((table, []), (tmp_path / "x.npz", ["--embed", tmp_path / "x.npz"])):
        target.write_text("mine")
        status, out, err = command(path, pictures[1], *flags)
        assert (status, out) == (2, "") and target.read_text() == "mine"
        message = f"{target} is somebody else's: --overwrite replaces it"
        assert err == f"predict.py: error: {message}\n"
        assert command(path, pictures[1], *flags, "--overwrite")[0] == 0
        assert target.read_bytes() != b"mine"
    assert (tmp_path / "files.txt").read_text() == "of somebody else\n"


def test_a_network_is_loaded_with_its_centers_and_embeds_files(trained, pictures):
    network = predict.load(trained[0])
    one, other = pictures[1], str(pictures[0] / "b.jpg")
    features, logits = network([one, other])
    assert features.shape == (2, 3) and logits.shape == (2, 3) and not features.requires_grad
    assert network.centers.shape == (3, 3) and network.classes == ["ant", "bee", "cat"]
    assert not network.model.training and network.size == (8, 8)
    assert torch.allclose(network([one, one])[0], features[[0, 0]], atol=1e-6)
    for path, expected in zip((one, other), features, strict=True):  # one file is taken as one
        assert torch.allclose(network(path)[0], expected[None], atol=1e-6)
    side_by_side = predict.load(trained[0], mirror="concat")
    assert side_by_side.centers.shape == (3, 6)
    found = side_by_side([one, other])[0]
    assert torch.allclose(found[:, :3], features, atol=1e-6)
    assert torch.allclose(found[:1, 3:], mirror_of(trained[0], one), atol=1e-6)


def test_a_loaded_network_takes_mirror_images_along_if_its_run_did(trained, pictures, tmp_path):
    mirrored = tmp_path / "mirrored.pt"
    checkpoint = torch.load(trained[0], weights_only=True)
    checkpoint["args"]["mirror"] = True
    torch.save(checkpoint, mirrored)

    def features(path, **options):
        return predict.load(path, **options)([pictures[0] / "b.jpg"])[0]

    assert not torch.equal(features(trained[0]), features(mirrored))
    assert torch.equal(features(trained[0]), features(mirrored, mirror=False))
    assert torch.equal(features(trained[0], mirror=True), features(mirrored))
    assert torch.equal(features(trained[0], mirror="mean"), features(mirrored))


@pytest.mark.parametrize(
    "edit",
    [
        lambda saved: saved["args"].pop("amp"),
        lambda saved: saved["args"].pop("feat_dim"),
        lambda saved: saved["args"].update(model="nosuch"),
        lambda saved: saved["args"].update(dataset="evil"),
        lambda saved: saved["args"].update(scaling=7),
        lambda saved: saved["args"].update(mirror="sideways"),
        lambda saved: saved["data"].update(in_channels=4),
        lambda saved: saved["data"].update(classes=["a", "b"]),
        lambda saved: saved["data"].update(image_size="large"),
        lambda saved: saved["data"].pop("image_size"),
        lambda saved: saved["model"].popitem(),
        lambda saved: saved.pop("centers"),
        lambda saved: saved.update(model=[]),
    ],
)
def test_whatever_is_wrong_with_a_checkpoint_is_one_run_error(edit, trained, tmp_path):
    saved = torch.load(trained[0], weights_only=True)
    edit(saved)
    torch.save(saved, tmp_path / "edited.pt")
    with pytest.raises(utils.RunError) as error:
        predict.load(tmp_path / "edited.pt")
    assert "\n" not in str(error.value) and "edited.pt is " in str(error.value)


def test_the_committed_checkpoint_whose_size_is_one_number_is_loaded():
    network = predict.load(ROOT / "log" / "reference" / "fast" / "checkpoint.pt")
    assert network.size == (28, 28) and len(network.classes) == 10
    assert network.centers.shape == (10, 2)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.export.save
def test_a_network_is_exported_as_the_page_says(trained, pictures, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "own-images.md").read_text(encoding="utf-8")
    snippet = re.search(r"## Export\n.*?\n\n((?:    [^\n]+\n)+)", page, re.S)[1]
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "best.pt").write_bytes(trained[0].read_bytes())
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes((pictures[0] / "b.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(snippet), {})
    exported = torch.export.load("network.pt2").module()
    network = predict.load(trained[0])
    images = network.scale([network.read(pictures[1])] * 3)
    for found, expected in zip(exported(images), network([pictures[1]] * 3), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


# What a user's program may have besides: packages, a namespace package, modules of the same names.
SITE = ("datasets/__init__.py", "datasets/arrow.py", "utils.py", "models.py", "engine/x.py")
PROGRAMS = {
    "later": "",
    "before": "import datasets, datasets.arrow, utils, models\nearlier = dict(sys.modules)",
}


@pytest.mark.parametrize(
    "how, when, crowded",
    [
        ("append(", "later", True),
        ("append(", "before", True),
        ("insert(0, ", "before", True),
        ("append(", "later", False),
    ],
)
def test_load_works_beside_other_modules_of_the_same_names(
    how, when, crowded, trained, pictures, tmp_path
):
    site = tmp_path / "site"
    for name in SITE:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("user = True\n")
    program = f"""
import sys
{PROGRAMS[when]}
names = {{"datasets", "datasets.arrow", "utils", "models"}} & sys.modules.keys()
before = {{name: sys.modules[name] for name in names}}
sys.path.{how}{str(ROOT)!r})
from predict import load
import predict
assert all(sys.modules[name] is module for name, module in before.items())
assert len(load({str(trained[0])!r})({str(pictures[1])!r})[0]) == 1
try:
    load("nowhere.pt")
except predict.utils.RunError as error:
    print(error)
from tools import results
print(len(results.REFERENCE) > 0)
import datasets, utils, models
print([getattr(each, "user", False) for each in (datasets, utils, models)])
print(utils is predict.utils, sys.path.count({str(ROOT)!r}))
"""
    environment = dict(os.environ, PYTHONPATH=str(site) if crowded else "", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "there is no checkpoint nowhere.pt",
        "True",
        str([crowded] * 3),
        f"{not crowded} 1",
    ]
