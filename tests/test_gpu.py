"""What only a GPU shows: graphs against eager steps, resumed runs, label errors, memory."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, checkpoint, make_folder

import center_loss
import models
from center_loss import CenterLoss
from engine import cuda_graph
from engine import step as steps
from engine.epoch import Progress

pytestmark = pytest.mark.gpu
# On 40 images of 28x28 pixels in batches of 8: five steps an epoch.
SETTINGS = {
    "zhou2018": "--stepsize 1",
    "amp": "--amp --stepsize 1",
    "softmax only": "--weight-cent 0",
    "wen2016": "--recipe wen2016 --max-iter 15 --milestones 6 12",
    "zahn2024-v1.0": "--recipe zahn2024-v1.0",
    "zahn2024-v1.2": "--recipe zahn2024-v1.2",
    "fast": "--recipe fast",
    "images": "--recipe images",
    "-j 2": "-j 2",
}
COMMON = "--dataset folder --image-size 28 --eval-freq 1 --batch-size 8 --deterministic".split()


@pytest.fixture(autouse=True)
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def images(tmp_path):
    return make_folder(tmp_path / "images", classes=("ant", "bee"), train=20, test=4, size=(28, 28))


@pytest.fixture
def train(run, images):
    """train(setting, *flags): three epochs on the GPU."""

    def call(setting, *flags):
        flags = [*COMMON, "--data-root", images, *setting.split(), *flags]
        length = [] if "--max-iter" in flags else ["--max-epoch", "3"]
        return run(*flags, *length, base=False)

    return call


def assert_close(ours, theirs, rel):
    for row, other in zip(checkpoint(ours)["history"], checkpoint(theirs)["history"], strict=True):
        assert row == pytest.approx(other, rel=rel, abs=1e-4)


def stop_at(step, monkeypatch):
    """Sends SIGTERM after that many steps of the training."""
    original = Progress.add
    counted = []

    def add(*arguments):
        counted.append(1)
        if len(counted) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(Progress, "add", add)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_graph_trains_as_eager_steps_do(setting, train, monkeypatch):
    replays = []
    original = cuda_graph.CudaGraph.replay

    def replay(graph):
        replays.append(1)
        return original(graph)

    monkeypatch.setattr(cuda_graph.CudaGraph, "replay", replay)
    status, out, err = train(SETTINGS[setting], "--save-dir", "graph")
    assert status == 0, err
    assert "without a CUDA graph" not in out and len(replays) == 12
    status, _, err = train(SETTINGS[setting], "--save-dir", "eager", "--no-cuda-graph")
    assert status == 0, err
    assert len(replays) == 12
    assert_close("graph", "eager", rel=1e-2)


@pytest.mark.slow
def test_a_compiled_network_goes_into_the_graph(train):
    status, out, err = train("--compile", "--save-dir", "compiled")
    if "needs a C++ compiler" in err:
        pytest.skip(err)
    assert status == 0, err
    assert "without a CUDA graph" not in out
    assert train("", "--save-dir", "plain")[0] == 0
    assert_close("compiled", "plain", rel=1e-2)


@pytest.mark.parametrize("setting", SETTINGS)
def test_stopped_and_resumed_runs_end_with_the_same_metrics_to_the_byte(
    setting, train, run, monkeypatch
):
    assert train(SETTINGS[setting], "--save-dir", "whole")[0] == 0
    with monkeypatch.context() as patched:
        stop_at(7, patched)
        assert train(SETTINGS[setting], "--save-dir", "stopped")[0] == 143
    assert run("--resume", "--save-dir", "stopped", base=False)[0] == 0
    assert Path("whole/metrics.csv").read_bytes() == Path("stopped/metrics.csv").read_bytes()


@pytest.mark.parametrize("first, then", [([], ["--use-cpu"]), (["--use-cpu"], ["--no-use-cpu"])])
@pytest.mark.parametrize("setting", ["zhou2018", "wen2016", "fast"])
def test_a_checkpoint_goes_on_on_the_other_device(setting, first, then, train, run, monkeypatch):
    flags = f"{SETTINGS[setting]} --no-amp"
    assert train(flags, "--save-dir", "whole", *first)[0] == 0
    with monkeypatch.context() as patched:
        stop_at(7, patched)
        assert train(flags, "--save-dir", "moved", *first)[0] == 143
    assert run("--resume", "--save-dir", "moved", *then, base=False)[0] == 0
    history = zip(checkpoint("moved")["history"], checkpoint("whole")["history"], strict=True)
    for row, other in history:
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=0.05)


def test_a_checkpoint_is_evaluated_on_either_device(train, run):
    train("", "--save-dir", "log")
    measured = []
    for flags in ([], ["--use-cpu"]):
        status, out, err = run("--evaluate", "log/checkpoint.pt", *flags, base=False)
        assert status == 0, err
        lines = [line for line in out.splitlines() if line.startswith(("Accuracy", "Nearest"))]
        words = " ".join(lines).split()
        measured.append([float(word) for word in words if word.replace(".", "").isdigit()])
    assert len(measured[0]) == 5 and measured[0] == pytest.approx(measured[1], rel=1e-2)


def test_two_runs_are_the_same(train):
    for name in ("one", "two"):
        assert train("--amp", "--save-dir", name)[0] == 0
    assert Path("one/metrics.csv").read_bytes() == Path("two/metrics.csv").read_bytes()


# ---------------------------------------------------------------------------- captured steps


def make_step(device="cuda", batch_size=6, waits=False, sparse=False):
    """A step as a graph, and what it said; `waits`: the network asks for a value."""
    torch.manual_seed(0)
    net = models.create("cnn", 3, 1, 8).to(device)
    if waits:
        net.register_forward_hook(lambda module, inputs, outputs: outputs[0].sum().item() and None)
    loss = CenterLoss(3, 2, use_gpu=False, sparse=sparse).to(device)
    optimizers = dict(
        model=torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, fused=True),
        cent=torch.optim.SGD(loss.parameters(), 0.5, fused=not sparse),
    )
    said = []
    step = steps.Step(net, loss, optimizers, weight=0.1)
    return cuda_graph.captured(step, batch_size, said.append), said


def make_batch(size=6, device="cuda"):
    labels = torch.arange(size, device=device) % 3
    return torch.randn(size, 1, 8, 8, device=device), labels


def test_after_a_capture_that_cuda_has_ended_memory_and_the_next_capture_work():
    step, said = make_step(waits=True)
    for _ in range(6):
        step(*make_batch())
    torch.cuda.synchronize()
    assert len(said) == 1 and "without a CUDA graph" in said[0]
    torch.cuda.empty_cache()
    step, said = make_step()
    for _ in range(6):
        step(*make_batch())
    torch.cuda.synchronize()
    assert said == [] and step.batch is not None
    torch.cuda.empty_cache()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_step_is_captured_on_its_own_device():
    step, said = make_step("cuda:1")
    batch = make_batch(device="cuda:1")
    for _ in range(5):
        step(*batch)
    before = step.net.classifier.weight.clone()
    step(*batch)
    torch.cuda.synchronize("cuda:1")
    assert said == [] and not torch.equal(before, step.net.classifier.weight)


def test_an_optimizer_that_is_loaded_after_the_capture_goes_on_from_what_it_loaded():
    ends = []
    for capture in (False, True):
        step, _ = make_step(batch_size=6 if capture else 7)
        for _ in range(6):
            step(*make_batch())
        saved = step.optimizers["model"].state_dict()
        zero = {
            key: dict(momentum_buffer=torch.zeros_like(each["momentum_buffer"]))
            for key, each in saved["state"].items()
        }
        step.optimizers["model"].load_state_dict(saved | dict(state=zero))
        for _ in range(6):
            step(*make_batch())
        ends.append([parameter.detach().clone() for parameter in step.net.parameters()])
    for one, two in zip(*ends, strict=True):
        assert torch.allclose(one, two, rtol=1e-2, atol=1e-4)


def test_a_batch_above_3072_is_captured():
    step, said = make_step(batch_size=4096)
    for _ in range(5):
        step(*make_batch(4096))
    torch.cuda.synchronize()
    assert said == [] and step.batch is not None


def test_an_epochs_last_batch_keeps_no_memory_beside_the_graphs():
    step, _ = make_step(batch_size=2048)
    for _ in range(5):
        step(*make_batch(2048))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    step(*make_batch(2000))
    assert torch.cuda.memory_reserved() - before < 64 * 2**20


def test_a_captured_step_of_a_sparse_loss_goes_on_without_a_graph_if_it_must():
    """Its optimizer cannot be fused, and no other reads the rate from a tensor."""
    centers = []
    for capture in (False, True):
        step, _ = make_step(batch_size=6 if capture else 7, sparse=True)
        batch = make_batch()
        centers.append([step(*batch).means[1].item() for _ in range(6)])
    assert centers[0] == pytest.approx(centers[1], rel=1e-3)


# --------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("center_update", ["gradient", "paper"])
def test_half_precision_with_a_grad_scaler_takes_the_step_of_float32(center_update):
    centers = []
    for half in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Linear(6, 2, device="cuda")
        loss = CenterLoss(3, 2, use_gpu=False, center_update=center_update).to("cuda")
        optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (network, loss)]
        scaler = torch.amp.GradScaler("cuda", enabled=half)
        inputs = torch.randn(8, 6, device="cuda")
        labels = torch.arange(8, device="cuda") % 3
        with torch.autocast("cuda", torch.float16, enabled=half):
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
    root = Path(center_loss.__file__).parent
    done = subprocess.run([PYTHON, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in done.stderr and done.stdout == ""


def test_a_sparse_step_takes_memory_for_the_batch_alone():
    peaks = []
    for num_classes in (1000, 1_000_000):
        loss = CenterLoss(num_classes, 64, use_gpu=False, sparse=True).to("cuda")
        optimizer = torch.optim.SGD(loss.parameters(), 0.5)
        features = torch.randn(128, 64, device="cuda", requires_grad=True)
        labels = torch.randint(num_classes, (128,), device="cuda")
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.zero_grad()
            loss(features, labels).backward()
            optimizer.step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2 * peaks[0] + 2**20  # dense gradients alone would take 244 MiB
