"""What a run has written is read again, and what is no run is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import utils
from plots.saved import check_comparable, names_of, read_run
from tests.epochs import make_run


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
    assert "has no labels" in refusal(directory)
    shutil.rmtree(directory / "test")
    assert "has no points of a tested epoch: train with --plot" in refusal(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null", "\udcff"])
def test_settings_that_no_run_has_written_are_one_line(text, directory):
    (directory / "args.json").write_bytes(text.encode(errors="surrogateescape"))
    assert f"{directory} is no run: args.json" in refusal(directory)


@pytest.mark.parametrize(
    "text", ["epoch\nx\n", "loss\n1\n", "epoch\n1,2,3\n", "epoch,a\n1,b\n", ""]
)
def test_metrics_that_no_run_has_written_are_one_line(text, directory):
    (directory / "metrics.csv").write_text(text)
    assert f"{directory} is no run: args.json, metrics.csv: " in refusal(directory)


@pytest.mark.parametrize("dataset", ["x/../../secret", "../secret", "/etc/hosts", "*", "x"])
def test_no_name_in_the_settings_leads_to_another_file(dataset, directory, tmp_path):
    (tmp_path / "secret.txt").write_text("SECRET")
    (directory / "log_x").mkdir()
    (directory / "args.json").write_text(json.dumps({"dataset": dataset}))
    assert read_run(directory).log == ""
    (directory / "args.json").write_text(json.dumps({"dataset": "folder"}))
    assert read_run(directory).log == "Currently using CPU\n"


def test_runs_of_other_data_are_not_compared(directory, tmp_path):
    def compare(**other):
        runs = [read_run(directory), read_run(directory)]
        for name, value in other.items():
            setattr(runs[1], name, value)
        check_comparable(runs)

    compare()
    with pytest.raises(utils.RunError, match="differ in their dataset"):
        compare(args={"dataset": "digits"})
    source = directory / "test" / "epoch_2.npz"
    shown = dict(np.load(source))
    for name, value in (
        ("classes", list("xyz")),
        ("unseen", ["d"]),
        ("labels", shown["labels"][:9]),
    ):
        other = Path(shutil.copytree(directory, tmp_path / name))
        utils.save_arrays(other / "test" / "epoch_2.npz", shown | {name: value})
        with pytest.raises(utils.RunError, match=f"differ in their {name}"):
            check_comparable([read_run(directory), read_run(other)])


def test_names_of_runs_are_as_long_as_makes_them_different(directory, tmp_path):
    (tmp_path / "b").mkdir()
    other = Path(shutil.copytree(directory, tmp_path / "b" / "run"))
    runs = [read_run(directory), read_run(other)]
    assert names_of(runs) == [str(tmp_path / "run"), str(tmp_path / "b" / "run")]
    assert names_of(runs[:1]) == ["run"]
