"""What is done with a trained network: the best epoch is tested, other images are predicted, features have paths."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder, program
from PIL import Image

import datasets
import models
import predict as prediction
from engine import evaluation

FLAGS = [
    "--dataset",
    "folder",
    "--image-size",
    "8",
    "--batch-size",
    "10",
    "--max-epoch",
    "4",
    "--eval-freq",
    "1",
    "--use-cpu",
    "--lr-model",
    "0.1",
    "--init",
    "xavier",
    "--weight-cent",
    "0.1",
    "--feat-dim",
    "3",
    "--val-share",
    "0.25",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on colour images with --val-share and --plot; its directory and that of its images."""
    base = tmp_path_factory.mktemp("trained")
    root = make_folder(base / "images", mode="RGB", size=(9, 12))
    assert (
        program(
            [*FLAGS, "--data-root", root, "--save-dir", base / "run", "--plot", "--save-features"]
        )
        == 0
    )
    return base / "run", root


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def network_of(path):
    checkpoint = torch.load(path, weights_only=True)
    model = models.create("cnn", 3, 3, 8, 3).eval()
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def outputs_of(model, root):
    images, labels, _ = next(iter(datasets.create("folder", root, 99, image_size=8).test))
    with torch.no_grad():
        return *model(images), labels


def test_the_best_epoch_by_validation_is_kept_and_alone_is_tested(trained):
    run, root = trained
    history = rows(run / "metrics.csv")
    assert [row["test_accuracy"] == "" for row in history] == [True, True, True, False]
    scores = [(float(row["val_accuracy"]), -float(row["val_xent"])) for row in history]
    model, best = network_of(run / "best.pt")
    assert best["epoch"] == 1 + scores.index(max(scores))
    features, logits, labels = outputs_of(model, root)
    assert float(history[-1]["test_accuracy"]) == pytest.approx(
        100 * (logits.argmax(1) == labels).double().mean()
    )
    nearest = torch.cdist(features, best["centers"]).argmin(1)
    assert float(history[-1]["nearest_center_accuracy"]) == pytest.approx(
        100 * (nearest == labels).double().mean()
    )
    log = (run / "log_folder.txt").read_text()
    assert log.count("==> Validation\n") == 4 and log.count("==> Test\n") == 1
    assert f"Best epoch by validation: {best['epoch']}\n==> Test\n" in log
    assert (
        (run / "val" / "epoch_4.png").exists()
        and (run / "val.gif").exists()
        and not (run / "test").exists()
    )
    assert (
        "validation" in (run / "report.html").read_text()
        and (run / "val" / "features.npz").exists()
    )
    assert np.load(run / "val" / "images.npz")["images"].shape == (6, 3, 8, 8)
    assert {"train_features", "val_features"} <= set(np.load(run / "features" / "epoch_4.npz"))


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([], True),
        ([(None, None)], True),
        ([(80, 0.3)], True),
        ([(90, 0.3)], False),
        ([(90, 0.5)], True),
        ([(95, 0.9), (80, 0.1)], False),
        ([(90, 0.4)], False),
    ],
)
def test_an_epoch_is_the_best_if_more_accurate_or_as_accurate_at_less_loss(
    scores, expected, tmp_path
):
    validated = dict(accuracy=90, xent=0.4)
    history = [dict(val_accuracy=accuracy, val_xent=xent) for accuracy, xent in scores]
    assert evaluation.is_best(
        validated, history, tmp_path
    )  # there is no best.pt of an earlier epoch
    (tmp_path / "best.pt").touch()
    assert evaluation.is_best(validated, history, tmp_path) == expected


def test_the_best_epoch_is_found_again_where_a_run_goes_on_elsewhere(
    trained, tmp_path, monkeypatch
):
    run, _ = trained
    monkeypatch.setattr(evaluation, "is_best", lambda *_: False)  # else the fifth epoch might be it
    assert (
        program(["--resume", run / "checkpoint.pt", "--save-dir", tmp_path, "--max-epoch", "5"])
        == 0
    )
    assert (tmp_path / "best.pt").read_bytes() == (run / "best.pt").read_bytes()
    final = {
        name: value
        for name, value in rows(tmp_path / "metrics.csv")[-1].items()
        if name.startswith("test")
    }
    assert final == {name: rows(run / "metrics.csv")[-1][name] for name in final}


@pytest.fixture
def pictures(tmp_path):
    """Images of other sizes and modes, in a directory without classes, and one beside it."""
    random = np.random.default_rng(1)
    directory = tmp_path / "new"
    (directory / "deep").mkdir(parents=True)
    for name, shape in (("b.jpg", (30, 20, 3)), ("deep/a.PNG", (8, 8)), ("c.webp", (12, 50, 3))):
        Image.fromarray(random.integers(0, 256, shape).astype(np.uint8)).save(directory / name)
    (directory / "notes.txt").write_text("no image")
    Image.new("CMYK", (9, 9), (10, 200, 30, 40)).save(tmp_path / "alone.tif")
    return [directory, tmp_path / "alone.tif"]


@pytest.mark.parametrize("flags", [[], ["--mirror"]])
def test_predictions_are_those_of_each_image_by_itself(flags, trained, pictures, tmp_path, capsys):
    run, _ = trained
    status = program(
        [
            "--evaluate",
            run / "best.pt",
            "--predict",
            *pictures,
            "--use-cpu",
            "--save-dir",
            tmp_path / "out",
            "--data-root",
            "nowhere",
            "--batch-size",
            "10",
            *flags,
        ]
    )
    out, err = capsys.readouterr()
    found = rows(tmp_path / "out" / "predictions.csv")
    directory, alone = pictures
    assert (status, err) == (0, "")
    assert [row["path"] for row in found] == [
        *(f"{directory}/{name}" for name in ("b.jpg", "c.webp", "deep/a.PNG")),
        str(alone),
    ]
    model, checkpoint = network_of(run / "best.pt")
    for row in found:
        image = datasets.square(8)(datasets.ReadImage("RGB")(row["path"]))
        with torch.no_grad():
            views = [(each[None] / 255 - 0.5) / 0.5 for each in (image, image.flip(-1))][
                : 1 + len(flags)
            ]
            features, logits = (
                sum(each) / len(views) for each in zip(*map(model, views), strict=True)
            )
        label = logits[0].argmax().item()
        distances = (features - checkpoint["centers"]).norm(dim=1)
        assert row["class"] == ("ant", "bee", "cat")[label]
        assert float(row["probability"]) == pytest.approx(
            logits[0].softmax(0)[label].item(), abs=1e-4
        )
        assert row["nearest_center"] == ("ant", "bee", "cat")[distances.argmin()]
        assert float(row["distance"]) == pytest.approx(distances.min().item(), abs=1e-4)
    counts = {name: [row["class"] for row in found].count(name) for name in ("ant", "bee", "cat")}
    assert "4 images: " in out and all(
        f"{name} {count}" in out for name, count in counts.items() if count
    )
    assert f"Probability below 0.5: {sum(float(row['probability']) < 0.5 for row in found)}" in out


def test_the_distance_is_exact_in_a_large_batch():
    """Where |x|² + |c|² - 2xc, to which torch.cdist goes over at 26 rows, would lose a small distance."""

    class Network:
        centers, classes = torch.tensor([[60.0, 80.0], [-50.0, 0.0]]), ["ant", "bee"]

        def __call__(self, paths):
            offsets = 0.01 * torch.tensor([[float(path)] * 2 for path in paths])
            return self.centers[:1] + offsets, torch.zeros(len(paths), 2)

    found = [
        row["distance"] for row in prediction.predictions(Network(), list(map(str, range(64))), 64)
    ]
    assert found == pytest.approx([0.01 * 2**0.5 * number for number in range(64)], abs=1e-4)


def test_paths_are_written_as_they_are_in_the_file_system(trained, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff \xe6\x97\xa5.png"
    with open(odd, "wb") as file:
        Image.new("RGB", (8, 8)).save(file, "PNG")
    flags = [
        "--evaluate",
        trained[0] / "best.pt",
        "--predict",
        tmp_path,
        "--save-dir",
        tmp_path / "out",
    ]
    assert program([*flags, "--use-cpu"]) == 0
    assert odd in (tmp_path / "out" / "predictions.csv").read_bytes()


def test_what_cannot_be_predicted_is_one_line(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    for path, message in (
        ("nowhere", "there is no nowhere"),
        (tmp_path / "empty", "holds none"),
        (tmp_path / "broken.png", "cannot read the image"),
    ):
        assert (
            program(
                [
                    "--evaluate",
                    trained[0] / "best.pt",
                    "--predict",
                    path,
                    "--save-dir",
                    tmp_path / "out",
                ]
            )
            == 2
        )
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
    for flag in ("--plot", "--save-features", "--tensorboard", "--verify"):
        assert program(["--evaluate", trained[0] / "best.pt", "--predict", tmp_path, flag]) == 2
        assert f"{flag} needs the test, which --predict replaces" in capsys.readouterr().err


def test_a_network_is_loaded_with_its_centers_and_embeds_a_batch(trained, pictures):
    network = prediction.load(trained[0] / "checkpoint.pt")
    features, logits = network([pictures[1], pictures[0] / "b.jpg"])
    assert features.shape == (2, 3) and logits.shape == (2, 3) and network.centers.shape == (3, 3)
    assert (
        network.classes == ["ant", "bee", "cat"]
        and not network.model.training
        and not features.requires_grad
    )


def test_a_loaded_network_takes_mirror_images_along_if_its_run_did(trained, pictures, tmp_path):
    plain, mirrored = trained[0] / "checkpoint.pt", tmp_path / "mirrored.pt"
    checkpoint = torch.load(plain, weights_only=True)
    checkpoint["args"]["mirror"] = True
    torch.save(checkpoint, mirrored)

    def features(path, **options):
        return prediction.load(path, **options)([pictures[0] / "b.jpg"])[0]

    assert not torch.equal(features(plain), features(mirrored))
    assert torch.equal(features(plain), features(mirrored, mirror=False))
    assert torch.equal(features(plain, mirror=True), features(mirrored))


def test_evaluating_test_images_alone_gives_their_features_with_paths(trained, tmp_path):
    run, root = trained
    shutil.copytree(root / "test", tmp_path / "alone" / "test")
    shutil.rmtree(tmp_path / "alone" / "test" / "ant")
    flags = ["--evaluate", run / "checkpoint.pt", "--save-dir", tmp_path / "out", "--data-root"]
    assert program([*flags, root]) == 0 and not (tmp_path / "out" / "features").exists()
    assert program([*flags, tmp_path / "alone", "--save-features"]) == 0
    saved = np.load(tmp_path / "out" / "features" / "test.npz")
    features, logits, labels = (
        each.numpy()[4:] for each in outputs_of(network_of(run / "checkpoint.pt")[0], root)
    )
    assert saved["test_features"] == pytest.approx(features, abs=1e-5)
    assert saved["test_predictions"].tolist() == logits.argmax(1).tolist()
    assert saved["test_labels"].tolist() == labels.tolist() and saved["classes"].tolist() == [
        "ant",
        "bee",
        "cat",
    ]
    names = [Path(path).parent.name for path in saved["test_paths"]]
    assert (
        names == [("ant", "bee", "cat")[label] for label in labels] and len(saved["centers"]) == 3
    )


def test_a_training_that_stays_at_chance_is_told_once_with_what_helps(folder, tmp_path, capsys):
    flags = [
        "--dataset",
        "folder",
        "--data-root",
        folder,
        "--image-size",
        "8",
        "--use-cpu",
        "--save-dir",
        tmp_path,
    ]
    notice = "The training accuracy is still about 33.3 %"
    assert program([*flags, "--batch-size", "1", "--max-epoch", "10", "--lr-model", "1e-9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (told,) = [number for number, line in enumerate(lines) if line.startswith(notice)]
    assert "--recipe images" in lines[told] and "==> Epoch 10/10" in lines[told + 1 :]
    assert (
        lines[told - 1] == "==> Epoch 9/10" or "Batch" in lines[told - 1]
    )  # 24 steps an epoch: 200 are in the ninth
    assert (
        program(
            [
                *flags,
                "--batch-size",
                "1",
                "--max-epoch",
                "9",
                "--weight-cent",
                "0.1",
                "--init",
                "xavier",
            ]
        )
        == 0
    )
    assert notice not in capsys.readouterr().out


def test_a_one_cycle_schedule_of_few_steps_is_named(folder, tmp_path, capsys):
    flags = [
        "--dataset",
        "folder",
        "--data-root",
        folder,
        "--image-size",
        "8",
        "--use-cpu",
        "--save-dir",
        tmp_path,
    ]
    for steps, told in ((9, True), (10, False)):
        assert program([*flags, "--schedule", "onecycle", "--max-iter", steps]) == 0
        assert (f"has only {steps} steps" in capsys.readouterr().out) == told
