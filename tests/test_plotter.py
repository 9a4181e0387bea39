"""Drawing in background processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from plots import plotter as plotter_module
from plots.plotter import Plotter
from tests import drawers


def test_plotter_draws_in_the_background_and_reports_what_failed(tmp_path):
    plotter = Plotter()
    plotter(tmp_path / "good", drawers.write, "drawn")
    plotter(tmp_path / "bad", drawers.fail)
    assert plotter.finish() == [f"{tmp_path / 'bad'}: no ink"]
    assert (tmp_path / "good").read_text() == "drawn" and not (tmp_path / "bad").exists()
    assert plotter.finish() == []


def is_running(process: int) -> bool:
    """Asks the system: Python cannot tell where the thread of the pool has waited for it, too."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_part(directory):
    while not list(directory.glob(".*.part")):
        time.sleep(0.01)


def test_a_plotter_that_is_asked_to_stop_leaves_no_process_and_no_half_picture(tmp_path):
    lines = []
    plotter = Plotter(lines.append)
    plotter(tmp_path / "slow", drawers.hang)
    plotter(tmp_path / "next", drawers.write, "drawn")
    wait_for_part(tmp_path)
    began = time.monotonic()
    errors = plotter.finish(lambda: True)
    assert errors == [f"{tmp_path / name}: stopped" for name in ("slow", "next")]
    assert lines == [f"Pictures that could not be drawn: 2, the first {errors[0]}"]
    assert time.monotonic() - began < 5 and os.listdir(tmp_path) == []
    assert not any(is_running(drawer.pid) for drawer in plotter.drawers)


def test_an_interrupt_ends_what_is_being_drawn(tmp_path):
    with pytest.raises(KeyboardInterrupt), Plotter() as plotter:
        plotter(tmp_path / "slow", drawers.hang)
        wait_for_part(tmp_path)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == [] and not any(
        is_running(drawer.pid) for drawer in plotter.drawers
    )


def test_a_drawing_process_loads_neither_the_script_that_runs_nor_torch(tmp_path, monkeypatch):
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("import torch")
    monkeypatch.setitem(sys.modules, "__main__", script)
    plotter = Plotter()
    plotter(tmp_path / "modules", drawers.name_modules)
    assert plotter.finish() == [] and sys.modules["__main__"] is script
    modules = (tmp_path / "modules").read_text().split()
    assert "plots" in modules and "torch" not in modules


def test_a_drawer_that_dies_costs_pictures_but_not_the_run_and_is_said_in_one_line(tmp_path):
    lines = []
    plotter = Plotter(lines.append)
    plotter(tmp_path / "first", drawers.die)
    plotter.futures[tmp_path / "first"].exception()
    plotter(tmp_path / "second", drawers.write, "drawn")
    errors = plotter.finish()
    assert [Path(error.partition(": ")[0]).name for error in errors] == ["first", "second"]
    assert all("process" in error and "\n" not in error for error in errors)
    assert lines == [f"Pictures that could not be drawn: 2, the first {errors[0]}"]


@pytest.mark.parametrize("others", [0, 1])
def test_a_process_that_cannot_start_neither_ends_nor_delays_the_run(others, tmp_path, monkeypatch):
    def start(process):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    began = time.monotonic()
    with Plotter(lambda line: None) as plotter:
        monkeypatch.setattr(plotter_module.os, "cpu_count", lambda: 8)
        for number in range(others):
            plotter(tmp_path / str(number), drawers.write, "drawn")
        with monkeypatch.context() as patched:
            patched.setattr(multiprocessing.get_context("spawn").Process, "start", start)
            plotter(tmp_path / "first", drawers.write, "drawn")
            plotter(tmp_path / "second", drawers.write, "drawn")
        errors = plotter.finish()
    assert [error.partition(": ")[2] for error in errors] == [
        "[Errno 11] Resource temporarily unavailable"
    ] * 2
    assert time.monotonic() - began < 20


def test_what_cannot_be_written_is_said_once_and_tried_again(tmp_path):
    lines = []
    plotter = Plotter(lines.append)
    blocked = tmp_path / "train"
    blocked.write_text("a file where the directory of the pictures would be")
    for epoch in (1, 2, 3):
        plotter.retry()
        assert not plotter.save(blocked / f"epoch_{epoch}.npz", {"points": np.zeros((2, 2))})
        plotter(blocked / f"epoch_{epoch}.png", drawers.write, "drawn")
        plotter.futures[blocked / f"epoch_{epoch}.png"].exception()
    assert len(lines) == 1 and "is tried again later" in lines[0]
    blocked.unlink()
    plotter.retry()
    assert plotter.finish() == [] and len(lines) == 1
    names = [f"epoch_{epoch}.{ending}" for epoch in (1, 2, 3) for ending in ("npz", "png")]
    assert sorted(os.listdir(blocked)) == names


def test_what_can_never_be_written_is_one_line_more(tmp_path):
    lines = []
    plotter = Plotter(lines.append)
    plotter(tmp_path / "bad", drawers.fail)
    for _ in range(2):
        plotter.futures[tmp_path / "bad"].exception()
        plotter.retry()
    assert plotter.finish() == [f"{tmp_path / 'bad'}: no ink"] and len(lines) == 2


def test_the_backend_of_a_notebook_stops_no_picture(tmp_path):
    command = [sys.executable, "-c", DRAW, str(tmp_path / "c.png")]
    done = subprocess.run(
        command, env=os.environ | {"MPLBACKEND": "no_such"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "c.png").stat().st_size > 1000


DRAW = """
import sys, pathlib, numpy, plots
plots.draw_to(pathlib.Path(sys.argv[1]), plots.draw_confusion, numpy.eye(2, dtype=int), "ab")
"""


def test_drawers_outlive_the_signals_that_a_whole_run_gets(tmp_path):
    plotter = Plotter()
    for number in (signal.SIGINT, signal.SIGTERM):
        plotter(tmp_path / str(number), drawers.signal_oneself, number)
    assert plotter.finish() == [] and len(os.listdir(tmp_path)) == 2
