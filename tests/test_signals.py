"""SIGTERM and Ctrl-C end a run soon, wherever it is, and what they leave goes on to the bit."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch.nn.functional as F
from kill_runs import differences

import datasets
import plots
from tests import drawers


@pytest.mark.parametrize("ends", [0, 1], ids=["first batch", "last batch"])
def test_a_signal_within_a_test_ends_it_and_its_epoch_is_done_again(ends, run, log, monkeypatch):
    """12 test images in batches of 10."""
    flags = ["--resume", "log/checkpoint.pt", "--max-epoch", "3"]
    assert run(*flags, "--save-dir", "whole", base=False)[0] == 0
    original = datasets.Batches.__iter__
    seen = []

    def send(batches):
        for batch in original(batches):
            if not batches.rows.shuffle:
                seen.append(batch)
                if len(seen) == ends + 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(datasets.Batches, "__iter__", send)
    status, _, err = run("--resume", "--max-epoch", "3", base=False)
    assert status == 143 and "stopped by SIGTERM after epoch 2" in err
    monkeypatch.setattr(datasets.Batches, "__iter__", original)
    assert run("--resume", "--max-epoch", "3", base=False)[0] == 0
    assert differences(Path("whole"), log) == []


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
        patched.setattr(plots.run, "draw_curves", drawers.hang)
        patched.setattr(plots.Plotter, "finish", finish)
        began = time.monotonic()
        ended, _, err = run("--plot", "--max-epoch", "1")
    assert ended == status and time.monotonic() - began < 60 and err.count("\n") == 1
    assert not list(Path("log").rglob("*.part")) and not Path("log/curves.png").exists()
    assert run("--resume", base=False)[0] == 0  # draws what is missing
    assert {"curves.png", "train.gif", "test.gif"} <= set(os.listdir("log"))


def test_a_signal_to_all_processes_of_a_run_ends_it_within_the_batch(run, monkeypatch):
    """As a cluster's; workers go on until the run ends. What -j 1 has begun, -j 0 ends."""
    import multiprocessing

    assert run("--save-dir", "whole")[0] == 0
    original = F.cross_entropy
    others = set(multiprocessing.active_children())
    calls = []

    def cross_entropy(*arguments, **options):
        calls.append(1)
        if len(calls) == 6:
            for process in set(multiprocessing.active_children()) - others:
                os.kill(process.pid, signal.SIGTERM)
                os.kill(process.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # a long step
        return original(*arguments, **options)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    status, _, err = run("-j", "1", "--save-dir", "stopped")
    assert status == 143 and err.startswith("main.py: stopped by SIGTERM after epoch 1; ")
    assert set(multiprocessing.active_children()) <= others
    assert run("--resume", "--save-dir", "stopped", "-j", "0", base=False)[0] == 0
    assert differences(Path("whole"), Path("stopped")) == []
