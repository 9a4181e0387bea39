"""The whole program on tiny data: its lines, files and figures against plain loops, its endings."""

import csv
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PYTHON, SHARED_DATA, checkpoint, files, make_folder

import datasets
import engine.sources
import main
import models

MAIN = Path(main.__file__)
FIGURE = r"-?\d+\.\d{6}"
BATCH_LINE = re.compile(
    rf"Batch \d+/3\t Loss {FIGURE} \({FIGURE}\) XentLoss {FIGURE} \({FIGURE}\) "
    rf"CenterLoss {FIGURE} \({FIGURE}\)"
)


def metrics(directory="log") -> list[dict]:
    with open(Path(directory, "metrics.csv")) as file:
        return list(csv.DictReader(file))


def test_a_run_prints_zhou2018s_lines_and_writes_its_files(run):
    status, out, err = run("--save-dir", "log/one")
    lines = out.splitlines()
    assert status == 0 and err == ""
    assert lines[:2] == ["Currently using CPU", "Creating dataset: folder"]
    start = lines.index("==> Epoch 1/2")
    assert lines[start - 1] == "Creating model: cnn"
    lines = lines[start + 1 :]
    assert all(BATCH_LINE.fullmatch(line) for line in lines[:3])
    assert lines[3] == "==> Test"
    assert re.fullmatch(r"Accuracy \(%\): \d+\.\d\d\t Error rate \(%\): \d+\.\d\d", lines[4])
    assert lines[5].startswith("Nearest-center accuracy (%): ")
    assert re.fullmatch(r"Epoch 1 took \d+\.\d s", lines[6])
    assert lines[7] == "==> Epoch 2/2"
    assert re.fullmatch(r"Finished\. Total elapsed time \(h:m:s\): 0:00:\d\d", lines[-1])
    assert Path("log/one/log_folder.txt").read_text() == out
    names = ["args.json", "checkpoint.pt", "files.txt", "log_folder.txt", "metrics.csv"]
    assert sorted(os.listdir("log/one")) == names
    args = json.loads(Path("log/one/args.json").read_text())
    assert args == checkpoint("log/one")["args"] and args["batch_size"] == 10
    assert [row["epoch"] for row in metrics("log/one")] == ["1", "2"]


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_training_takes_the_steps_of_a_plain_loop(weight, run, folder):
    """Oracle: the loop as references.md describes zhou2018's, with the loss written out."""
    assert run("--weight-cent", weight, "--lr-model", "0.05")[0] == 0
    data = datasets.create("folder", folder, 10, image_size=8)
    torch.manual_seed(1)
    model = models.create("cnn", 3, 1, 8)
    centers = torch.randn(3, 2)
    sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for row in metrics():
        sums = torch.zeros(2)
        right = 0
        for images, labels, _ in data.train:
            features, logits = model(images)
            xent = F.cross_entropy(logits, labels)
            center = weight * (features - centers[labels]).pow(2).sum(1).mean()
            sgd.zero_grad()
            (xent + center).backward()
            sums += torch.stack([xent, center]).detach() * len(labels)
            right += (logits.argmax(1) == labels).sum().item()
            for label in range(3 if weight else 0):
                own = features.detach()[labels == label]
                centers[label] -= 0.5 * 2 * (centers[label] - own).sum(0) / len(labels)
            sgd.step()
        measured = [float(row["train_xent"]), float(row["train_center"])]
        assert measured == pytest.approx((sums / 24).tolist(), abs=1e-5)
        assert float(row["train_accuracy"]) == pytest.approx(100 * right / 24)
    saved = checkpoint()
    for name, value in model.state_dict().items():
        assert torch.allclose(saved["model"][name], value, atol=1e-5)
    assert torch.allclose(saved["center_loss"]["centers"], centers, atol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--mirror"]])
def test_test_figures_are_those_of_slow_loops(flags, run, folder):
    assert run("--lr-model", "0.05", *flags)[0] == 0
    row = metrics()[-1]
    centers = checkpoint()["center_loss"]["centers"]
    model = models.create("cnn", 3, 1, 8)
    model.load_state_dict(checkpoint()["model"])
    right = nearest = 0
    distances = []
    for images, labels, _ in datasets.create("folder", folder, 1, image_size=8).test:
        views = [images, images.flip(-1)] if flags else [images]
        features, logits = (sum(each) / len(views) for each in zip(*map(model, views), strict=True))
        right += logits.argmax().item() == labels.item()
        to_centers = [(features[0] - center).norm().item() for center in centers]
        nearest += to_centers.index(min(to_centers)) == labels.item()
        distances.append(to_centers[labels.item()])
    inter = min((centers[i] - centers[j]).norm().item() for i in range(3) for j in range(i))
    assert float(row["test_accuracy"]) == pytest.approx(100 * right / 12)
    assert float(row["nearest_center_accuracy"]) == pytest.approx(100 * nearest / 12)
    assert float(row["intra_distance"]) == pytest.approx(np.mean(distances), rel=1e-5)
    assert float(row["inter_distance"]) == pytest.approx(inter, rel=1e-5)


def test_softmax_only_leaves_the_centers_alone_and_shows_class_means(run):
    assert run("--weight-cent", "0", "--save-features", "--max-epoch", "1")[0] == 0
    torch.manual_seed(1)
    models.create("cnn", 3, 1, 8)
    assert torch.equal(checkpoint()["center_loss"]["centers"], torch.randn(3, 2))
    saved = np.load("log/features/epoch_1.npz")
    labels = saved["train_labels"]
    means = [saved["train_features"][labels == label].mean(0) for label in range(3)]
    assert saved["centers"] == pytest.approx(np.stack(means), abs=1e-6)
    shapes = {"centers": (3, 2)}
    for split, count in (("train", 24), ("test", 12)):
        shapes[f"{split}_features"] = (count, 2)
        shapes[f"{split}_labels"] = shapes[f"{split}_predictions"] = (count,)
    assert {name: saved[name].shape for name in saved} == shapes
    assert metrics()[0]["train_center"] == "0.0"


def test_plots_of_a_run(run):
    flags = ["--eval-freq", "2", "--max-epoch", "3", "--weight-cent", "0", "--feat-dim", "5"]
    status, out, err = run("--plot", *flags)
    assert (status, err) == (0, "") and "picture" not in out
    expected = [f"epoch_{epoch}.{ending}" for epoch in (1, 2, 3) for ending in ("npz", "png")]
    assert sorted(os.listdir("log/train")) == expected
    assert sorted(path.stem for path in Path("log/test").glob("*.png")) == ["epoch_2", "epoch_3"]
    assert out.endswith("Pictures in log, page log/report.html\n")
    for name in ("train.gif", "test.gif", "curves.png", "report.html"):
        assert Path("log", name).stat().st_size > 2000
    shown = np.load("log/test/epoch_2.npz")
    accuracy = float(metrics()[1]["test_accuracy"])
    assert str(shown["title"]) == f"test, epoch 2: accuracy {accuracy:.2f} %"
    assert shown["axes"][0].startswith("PC 1 (")
    listed = set(Path("log/files.txt").read_text().splitlines()[1:])
    assert listed == {path.relative_to("log").as_posix() for path in files()} - {"files.txt"}


@pytest.mark.parametrize(
    "test, flags, tested",
    [
        (2, ["--plot"], [1, 2, 3]),
        (2, [], [3]),
        (2, ["--plot", "--eval-freq", "0"], [3]),
        (3, ["--plot"], [3]),
        (3, ["--val-share", "0.2"], [3]),
        (3, ["--val-share", "0.2", "--eval-freq", "2"], [3]),
        (3, ["--eval-freq", "2"], [2, 3]),
    ],
)
def test_which_epochs_are_tested(test, flags, tested, run, tmp_path, monkeypatch):
    """With plots each, where a test is cheap: 24 images to train, 6 or 9 to test."""
    monkeypatch.setattr(main.plots, "plot_epoch", lambda *_: None)
    monkeypatch.setattr(main.plots, "plot_run", lambda *_: [])
    root = make_folder(tmp_path / "data", train=8, test=test)
    common = ["--dataset", "folder", "--data-root", root, "--image-size", "8", "--use-cpu"]
    assert run(*common, "--max-epoch", "3", *flags, base=False)[0] == 0
    rows = metrics()
    assert [int(row["epoch"]) for row in rows if row["test_accuracy"]] == tested
    if "--val-share" in flags:
        validated = [2, 3] if "--eval-freq" in flags else [1, 2, 3]
        assert [int(row["epoch"]) for row in rows if row["val_accuracy"]] == validated


def test_how_often_one_tests_changes_nothing_in_the_training(run):
    trained = []
    for frequency in ("1", "0"):
        assert run("--eval-freq", frequency, "--max-epoch", "3")[0] == 0
        names = [name for name in metrics()[0] if name.startswith("train")]
        trained.append([[row[name] for name in names] for row in metrics()])
    assert trained[0] == trained[1]


def test_max_iter_ends_within_an_epoch(run):
    status, out, _ = run("--max-iter", "4")
    assert status == 0 and "==> Epoch 2/2" in out and out.count("Batch ") == 4
    assert len(metrics()) == 2


def test_the_best_epoch_by_validation_is_the_one_that_is_tested(run):
    status, out, _ = run("--val-share", "0.25", "--max-epoch", "3", "--lr-model", "0.1")
    assert status == 0
    rows = metrics()
    best = max(rows, key=lambda row: (float(row["val_accuracy"]), -float(row["val_xent"])))
    saved = torch.load("log/best.pt", weights_only=True)
    assert saved["epoch"] == int(best["epoch"])
    assert f"Best epoch by validation: {best['epoch']}" in out.splitlines()
    assert [row["test_accuracy"] != "" for row in rows] == [False, False, True]
    status, out, _ = run("--evaluate", "log/best.pt", base=False)
    assert f"Accuracy (%): {float(rows[-1]['test_accuracy']):.2f}" in out


# ---------------------------------------------------------------------------------- divergence

DIVERGING = {
    "--lr-model 1e20": "loss, xent, center, network's weights, centers",
    "--lr-model 1e20 --weight-cent 0": "loss, xent, network's weights",
    "--lr-model 1e-30 --lr-cent 1e25 --batch-size 24": "intra_distance, inter_distance",
    "--lr-model 1e30 --batch-size 24": "xent, intra_distance",
}


@pytest.mark.parametrize("flags", DIVERGING)
def test_divergence_is_one_line_that_says_what_to_change_and_no_checkpoint_has_it(flags, run):
    assert run("--max-epoch", "1", "--lr-model", "1e-3")[0] == 0
    status, _, err = run("--print-freq", "1000", *flags.split())
    assert status == 3 and err.count("\n") == 1
    start = f"main.py: error: the training has diverged in epoch 1: {DIVERGING[flags]} no longer "
    assert err.startswith(start + "finite, with --weight-cent ")
    assert "lower --lr-model" in err and ("--lr-cent or" in err) == (flags[-2:] != " 0")
    saved = checkpoint()
    assert saved["epoch"] == 0
    assert all(each.isfinite().all() for each in [*saved["model"].values(), saved["centers"]])


def test_looking_for_divergence_never_waits_for_the_device_within_an_epoch(run, monkeypatch):
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)

        def wait(self, original=original):
            waits.append(1)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, wait)
    counts = []
    for size in ("8", "2"):  # 3 and 12 steps
        waits.clear()
        assert run("--max-epoch", "1", "--print-freq", "1000", "--batch-size", size)[0] == 0
        counts.append(len(waits))
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------ how a run ends


def test_a_mistake_in_the_data_leaves_the_old_run_as_it_was(log, run):
    before = files()
    status, _, err = run("--data-root", "nowhere")
    assert status == 2 and err.startswith("main.py: error: ") and err.count("\n") == 1
    assert run("--model", "bn-deep")[0] == 2  # the images are too small for it
    assert files() == before


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read_is_one_line(workers, run, tmp_path):
    bad = make_folder(tmp_path / "images", size=(64, 64)) / "train" / "bee" / "3.png"
    bad.write_bytes(bad.read_bytes()[:2000])
    status, _, err = run("--data-root", tmp_path / "images", "-j", workers)
    assert status == 2 and err.count("\n") == 1 and "bee/3.png" in err


def test_a_worker_that_dies_is_one_line(run, monkeypatch):
    def batches(*_):
        raise engine.sources.WorkerError("a worker has died, and a smaller -j needs less memory")

    monkeypatch.setattr(datasets.Batches, "__iter__", batches)
    status, _, err = run()
    assert (status, err.count("\n")) == (1, 1) and "a smaller -j needs less memory" in err


@pytest.mark.parametrize("allocate", [lambda *_: torch.empty(10**15), lambda *_: bytearray(10**17)])
def test_running_out_of_memory_is_told_in_a_line(allocate, run, monkeypatch):
    monkeypatch.setattr(main, "build", allocate)
    status, _, err = run()
    assert status == 1 and err.startswith("main.py: error: out of memory") and err.count("\n") == 1


def start(*flags, cwd, **environment):
    return subprocess.Popen(
        [PYTHON, MAIN, *map(str, flags)],
        cwd=cwd,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_ctrl_c_while_training_draws_the_pictures_of_whole_epochs(folder, tmp_path):
    data = ["--dataset", "folder", "--data-root", folder, "--image-size", "8", "--batch-size", "10"]
    process = start(*data, "--plot", "--max-epoch", "100000", "--save-dir", "a b", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("==> Epoch 3/"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    end = r"to go on: python main\.py --resume --save-dir 'a b'\n"
    stopped = re.fullmatch(rf"main\.py: stopped by SIGINT after epoch (\d+); {end}", err)
    epochs = [row["epoch"] for row in metrics(tmp_path / "a b")]
    assert epochs[-1] == stopped[1]
    drawn = {path.stem for path in (tmp_path / "a b" / "train").glob("*.png")}
    assert drawn == {f"epoch_{epoch}" for epoch in epochs}


@pytest.mark.parametrize("module", ["tqdm", "sklearn"], ids=["imports", "reading"])
def test_ctrl_c_before_the_training_is_one_line_and_status_130(module, tmp_path):
    """Within a module that swallows every exception, as some do."""
    (tmp_path / f"{module}.py").write_text(
        f"import time\nprint('in {module}', flush=True)\n"
        "while True:\n"
        "    try:\n        time.sleep(0.1)\n"
        "    except BaseException:\n        pass\n"
    )
    process = start("--recipe", "digits", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    for line in process.stdout:
        if line == f"in {module}\n":
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "main.py: interrupted\n")
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_compile_compiles_once_and_gives_the_same_figures(run):
    """The batches are of 10, 10 and 4 images."""
    from torch._dynamo.utils import counters

    rows = []
    for more in ([], ["--compile"]):
        torch.compiler.reset()
        counters.clear()
        status, _, err = run(*more)
        if "needs a C++ compiler" in err:
            pytest.skip(err)
        assert status == 0, err
        rows.append(metrics())
    assert counters["stats"]["unique_graphs"] == 2  # the network, and what the compiler is tried on
    for plain, compiled in zip(*rows, strict=True):
        for name in ("train_xent", "train_center"):
            assert float(plain[name]) == pytest.approx(float(compiled[name]), abs=1e-5)
    assert list(checkpoint()["model"]) == list(models.create("cnn", 3, 1, 8).state_dict())
    status, _, err = run("--evaluate", "log/checkpoint.pt", base=False)
    assert status == 0, err


@pytest.mark.mnist
@pytest.mark.slow
def test_first_50_batches_on_mnist_print_zhou2018s_losses(run, monkeypatch):
    monkeypatch.setattr(main, "test", lambda *_: {})
    flags = ["--use-cpu", "--data-root", SHARED_DATA, "--max-iter", "50"]
    status, out, _ = run(*flags, base=False)
    line = next(line for line in out.splitlines() if line.startswith("Batch 50/469"))
    losses = [float(loss) for loss in re.findall(r"\d+\.\d+", line)]
    expected = (2.403692, 2.628492, 2.403593, 2.393760, 0.000099, 0.234732)
    assert status == 0 and losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.mnist
def test_the_fast_recipe_learns_mnist_in_150_steps(run):
    """Of the 705 of the whole recipe; seed 1 had 97.04 %."""
    flags = ["--recipe", "fast", "--max-iter", "150", "--data-root", SHARED_DATA, "--use-cpu"]
    status, _, err = run(*flags, base=False)
    assert (status, err) == (0, "") and float(metrics()[-1]["test_accuracy"]) > 96
