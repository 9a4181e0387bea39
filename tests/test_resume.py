"""Nothing is lost: a run that was stopped, killed or kept from writing goes on to the bit, and says what happened.

Here the process itself stands in for a killed one where it can: an exception from a hook leaves the files as a kill
does. tests/kill_runs.py kills real processes.
"""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in
import torch
import torch.nn.functional as F
from conftest import PYTHON, make_folder, program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kill_runs import differences
from torch import nn

import cli
import datasets
import main
import models
import plots
import utils
from engine import cuda_graph, epoch
from tests import drawers

MAIN = Path(main.__file__)


class Killed(BaseException):
    """Goes through every handler, as SIGKILL does."""


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step, what): at the training's step of that number from now, raises Killed or sends itself a signal."""
    original, count = torch.nn.functional.cross_entropy, {}

    def cross_entropy(*arguments, **options):
        if torch.is_grad_enabled():  # no test
            count["now"] += 1
            if count["now"] == count["step"]:
                if count["what"] is Killed:
                    raise Killed
                os.kill(os.getpid(), count["what"])
        return original(*arguments, **options)

    def stop(step, what=Killed):
        count.update(now=0, step=step, what=what)

    stop(0)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    return stop


# 24 images in batches of 10: three steps an epoch.
SETTINGS = {
    "zhou2018": [],
    "one optimizer, milestones, max-iter": [
        "--recipe",
        "wen2016",
        "--model",
        "cnn",
        "--max-iter",
        "8",
        "--milestones",
        "2",
        "5",
    ],
    "BatchNorm, class average": [
        "--recipe",
        "zahn2024-v1.0",
        "--model",
        "bn-shallow",
        "--stepsize",
        "1",
    ],
    "euclidean": ["--distance", "euclidean", "--momentum-cent", "0.5"],
    "adamw, onecycle": ["--optimizer", "adamw", "--schedule", "onecycle"],
    "bfloat16": ["--amp", "--optimizer", "adamw", "--schedule", "onecycle"],
    "bfloat16, one optimizer": ["--amp", "--one-optimizer", "--caffe-biases"],
    "softmax only": ["--weight-cent", "0", "--save-features"],
    "features": ["--save-features", "--stepsize", "1"],
    "augmented, validation": [
        "--augment",
        "--val-share",
        "0.1",
        "--lr-model",
        "0.05",
        "--erase",
        "0.3",
        "--label-smoothing",
        "0.1",
    ],
    "dropout": ["--model", "dropout"],
}


class Dropout(nn.Module):
    def __init__(self, num_classes, in_channels, image_size, feat_dim):
        super().__init__()
        self.embedding = nn.Linear(in_channels * image_size**2, feat_dim)
        self.classifier = nn.Linear(feat_dim, num_classes)

    def forward(self, images):
        features = self.embedding(F.dropout(images.flatten(1), 0.5, self.training))
        return features, self.classifier(features)


@pytest.mark.parametrize("setting", SETTINGS)
def test_stopped_and_resumed_runs_are_the_same_to_the_bit(setting, run, stop_at, monkeypatch):
    """A kill, a stop in the middle of an epoch, another in the same epoch, a kill after it; then to the end."""
    monkeypatch.setitem(models.MODELS, "dropout", Dropout)
    flags = ["--max-epoch", "3", *SETTINGS[setting]]
    assert run(*flags, "--save-dir", "whole")[0] == 0
    for number, (step, what, resume) in enumerate(
        [
            (2, Killed, []),
            (4, signal.SIGTERM, ["--resume"]),
            (1, signal.SIGINT, ["--resume"]),
            (1, Killed, ["--resume"]),
        ]
    ):
        stop_at(step, what)
        try:
            status, _, err = run(
                *(flags if number == 0 else []), "--save-dir", "stopped", *resume, base=number == 0
            )
        except Killed:
            assert what is Killed
        else:
            assert status == 128 + what and re.search(
                r"holds all up to epoch 1 and [12] batches; to go on: ", err
            )
    stop_at(0)
    status, out, err = run("--resume", "--save-dir", "stopped", base=False)
    assert (status, err) == (0, "") and "Resuming after epoch 1" in out
    assert differences(Path("whole"), Path("stopped")) == []


@pytest.mark.parametrize(
    "setting", ["zhou2018", "one optimizer, milestones, max-iter", "adamw, onecycle"]
)
def test_captured_runs_go_on_to_the_bit_and_without_graphs_too(setting, run, stop_at, monkeypatch):
    flags, eager = ["--max-epoch", "3", "--batch-size", "5", *SETTINGS[setting]], cuda_graph.captured
    monkeypatch.setattr(training, "captured", stand_in.captured)
    assert run(*flags, "--save-dir", "whole")[0] == 0
    stop_at(5, signal.SIGTERM)
    assert run(*flags, "--save-dir", "stopped")[0] == 143
    shutil.copytree("stopped", "elsewhere")
    stop_at(1)
    with pytest.raises(Killed):
        run("--resume", "--save-dir", "stopped", base=False)
    stop_at(0)
    assert run("--resume", "--save-dir", "stopped", base=False)[0] == 0
    assert differences(Path("whole"), Path("stopped")) == []
    monkeypatch.setattr(training, "captured", eager)  # a CPU, whose optimizers are not fused
    assert run("--resume", "--save-dir", "elsewhere", base=False)[0] == 0
    ours, theirs = (
        torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in ("elsewhere", "whole")
    )
    assert all(not group["fused"] for group in ours["optimizer_model"]["param_groups"])
    for row, other in zip(ours["history"], theirs["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-3)


def test_a_stop_is_seen_with_workers_as_well_and_they_outlive_its_signal(run, stop_at, monkeypatch):
    """A cluster signals all processes of a run. What -j 2 has begun, -j 0 may end."""
    import multiprocessing

    flags = ["--max-epoch", "3", "-j", "2"]
    assert run(*flags, "--save-dir", "whole")[0] == 0
    original, others, calls = torch.nn.functional.cross_entropy, set(multiprocessing.active_children()), []

    def cross_entropy(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # each of the two workers has given a batch
            workers = set(multiprocessing.active_children()) - others
            assert workers
            for process in workers:
                os.kill(process.pid, signal.SIGTERM)
                os.kill(process.pid, signal.SIGINT)
            time.sleep(0.3)
            assert all(process.is_alive() for process in workers)
            monkeypatch.setattr(torch.nn.functional, "cross_entropy", original)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    assert run(*flags, "--save-dir", "stopped")[0] == 143
    assert (
        set(multiprocessing.active_children()) <= others
    )  # the interpreter would wait ten seconds for one
    assert run("--resume", "--save-dir", "stopped", "-j", "0", base=False)[0] == 0
    assert differences(Path("whole"), Path("stopped")) == []


@pytest.mark.parametrize(
    "name", ["checkpoint.pt", "metrics.csv", "log_folder.txt", "args.json", "epoch_2.npz"]
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_around_any_replaced_file_loses_nothing(name, after, run, monkeypatch):
    assert run("--max-epoch", "3", "--save-features", "--save-dir", "whole")[0] == 0
    original, times = os.replace, []

    def replace(source, target):
        if Path(target).name == name:
            times.append(target)
        if Path(target).name == name and len(times) == (
            2 if name in ("checkpoint.pt", "metrics.csv") else 1
        ):
            if after:
                original(source, target)
            raise Killed
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        run("--max-epoch", "3", "--save-features", "--save-dir", "killed")
    assert times
    monkeypatch.setattr(os, "replace", original)
    there = Path("killed/checkpoint.pt").exists()
    assert there == (name not in ("log_folder.txt", "args.json"))
    again = [["--max-epoch", "3", "--save-features"], ["--resume"]][there]
    assert run(*again, "--save-dir", "killed", base=not there)[0] == 0
    assert differences(Path("whole"), Path("killed")) == []


@pytest.mark.slow
def test_real_processes_killed_ten_times_at_random_moments():
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run(
        [PYTHON, script, "--kills", "10", "--seed", str(os.getpid())],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^10 kills .* 0 runs differ", done.stdout, re.MULTILINE)


def test_the_comparison_sees_a_single_bit(run, tmp_path):
    run("--save-dir", "one")
    shutil.copytree("one", "two")
    assert differences(Path("one"), Path("two")) == []
    checkpoint = torch.load("two/checkpoint.pt", weights_only=True)
    for name in ("model", "center_loss"):
        value = next(iter(checkpoint[name].values()))
        value.view(torch.int32).view(-1)[0] ^= 1
    checkpoint["optimizer_model"]["state"][0]["momentum_buffer"].view(-1)[0] += 1
    torch.save(checkpoint, "two/checkpoint.pt")
    Path("two/metrics.csv").write_text(Path("two/metrics.csv").read_text().replace("\n2,", "\n3,"))
    Path("two/log_folder.txt").write_text("Accuracy (%): 1\n")
    for name in ("one", "two"):
        Path(name, "train.gif").write_text(name)
    assert differences(Path("two"), Path("one")) == [
        "centers",
        "model.body.0.weight",
        "center_loss.centers",
        "optimizer_model.state.0.momentum_buffer",
        "metrics.csv",
        "log_folder.txt",
        "train.gif",
        "epochs in metrics.csv: [1, 3]",
    ]


# ------------------------------------------------------------------------------------------------- where and how far


def test_resuming_elsewhere_takes_the_whole_run_along_and_leaves_the_old_one(run):
    written = ["--plot", "--save-features"]
    run("--max-epoch", "2", "--save-dir", "whole", *written)
    run("--max-epoch", "1", "--save-dir", "old", *written)
    before = {path: path.read_bytes() for path in Path("old").rglob("*.*")}
    status, out, _ = run(
        "--resume", "old/checkpoint.pt", "--save-dir", "new", "--max-epoch", "2", base=False
    )
    assert status == 0 and "Resuming after epoch 1" in out
    assert {path: path.read_bytes() for path in Path("old").rglob("*.*")} == before
    assert differences(Path("whole"), Path("new")) == []
    whole, new = (
        {path.relative_to(root): path for path in Path(root).rglob("*.*")}
        for root in ("whole", "new")
    )
    assert whole.keys() == new.keys()
    pictures = [path for path in whole if path.suffix in (".png", ".gif")]
    assert len(pictures) == 7 and all(
        whole[path].read_bytes() == new[path].read_bytes() for path in pictures
    )
    assert (
        Path("new/log_folder.txt").read_bytes().startswith(before[Path("old/log_folder.txt")][:500])
    )


def test_a_checkpoint_is_resumed_in_its_own_directory(run):
    run("--max-epoch", "1", "--save-dir", "deep/one")
    assert run("--resume", "deep/one/checkpoint.pt", "--max-epoch", "2", base=False)[0] == 0
    assert not Path("log").exists()
    assert len(Path("deep/one/metrics.csv").read_text().splitlines()) == 3


def test_an_earlier_checkpoint_takes_later_pictures_away(run):
    run("--max-epoch", "1", "--save-features")
    shutil.copy("log/checkpoint.pt", "log/early.pt")
    run("--resume", "--max-epoch", "3", base=False)
    Path("log/features/epoch_best.npz").touch()  # not ours
    assert run("--resume", "log/early.pt", "--max-epoch", "2", base=False)[0] == 0
    assert sorted(os.listdir("log/features")) == ["epoch_1.npz", "epoch_2.npz", "epoch_best.npz"]


def test_what_may_differ_from_the_checkpoint_can_be_switched_off_too(run):
    run("--max-epoch", "1", "--save-features")
    assert not cli.parse_args(["--resume", "--no-use-cpu", "--no-save-features"]).use_cpu
    kept = cli.parse_args(["--resume"])
    assert kept.use_cpu and kept.save_features
    assert run("--resume", "--no-save-features", "--max-epoch", "2", base=False)[0] == 0
    assert os.listdir("log/features") == ["epoch_1.npz"]


def test_resuming_into_the_directory_of_another_run_says_that_it_is_replaced(run):
    run("--max-epoch", "1", "--save-dir", "one")
    run("--max-epoch", "3", "--save-dir", "two", "--save-features")
    status, out, _ = run(
        "--resume", "one/checkpoint.pt", "--save-dir", "two", "--max-epoch", "2", base=False
    )
    assert status == 0 and "Replacing the earlier run in two" in out
    assert not list(Path("two/features").iterdir())


def test_a_finished_run_says_so_and_changes_nothing(run):
    run()
    before = {path: path.read_bytes() for path in Path("log").iterdir()}
    status, out, _ = run("--resume", base=False)
    assert status == 0
    assert out.endswith(
        "The run of log/checkpoint.pt is finished after 2 epochs; a larger --max-epoch goes on\n"
    )
    assert {path: path.read_bytes() for path in Path("log").iterdir()} == before


def test_a_finished_run_is_resumed_elsewhere_with_all_it_has(run):
    run("--save-dir", "old", "--plot", "--verify", "--max-epoch", "1", "--feat-dim", "3")
    before = {path: path.read_bytes() for path in Path("old").rglob("*.*")}
    for flags in ([], ["--no-plot"]):
        status, out, _ = run(
            "--resume", "old/checkpoint.pt", "--save-dir", "new", *flags, base=False
        )
        assert status == 0 and "is finished after 1 epochs" in out and "Finished." in out
        new = {
            Path("old") / path.relative_to("new"): path.read_bytes()
            for path in Path("new").rglob("*.*")
        }
        drawn = {"train.gif", "test.gif", "curves.png", "report.html", "run.json"}
        assert before.keys() - new.keys() == (
            {Path("old") / name for name in drawn} if flags else set()
        )
        different = {path.name for path in new if before[path] != new[path]}
        assert different <= {
            "args.json",
            "checkpoint.pt",
            "log_folder.txt",
            "report.html",
            "run.json",
        }
        assert differences(Path("old"), Path("new")) == [] or flags
        shutil.rmtree("new")
    assert {path: path.read_bytes() for path in Path("old").rglob("*.*")} == before


def test_a_finished_run_draws_pictures_that_a_kill_has_kept_back(run):
    run("--plot")
    for name in ("train/epoch_2.png", "train.gif", "curves.png"):
        Path("log", name).unlink()
    assert run("--resume", base=False)[0] == 0
    assert all(
        Path("log", name).exists() for name in ("train/epoch_2.png", "train.gif", "curves.png")
    )


def test_an_epoch_begun_without_its_features_is_not_shown_as_whole(run, stop_at):
    stop_at(2, signal.SIGTERM)
    run("--max-epoch", "2")
    status, out, _ = run("--resume", "--save-features", "--plot", base=False)
    assert (
        status == 0
        and out.count("Epoch 1 was begun without --plot and --save-features: it has neither") == 1
    )
    assert sorted(str(path) for path in Path("log").rglob("epoch_*")) == [
        f"log/{name}"
        for name in (
            "features/epoch_2.npz",
            "test/epoch_2.npz",
            "test/epoch_2.png",
            "train/epoch_2.npz",
            "train/epoch_2.png",
        )
    ]


def test_a_run_stopped_twice_in_an_epoch_has_the_centers_of_now(run, stop_at):
    for step, flags in ((4, []), (1, ["--resume"])):
        stop_at(step, signal.SIGTERM)
        assert run(*flags, base=not flags)[0] == 143
        checkpoint = torch.load("log/checkpoint.pt", weights_only=True)
        assert torch.equal(checkpoint["centers"], checkpoint["center_loss"]["centers"])
    assert checkpoint["partial"]["batches"] == 2


@pytest.mark.parametrize(
    "flags", [[], ["--weight-cent", "0", "--save-features"], ["--max-iter", "5", "-j", "1"]]
)
def test_a_signal_within_a_test_ends_it_and_the_test_is_made_again(flags, run, monkeypatch):
    """12 test images in batches of 10, and the last epoch of --max-iter 5 is shorter than the data."""
    assert run(*flags, "--save-dir", "whole")[0] == 0
    original, ends = datasets.Batches.__iter__, 0
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # in the first epoch's test, then in the second's
        seen = []

        def send(batches, number=number, seen=seen, ends=ends):
            for batch in original(batches):
                seen.append(os.kill(os.getpid(), number) if len(seen) == ends else None)
                yield batch

        monkeypatch.setattr(datasets.Batches, "__iter__", send)
        status, _, err = run(
            *flags if not ends else ["--resume"], "--save-dir", "stopped", base=not ends
        )
        last = 2 if "--max-iter" in flags and ends else 3
        assert (
            status == 128 + number
            and f"holds all up to epoch {ends // 2} and {last} batches" in err
        )
        assert len(seen) == ends + 1
        ends = 2
    monkeypatch.setattr(datasets.Batches, "__iter__", original)
    assert run("--resume", "--save-dir", "stopped", base=False)[0] == 0
    assert differences(Path("whole"), Path("stopped")) == []


@pytest.mark.parametrize(
    "signals, status", [([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)]
)
def test_a_film_in_hand_keeps_no_one_waiting(signals, status, run, monkeypatch):
    original = plots.Plotter.finish

    def finish(plotter, *arguments):
        while not list(Path("log").glob(".*.part")):  # curves.png is being drawn, and never done
            time.sleep(0.01)
        for number in signals:
            os.kill(os.getpid(), number)
        return original(plotter, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(plots, "draw_curves", drawers.hang)
        patched.setattr(plots.Plotter, "finish", finish)
        began = time.monotonic()
        ended, _, err = run("--plot", "--max-epoch", "1")
    assert ended == status and time.monotonic() - began < 30 and err.count("\n") == 1
    assert not list(Path("log").rglob("*.part")) and not Path("log/curves.png").exists()
    assert run("--resume", base=False)[0] == 0
    assert {"curves.png", "train.gif", "test.gif"} <= set(os.listdir("log"))


def test_a_worker_that_is_killed_is_one_line_and_resume_goes_on(run, monkeypatch):
    import multiprocessing

    assert run("--save-dir", "whole")[0] == 0
    original, others, calls = torch.nn.functional.cross_entropy, set(multiprocessing.active_children()), []

    def cross_entropy(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            for process in set(multiprocessing.active_children()) - others:
                os.kill(process.pid, signal.SIGKILL)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
        status, _, err = run("-j", "1", "--save-dir", "killed")
    assert status == 1 and err.count("\n") == 1 and err.endswith("to go on: --resume\n")
    assert err.startswith("main.py: error: a worker has died, and a smaller -j needs less memory: ")
    assert run("--resume", "--save-dir", "killed", base=False)[0] == 0
    assert differences(Path("whole"), Path("killed")) == []


@pytest.mark.parametrize(
    "flags, contradiction, message",
    [
        ([], ["--seed", "2"], "--seed must be 1, as in log/checkpoint.pt, got 2"),
        ([], ["--model", "bn-deep"], "--model must be cnn, as in log/checkpoint.pt, got bn-deep"),
        ([], ["--feat-dim", "3"], "--feat-dim must be 2, as in log/checkpoint.pt, got 3"),
        (
            [],
            ["--recipe", "wen2016"],
            "--recipe must be zhou2018, as in log/checkpoint.pt, got wen2016",
        ),
        (
            [],
            ["--dataset", "digits"],
            "--dataset must be folder, as in log/checkpoint.pt, got digits",
        ),
        (
            [],
            ["--batch-size", "128"],
            "--batch-size must be 10, as in log/checkpoint.pt, got 128",
        ),  # 128: the default
        (
            ["--weight-cent", "0.5"],
            ["--weight-cent", "1"],
            "--weight-cent must be 0.5, as in log/checkpoint.pt, got 1.0",
        ),
        ([], ["--amp"], "--amp must be False, as in log/checkpoint.pt, got True"),
        ([], ["--mirror"], "--mirror must be False, as in log/checkpoint.pt, got True"),
        (["--amp"], ["--no-amp"], "--amp must be True, as in log/checkpoint.pt, got False"),
        ([], ["--max-iter", "9"], "--max-iter must be 0, as in log/checkpoint.pt, got 9"),
        (
            ["--max-iter", "2"],
            ["--max-iter", "9"],
            "--max-iter must be 2, as in log/checkpoint.pt, got 9",
        ),
        (
            ["--max-iter", "2"],
            ["--max-epoch", "9"],
            "--max-epoch must be 1, as in log/checkpoint.pt, got 9",
        ),
        (
            ["--schedule", "onecycle"],
            ["--max-epoch", "9"],
            "--max-epoch must be 1, as in log/checkpoint.pt, got 9",
        ),
        (
            [],
            ["--evaluate", "log/checkpoint.pt"],
            "--evaluate tests and --resume trains on: give one of them",
        ),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(flags, contradiction, message, run):
    run("--max-epoch", "1", *flags)
    before = {path: path.read_bytes() for path in Path("log").iterdir()}
    assert run("--resume", *contradiction, base=False) == (2, "", f"main.py: error: {message}\n")
    assert {path: path.read_bytes() for path in Path("log").iterdir()} == before


def test_other_data_than_the_checkpoints_are_refused(run, tmp_path):
    run("--max-epoch", "1")
    before = {path: path.read_bytes() for path in Path("log").iterdir()}
    make_folder(tmp_path / "names", classes=("ant", "bee", "cow"))
    make_folder(tmp_path / "more", train=9)
    names = "the training classes must be ['ant', 'bee', 'cat'], as in log/checkpoint.pt, got ['ant', 'bee', 'cow']"
    more = "the training images must be 24, as in log/checkpoint.pt, got 27"
    for root, message in dict(names=names, more=more).items():
        status, _, err = run("--resume", "--max-epoch", "2", "--data-root", root, base=False)
        assert (status, err) == (2, f"main.py: error: {message}\n")
    assert {path: path.read_bytes() for path in Path("log").iterdir()} == before


# -------------------------------------------------------------------------------------------- damaged and foreign files


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder) -> Path:
    """The directory of a run of one epoch."""
    directory = tmp_path_factory.mktemp("finished") / "log"
    assert (
        program(
            [
                "--dataset",
                "folder",
                "--data-root",
                folder,
                "--image-size",
                "8",
                "--batch-size",
                "10",
                "--max-epoch",
                "1",
                "--use-cpu",
                "--save-dir",
                directory,
            ]
        )
        == 0
    )
    return directory


SUMS = dict(batches=1, samples=10, sums=torch.zeros(3), kept=None)
TAMPERED = {
    "no elapsed": dict(elapsed=None),
    "endless": dict(elapsed=math.inf),
    "past": dict(log_bytes=-1),
    "other centers": dict(centers=torch.zeros(5, 2)),
    "whole centers": dict(centers=torch.zeros(3, 2, dtype=torch.int)),
    "no partial": dict(partial={}),
    "no sums": dict(partial=SUMS | dict(sums=None)),
    "few kept": dict(partial=SUMS | dict(kept=[torch.zeros(9, 2), torch.zeros(9), torch.zeros(9)])),
    "no args": dict(args={}),
    "negative epoch": dict(epoch=-5),
    "later epoch": dict(epoch=7),
    "no history": dict(history=[3]),
}


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    checkpoint = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "flipped bit":  # within a weight, where nothing but a checksum tells
        at = whole.index(checkpoint["model"]["body.0.weight"].numpy().tobytes()) + 7
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("epoch 3\n")
    elif how == "a directory":
        path.unlink()
        path.mkdir()
    elif how == "weights alone":
        torch.save(checkpoint["model"], path)
    elif how == "wrong types":
        torch.save(checkpoint | dict(args=3), path)
    elif how == "other network":
        torch.save(checkpoint | dict(model={"weight": torch.zeros(3)}), path)
    elif how in TAMPERED:
        torch.save(checkpoint | TAMPERED[how], path)
    elif how == "other random state":
        torch.save(checkpoint | dict(rng=torch.zeros(3)), path)
    elif how == "other optimizer":
        torch.save(checkpoint | dict(optimizer_model={}), path)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "flipped bit",
        "empty",
        "text",
        "a directory",
        "weights alone",
        "wrong types",
        "other network",
        "other random state",
        "other optimizer",
        *TAMPERED,
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_one_line(how, flag, finished, run):
    shutil.copytree(finished, "log")
    damage(Path("log/checkpoint.pt"), how)
    before = {path: path.read_bytes() for path in Path("log").iterdir() if path.is_file()}
    status, _, err = run(flag, "log/checkpoint.pt", base=False)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("main.py: error: ") and "log/checkpoint.pt" in err
    assert {path: path.read_bytes() for path in Path("log").iterdir() if path.is_file()} == before


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
tensors = st.builds(
    lambda shape, kind, seed: (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(100).to(kind)
    ),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
    st.integers(0, 99),
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    args=st.dictionaries(st.text(max_size=8), values, max_size=4),
    epoch=st.integers(0, 10**9),
    history=st.lists(
        st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False) | st.none()), max_size=3
    ),
    state=st.dictionaries(st.text(max_size=8), tensors, max_size=4),
    centers=tensors,
)
def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, args, epoch, history, state, centers):
    checkpoint = dict(
        args=args,
        data={},
        epoch=epoch,
        partial=None,
        history=history,
        centers=centers,
        rng=torch.get_rng_state(),
        model=state,
        center_loss=state,
        scheduler=args,
        optimizer_model=dict(state={0: state}, param_groups=[args]),
    )
    utils.save_checkpoint(tmp_path / "c.pt", checkpoint)
    loaded = utils.load_checkpoint(tmp_path / "c.pt")

    def same(one, two) -> bool:
        if isinstance(one, torch.Tensor):
            return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
        if isinstance(one, dict):
            return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
        if isinstance(one, list):
            return len(one) == len(two) and all(map(same, one, two))
        return type(one) is type(two) and one == two

    assert same(checkpoint, loaded)
    assert os.listdir(tmp_path) == ["c.pt"]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_damage_of_a_checkpoint_goes_unseen(tmp_path, data):
    path = tmp_path / "c.pt"
    state = {"weight": torch.arange(64.0)}
    utils.save_checkpoint(
        path,
        dict(
            args={},
            data={},
            epoch=1,
            partial=None,
            history=[],
            centers=torch.zeros(2),
            rng=torch.get_rng_state(),
            model=state,
            center_loss={},
            scheduler={},
            optimizer_model={},
        ),
    )
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(
        whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    )
    try:
        loaded = utils.load_checkpoint(path)
    except utils.RunError as error:
        assert "\n" not in str(error)
    else:  # in the archive's own padding or dates
        assert torch.equal(loaded["model"]["weight"], state["weight"]) and loaded["epoch"] == 1


# ----------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    "flags, term",
    [
        (["--lr-model", "1e20"], "cross entropy and center loss"),
        (["--lr-model", "1e20", "--weight-cent", "0"], "cross entropy"),
        (["--lr-model", "1e-30", "--lr-cent", "1e30"], "center loss"),
        (
            ["--lr-model", "1e30", "--batch-size", "24"],
            "cross entropy of the test and distances from the centers",
        ),
        (["--lr-model", "3e38", "--weight-cent", "1e6", "--batch-size", "24"], "network's weights"),
        (["--lr-model", "1e-30", "--lr-cent", "3e38", "--batch-size", "24"], "centers"),
        (
            ["--lr-model", "1e-30", "--lr-cent", "1e25", "--batch-size", "24"],
            "distances from the centers",
        ),
    ],
)
def test_divergence_is_told_within_the_epoch_and_no_checkpoint_has_it(flags, term, run):
    status, _, err = run("--print-freq", "1000", *flags)
    assert status == 3 and err.count("\n") == 1
    assert err.startswith(
        f"main.py: error: the training has diverged in epoch 1: {term} no longer finite, with --w"
    )
    for name in ("--lr-model", "--lr-cent", "--weight-cent", "lower"):
        assert name in err
    checkpoint = torch.load("log/checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 0 and checkpoint["partial"] is None
    assert all(
        each.isfinite().all() for each in [*checkpoint["model"].values(), checkpoint["centers"]]
    )


def test_looking_for_divergence_never_waits_for_the_device_within_an_epoch(run, monkeypatch):
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, original=original: (waits.append(1), original(self))[1]
        )
    counts = []
    for size in ("8", "2"):  # 3 and 12 steps
        waits.clear()
        assert run("--max-epoch", "1", "--print-freq", "1000", "--batch-size", size)[0] == 0
        counts.append(len(waits))
    assert counts[0] == counts[1]


def test_the_last_good_checkpoint_is_untouched_by_a_divergence(run, monkeypatch):
    run("--max-epoch", "1")
    before = torch.load("log/checkpoint.pt", weights_only=True)["model"]
    original = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda *given, **options: original(*given, **options) * math.nan,
    )
    saved = []
    original_save = utils.save_checkpoint
    monkeypatch.setattr(
        utils,
        "save_checkpoint",
        lambda path, checkpoint: (
            saved.append(checkpoint["epoch"]),
            original_save(path, checkpoint),
        ),
    )
    status, _, err = run("--resume", "--max-epoch", "3", base=False)
    assert status == 3 and "has diverged in epoch 2: cross entropy no longer finite" in err
    assert saved == [1]  # as it was, when the run began
    now = torch.load("log/checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_a_stop_does_not_save_what_has_diverged(run, stop_at):
    stop_at(2, signal.SIGTERM)
    status, _, err = run("--lr-model", "1e20", "--print-freq", "1000")
    assert status == 3 and "no longer finite" in err
    assert torch.load("log/checkpoint.pt", weights_only=True)["partial"] is None


# ---------------------------------------------------------------------------------- full disks, vanished directories


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with little room."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", path], capture_output=True
        ).returncode
    ):
        pytest.skip("this user may not mount a file system")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path, leave: int) -> None:
    with open(path / "filler", "wb", buffering=0) as file:
        while file.write(b"\0" * 4096) == 4096 and shutil.disk_usage(path).free > leave:
            pass


@pytest.mark.parametrize("leave", [0, 40_000, 400_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    leave, run, small_disk, monkeypatch
):
    run("--max-epoch", "3", "--save-features", "--save-dir", "whole")
    log = small_disk / "log"
    flags = ["--max-epoch", "1", "--save-features", "--save-dir", log]
    assert run(*flags)[0] == 0
    before = torch.load(log / "checkpoint.pt", weights_only=True)
    original = epoch.train_epoch

    def train(*arguments):
        fill(small_disk, leave)
        return original(*arguments)

    monkeypatch.setattr(training, "train_epoch", train)
    status, _, err = run("--resume", "--max-epoch", "3", "--save-dir", log, base=False)
    assert status == 1 and err.count("\n") == 1
    assert re.match(
        r"main.py: error: cannot write .*: No space left on device; the earlier files are whole",
        err,
    )
    now = torch.load(log / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(now["model"][name], value) for name, value in before["model"].items())
    assert not list(log.rglob("*.part"))
    monkeypatch.setattr(training, "train_epoch", original)
    (small_disk / "filler").unlink()
    assert run("--resume", "--save-dir", log, base=False)[0] == 0
    assert differences(Path("whole"), log) == []


@pytest.mark.parametrize(
    "name", ["checkpoint.pt", "metrics.csv", "args.json", "log_folder.txt", "features", "train"]
)
def test_a_file_that_cannot_be_written_is_named(name, run, monkeypatch):
    original = utils.replace_file

    def replace_file(path, write):
        if name in str(path):

            def write(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        original(path, write)

    monkeypatch.setattr(utils, "replace_file", replace_file)
    status, _, err = run("--save-features", "--plot", "--max-epoch", "1")
    assert status == 1 and err.count("\n") == 1
    assert re.match(rf"main.py: error: cannot write log/.*{name}.*: No space left on device; ", err)


def test_a_picture_that_cannot_be_drawn_is_told_and_drawn_when_there_is_room(run, monkeypatch):
    original = epoch.train_epoch

    def train(*arguments):
        Path("log/train/epoch_1.png/x").mkdir(parents=True)  # a directory in the picture's place
        return original(*arguments)

    monkeypatch.setattr(training, "train_epoch", train)
    status, out, err = run("--plot", "--max-epoch", "1")
    assert (
        status == 1
        and err.count("\n") == 1
        and "log/train/epoch_1.png" in err
        and "--resume draws" in err
    )
    assert "A picture could not be drawn" in out and "Finished." in out
    shutil.rmtree("log/train/epoch_1.png")
    assert run("--resume", base=False)[0] == 0
    assert Path("log/train/epoch_1.png").is_file()


@pytest.mark.parametrize("stopped", [False, True], ids=["at the epoch's end", "in its middle"])
@pytest.mark.parametrize("then", ["gone", "replaced", "moved"])
def test_a_directory_that_vanishes_ends_the_run_with_one_line(
    then, stopped, run, stop_at, monkeypatch
):
    original = epoch.train_epoch

    def train(*arguments):
        shutil.move("log", "elsewhere") if then == "moved" else shutil.rmtree("log")
        if then == "replaced":
            os.mkdir("log")
        return original(*arguments)

    monkeypatch.setattr(training, "train_epoch", train)
    stop_at(2 if stopped else 0, signal.SIGTERM)
    status, _, err = run("--max-epoch", "1", "--save-features")
    assert (
        status == 1
        and err
        == "main.py: error: --save-dir log has been removed while the run was writing to it\n"
    )
    assert sorted(os.listdir()) == dict(gone=[], replaced=["log"], moved=["elsewhere"])[then]
    assert not Path("log").exists() or os.listdir("log") == []


@pytest.mark.parametrize(
    "target, reason", [("/dev/full", "No space left on device"), ("pipe", "Broken pipe")]
)
def test_an_output_that_is_full_or_closed_is_one_line(target, reason, folder, tmp_path):
    if target == "/dev/full" and not os.path.exists(target):
        pytest.skip("there is no /dev/full")
    if target == "pipe":
        end, output = os.pipe()
        os.close(end)
    else:
        output = os.open(target, os.O_WRONLY)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [PYTHON, MAIN, "--dataset", "folder", "--data-root", folder, "--use-cpu"],
        cwd=tmp_path,
        env=buffered,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(output)
    assert done.returncode == 1
    assert done.stderr == f"main.py: error: cannot write to the standard output: {reason}\n"


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_lives(run, monkeypatch):
    original, seen = epoch.train_epoch, []

    def train(*arguments):
        monkeypatch.setattr(training, "train_epoch", original)
        before = {path: path.read_bytes() for path in Path("log").iterdir()}
        for flags in ([], ["--resume"]):
            seen.append(program(flags or ["--dataset", "digits", "--use-cpu", "--max-iter", "1"]))
        assert {path: path.read_bytes() for path in Path("log").iterdir()} == before
        return original(*arguments)

    monkeypatch.setattr(training, "train_epoch", train)
    status, _, err = run("--max-epoch", "1")
    assert status == 0 and seen == [2, 2]
    assert (
        err
        == "main.py: error: --save-dir log is in use by another run; give this one its own\n" * 2
    )


# ------------------------------------------------------------------------------------------------------- other records


def read_scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(directory)
    events.Reload()
    return {
        tag: [(each.step, each.value) for each in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_records_and_each_epoch_once(run, monkeypatch):
    pytest.importorskip("tensorboard")
    original = utils.save_checkpoint

    def killed(path, checkpoint):
        if checkpoint["epoch"] == 2:  # epoch 2 is in the events, but not in the checkpoint
            raise Killed
        original(path, checkpoint)

    monkeypatch.setattr(utils, "save_checkpoint", killed)
    with pytest.raises(Killed):
        run("--tensorboard", "--max-epoch", "3", "--eval-freq", "2")
    monkeypatch.setattr(utils, "save_checkpoint", original)
    assert run("--resume", base=False)[0] == 0
    history = torch.load("log/checkpoint.pt", weights_only=True)["history"]
    scalars = read_scalars("log/tensorboard")
    assert scalars.keys() == history[0].keys() - {"epoch"}
    for name, shown in scalars.items():
        expected = [
            (row["epoch"], pytest.approx(row[name], rel=1e-6))
            for row in history
            if row[name] is not None
        ]
        assert shown == expected
    assert [step for step, _ in scalars["test_accuracy"]] == [2, 3]
    assert run("--max-epoch", "1")[0] == 0 and not os.listdir("log/tensorboard")


def test_tensorboard_has_the_settings_and_the_pictures_of_each_epoch_once(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run("--tensorboard", "--plot", "--max-epoch", "1", "--eval-freq", "2", "--lr-model", "0.125")
    assert run("--resume", "--max-epoch", "2", base=False)[0] == 0
    events = EventAccumulator("log/tensorboard", size_guidance=dict(images=0))
    events.Reload()
    for tag, epochs in (("train features", [1, 2]), ("test features", [1, 2])):
        assert [event.step for event in events.Images(tag)] == epochs
        assert [event.encoded_image_string for event in events.Images(tag)] == [
            Path("log", tag.split()[0], f"epoch_{epoch}.png").read_bytes() for epoch in epochs
        ]
    started = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(started).session_start_info.hparams
    assert (
        settings["lr_model"].number_value == 0.125 and settings["dataset"].string_value == "folder"
    )


def test_tensorboard_has_the_earlier_epochs_of_a_run_that_goes_on_elsewhere_or_asks_for_it_late(
    run,
):
    pytest.importorskip("tensorboard")
    run("--tensorboard", "--max-epoch", "2", "--save-dir", "whole")
    run("--tensorboard", "--max-epoch", "1", "--save-dir", "one")
    shutil.copytree("one", "late")
    shutil.rmtree("late/tensorboard")
    for resumed, flags in (("one", ["--save-dir", "two"]), ("late", [])):
        assert (
            run("--resume", f"{resumed}/checkpoint.pt", "--max-epoch", "2", *flags, base=False)[0]
            == 0
        )
        assert read_scalars(f"{flags[-1] if flags else resumed}/tensorboard") == read_scalars(
            "whole/tensorboard"
        )


def test_tensorboard_without_its_package_is_refused_before_any_work(run, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    status, out, err = run("--tensorboard")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "pip install tensorboard" in err
    assert os.listdir() == []


@pytest.mark.parametrize("flags", [[], ["--deterministic"]])
def test_two_runs_with_one_seed_are_the_same_to_the_bit(flags, run):
    try:
        for name in ("one", "two"):
            assert run("--save-dir", name, "--amp", *flags)[0] == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(Path("one"), Path("two")) == []
    assert run("--save-dir", "three", "--amp", "--seed", "2")[0] == 0
    assert differences(Path("one"), Path("three")) != []


@pytest.mark.parametrize("model", sorted(main.models.MODELS))
def test_deterministic_algorithms_are_there_for_every_network(model, run, tmp_path):
    make_folder(tmp_path / "data", train=3, test=1, size=(28, 28))
    try:
        status, _, err = run(
            "--data-root",
            tmp_path / "data",
            "--image-size",
            "28",
            "--model",
            model,
            "--max-iter",
            "1",
            "--deterministic",
            "--weight-cent",
            "0" if model == "cnn" else "1",
        )
        assert (status, err) == (0, "") and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_args_and_checkpoint_say_the_same(run):
    run("--max-epoch", "1", "--recipe", "wen2016", "--model", "cnn", "--max-iter", "2")
    args = torch.load("log/checkpoint.pt", weights_only=True)["args"]
    assert json.loads(Path("log/args.json").read_text()) == args
    assert set(vars(cli.parse_args([]))) == set(args)
