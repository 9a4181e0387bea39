"""`python -m tools.bench` prints what its help promises; how fast anything is, no test says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import center_loss
from engine.device import multiplies_bfloat16
from tools.bench import __main__ as bench
from tools.bench import loss, matrix_loss, train

ROOT = Path(center_loss.__file__).parent


def columns(text):
    """The table in it: {first cell of a row: {column: number}}."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}
    found = {}
    for name, *cells in rows[2:]:
        numbers = [float(cell.replace(",", "")) for cell in cells]
        found[name] = dict(zip(rows[0][1:], numbers, strict=True))
    return found


def test_loss_shows_hardware_times_and_what_each_form_needs_of_memory():
    command = [sys.executable, "-m", "tools.bench", "loss", "--quick", "--classes", "10", "3000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.match(r"torch \d+\.\d+.*, .+, \d+ cores, \d+ threads, .+\n", done.stdout)
    rows = columns(done.stdout)
    assert list(rows) == ["10", "3,000"]
    row = rows["3,000"]
    assert all(row[f"{form}, ms"] > 0 for form in loss.FORMS)
    assert row["indexing/dense"] == pytest.approx(row["indexing, ms"] / row["dense, ms"], rel=0.02)
    # A dense gradient has the centers' size, a sparse one at most B rows; both keep the offsets.
    gradient = 3000 * 128 * 4 / 2**20
    rows_of_a_batch = 128 * 128 * 4 / 2**20
    for form in ("indexing", "dense"):
        assert gradient < row[f"{form}, MiB"] < gradient + 2 * rows_of_a_batch
    assert row["sparse, MiB"] < 3 * rows_of_a_batch
    assert row["matrix, MiB"] > gradient + 128 * 3000 * 4 / 2**20


@pytest.mark.parametrize("bfloat16", [True, False])
def test_train_times_each_form_that_the_hardware_can_do(bfloat16, monkeypatch, capsys):
    """On a whole test of one batch, as on a GPU."""
    if bfloat16 and not multiplies_bfloat16(None):
        pytest.skip("the hardware does not multiply bfloat16")
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda gpu: bfloat16)
    bench.main(["train", "--quick"])
    text = capsys.readouterr().out
    rows = columns(text)
    graph = ["--no-cuda-graph"] if torch.cuda.is_available() else []
    amp = ["--amp"] if bfloat16 else []
    assert list(rows) == ["plain", "--recipe zhou2018", "--recipe fast", *graph, *amp]
    assert ("--amp is left out: the hardware does not" in text) != bfloat16
    assert rows["plain"]["plain / form"] == 1
    for row in rows.values():
        epoch = 60 * row["training, ms/image"] + 10 * row["test, ms/image"]
        assert row["epoch with test, s"] == pytest.approx(epoch, rel=0.01, abs=0.01)


def test_the_plain_losses_are_the_center_loss():
    features = torch.randn(7, 2, dtype=torch.float64)
    labels = torch.arange(7) % 3
    criterion = center_loss.CenterLoss(3, 2, use_gpu=False).double()
    expected = criterion(features, labels).item()
    for function in (matrix_loss, loss.indexing_loss):
        assert function(features, labels, criterion.centers).item() == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [[], ["loss", "--classes", "0"], ["train", "--turns", "two"]])
def test_wrong_command_lines_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
