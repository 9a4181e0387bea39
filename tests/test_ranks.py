"""Two ranks under torchrun take the steps of one process: losses, weights, centers, metrics, files.

Run by torchrun, this file is the ranks' own program: it runs main.py once for each list of flags in a JSON file.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_folder, program

import cli
import datasets
import main
from center_loss import CenterLoss
from engine import epoch, step
from engine.ranks import BatchNormOverRanks, Ranks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
COMMON = [
    "--dataset",
    "folder",
    "--image-size",
    "16",
    "--max-epoch",
    "2",
    "--eval-freq",
    "1",
    "--use-cpu",
]
# 25 training images: the last of 9, 9 and 7 is odd; with 8 it is a batch of one, and one rank has no sample in it.
VARIANTS = {
    "zhou2018": ["--lr-model", "0.01", "--batch-size", "9"],
    "zhou2018, last batch of one": ["--lr-model", "0.01", "--batch-size", "8"],
    "zhou2018, workers": ["--lr-model", "0.01", "--batch-size", "8", "-j", "1"],
    "softmax only": [
        "--lr-model",
        "0.01",
        "--batch-size",
        "9",
        "--weight-cent",
        "0",
        "--save-features",
    ],
    "augmented, validation": [
        "--lr-model",
        "0.05",
        "--batch-size",
        "9",
        "--augment",
        "--val-share",
        "0.2",
        "--erase",
        "0.3",
        "--label-smoothing",
        "0.1",
    ],
    "one optimizer": [
        "--lr-model",
        "0.01",
        "--batch-size",
        "9",
        "--one-optimizer",
        "--unseen",
        "bee",
        "--verify",
    ],
    "wen2016": ["--recipe", "wen2016", "--batch-size", "9", "--max-iter", "5"],
    "zahn2024-v1.0": ["--recipe", "zahn2024-v1.0", "--batch-size", "8", "--max-epoch", "1"],
    "zahn2024-v1.2": ["--recipe", "zahn2024-v1.2", "--batch-size", "8", "--max-epoch", "1"],
    "paper, adamw, onecycle": [
        "--center-update",
        "paper",
        "--optimizer",
        "adamw",
        "--schedule",
        "onecycle",
        "--batch-size",
        "9",
        "--weight-cent",
        "0.1",
    ],
}
BFLOAT16 = {
    "batch norm": ["--model", "bn-fast", "--image-size", "28", "--amp", "--batch-size", "9"]
}
DROPOUT = {
    "dropout": [
        "--model",
        "squeezenet1_1",
        "--image-size",
        "32",
        "--batch-size",
        "9",
        "--save-features",
    ]
}


@contextlib.contextmanager
def float64():
    """Runs main.py in float64, where the rounding that BatchNorm layers amplify stays far below any real difference."""
    normalise, threads = datasets.Normalise.__call__, torch.get_num_threads()
    datasets.Normalise.__call__ = lambda self, images: normalise(self, images).double()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # as torchrun does: on many cores the order of a sum depends on it
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        datasets.Normalise.__call__ = normalise


def run_as(name):
    return contextlib.nullcontext() if name in BFLOAT16 else float64()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = make_folder(tmp_path_factory.mktemp("ranks") / "images", train=8, test=3, size=(16, 16))
    (root / "train" / "ant" / "9.png").write_bytes((root / "train" / "ant" / "1.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def both(images, tmp_path_factory):
    """All variants, run by one process and, in one launch, by two ranks: {name: (directory, directory)}."""
    base, jobs, pairs = tmp_path_factory.mktemp("runs"), [], {}
    for index, (name, flags) in enumerate((VARIANTS | BFLOAT16 | DROPOUT).items()):
        pairs[name] = base / f"{index}-one", base / f"{index}-two"
        flags = [*COMMON, "--data-root", str(images), *flags, "--save-dir"]
        with run_as(name):
            assert program([*flags, pairs[name][0]]) == 0
        jobs.append([name, [*flags, str(pairs[name][1])]])
    (base / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(Path(main.__file__).parent)}
    result = subprocess.run(
        [*TORCHRUN, __file__, base / "jobs.json"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return pairs, result.stdout


def checkpoint(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_end_where_one_process_does(name, both):
    tolerance = 1e-6 if name == "zahn2024-v1.0" else 1e-8  # nine BatchNorm layers amplify rounding
    one, two = (checkpoint(directory) for directory in both[0][name])
    assert one["model"].keys() == two["model"].keys()
    for key, value in one["model"].items():
        assert torch.allclose(value, two["model"][key], atol=tolerance, rtol=0), key
    assert torch.allclose(
        one["center_loss"]["centers"], two["center_loss"]["centers"], atol=tolerance, rtol=0
    )
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        measured = {name: value for name, value in theirs.items() if value is not None}
        assert {name: value for name, value in ours.items() if value is not None} == pytest.approx(
            measured, abs=tolerance, rel=tolerance
        )


def test_two_ranks_in_bfloat16_are_one_process_but_for_its_rounding(both):
    one, two = (checkpoint(directory) for directory in both[0]["batch norm"])
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        for name in ("train_loss", "train_xent", "test_xent"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.1)


def test_ranks_that_drop_out_by_themselves_still_share_every_epoch(both):
    for directory in both[0]["dropout"]:
        assert np.bincount(
            np.load(directory / "features" / "epoch_2.npz")["train_labels"]
        ).tolist() == [9, 8, 8]


def test_rank_0_alone_prints_and_writes(both):
    pairs, out = both
    assert out.count("Creating model") == len(pairs)
    for one, two in (pairs[name] for name in VARIANTS):
        assert sorted(path.name for path in one.iterdir()) == sorted(
            path.name for path in two.iterdir()
        )
        lines = [
            (directory / "log_folder.txt").read_text().splitlines()[:-1] for directory in (one, two)
        ]
        figures = [
            [float(figure) for line in each for figure in re.findall(r"\d+\.\d+", line)]
            for each in lines
        ]
        assert figures[0] == pytest.approx(figures[1], abs=1e-6)
        texts = [[re.sub(r"[\d.]+", "#", line) for line in each] for each in lines]
        assert texts[0] == texts[1]


def test_features_of_all_ranks_are_gathered(both):
    one, two = (
        np.load(directory / "features" / "epoch_2.npz") for directory in both[0]["softmax only"]
    )
    for split, count in (("train", 25), ("test", 9)):
        ours, theirs = (each[f"{split}_features"] for each in (one, two))
        assert len(ours) == len(theirs) == count
        assert ours[np.lexsort(ours.T)] == pytest.approx(theirs[np.lexsort(theirs.T)], abs=1e-8)
    assert one["test_features"] == pytest.approx(
        two["test_features"], abs=1e-8
    )  # in the data set's order


def test_one_process_goes_on_from_two_ranks_checkpoint(both, images, tmp_path):
    one, two = both[0]["zhou2018"]
    for directory in (one, two):
        flags = [
            "--resume",
            directory / "checkpoint.pt",
            "--save-dir",
            tmp_path / directory.name,
            "--max-epoch",
            "3",
        ]
        assert program(flags) == 0
    ends = [checkpoint(tmp_path / directory.name) for directory in (one, two)]
    assert all(
        torch.allclose(value, ends[1]["model"][key], atol=1e-4)
        for key, value in ends[0]["model"].items()
    )


def launch(*flags):
    return subprocess.Popen(
        [*TORCHRUN, main.__file__, *map(str, flags)],
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_rank_that_dies_ends_the_others_and_resume_goes_on(images, tmp_path):
    flags = [
        *COMMON,
        "--data-root",
        images,
        "--batch-size",
        "9",
        "--save-dir",
        tmp_path,
        "--max-epoch",
        "100000",
    ]
    process = launch(*flags)
    for line in process.stdout:
        if line.startswith("==> Epoch 3/"):
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    os.kill(ranks[1], signal.SIGKILL)
    started = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - started < 100
    assert (
        "main.py: error: rank 0 has failed or lost the others" in err
        and "to go on: --resume" in err
    )
    epochs = checkpoint(tmp_path)["epoch"]
    assert epochs >= 2
    assert program(["--resume", "--save-dir", tmp_path, "--max-epoch", epochs + 1]) == 0
    assert checkpoint(tmp_path)["epoch"] == epochs + 1


def test_a_gpu_index_under_torchrun_is_refused(monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as exit:
        cli.parse_args(["--gpu", "1"])
    assert (
        exit.value.code == 2 and "--gpu must be left out under torchrun" in capsys.readouterr().err
    )
    assert cli.parse_args([]).gpu == "1"


def check_batch_norm(ranks):
    """Statistics and gradients of shares of a batch, which may be empty, are torch's of the whole."""
    for shares, dtype in itertools.product(
        ((5, 3), (4, 0), (0, 2)), (torch.float64, torch.bfloat16)
    ):
        torch.manual_seed(0)
        joined = torch.randn(sum(shares), 4, 3, 3).to(dtype).double().requires_grad_()
        weights = torch.randn_like(joined)
        oracle = torch.nn.BatchNorm2d(4).double()
        ours = BatchNormOverRanks(4).to(torch.promote_types(dtype, torch.float32))
        (oracle(joined) * weights).sum().backward()
        rows = slice(0, shares[0]) if ranks.rank == 0 else slice(shares[0], None)
        share = joined.detach()[rows].to(dtype).requires_grad_()
        outputs = ours(share)
        assert outputs.dtype == dtype
        (outputs * weights[rows]).sum().backward()
        pairs = [
            (share.grad, joined.grad[rows]),
            (ours.running_mean, oracle.running_mean),
            (ours.running_var, oracle.running_var),
            (ranks.total(ours.weight.grad), oracle.weight.grad),
            (ranks.total(ours.bias.grad), oracle.bias.grad),
        ]
        for index, (mine, whole) in enumerate(pairs):
            assert torch.allclose(
                mine.double(), whole, atol=1e-12 if dtype == torch.float64 else 0.02
            ), (shares, index)


def check_epoch_without_batches_left(ranks):
    """As one that was stopped in its test: what all ranks have of it is what it was stopped with."""
    step = step.Step(
        torch.nn.Linear(2, 2), CenterLoss(2, 2, use_gpu=False), {}, weight=1.0, ranks=ranks
    )
    kept = [
        torch.rand(12, 2),
        torch.zeros(12, dtype=torch.int64),
        torch.ones(12, dtype=torch.int64),
    ]
    begun = epoch.Epoch(3, 12, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), kept)
    epoch = epoch.train_epoch(step, [], None, begun, keep=True)
    assert epoch.samples == 12 and torch.equal(epoch.sums, begun.sums)
    if ranks.rank == 0:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(epoch.kept, kept, strict=True))


if __name__ == "__main__":
    ranks = Ranks.of_environment()
    with ranks.joined():
        check_batch_norm(ranks)
        check_epoch_without_batches_left(ranks)
        for name, flags in json.loads(Path(sys.argv[1]).read_text()):
            with run_as(name):
                main.main(cli.parse_args(flags))
