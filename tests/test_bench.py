"""bench.py runs and prints what its header promises; how fast anything is, no test says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench

ROOT = Path(bench.__file__).parent
NUMBER = re.compile(r"< 1|[\d,]+(\.\d+)?")


def output_of(*arguments):
    command = [sys.executable, "bench.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(NUMBER.fullmatch(cell) for row in rows[2:] for cell in row), rows
    return rows[0], rows[2:]


def test_loss_prints_hardware_times_memory_and_ratios():
    text = output_of("loss", "--quick", "--threads", "1", "--classes", "10", "20000")
    assert re.match(r"torch \d+\.\d+.*, .+, \d+ cores, 1 threads, .+\n", text)
    header, rows = table(text)
    assert header[1:4] == ["matrix, ms", "dense, ms", "sparse, ms"]
    assert [row[0] for row in rows] == ["10", "20,000"]
    matrix, dense, sparse = (0.0 if cell == "< 1" else float(cell.replace(",", "")) for cell in rows[1][-3:])
    assert matrix > 3 * 128 * 20_000 * 4 / 2**20  # the forward pass alone keeps several B x C matrices
    assert 0.8 < dense / (20_000 * 128 * 4 / 2**20) < 2  # one gradient of the size of the centers
    assert sparse < dense / 2
    assert re.search(r"sparse, 20,000 against 10 classes: \d+\.\d\d times the time", text)


def test_loss_runs_on_two_ranks():
    text = output_of("loss", "--quick", "--ranks", "2", "--threads", "2")
    assert "on 2 gloo processes, B = 128 over all" in text
    assert [row[0] for row in table(text)[1]] == ["10", "1,000"]
    assert re.search(r"sparse, 1,000 against 10 classes: \d+\.\d\d times the time", text)


@pytest.mark.parametrize("arguments", [[], ["loss", "--classes", "0"], ["loss", "--ranks", "two"]])
def test_wrong_command_lines_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
