"""Nothing is lost: a run that was stopped or killed goes on to the bit, and says what happened.

Here the process itself stands in for a killed one: an exception from a hook leaves the files as a
kill does. tests/kill_runs.py kills real processes.
"""

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import stand_in
import torch
import torch.nn.functional as F
from conftest import PYTHON, checkpoint, files, make_folder
from kill_runs import differences
from torch import nn

import cli
import models
import recipes
import utils


class Killed(BaseException):
    """Goes through every handler, as SIGKILL does."""


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step, what): at the step of that number from now, raises Killed or sends a signal."""
    original = F.cross_entropy
    count = {}

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
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    return stop


class Dropout(nn.Module):
    def __init__(self, num_classes, in_channels, image_size, feat_dim):
        super().__init__()
        height, width = image_size
        self.embedding = nn.Linear(in_channels * height * width, feat_dim)
        self.classifier = nn.Linear(feat_dim, num_classes)

    def forward(self, images):
        features = self.embedding(F.dropout(images.flatten(1), 0.5, self.training))
        return features, self.classifier(features)


# Three steps an epoch.
SETTINGS = {
    "zhou2018": "",
    "one optimizer, milestones, max-iter": "--recipe wen2016 --model cnn --max-iter 8 "
    "--milestones 2 5",
    "BatchNorm, class average": "--recipe zahn2024-v1.0 --model bn-fast --image-size 28 "
    "--stepsize 1",
    "euclidean": "--distance euclidean --momentum-cent 0.5",
    "bfloat16, adamw, onecycle": "--amp --optimizer adamw --schedule onecycle",
    "softmax only, features": "--weight-cent 0 --save-features",
    "augmented": "--augment --erase 0.3 --label-smoothing 0.1",
    "validation": "--val-share 0.1 --lr-model 0.05 --verify",
    "dropout": "--model dropout",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_stopped_and_resumed_runs_are_the_same_to_the_bit(setting, run, stop_at, monkeypatch):
    """A kill in the second epoch, a stop in it, a stop in the third; then to the end."""
    monkeypatch.setitem(models.MODELS, "dropout", Dropout)
    flags = ["--max-epoch", "3", *SETTINGS[setting].split()]
    assert run(*flags, "--save-dir", "whole")[0] == 0
    stop_at(5)
    with pytest.raises(Killed):
        run(*flags, "--save-dir", "stopped")
    for step, number, done in ((2, signal.SIGTERM, 1), (4, signal.SIGINT, 2)):
        stop_at(step, number)
        status, _, err = run("--resume", "--save-dir", "stopped", base=False)
        name = signal.Signals(number).name
        assert status == 128 + number
        assert err == (
            f"main.py: stopped by {name} after epoch {done}; to go on: "
            "python main.py --resume --save-dir stopped\n"
        )
    stop_at(0)
    status, out, err = run("--resume", "--save-dir", "stopped", base=False)
    assert (status, err) == (0, "") and "Resuming after epoch 2" in out
    assert differences(Path("whole"), Path("stopped")) == []


@pytest.mark.parametrize(
    "setting", ["zhou2018", "one optimizer, milestones, max-iter", "bfloat16, adamw, onecycle"]
)
def test_captured_runs_go_on_to_the_bit_and_without_graphs_too(setting, run, stop_at, monkeypatch):
    flags = ["--max-epoch", "3", "--batch-size", "5", *SETTINGS[setting].split()]
    flags = [flag for flag in flags if flag != "--amp"]
    eager = recipes.captured
    monkeypatch.setattr(recipes, "captured", stand_in.captured)
    assert run(*flags, "--save-dir", "whole")[0] == 0
    stop_at(8, signal.SIGTERM)
    assert run(*flags, "--save-dir", "stopped")[0] == 143
    stop_at(0)
    shutil.copytree("stopped", "elsewhere")
    assert run("--resume", "--save-dir", "stopped", base=False)[0] == 0
    # The steps before a capture are computed as those of the graph are.
    assert differences(Path("whole"), Path("stopped")) == []
    monkeypatch.setattr(recipes, "captured", eager)  # a CPU, whose optimizers are not fused
    assert run("--resume", "--save-dir", "elsewhere", base=False)[0] == 0
    ours = checkpoint("elsewhere")
    assert not any(group["fused"] for group in ours["optimizer_model"]["param_groups"])
    for row, other in zip(ours["history"], checkpoint("whole")["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-3)


FILES = ["checkpoint.pt", "metrics.csv", "log_folder.txt", "args.json", "epoch_2.npz", "best.pt"]


@pytest.mark.parametrize("name", FILES)
def test_a_kill_around_any_replaced_file_loses_nothing(name, run, monkeypatch):
    """Before it is replaced, and after, for the second time where there is one."""
    flags = ["--max-epoch", "3", "--save-features", "--val-share", "0.2"]
    assert run(*flags, "--save-dir", "whole")[0] == 0
    original = os.replace
    for after in (False, True):
        times = []

        def replace(source, target, after=after, times=times):
            if Path(target).name == name:
                times.append(target)
                if len(times) == (2 if name in ("checkpoint.pt", "metrics.csv") else 1):
                    if after:
                        original(source, target)
                    raise Killed
            original(source, target)

        directory = f"killed{after}"
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            run(*flags, "--save-dir", directory)
        monkeypatch.setattr(os, "replace", original)
        there = Path(directory, "checkpoint.pt").exists()
        assert there == (name not in ("log_folder.txt", "args.json"))
        again = ["--resume"] if there else flags
        assert run(*again, "--save-dir", directory, base=not there)[0] == 0
        assert differences(Path("whole"), Path(directory)) == []


@pytest.mark.slow
def test_real_processes_killed_at_random_moments():
    script = Path(__file__).with_name("kill_runs.py")
    command = [PYTHON, script, "--kills", "4", "--only", "zhou2018", "--seed", str(os.getpid())]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 runs differ" in done.stdout and "\n4 kills " in done.stdout


def test_the_comparison_sees_a_single_bit(log):
    shutil.copytree(log, "two")
    assert differences(log, Path("two")) == []
    changed = checkpoint("two")
    for name in ("model", "center_loss"):
        value = next(iter(changed[name].values()))
        value.view(torch.int32).view(-1)[0] ^= 1
    changed["optimizer_model"]["state"][0]["momentum_buffer"].view(-1)[0] += 1
    torch.save(changed, "two/checkpoint.pt")
    Path("two/metrics.csv").write_text(Path("two/metrics.csv").read_text().replace("\n2,", "\n3,"))
    Path("two/log_folder.txt").write_text("Accuracy (%): 1\n")
    for name in ("log", "two"):
        Path(name, "train.gif").write_text(name)
    assert differences(Path("two"), log) == [
        "model.body.0.weight",
        "center_loss.centers",
        "optimizer_model.state.0.momentum_buffer",
        "metrics.csv",
        "log_folder.txt",
        "train.gif",
        "epochs in metrics.csv: [1, 3]",
    ]


# ------------------------------------------------------------------------- where and how far


def test_resuming_elsewhere_takes_the_whole_run_along_and_leaves_the_old_one(run):
    written = ["--plot", "--save-features", "--verify"]
    run("--max-epoch", "1", "--save-dir", "old", *written)
    before = files("old")
    flags = ["--resume", "old/checkpoint.pt", "--save-dir", "new"]
    status, out, _ = run(*flags, "--max-epoch", "2", base=False)
    assert status == 0 and "Resuming after epoch 1" in out
    assert files("old") == before
    assert run("--resume", "old/checkpoint.pt", "--max-epoch", "2", base=False)[0] == 0
    assert differences(Path("old"), Path("new")) == []
    old = {path.relative_to("old"): contents for path, contents in files("old").items()}
    new = {path.relative_to("new"): contents for path, contents in files("new").items()}
    assert old.keys() == new.keys()
    pictures = [path for path in old if path.suffix in (".png", ".gif")]
    assert len(pictures) == 8 and all(old[path] == new[path] for path in pictures)
    first = before[Path("old/log_folder.txt")]
    assert new[Path("log_folder.txt")].startswith(first[:500])


def test_an_earlier_checkpoint_takes_later_files_away(run):
    run("--max-epoch", "1", "--save-features", "--save-dir", "deep/log")
    shutil.copy("deep/log/checkpoint.pt", "deep/log/early.pt")
    resume = ["--resume", "deep/log/checkpoint.pt"]
    assert run(*resume, "--max-epoch", "3", base=False)[0] == 0
    Path("deep/log/features/epoch_best.npz").touch()  # not ours
    assert run("--resume", "deep/log/early.pt", "--max-epoch", "2", base=False)[0] == 0
    names = ["epoch_1.npz", "epoch_2.npz", "epoch_best.npz"]
    assert sorted(os.listdir("deep/log/features")) == names
    assert not Path("log").exists()


def test_a_link_to_a_checkpoint_is_the_run_that_it_points_to(log, run):
    Path("links").mkdir()
    Path("links/latest.pt").symlink_to("../log/checkpoint.pt")
    assert run("--resume", "links/latest.pt", "--max-epoch", "3", base=False)[0] == 0
    flags = ["--resume", "links/latest.pt", "--save-dir", "log", "--max-epoch", "4"]
    assert run(*flags, base=False)[0] == 0
    assert run("--evaluate", "links/latest.pt", base=False)[0] == 0
    assert os.listdir("links") == ["latest.pt"] and checkpoint()["epoch"] == 4
    epochs = [
        line for line in Path("log/log_folder.txt").read_text().splitlines() if "==> E" in line
    ]
    assert [line.split()[2].split("/")[0] for line in epochs] == ["1", "2", "3", "4"]


def test_what_may_differ_from_the_checkpoint_can_be_switched_off_too(run):
    run("--max-epoch", "1", "--save-features")
    assert not cli.parse_args(["--resume", "--no-use-cpu", "--no-save-features"]).use_cpu
    kept = cli.parse_args(["--resume"])
    assert kept.use_cpu and kept.save_features
    assert run("--resume", "--no-save-features", "--max-epoch", "2", base=False)[0] == 0
    assert os.listdir("log/features") == ["epoch_1.npz"]


def test_a_finished_run_says_so_and_changes_nothing(log, run):
    before = files()
    status, out, _ = run("--resume", base=False)
    assert status == 0
    assert out.endswith("The run of log/checkpoint.pt is finished after 2 epochs\n")
    assert files() == before
    status, out, _ = run("--resume", "log/checkpoint.pt", "--save-dir", "new", base=False)
    assert status == 0 and "Finished." in out
    assert differences(log, Path("new")) == []


def test_a_finished_run_with_validation_is_made_longer_with_a_new_best_epoch(run):
    assert run("--val-share", "0.2", "--max-epoch", "1", "--lr-model", "0.05")[0] == 0
    assert run("--resume", "--max-epoch", "2", base=False)[1].count("Best epoch by validation") == 1
    rows = checkpoint()["history"]
    assert rows[-1]["test_accuracy"] is not None and checkpoint()["best_tested"]


CONTRADICTIONS = {
    "--seed 2": "--seed must be 1, as in log/checkpoint.pt, got 2",
    "--model bn-deep": "--model must be cnn, as in log/checkpoint.pt, got bn-deep",
    "--recipe wen2016": "--recipe must be zhou2018, as in log/checkpoint.pt, got wen2016",
    "--batch-size 128": "--batch-size must be 10, as in log/checkpoint.pt, got 128",  # the default
    "--weight-cent 0.5": "--weight-cent must be 1.0, as in log/checkpoint.pt, got 0.5",
    "--amp": "--amp must be False, as in log/checkpoint.pt, got True",
    "--mirror": "--mirror must be False, as in log/checkpoint.pt, got mean",
    "--max-iter 9": "--max-iter must be 0, as in log/checkpoint.pt, got 9",
    "--evaluate log/checkpoint.pt": "--evaluate tests and --resume trains on: give one of them",
}


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_flags_that_contradict_the_checkpoint_are_refused(flags, log, run):
    before = files()
    message = f"main.py: error: {CONTRADICTIONS[flags]}\n"
    assert run("--resume", *flags.split(), base=False) == (2, "", message)
    assert files() == before


@pytest.mark.parametrize("flags", ["--max-iter 2", "--schedule onecycle"])
def test_a_run_whose_rates_depend_on_its_length_keeps_it(flags, run):
    assert run("--max-epoch", "1", *flags.split())[0] == 0
    status, _, err = run("--resume", "--max-epoch", "9", base=False)
    assert status == 2 and "--max-epoch must be 1, as in log/checkpoint.pt, got 9" in err


def test_other_data_than_the_checkpoints_are_refused(log, run, tmp_path):
    before = files()
    make_folder(tmp_path / "names", classes=("ant", "bee", "cow"))
    make_folder(tmp_path / "more", train=9)
    for root, what in (
        ("names", "training classes must be ['ant', 'bee', 'cat'], as in log/checkpoint.pt"),
        ("more", "number of training images must be 24, as in log/checkpoint.pt, got 27"),
    ):
        status, _, err = run("--resume", "--max-epoch", "3", "--data-root", root, base=False)
        assert status == 2 and err.startswith(f"main.py: error: the {what}")
        assert err.count("\n") == 1
    assert files() == before


EDITED = {
    "truncated": None,
    "other network": dict(model={"weight": torch.zeros(3)}),
    "other optimizer": dict(optimizer_model={}),
    "random state": dict(rng=torch.zeros(3)),
    "no args": dict(args={}),
    "later epoch": dict(epoch=7),
    "within an epoch": dict(partial=dict(batches=1)),
}
EDITED_ARGS = dict(dataset="x/../../evil", lr_model=-1.0, model=3)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("how", [*EDITED, *EDITED_ARGS])
def test_a_damaged_or_foreign_checkpoint_is_one_line(how, flag, log, run):
    path = log / "checkpoint.pt"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how in EDITED:
        torch.save(checkpoint() | EDITED[how], path)
    else:
        args = checkpoint()["args"] | {how: EDITED_ARGS[how], 5: 1}
        torch.save(checkpoint() | dict(args=args), path)
    before = files()
    status, _, err = run(flag, "log/checkpoint.pt", base=False)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("main.py: error: ") and "log/checkpoint.pt" in err
    assert files() == before


def test_two_runs_with_one_seed_are_the_same_to_the_bit(run):
    for name, flags in (("one", []), ("two", ["--deterministic"]), ("three", ["--seed", "2"])):
        try:
            assert run("--save-dir", name, "--amp", *flags)[0] == 0
        finally:
            torch.use_deterministic_algorithms(False)
    found = differences(Path("one"), Path("two"))
    assert found == ["args.deterministic: False and True"]
    assert "model.body.0.weight" in differences(Path("one"), Path("three"))


# --------------------------------------------------------------------------------- TensorBoard


def read_scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(directory)
    events.Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        scalars[tag] = [(each.step, each.value) for each in events.Scalars(tag)]
    return scalars


def test_tensorboard_has_each_epoch_once_also_elsewhere_and_asked_for_late(run, monkeypatch):
    pytest.importorskip("tensorboard")
    run("--tensorboard", "--max-epoch", "3", "--save-dir", "whole")
    original = utils.save_checkpoint

    def killed(path, saved):
        if saved["epoch"] == 2:  # epoch 2 is in the events, but not in the checkpoint
            raise Killed
        original(path, saved)

    monkeypatch.setattr(utils, "save_checkpoint", killed)
    with pytest.raises(Killed):
        run("--tensorboard", "--max-epoch", "3", "--save-dir", "one")
    monkeypatch.setattr(utils, "save_checkpoint", original)
    shutil.copytree("one", "late")
    shutil.rmtree("late/tensorboard")
    moved = ["--resume", "one/checkpoint.pt", "--save-dir", "two"]
    for flags in (["--resume", "--save-dir", "late"], moved, ["--resume", "--save-dir", "one"]):
        assert run(*flags, base=False)[0] == 0
    expected = read_scalars("whole/tensorboard")
    assert expected.keys() == checkpoint("whole")["history"][0].keys() - {"epoch"}
    for name in ("one", "two", "late"):
        assert read_scalars(f"{name}/tensorboard") == expected
    assert run("--max-epoch", "1", "--save-dir", "one")[0] == 0
    assert not os.listdir("one/tensorboard")


def test_a_disk_error_of_the_checkpoint_leaves_the_one_before(log, run, monkeypatch):
    before = checkpoint()["model"]
    original = os.replace

    def replace(source, target):
        if Path(target).name == "checkpoint.pt" and "epoch" in seen:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seen.append("epoch")
        original(source, target)

    seen = []
    monkeypatch.setattr(os, "replace", replace)
    status, _, err = run("--resume", "--max-epoch", "3", base=False)
    assert status == 1 and "cannot write log/checkpoint.pt: No space left on device" in err
    now = checkpoint()["model"]
    assert all(torch.equal(before[name], now[name]) for name in before)
