"""The snippets of docs/loss.md for trainers, where those are installed: tests/trainers.txt."""

import re
from pathlib import Path

import pytest
import torch

import center_loss

PAGE = (Path(center_loss.__file__).parent / "docs" / "loss.md").read_text(encoding="utf-8")
MARKED = r"<!-- tested where installed: (\w+) -->\n+```py\n(.*?)^```$"
SNIPPETS = dict(re.findall(MARKED, PAGE, re.DOTALL | re.MULTILINE))

# The packages' own warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(package): the variables of its snippet, and the centers that its loss started with."""
    monkeypatch.chdir(tmp_path)
    started = []
    init = center_loss.CenterLoss.__init__

    def remember(self, *arguments, **options):
        init(self, *arguments, **options)
        started.append(self.centers.detach().clone())  # on "meta" where weights are loaded

    monkeypatch.setattr(center_loss.CenterLoss, "__init__", remember)

    def run(package, code=None):
        pytest.importorskip(package, reason=f"{package} is not installed: tests/trainers.txt")
        torch.manual_seed(0)
        variables = {"__name__": "__main__"}
        exec(compile(code or SNIPPETS[package], package, "exec"), variables)
        return variables, started[0].cpu()

    return run


def moved(loss, start):
    """How far the centers are from where they were, in the mean."""
    return (loss.centers.detach().cpu() - start).norm(dim=1).mean()


def test_every_snippet_for_a_trainer_is_tested():
    assert set(SNIPPETS) == {"lightning", "transformers", "pytorch_metric_learning"}
    assert PAGE.count("```py\n") == len(SNIPPETS)


def test_lightning_moves_the_centers_in_training_alone(run):
    variables, start = run("lightning")
    network, loss = variables["network"], variables["network"].center_loss
    assert moved(loss, start) > 1
    now = loss.centers.detach().clone()
    variables["trainer"].validate(network, variables["loader"], verbose=False)
    assert torch.equal(loss.centers.cpu(), now.cpu())
    optimizer = network.configure_optimizers()
    held = [each for group in optimizer.param_groups for each in group["params"]]
    assert len(held) == 4 and all(each is not loss.centers for each in held)


def test_transformers_moves_the_centers_in_training_alone_also_once_loaded(run):
    pytest.importorskip("accelerate", reason="accelerate is not installed: tests/trainers.txt")
    variables, start = run("transformers")
    trained, loaded = variables["trainer"].model, variables["network"]
    assert moved(trained.center_loss, start) > 1
    now = trained.center_loss.centers.detach().cpu().clone()
    variables["trainer"].evaluate()
    assert torch.equal(trained.center_loss.centers.cpu(), now)
    assert torch.equal(loaded.center_loss.centers.cpu(), now)

    images, labels = torch.randn(16, 784), torch.arange(16) % 10
    loaded.train()
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1.0)  # which holds the centers, too
    other = center_loss.CenterLoss(10, 64, use_gpu=False)
    other.load_state_dict(loaded.center_loss.state_dict())
    other.update_centers(loaded.backbone(images), labels, alpha=0.5)
    loaded(images, labels)["loss"].backward()
    optimizer.step()
    torch.testing.assert_close(loaded.center_loss.centers, other.centers, rtol=0, atol=1e-6)


def test_pytorch_metric_learning_moves_the_centers(run):
    variables, start = run("pytorch_metric_learning")
    loss = variables["center_loss"]
    assert moved(loss, start) > 1
    now = loss.centers.detach().clone()
    loss.eval()(torch.randn(4, 64, device=now.device), torch.arange(4, device=now.device), None)
    assert torch.equal(loss.centers, now)


@pytest.mark.parametrize("hook", [True, False])
def test_pytorch_metric_learnings_optimizer_of_the_centers_needs_the_hook(run, hook):
    """With it the centers take the snippet's steps; without it they hardly move, silently."""
    lines = SNIPPETS["pytorch_metric_learning"]
    changes = [
        (r"        if self.training:\n.*\n", ""),
        (r"\.requires_grad_\(False\)", ""),
        (
            r"    \},  # and no metric_loss_optimizer\n",
            "        'metric_loss_optimizer': cent,\n    },\n",
        ),
        (r"trainer = ", "cent = torch.optim.SGD(center_loss.parameters(), lr=0.5)\ntrainer = "),
    ]
    if hook:
        line = re.search(
            r"^    optimizer_cent(\.register_step_pre_hook\(.*\))$", PAGE, re.MULTILINE
        )[1]
        changes.append((r"trainer\.train", f"cent{line}\ntrainer.train"))
    for pattern, text in changes:
        lines, count = re.subn(pattern, text, lines)
        assert count == 1
    variables, start = run(
        "pytorch_metric_learning", lines.replace("import torch\n", "import torch\nλ = 1 / 64\n", 1)
    )
    far = moved(variables["center_loss"], start)
    if not hook:
        assert 0 < far < 0.3
        return
    loss = variables["center_loss"].centers.detach()
    snippet = run("pytorch_metric_learning")[0]["center_loss"]
    torch.testing.assert_close(loss, snippet.centers.detach(), rtol=1e-4, atol=1e-4)
