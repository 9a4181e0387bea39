"""Two ranks under torchrun take the steps of one process: losses, weights, metrics, files.

Run by torchrun, this file is the ranks' own program: it runs main.py once for each list of flags in
a JSON file.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PYTHON, checkpoint, make_folder, program

import cli
import engine.batches
import main
from engine import ranks as of_ranks
from engine.ranks import BatchNormOverRanks, Ranks

TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
COMMON = "--dataset folder --image-size 16 --max-epoch 2 --eval-freq 1 --use-cpu".split()
# 25 training images: the last of 9, 9 and 7 is odd; with 8 it is a batch of one, and one rank has
# no sample in it.
VARIANTS = {
    "zhou2018, last batch of one": "--lr-model 0.01 --batch-size 8",
    "softmax only": "--lr-model 0.01 --batch-size 9 --weight-cent 0 --save-features",
    "augmented, validation": "--lr-model 0.05 --batch-size 9 --augment --val-share 0.2 --erase 0.3 "
    "--label-smoothing 0.1",
    "one optimizer, workers": "--lr-model 0.01 --batch-size 9 --one-optimizer --unseen bee "
    "--verify -j 1",
    "zahn2024-v1.2": "--recipe zahn2024-v1.2 --model bn-fast --image-size 28 --batch-size 8 "
    "--max-epoch 1",
    "paper, adamw, onecycle": "--center-update paper --optimizer adamw --schedule onecycle "
    "--batch-size 9 --weight-cent 0.1",
}


@contextlib.contextmanager
def float64():
    """In float64, where the rounding that BatchNorm amplifies stays far below any difference."""
    original = engine.batches.Normalise.__call__
    threads = torch.get_num_threads()
    engine.batches.Normalise.__call__ = lambda self, images: original(self, images).double()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # as torchrun does: the order of a sum may depend on it
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        engine.batches.Normalise.__call__ = original


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = make_folder(tmp_path_factory.mktemp("ranks") / "images", train=8, test=3, size=(16, 16))
    (root / "train" / "ant" / "9.png").write_bytes((root / "train" / "ant" / "1.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def both(images, tmp_path_factory):
    """All variants, by one process and, in one launch, by two ranks: ({name: directories}, out)."""
    base = tmp_path_factory.mktemp("runs")
    jobs = []
    pairs = {}
    for index, (name, flags) in enumerate(VARIANTS.items()):
        pairs[name] = (base / f"{index}-one", base / f"{index}-two")
        flags = [*COMMON, "--data-root", str(images), *flags.split(), "--save-dir"]
        with float64():
            assert program([*flags, pairs[name][0]]) == 0
        jobs.append([*flags, str(pairs[name][1])])
    (base / "jobs.json").write_text(json.dumps(jobs))
    result = subprocess.run(
        [*TORCHRUN, __file__, base / "jobs.json"],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": str(Path(main.__file__).parent)},
    )
    assert result.returncode == 0, result.stderr
    return pairs, result.stdout


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_end_where_one_process_does(name, both):
    one, two = map(checkpoint, both[0][name])
    assert one["model"].keys() == two["model"].keys()
    for key, value in one["model"].items():
        assert torch.allclose(value, two["model"][key], atol=1e-8, rtol=0), key
    centers = [each["center_loss"]["centers"] for each in (one, two)]
    assert torch.allclose(*centers, atol=1e-8, rtol=0)
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert [value is None for value in ours.values()] == [
            value is None for value in theirs.values()
        ]
        measured = [name for name, value in ours.items() if value is not None]
        figures = [[row[name] for name in measured] for row in (ours, theirs)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-8, rel=1e-8)


def test_rank_0_alone_prints_and_writes(both):
    pairs, out = both
    assert out.count("Creating model") == len(pairs)
    for one, two in pairs.values():
        assert sorted(os.listdir(one)) == sorted(os.listdir(two))
        figures = []
        texts = []
        for directory in (one, two):
            text = (directory / "log_folder.txt").read_text()
            text = re.sub(r"took [\d.]+ s|Finished.*", "", text)
            figures.append([float(figure) for figure in re.findall(r"\d+\.\d+", text)])
            texts.append(re.sub(r"[\d.]+", "#", text))
        assert figures[0] == pytest.approx(figures[1], abs=1e-6)
        assert texts[0] == texts[1]


def test_features_of_all_ranks_are_gathered(both):
    directories = both[0]["softmax only"]
    one, two = (np.load(directory / "features" / "epoch_2.npz") for directory in directories)
    for split, count in (("train", 25), ("test", 9)):
        ours, theirs = (each[f"{split}_features"] for each in (one, two))
        assert len(ours) == len(theirs) == count
        assert ours[np.lexsort(ours.T)] == pytest.approx(theirs[np.lexsort(theirs.T)], abs=1e-8)
    # In the data set's order.
    assert one["test_features"] == pytest.approx(two["test_features"], abs=1e-8)


def test_one_process_goes_on_from_two_ranks_checkpoint(both, tmp_path):
    ends = []
    for directory in both[0]["paper, adamw, onecycle"]:
        args = ["--resume", directory / "checkpoint.pt", "--save-dir", tmp_path / directory.name]
        assert program(args) == 0  # a finished run, elsewhere
        ends.append(checkpoint(tmp_path / directory.name))
    for key, value in ends[0]["model"].items():
        assert torch.allclose(value, ends[1]["model"][key], atol=1e-8)


def test_a_rank_that_dies_ends_the_others_and_resume_goes_on(images, tmp_path):
    flags = [*COMMON, "--data-root", images, "--batch-size", "9", "--save-dir", tmp_path]
    process = subprocess.Popen(
        [*TORCHRUN, main.__file__, *map(str, flags), "--max-epoch", "100000"],
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in process.stdout:
        if line.startswith("==> Epoch 3/"):
            break
    ranks = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                ranks[int(entry[5:])] = int(child)
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "main.py: error: rank 0 has failed or lost the others" in err
    epochs = checkpoint(tmp_path)["epoch"]
    assert epochs >= 2
    assert program(["--resume", "--save-dir", tmp_path, "--max-epoch", epochs + 1]) == 0


def test_a_gpu_index_under_torchrun_is_refused(monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as exit:
        cli.parse_args(["--gpu", "1"])
    assert exit.value.code == 2
    assert "--gpu must be left out under torchrun" in capsys.readouterr().err
    assert cli.parse_args([]).gpu == "1"


# ------------------------------------------------------------------------------- one process


def test_each_row_goes_to_one_rank():
    rows = torch.arange(7)
    shares = [Ranks(rank, 3).share(rows).tolist() for rank in range(3)]
    assert sorted(itertools.chain(*shares)) == rows.tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_stop_request_notes_the_first_signal_and_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with of_ranks.StopRequest(Ranks()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() == signal.SIGTERM and stop.urgent()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_ends_a_pass_after_its_batch_and_at_once_where_none_comes():
    def hang():
        yield 1
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()  # a worker that gives no batch

    for batches in ([1, 2, 3], hang()):
        seen = []
        with of_ranks.StopRequest(Ranks()) as stop, pytest.raises(of_ranks.Interrupted):
            for batch in stop.watch(batches):
                seen.append(batch)
                if isinstance(batches, list):
                    os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [1]


# --------------------------------------------------------------------------- the ranks' program


def check_batch_norm(ranks):
    """Statistics and gradients of shares of a batch, which may be empty, are torch's of all."""
    kinds = (torch.float64, torch.bfloat16)
    for shares, dtype in itertools.product(((5, 3), (4, 0), (0, 2)), kinds):
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
        tolerance = 1e-12 if dtype == torch.float64 else 0.02
        for mine, whole in pairs:
            assert torch.allclose(mine.double(), whole, atol=tolerance), (shares, dtype)


if __name__ == "__main__":
    this = Ranks.of_environment()
    with this.joined():
        check_batch_norm(this)
        for flags in json.loads(Path(sys.argv[1]).read_text()):
            with float64():
                main.main(cli.parse_args(flags))
