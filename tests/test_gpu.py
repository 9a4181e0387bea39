"""What only a GPU shows: graphs against eager steps, resumed runs, half precision, label errors, memory."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, make_folder

import center_loss
import main
from center_loss import CenterLoss
from engine import cuda_graph, step

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# On 40 images of 28x28 pixels in batches of 8.
SETTINGS = {
    "zhou2018": ["--stepsize", "1"],
    "amp": ["--amp", "--stepsize", "1"],
    "softmax only": ["--weight-cent", "0"],
    "wen2016": ["--recipe", "wen2016", "--max-iter", "15", "--milestones", "6", "12"],
    "zahn2024-v1.0": ["--recipe", "zahn2024-v1.0"],
    "zahn2024-v1.2": ["--recipe", "zahn2024-v1.2"],
    "fast": ["--recipe", "fast"],
    "-j 2": ["-j", "2"],
}


@pytest.fixture(autouse=True)
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def images(tmp_path):
    return make_folder(tmp_path / "images", classes=("ant", "bee"), train=20, test=4, size=(28, 28))


@pytest.fixture
def train(run, images):
    """train(*flags): three epochs on the GPU."""
    return lambda *flags: run(
        "--dataset",
        "folder",
        "--data-root",
        images,
        "--image-size",
        "28",
        "--eval-freq",
        "1",
        "--batch-size",
        "8",
        "--deterministic",
        *flags,
        *["--max-epoch", "3"] * ("--max-iter" not in flags),
        base=False,
    )


def history(directory):
    return torch.load(Path(directory, "checkpoint.pt"), weights_only=True)["history"]


def assert_close(ours, theirs, rel):
    for row, other in zip(history(ours), history(theirs), strict=True):
        assert row == pytest.approx(other, rel=rel, abs=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_graph_trains_as_eager_steps_do(setting, train, monkeypatch):
    replays, replay = [], cuda_graph.CudaGraph.replay
    monkeypatch.setattr(
        cuda_graph.CudaGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1]
    )
    status, out, _ = train(*SETTINGS[setting], "--save-dir", "graph")
    assert status == 0 and "without a CUDA graph" not in out and len(replays) == 12
    assert (
        train(*SETTINGS[setting], "--save-dir", "eager", "--no-cuda-graph")[0] == 0
        and len(replays) == 12
    )
    assert_close("graph", "eager", rel=1e-2)


@pytest.mark.slow
def test_a_compiled_network_goes_into_the_graph(train):
    status, out, _ = train("--compile", "--save-dir", "compiled")
    assert status == 0 and "without a CUDA graph" not in out
    assert train("--save-dir", "plain")[0] == 0
    assert_close("compiled", "plain", rel=1e-2)


class Killed(BaseException):
    """Goes through every handler, as SIGKILL does."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_stopped_and_resumed_runs_end_with_the_same_metrics_to_the_byte(
    setting, train, run, monkeypatch
):
    assert train(*SETTINGS[setting], "--save-dir", "whole")[0] == 0
    report, steps = main.Experiment.report_step, []

    def report_step(*arguments, **options):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(steps) == 9:
            raise Killed
        return report(*arguments, **options)

    monkeypatch.setattr(main.Experiment, "report_step", report_step)
    assert train(*SETTINGS[setting], "--save-dir", "stopped")[0] == 143
    with pytest.raises(Killed):
        run("--resume", "--save-dir", "stopped", base=False)
    assert run("--resume", "--save-dir", "stopped", base=False)[0] == 0
    assert Path("whole/metrics.csv").read_bytes() == Path("stopped/metrics.csv").read_bytes()


@pytest.mark.parametrize("first, then", [([], ["--use-cpu"]), (["--use-cpu"], ["--no-use-cpu"])])
@pytest.mark.parametrize("setting", ["zhou2018", "wen2016", "fast"])
def test_a_checkpoint_goes_on_on_the_other_device(setting, first, then, train, run, monkeypatch):
    flags = [*SETTINGS[setting], "--no-amp"]
    assert train(*flags, "--save-dir", "whole", *first)[0] == 0
    report, steps = main.Experiment.report_step, []

    def report_step(*arguments, **options):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return report(*arguments, **options)

    monkeypatch.setattr(main.Experiment, "report_step", report_step)
    assert train(*flags, "--save-dir", "moved", *first)[0] == 143
    assert run("--resume", "--save-dir", "moved", *then, base=False)[0] == 0
    for row, other in zip(history("moved"), history("whole"), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=0.05)


def test_a_checkpoint_is_evaluated_on_either_device(train, run):
    train("--save-dir", "log")
    out = [
        run("--evaluate", "log/checkpoint.pt", *flags, base=False)[1]
        for flags in ([], ["--use-cpu"])
    ]
    gpu, cpu = ([float(number) for number in re.findall(r"\d+\.\d+", text)] for text in out)
    assert gpu == pytest.approx(cpu, rel=1e-2)


def test_two_runs_are_the_same(train):
    for name in ("one", "two"):
        assert train("--amp", "--save-dir", name)[0] == 0
    assert Path("one/metrics.csv").read_bytes() == Path("two/metrics.csv").read_bytes()


@pytest.mark.parametrize("center_update", ["gradient", "paper"])
def test_half_precision_with_a_grad_scaler_takes_the_step_of_float32(center_update):
    centers = []
    for half in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Linear(6, 2, device=DEVICE)
        loss = CenterLoss(3, 2, use_gpu=False, center_update=center_update).to(DEVICE)
        optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (network, loss)]
        scaler, inputs = (
            torch.amp.GradScaler(DEVICE, enabled=half),
            torch.randn(8, 6, device=DEVICE),
        )
        labels = torch.arange(8, device=DEVICE) % 3
        with torch.autocast(DEVICE, torch.float16, enabled=half):
            features = network(inputs)
        scaler.scale(0.5 * loss(features, labels)).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        loss.rescale_center_grad(0.5)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert features.dtype == (torch.float16 if half else torch.float32)
        centers.append(loss.centers.detach())
    assert torch.allclose(*centers, atol=1e-2)


def test_a_label_out_of_range_ends_with_an_error_at_the_next_wait():
    code = """
import torch
from center_loss import CenterLoss
loss = CenterLoss(3, 2).cuda()
print(loss(torch.randn(2, 2, device="cuda"), torch.tensor([0, 3], device="cuda")).item())
"""
    done = subprocess.run(
        [PYTHON, "-c", code], cwd=Path(center_loss.__file__).parent, capture_output=True, text=True
    )
    assert done.returncode != 0 and "assert" in done.stderr and done.stdout == ""


def test_a_sparse_step_takes_memory_for_the_batch_alone():
    peaks = []
    for num_classes in (1000, 1_000_000):
        loss = CenterLoss(num_classes, 64, use_gpu=False, sparse=True).to(DEVICE)
        optimizer = torch.optim.SGD(loss.parameters(), 0.5)
        features = torch.randn(128, 64, device=DEVICE, requires_grad=True)
        labels = torch.randint(num_classes, (128,), device=DEVICE)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.zero_grad()
            loss(features, labels).backward()
            optimizer.step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2 * peaks[0] + 2**20  # dense gradients alone would take 244 MiB


def test_a_captured_step_of_a_sparse_loss_goes_on_without_a_graph_if_it_must():
    """Its optimizer cannot be fused, and no other reads the rate from a tensor."""
    outputs = []
    for capture in (False, True):
        torch.manual_seed(0)
        net = main.models.create("cnn", 3, 1, 8).to(DEVICE)
        loss = CenterLoss(3, 2, use_gpu=False, sparse=True).to(DEVICE)
        optimizers = dict(
            model=torch.optim.SGD(net.parameters(), 0.1),
            cent=torch.optim.SGD(loss.parameters(), 0.5),
        )
        step = step.Step(net, loss, optimizers, weight=0.1)
        step = cuda_graph.captured(step, 6, lambda line: None) if capture else step
        images, labels = torch.randn(6, 1, 8, 8, device=DEVICE), torch.arange(6, device=DEVICE) % 3
        outputs.append([step(images, labels).center.item() for _ in range(6)])
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-3)
