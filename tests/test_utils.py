"""The log, files that are whole or absent, checkpoints that cannot be used, the list of files."""

import errno
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint, files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils

on_one_path = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_log_writes_earlier_lines_and_goes_on_where_a_checkpoint_says(tmp_path, capsys):
    path = tmp_path / "log.txt"
    log = utils.Log()
    log("before λ")
    log.open(path)
    log("kept")
    assert path.read_bytes() == "before λ\nkept\n".encode()  # at once, on every system
    position = log.position()
    log("after the checkpoint")
    log.close()
    again = utils.Log()
    again("resumed")
    again.open(path, path.read_bytes()[:position])
    again.close()
    assert path.read_text(encoding="utf-8") == "before λ\nkept\nresumed\n"
    assert capsys.readouterr().out == "before λ\nkept\nafter the checkpoint\nresumed\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    utils.replace_file(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(utils.WriteError, match=r"^cannot write .*file: disk full$"):
        utils.replace_file(path, fail)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_files_are_synced_where_that_needs_a_writable_handle(tmp_path, monkeypatch):
    """As on Windows."""
    fcntl = pytest.importorskip("fcntl")
    original = os.fsync
    synced = []

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        synced.append(number)
        original(number)

    monkeypatch.setattr(os, "fsync", fsync)
    utils.write_json(tmp_path / "a.json", dict(a=1))
    utils.save_arrays(tmp_path / "a.npz", dict(a=np.ones(3)))
    utils.write_metrics(tmp_path / "a.csv", [dict(epoch=1)])
    assert len(synced) == 3


def test_a_file_that_another_program_has_open_is_tried_for_a_moment(tmp_path, monkeypatch):
    """As on Windows, where a spreadsheet keeps metrics.csv."""
    original = os.replace
    tries = []

    def replace(source, target):
        tries.append(target)
        if len(tries) < locked:
            raise PermissionError(errno.EACCES, "it is in use")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
    locked = 4
    utils.write_json(tmp_path / "a.json", {})
    assert len(tries) == 4
    locked = 1000
    with pytest.raises(utils.WriteError, match=r"^cannot write .*b\.json: it is in use$"):
        utils.write_json(tmp_path / "b.json", {})
    assert os.listdir(tmp_path) == ["a.json"]


def test_commands_are_quoted_for_the_shell_at_hand(monkeypatch):
    words = ["python", "main.py", "--save-dir", "My Drive/it's"]
    assert shlex.split(utils.shell(*words)) == words
    stopped = utils.Stopped(signal.SIGTERM, 3, "My Drive/log")
    assert stopped.status == 143
    assert str(stopped).endswith("python main.py --resume --save-dir 'My Drive/log'")
    monkeypatch.setattr(os, "name", "nt")
    assert utils.shell("python", "My Drive") == 'python "My Drive"'


def test_metrics_leave_unmeasured_cells_empty(tmp_path):
    rows = [dict(epoch=1, a=0.1 + 0.2, b=None), dict(epoch=2, a=1.0, b=2.5)]
    utils.write_metrics(tmp_path / "m.csv", rows)
    assert (tmp_path / "m.csv").read_bytes() == b"epoch,a,b\n1,0.30000000000000004,\n2,1.0,2.5\n"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\ta", "\ra"])
def test_a_spreadsheet_shows_a_cell_and_does_not_run_it(text):
    assert utils.spreadsheet_text(text) == "'" + text
    assert utils.spreadsheet_text("a" + text) == "a" + text


# ----------------------------------------------------------------------------- the list of files


def test_what_is_written_in_a_runs_directory_is_listed_once_by_known_names(tmp_path):
    utils.start_list(tmp_path)
    (tmp_path / "train").mkdir()
    for name in ("metrics.csv", "train/epoch_1.png", "metrics.csv", "notes.csv"):
        utils.replace_file(tmp_path / name, lambda part: part.write_text("text"))
    utils.start_list(tmp_path)  # a second run
    assert (tmp_path / utils.FILES).read_text().splitlines()[1:] == [
        "metrics.csv",
        "train/epoch_1.png",
    ]


@pytest.mark.parametrize("name", ["../mine.png", "x/../../mine.png", "log_x/../../a.txt", "a.txt"])
def test_a_list_names_nothing_but_a_runs_files(name, tmp_path):
    (tmp_path / utils.FILES).write_text(f"{utils.LIST}\n{name}\nbest.pt\n")
    assert utils.recorded(tmp_path) == {"best.pt", utils.FILES}
    (tmp_path / utils.FILES).write_text(f"{name}\nbest.pt\n")  # another program's list
    assert utils.recorded(tmp_path) == set()


# ----------------------------------------------------------------------------------- checkpoints

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


def draw_tensor(shape, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(100).to(kind)


kinds = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]
shapes = st.lists(st.integers(0, 4), max_size=4)
tensors = st.builds(draw_tensor, shapes, st.sampled_from(kinds), st.integers(0, 99))


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


def small_checkpoint(**entries) -> dict:
    data = dict(classes=["a", "b"], in_channels=1, image_size=8, images=3)
    state = dict(model={}, center_loss={}, scheduler={}, optimizer_model={})
    run = dict(args={}, data=data, epoch=1, history=[], centers=torch.zeros(2, 2))
    return run | state | dict(rng=torch.get_rng_state()) | entries


@on_one_path
@given(
    args=st.dictionaries(st.text(max_size=8), values, max_size=4),
    state=st.dictionaries(st.text(max_size=8), tensors, max_size=4),
    centers=tensors,
)
def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path, args, state, centers):
    optimizer = dict(state={0: state}, param_groups=[args])
    saved = small_checkpoint(args=args, model=state, centers=centers, optimizer_model=optimizer)
    utils.save_checkpoint(tmp_path / "c.pt", saved)
    assert same(saved, utils.load_checkpoint(tmp_path / "c.pt"))
    assert os.listdir(tmp_path) == ["c.pt"]


@on_one_path
@given(data=st.data())
def test_no_damage_of_a_checkpoint_goes_unseen(tmp_path, data):
    path = tmp_path / "c.pt"
    weight = torch.arange(64.0)
    utils.save_checkpoint(path, small_checkpoint(model=dict(weight=weight)))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
    try:
        loaded = utils.load_checkpoint(path)
    except utils.RunError as error:
        assert "\n" not in str(error)
    else:  # in the archive's own padding or dates
        assert torch.equal(loaded["model"]["weight"], weight) and loaded["epoch"] == 1


WRONG = {
    "weights alone": None,
    "args": dict(args=3),
    "data": dict(data={}),
    "classes": dict(data=dict(classes=[1], in_channels=1, image_size=8)),
    "epoch": dict(epoch="x"),
    "centers": dict(centers=None),
    "within an epoch": dict(partial=dict(batches=3)),
    "code": dict(more=Path("x")),
}


@pytest.mark.parametrize("what", ["missing", "empty", "text", "truncated", "a directory", *WRONG])
def test_a_checkpoint_that_cannot_be_used_is_one_line(what, tmp_path):
    path = tmp_path / "c.pt"
    if what in WRONG:
        changed = WRONG[what]
        torch.save({"weight": 3} if changed is None else small_checkpoint(**changed), path)
    elif what == "a directory":
        path.mkdir()
    elif what != "missing":
        torch.save(small_checkpoint(), path)
        contents = dict(empty=b"", text=b"hello", truncated=path.read_bytes()[:900])
        path.write_bytes(contents[what])
    with pytest.raises(utils.RunError) as error:
        utils.load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_checkpoint_of_a_run_can_be_used(finished):
    assert same(utils.load_checkpoint(finished / "checkpoint.pt"), checkpoint(finished))
    assert finished / "checkpoint.pt" in files(finished)
