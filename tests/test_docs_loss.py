"""What docs/loss.md's snippets compute; that they run is tested with the other pages'."""

import re
from pathlib import Path

import pytest
import torch

import center_loss
import models

ROOT = Path(center_loss.__file__).resolve().parent
PAGE = (ROOT / "docs" / "loss.md").read_text(encoding="utf-8")


def run_snippet(name):
    """Its variables, after it has run."""
    code = re.search(
        rf"<!-- tested: {name} -->\n+```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
    )[1]
    exec(compile(code, name, "exec"), variables := {})
    return variables


def test_contrastive_and_triplet_center_loss_are_those_of_their_papers():
    torch.manual_seed(0)
    run = run_snippet("distances")
    x, y, c = run["features"].tolist(), run["labels"].tolist(), run["center_loss"].centers.tolist()
    contrastive = triplet = 0.0
    for feature, label in zip(x, y, strict=True):
        squares = [sum((a - b) ** 2 for a, b in zip(feature, center, strict=True)) for center in c]
        own = squares.pop(label)
        contrastive += own / (sum(squares) + 1) / 2 / len(x)
        triplet += max(own + 5 - min(squares), 0) / len(x)
    assert run["contrastive"].item() == pytest.approx(contrastive, rel=1e-5)
    assert run["triplet"].item() == pytest.approx(triplet, rel=1e-5)


def test_the_snippets_that_train_move_centers_and_network():
    for name in ("update-centers", "grad-scaler"):
        torch.manual_seed(0)
        start = torch.nn.Linear(784, 64).weight
        torch.manual_seed(0)
        run = run_snippet(name)
        assert not torch.equal(run["network"].weight.cpu(), start)
        centers = run["center_loss"].centers.detach().cpu()
        assert (
            centers.isfinite().all() and centers.norm(dim=1).max() < 8
        )  # 8 at the start: towards the features


def test_three_lines_load_the_weights_that_their_run_ended_with(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = re.search(r"^    saved = .*\n    .*\n    .*$", PAGE, re.MULTILINE)[0]
    variables = dict(torch=torch, models=models, CenterLoss=center_loss.CenterLoss)
    exec("\n".join(line.strip() for line in lines.splitlines()), variables)
    saved, model = variables["saved"], variables["model"]
    assert saved["epoch"] == 3 and torch.equal(variables["center_loss"].centers, saved["centers"])
    assert not model.training
    assert all(
        torch.equal(saved["model"][name], value) for name, value in model.state_dict().items()
    )


def test_the_changelog_begins_with_the_version_and_the_citation_is_of_the_paper():
    assert (
        re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
        == center_loss.__version__
    )
    citation = (ROOT / "CITATION.cff").read_text()
    assert (
        f"version: {center_loss.__version__}\n" in citation
        and "A Discriminative Feature Learning" in citation
    )
