"""Files are whole or absent, a run's directory has one owner, wrong values get one line."""

import argparse
import os
import signal

import pytest
import torch

import utils


def test_log_writes_earlier_lines_and_goes_on_where_a_checkpoint_says(tmp_path, capsys):
    path = tmp_path / "log.txt"
    log = utils.Log()
    log("before")
    log.open(path)
    log("kept")
    assert (
        path.read_text() == "before\nkept\n"
    )  # at once, and nothing is left to write when the run ends
    position = log.position()
    log("after the checkpoint")
    again = utils.Log()
    again("resumed")
    again.open(path, utils.read_start(path, position))
    log.close()
    again.close()
    assert path.read_text() == "before\nkept\nresumed\n"
    assert capsys.readouterr().out == "before\nkept\nafter the checkpoint\nresumed\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    utils.replace_file(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(
        utils.WriteError, match="cannot write .*file: disk full; the earlier files are whole"
    ):
        utils.replace_file(path, fail)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_save_dir_must_be_or_become_a_writable_directory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    utils.check_save_dir(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    for path in ("file", "file/below"):
        with pytest.raises(utils.RunError, match="is a file"):
            utils.check_save_dir(tmp_path / path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(utils.RunError, match="must be writable"):
        utils.check_save_dir(tmp_path)


def test_a_directory_has_one_run_at_a_time(tmp_path):
    with (
        utils.claim(tmp_path / "run"),
        pytest.raises(utils.RunError, match="in use by another run"),
    ):
        with utils.claim(tmp_path / "run"):
            pass
    with utils.claim(tmp_path / "run"):
        pass


def test_clear_takes_a_runs_files_and_no_others(tmp_path):
    mine = [
        "log_digits.txt",
        "log_mnist.txt",
        "metrics.csv",
        "args.json",
        "checkpoint.pt",
        "train/epoch_12.png",
        "train/epoch_12.npz",
        "features/epoch_3.npz",
        "test.gif",
        "tensorboard/events.out.tfevents.17.host.3.0",
        "report.html",
        "compare.html",
        "run.json",
        "test/images.npz",
        "val/features.npz",
        "figures/curves.pdf",
        "figures/train_epoch_1_20.svg",
        "figures/test_tsne_epoch_3.png",
        "figures/compare.png",
        "figures/.val_epoch_7.pdf.8.part",
        ".checkpoint.pt.17.part",
        "train/.epoch_3.png.4.part",
        ".log_mnist.txt.5.part",
    ]
    others = [
        "notes.txt",
        "reference/mnist/metrics.csv",
        "train/notes.png",
        "my.gif",
        "log_notes.txt",
        "my.part",
        "train/epoch_notes.txt",
        "train/epoch_12.txt",
        "train/epoch_012.png",
        "features/epoch_best.npz",
        ".my.part",
        ".my.12.part",
        "train/.mine.3.part",
        "tensorboard/events.txt",
        "log_cifar10.txt",
        "figures/notes.txt",
        "figures/train_epoch_best.png",
        "figures/train_epoch_1_.png",
        "figures/curves.jpg",
        "figures/.mine.pdf.3.part",
        "train/images.npz",
    ]
    for name in mine + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "args.json").write_text('{"dataset": "digits"}')

    def there() -> list[str]:
        return sorted(
            str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
        )

    assert utils.clear(tmp_path, "mnist", after=11) is True
    assert set(mine + others) - set(there()) == {
        "train/epoch_12.png",
        "train/epoch_12.npz",
        *mine[-3:],
    }
    assert utils.clear(tmp_path, "mnist") is True
    assert there() == sorted(others)
    assert utils.clear(tmp_path, "mnist") is False
    (tmp_path / "args.json").write_text("[3")
    assert utils.clear(tmp_path, "mnist") is True and there() == sorted(others)


def test_metrics_leave_unmeasured_cells_empty(tmp_path):
    utils.write_metrics(
        tmp_path / "m.csv", [dict(epoch=1, a=0.1 + 0.2, b=None), dict(epoch=2, a=1.0, b=2.5)]
    )
    assert (tmp_path / "m.csv").read_text() == "epoch,a,b\n1,0.30000000000000004,\n2,1.0,2.5\n"


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "foreign", "code"])
def test_checkpoints_that_cannot_be_used_are_one_line(damage, tmp_path):
    path = tmp_path / "c.pt"
    if damage == "foreign":
        torch.save({"state_dict": {}}, path)
    elif damage == "code":
        torch.save({"epoch": utils.Log()}, path)  # weights_only refuses to run foreign code
    elif damage != "missing":
        torch.save({"epoch": torch.zeros(5000)}, path)
        path.write_bytes(
            {"empty": b"", "text": b"hello", "truncated": path.read_bytes()[:900]}[damage]
        )
    with pytest.raises(utils.RunError) as error:
        utils.load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_lock_ends_with_its_run_though_forked_workers_live_on(tmp_path):
    read, write = os.pipe()
    with utils.claim(tmp_path):
        if (worker := os.fork()) == 0:
            os.write(write, b"up")
            signal.pause()
        os.read(read, 2)
    try:
        with utils.claim(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_tensorboard_has_the_pictures_of_all_splits_once_and_those_of_earlier_epochs_where_it_had_none(
    tmp_path,
):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def add(path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"picture")

    args = argparse.Namespace(lr_model=0.1, milestones=[3])
    add(tmp_path / "val" / "epoch_1.png")
    with utils.Board(tmp_path, args, dict(epoch=1, history=[dict(epoch=1, loss=3.0)])):
        add(tmp_path / "train" / "epoch_1.png")  # drawn late
    with utils.Board(tmp_path, args, dict(epoch=1, history=[dict(epoch=1, loss=3.0)])) as board:
        add(tmp_path / "val" / "epoch_2.png")
        board.add_epoch(dict(epoch=2, loss=1.0))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 1.0)]
    assert [event.step for event in events.Images("val features")] == [1, 2]
    assert [event.step for event in events.Images("train features")] == [1]
