"""`python -m bench` runs and prints what its help promises; how fast anything is, no test says."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import center_loss
from tools.bench import __main__ as bench
from tools.bench import common, train

ROOT = Path(center_loss.__file__).parent
NUMBER = re.compile(r"< 1|[\d,]+(\.\d+)?")


def output_of(*arguments):
    command = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(NUMBER.fullmatch(cell) for row in rows[2:] for cell in row), rows
    return rows[0], rows[2:]


def test_loss_prints_hardware_times_memory_and_ratios():
    text = output_of("loss", "--quick", "--classes", "10", "20000")
    assert re.match(r"torch \d+\.\d+.*, .+, \d+ cores, \d+ threads, .+\n", text)
    header, rows = table(text)
    assert header[1:4] == ["matrix, ms", "dense, ms", "sparse, ms"]
    assert [row[0] for row in rows] == ["10", "20,000"]
    matrix, dense, sparse = (
        0.0 if cell == "< 1" else float(cell.replace(",", "")) for cell in rows[1][-3:]
    )
    assert (
        matrix > 3 * 128 * 20_000 * 4 / 2**20
    )  # the forward pass alone keeps several B x C matrices
    assert 0.8 < dense / (20_000 * 128 * 4 / 2**20) < 2  # one gradient of the size of the centers
    assert sparse < dense / 2


def rows_of(text, name):
    """The table whose first column is `name`: {first cell: {column: cell}}."""
    lines = text[text.index(f"| {name}") :].splitlines()
    rows = [
        line.strip("| ").split(" | ")
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines)
    ]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


@pytest.mark.slow  # it compiles
def test_train_compares_a_plain_script_with_mains_settings():
    text = output_of("train", "--quick", "--device", "cpu")
    forms = rows_of(text, "form")
    assert list(forms) == ["plain", "default", "--amp", "--amp --compile", "--amp, torch's PReLU"]
    assert all(NUMBER.fullmatch(cell) for row in forms.values() for cell in row.values())
    assert forms["plain"]["plain / form"] == "1.00"
    for row in forms.values():
        names = ("step, ms", "steps/s", "test, ms/image", "epoch with test, s")
        step, per_second, test, epoch = (float(row[name].replace(",", "")) for name in names)
        assert per_second == pytest.approx(1000 / step, rel=0.02, abs=0.01)
        assert epoch == pytest.approx(0.469 * step + 10 * test, rel=0.01)
    assert re.search(r"peak, torch.bfloat16: [\d,]+ GFLOP/s", text) and re.search(
        r"compilation: -?\d+ s", text
    )
    start = re.search(
        r"fast, s: imports alone (.+), first step (.+), last step (.+), prompt (.+)", text
    )
    imports, first, last, prompt = map(float, start.groups())
    assert imports > 0 and 0 < first <= last <= prompt


def test_train_counts_the_operations_of_a_step():
    inside, outside, pixels = (
        (1, 32, 32, 64, 64, 128),
        (32, 32, 64, 64, 128, 128),
        (784, 784, 196, 196, 49, 49),
    )
    passes = (2, 3, 3, 3, 3, 3)  # the images have no gradient
    sums = [
        n * 25 * i * o * size for n, i, o, size in zip(passes, inside, outside, pixels, strict=True)
    ]
    assert train.step_flops(4) == 4 * 2 * (sum(sums) + 3 * (1152 * 2 + 2 * 10))


def test_the_plain_loss_is_the_center_loss():
    features, labels = torch.randn(7, 2, dtype=torch.float64), torch.arange(7) % 3
    loss = center_loss.CenterLoss(3, 2, use_gpu=False).double()
    assert common.matrix_loss(features, labels, loss.centers).item() == pytest.approx(
        loss(features, labels).item()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["loss", "--classes", "0"],
        ["loss", "--feat-dim", "two"],
        ["train", "--steps", "0"],
        ["train", "--device", "cuda"],
    ],
)
def test_wrong_command_lines_end_with_status_2(arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
