"""What a run has written is read again, and what is no run is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import utils
from plots.saved import check_comparable, read_run
from tests.epochs import SETTINGS, make_run


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("saved") / "run", epochs=2)


@pytest.fixture
def directory(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def refusal(path) -> str:
    with pytest.raises(utils.RunError) as caught:
        read_run(path).last()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_run_is_refused(directory, tmp_path):
    assert "is no run" in refusal(tmp_path) and "is no run" in refusal(tmp_path / "missing")
    (directory / "test" / "epoch_2.npz").write_bytes(b"PK damaged")
    assert f"cannot read {directory / 'test' / 'epoch_2.npz'}" in refusal(directory)
    utils.save_arrays(directory / "test" / "epoch_2.npz", {"points": np.zeros((2, 2))})
    assert "labels" in refusal(directory)
    shutil.rmtree(directory / "test")
    assert "has no points of a tested epoch: train with --plot" in refusal(directory)


def test_nothing_measured_is_none(directory):
    (directory / "metrics.csv").write_text("epoch,train_loss,test_accuracy\n1,0.5,\n2,0.25,99\n")
    assert read_run(directory).history == [
        {"epoch": 1, "train_loss": 0.5, "test_accuracy": None},
        {"epoch": 2, "train_loss": 0.25, "test_accuracy": 99.0},
    ]


def test_runs_of_other_data_are_not_compared(directory, tmp_path):
    run = read_run(directory)
    check_comparable([run, read_run(directory)])
    source = directory / "test" / "epoch_2.npz"
    shown = dict(np.load(source))
    changes = {"classes": list("xyz"), "unseen": ["d"], "labels": shown["labels"][:9]}
    for name, value in changes.items():
        other = Path(shutil.copytree(directory, tmp_path / name))
        utils.save_arrays(other / "test" / "epoch_2.npz", shown | {name: value})
        with pytest.raises(utils.RunError, match="needs runs of the same data set"):
            check_comparable([run, read_run(other)])
    (directory / "args.json").write_text(json.dumps(SETTINGS | {"dataset": "digits"}))
    with pytest.raises(utils.RunError, match="needs runs of the same data set"):
        check_comparable([run, read_run(directory)])
