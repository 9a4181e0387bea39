"""Files are whole or absent, a run's directory has one owner, wrong values get one line."""

import argparse
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cli
import plots
import processes
import utils
from tests import drawers


@pytest.mark.parametrize(
    "converter, good, bad",
    [
        (cli.number(int, 1), ["1", "12"], ["0", "-3", "1.5", "x", "", "nan", "1e3"]),
        (cli.number(int, 0, 10), ["0", "10"], ["11", "-1"]),
        (cli.number(float, 0), ["0", "1e-3", "200"], ["-1e-9", "nan", "inf", "-inf", "x"]),
        (cli.number(float, 0, above=True), ["1e-9"], ["0", "-1", "0.0"]),
        (cli.number(float, 0, 1), ["0", "0.9", "1"], ["1.1", "-0.1"]),
    ],
)
def test_number_takes_what_is_in_its_range(converter, good, bad):
    assert [converter(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="^must be .*, got") as error:
            converter(text)
        assert str(error.value).endswith(f"got {text}")


def test_gpu_index_answers_a_list_with_the_torchrun_command():
    assert cli.gpu_index("3") == "3"
    with pytest.raises(argparse.ArgumentTypeError) as error:
        cli.gpu_index("0, 2")
    assert "CUDA_VISIBLE_DEVICES=0,2 torchrun --standalone --nproc_per_node=2 main.py" in str(error.value)
    for text in ("-1", "a", "0,", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="index"):
            cli.gpu_index(text)


def test_log_writes_earlier_lines_and_goes_on_where_a_checkpoint_says(tmp_path, capsys):
    path = tmp_path / "log.txt"
    log = utils.Log()
    log("before")
    log.open(path)
    log("kept")
    assert path.read_text() == "before\nkept\n"  # at once, and nothing is left to write when the run ends
    position = log.position()
    log("after the checkpoint")
    again = utils.Log()
    again("resumed")
    again.open(path, utils.read_start(path, position))
    assert path.read_text() == "before\nkept\nresumed\n"
    assert capsys.readouterr().out == "before\nkept\nafter the checkpoint\nresumed\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    utils.replace_file(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(utils.WriteError, match="cannot write .*file: disk full; the earlier files are whole"):
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
    with utils.claim(tmp_path / "run"), pytest.raises(utils.RunError, match="in use by another run"):
        with utils.claim(tmp_path / "run"):
            pass
    with utils.claim(tmp_path / "run"):
        pass


def test_clear_takes_a_runs_files_and_no_others(tmp_path):
    mine = ["log_mnist.txt", "metrics.csv", "checkpoint.pt", "train/epoch_12.png", "train/epoch_12.npz", "test.gif"]
    others = ["notes.txt", "reference/mnist/metrics.csv", "train/notes.png", "my.gif"]
    for name in mine + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert utils.clear(tmp_path) is True
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(others)
    assert utils.clear(tmp_path) is False


def test_metrics_leave_unmeasured_cells_empty(tmp_path):
    utils.write_metrics(tmp_path / "m.csv", [dict(epoch=1, a=0.1 + 0.2, b=None), dict(epoch=2, a=1.0, b=2.5)])
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
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": path.read_bytes()[:900]}[damage])
    with pytest.raises(utils.RunError) as error:
        utils.load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_stop_request_notes_the_first_signal_and_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with processes.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_plotter_draws_in_the_background_and_reports_what_failed(tmp_path):
    plotter = plots.Plotter()
    plotter(tmp_path / "good", drawers.write, "drawn")
    plotter(tmp_path / "bad", drawers.fail)
    assert plotter.finish() == [f"{tmp_path / 'bad'}: no ink"]
    assert (tmp_path / "good").read_text() == "drawn" and not (tmp_path / "bad").exists()
    assert plotter.finish() == []


def test_a_drawing_process_loads_neither_the_script_that_runs_nor_torch(tmp_path, monkeypatch):
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("import torch")
    monkeypatch.setitem(sys.modules, "__main__", script)
    plotter = plots.Plotter()
    plotter(tmp_path / "modules", drawers.name_modules)
    assert plotter.finish() == [] and sys.modules["__main__"] is script
    modules = (tmp_path / "modules").read_text().split()
    assert "plots" in modules and "torch" not in modules


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


def test_parts_that_a_killed_run_has_left_are_taken_away(tmp_path):
    (tmp_path / "train").mkdir()
    for name in (".checkpoint.pt.17.part", "train/.epoch_3.png.4.part", "my.part"):
        (tmp_path / name).touch()
    with utils.claim(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["my.part"]


def test_a_drawer_that_dies_costs_pictures_but_not_the_run(tmp_path):
    plotter = plots.Plotter()
    plotter(tmp_path / "first", drawers.die)
    plotter.tasks[0][1].exception()
    plotter(tmp_path / "second", drawers.write, "drawn")
    errors = plotter.finish()
    assert [error.partition(":")[0] for error in errors] == [str(tmp_path / "first"), str(tmp_path / "second")]


def test_drawers_outlive_the_signals_that_a_whole_run_gets(tmp_path):
    plotter = plots.Plotter()
    for number in (signal.SIGINT, signal.SIGTERM):
        plotter(tmp_path / str(number), drawers.signal_oneself, number)
    assert plotter.finish() == [] and len(os.listdir(tmp_path)) == 2
