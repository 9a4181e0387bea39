"""--evaluate tells the figures of the run's last test and changes nothing else."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED_DATA, checkpoint, files, make_folder

import datasets
import models
import utils
from tools.run_files import claim


def evaluate(run, *flags, path="log/checkpoint.pt"):
    """Evaluates; the lines of the log."""
    status, out, err = run("--evaluate", path, *flags, base=False)
    assert (status, err) == (0, "")
    return out.splitlines()


def measured(directory="log") -> dict:
    return json.loads(Path(directory, "evaluation.json").read_text())


FLAGS = ["", "--weight-cent 0", "--amp", "--recipe zahn2024-v1.1 --model cnn", "--mirror"]


@pytest.mark.parametrize("flags", [*FLAGS, "--unseen bee --verify -j 1"])
def test_figures_are_those_of_the_runs_last_test(flags, run):
    _, trained, _ = run("--lr-model", "0.05", *flags.split())
    before = files()
    out = evaluate(run)
    tested = trained[trained.rindex("Accuracy (%)") :].splitlines()
    assert set(tested[: tested.index(next(line for line in tested if "took" in line))]) <= set(out)
    after = files()
    new = {"evaluation.json", utils.FILES}
    assert {path.name for path in after if after[path] != before.get(path)} <= new
    assert measured()["epoch"] == 2 and measured()["mirror"] == ("--mirror" in flags)


@pytest.mark.mnist
def test_the_committed_weights_have_the_metrics_of_their_run(run):
    """Within what bfloat16 differs by from one CPU to another."""
    directory = Path(utils.__file__).parent / "log" / "reference" / "fast"
    flags = ["--data-root", SHARED_DATA, "--save-dir", "evaluated"]
    evaluate(run, *flags, path=directory / "checkpoint.pt")
    tested = measured("evaluated")
    with open(directory / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    for name, column, tolerance in (
        ("accuracy", "test_accuracy", dict(abs=0.05)),
        ("nearest_center_accuracy", "nearest_center_accuracy", dict(abs=0.05)),
        ("intra_distance", "intra_distance", dict(rel=0.01)),
        ("inter_distance", "inter_distance", dict(rel=1e-4)),
    ):
        assert tested[name] == pytest.approx(float(last[column]), **tolerance)


def test_the_confusion_matrix_counts_predictions_one_by_one(log, run, folder):
    evaluate(run)
    model = models.create("cnn", 3, 1, 8)
    model.load_state_dict(checkpoint()["model"])
    counts = np.zeros((3, 3), int)
    for images, labels, _ in datasets.create("folder", folder, 1, image_size=8).test:
        counts[labels.item(), model(images)[1].argmax().item()] += 1
    assert measured()["confusion"] == counts.tolist()


def test_pictures_and_features_are_written_where_they_are_asked_for(log, run, folder):
    evaluate(run, "--plot", "--save-features", "--save-dir", "tested/by me")
    names = sorted(path.relative_to("tested/by me").as_posix() for path in files("tested"))
    expected = ["confusion.png", "evaluation.json", "features/test.npz", "files.txt", "roc.png"]
    assert names == expected
    assert all(Path("tested/by me", name).stat().st_size > 2000 for name in names if "png" in name)
    saved = np.load("tested/by me/features/test.npz")
    assert saved["test_features"].shape == (12, 2) and saved["classes"].tolist() == [
        "ant",
        "bee",
        "cat",
    ]
    paths = [Path(path) for path in saved["test_paths"]]
    assert [path.parent.name for path in paths] == ["ant"] * 4 + ["bee"] * 4 + ["cat"] * 4
    assert all(path.is_file() for path in paths)


def test_a_checkpoint_is_enough_and_compiles_nothing(log, run, monkeypatch):
    saved = checkpoint()
    saved["args"]["compile"] = True
    torch.save(saved, "network.pt")
    shutil.rmtree("log")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiles"))
    evaluate(run, path="network.pt")
    assert sorted(os.listdir()) == ["evaluation.json", "files.txt", "network.pt"]


def test_a_run_that_goes_on_can_be_evaluated_meanwhile(log, run):
    with claim(log, print):
        evaluate(run, "--plot")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_other_images_are_read_as_the_network_takes_them(mode, log, run, tmp_path):
    make_folder(tmp_path / "more", train=9, test=30, mode=mode)
    evaluate(run, "--data-root", "more")
    assert np.sum(measured()["confusion"]) == 90


# ------------------------------------------------------- classes that were not in the training


@pytest.fixture
def people(tmp_path):
    """Four people to train and two others to test, and one of both."""
    root = make_folder(tmp_path / "people", classes=["ann", "bob", "cat", "dan"], train=8, test=3)
    for name in ("ann", "bob", "cat", "dan"):
        shutil.rmtree(root / "test" / name)
    make_folder(tmp_path / "others", classes=["eve", "fay"], train=3, test=4)
    for name in ("eve", "fay"):
        shutil.move(tmp_path / "others" / "test" / name, root / "test" / name)
    return root


def test_without_a_trained_class_in_the_test_its_metrics_are_empty(people, run):
    status, out, err = run("--data-root", people, "--save-features")
    assert (status, err) == (0, "")
    assert "Accuracy (%)" not in out and "Unknown classes" in out
    rows = checkpoint()["history"]
    assert all(row["test_accuracy"] is None and row["intra_distance"] is None for row in rows)
    assert measured()["unknown"]["classes"] == ["eve", "fay"] and "accuracy" not in measured()
    saved = np.load("log/features/epoch_2.npz")
    assert saved["unknown_labels"].tolist() == [4] * 4 + [5] * 4 and "test_labels" not in saved


def test_with_validation_the_metrics_are_of_the_trained_people(people, run):
    status, out, _ = run(
        "--data-root", people, "--val-share", "0.25", "--verify", "--max-epoch", "1"
    )
    rows = checkpoint()["history"]
    assert status == 0 and rows[0]["val_accuracy"] is not None and rows[0]["test_accuracy"] is None
    assert out.count("Accuracy (%)") == 1 and "Unknown classes" in out


def test_new_people_alone_can_be_evaluated(log, run, people):
    shutil.rmtree(people / "train")
    evaluate(run, "--data-root", people, "--save-features")
    saved = np.load("log/features/test.npz")
    assert saved["unseen"].tolist() == ["eve", "fay"] and len(saved["unknown_paths"]) == 8


# --------------------------------------------------------------------------------- given pairs


@pytest.fixture
def pairs(folder):
    """A list of 60 pairs of test images, half of them of one class; ten folds in order."""
    random = np.random.default_rng(0)
    lines = []
    for index in range(60):
        first, second = random.choice(["ant", "bee", "cat"], 2, replace=False)
        same = index % 2
        names = [f"test/{first}/{random.integers(2)}.png"]
        names.append(f"test/{first if same else second}/{2 + random.integers(2)}.png")
        lines.append(f"{names[0]} {names[1]} {same}")
    Path("pairs.txt").write_text("\n".join(lines))
    return [line.split() for line in lines]


@pytest.mark.parametrize("mirror", ["--no-mirror", "--mirror=concat"])
def test_pairs_have_the_accuracy_of_a_slow_loop_over_folds(mirror, log, run, folder, pairs):
    model = models.create("cnn", 3, 1, 8).eval()
    model.load_state_dict(checkpoint()["model"])
    data = datasets.create("folder", folder, 1, image_size=8).test
    features = {}
    for path, (images, _, _) in zip(data.paths, data, strict=True):
        views = [images, images.flip(3)] if "concat" in mirror else [images]
        with torch.no_grad():
            features[str(Path(path).relative_to(folder))] = torch.cat(
                [model(view)[0] for view in views], 1
            )[0]
    distances = np.array([(features[a] - features[b]).norm().item() for a, b, _ in pairs])
    same = np.array([bool(int(last)) for *_, last in pairs])
    folds = np.arange(60) // 6
    accuracies = []
    for fold in range(10):
        others = folds != fold
        limits = [-1.0, *(distances + 1e-9)]
        right = [np.mean((distances <= limit)[others] == same[others]) for limit in limits]
        best = [limit for limit, share in zip(limits, right, strict=True) if share == max(right)]
        within = [np.mean((distances <= limit)[~others] == same[~others]) for limit in best]
        accuracies.append((min(within), max(within)))
    out = evaluate(run, "--data-root", folder, "--pairs", "pairs.txt", "--plot", mirror)
    found = measured()["pairs"]
    low, high = (100 * np.mean(each) for each in zip(*accuracies, strict=True))
    assert low - 1e-9 <= found["l2"]["accuracy"] <= high + 1e-9
    assert {"cosine", "cosine_pca"} < found.keys() and found["pairs"] == 60
    assert any(f"{found['l2']['accuracy']:.2f}" in line for line in out)
    assert Path("log/roc.png").stat().st_size > 2000


def test_pairs_stand_beside_what_an_evaluation_has_measured(log, run, folder, pairs):
    evaluate(run)
    before = measured()
    evaluate(run, "--data-root", folder, "--pairs", "pairs.txt")
    assert before.items() <= (measured() | dict(mirror=False)).items()


@pytest.mark.parametrize(
    "text",
    ["test/ant/0.png test/ant/9.png 1", "test/ant/0.png test/ant/1.png yes", "", "10 300\na b"],
)
def test_a_file_of_pairs_that_cannot_be_used_is_one_line(text, log, run, folder):
    Path("pairs.txt").write_text(text)
    before = files()
    flags = ["--evaluate", "log/checkpoint.pt", "--data-root", folder, "--pairs", "pairs.txt"]
    status, _, err = run(*flags, base=False)
    assert status == 2 and err.startswith("main.py: error: --pairs") and err.count("\n") == 1
    assert files() == before
