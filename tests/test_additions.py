"""One obvious place for each addition: a test adds one there, and trains with it."""

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from torch import nn
from torch.optim import lr_scheduler

import center_loss
import cli
import datasets
import models
import recipes

COLOUR = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_is_an_entry_of_specs_even_with_split_in_place_of_train(
    workers, run, tmp_path, monkeypatch
):
    """SVHN of torchvision, on small files of its format."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        labels = np.arange(count)[:, None] % 10 + 1  # 10 stands for the digit 0
        scipy.io.savemat(
            tmp_path / f"{split}_32x32.mat",
            dict(X=random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8), y=labels),
        )
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.svhn, "download_url", lambda *arguments: None)
    svhn = datasets.from_torchvision(
        "SVHN", 10, (3, 32, 32), (dict(split="train"), dict(split="test"))
    )
    monkeypatch.setitem(datasets.SPECS, "svhn", datasets.Spec(svhn, *COLOUR))
    status, out, _ = run(
        "--dataset", "svhn", "--data-root", tmp_path, "--max-epoch", "1", "-j", workers
    )
    assert status == 0 and "Batch 2/2" in out
    assert torch.load("log/checkpoint.pt", weights_only=True)["data"] == dict(
        classes=list("0123456789"), unseen=[], images=20, in_channels=3, image_size=[32, 32]
    )


class Linear(nn.Module):
    def __init__(self, num_classes, in_channels, image_size, feat_dim):
        super().__init__()
        height, width = image_size
        self.embedding = nn.Linear(in_channels * height * width, feat_dim)
        self.classifier = nn.Linear(feat_dim, num_classes)

    def forward(self, images):
        features = self.embedding(images.flatten(1))
        return features, self.classifier(features)


def test_a_network_is_an_entry_of_models(run, monkeypatch):
    monkeypatch.setitem(models.MODELS, "linear", Linear)
    assert run("--model", "linear", "--max-epoch", "1")[0] == 0
    weight = torch.load("log/checkpoint.pt", weights_only=True)["model"]["embedding.weight"]
    assert weight.shape == (2, 64)


def test_a_distance_and_a_center_rule_are_entries_of_center_loss(run, monkeypatch):
    """The flags take their choices from the same tables."""
    monkeypatch.setitem(center_loss.DISTANCES, "manhattan", lambda offsets: offsets.abs().sum(-1))
    monkeypatch.setitem(center_loss.CENTER_UPDATES, "halved", lambda counts: 2 * counts)
    flags = [
        "--distance",
        "manhattan",
        "--center-update",
        "halved",
        "--lr-model",
        "1e-9",
        "--lr-cent",
        "1",
    ]
    assert run(*flags, "--batch-size", "24", "--max-iter", "1", "--save-features")[0] == 0
    saved = np.load("log/features/epoch_1.npz")
    features, labels = saved["train_features"], saved["train_labels"]
    torch.manual_seed(1)
    models.create("cnn", 3, 1, 8)
    before = torch.randn(3, 2).numpy()
    means = np.stack([features[labels == label].mean(0) for label in range(3)])
    assert saved["centers"] == pytest.approx((before + means) / 2, abs=1e-5)
    loss = torch.load("log/checkpoint.pt", weights_only=True)["history"][0]["train_center"]
    assert loss == pytest.approx(np.abs(features - before[labels]).sum(1).mean(), rel=1e-5)


def test_a_recipe_is_an_entry_of_recipes(run, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "mine", dict(lr_model=0.25, max_epoch=1))
    assert run("--recipe", "mine", "--max-iter", "1")[0] == 0
    args = torch.load("log/checkpoint.pt", weights_only=True)["args"]
    assert (args["recipe"], args["lr_model"]) == ("mine", 0.25)


def test_a_flag_is_a_line_that_says_whether_a_resumed_run_may_change_it(run, monkeypatch):
    original = cli.build_parser

    def build_parser(description=""):
        parser = original(description)
        add = parser.group("mine")
        add("--note", str, "", "free to change", free=True)
        add("--power", int, 2, "part of the training")
        return parser

    assert run("--max-epoch", "1", "--save-dir", "older")[0] == 0
    monkeypatch.setattr(cli, "build_parser", build_parser)
    assert run("--resume", "older/checkpoint.pt", "--power", "4", base=False)[::2] == (
        2,
        "main.py: error: --power must be 2, as in older/checkpoint.pt, got 4\n",
    )
    assert run("--note", "one", "--power", "3", "--max-epoch", "1")[0] == 0
    assert run("--resume", "--power", "4", base=False)[::2] == (
        2,
        "main.py: error: --power must be 3, as in log/checkpoint.pt, got 4\n",
    )
    assert run("--resume", "--note", "two", "--max-epoch", "2", base=False)[0] == 0
    args = torch.load("log/checkpoint.pt", weights_only=True)["args"]
    assert (args["note"], args["power"]) == ("two", 3)


@pytest.mark.parametrize("fixed_length", [False, True])
def test_a_schedule_is_an_entry_that_says_whether_the_runs_length_is_part_of_it(
    fixed_length, run, monkeypatch
):
    def linear(optimizer, args, per_epoch, steps):
        return lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)

    monkeypatch.setitem(recipes.SCHEDULES, "linear", recipes.Schedule(linear, fixed_length))
    flags = ["--schedule", "linear", "--lr-model", "0.1"]
    assert run(*flags, "--save-dir", "whole")[0] == 0
    assert run(*flags, "--max-epoch", "1")[0] == 0
    status, _, err = run("--resume", "--max-epoch", "2", base=False)
    assert status == (2 if fixed_length else 0) and ("--max-epoch must be 1" in err) == fixed_length
    rate = torch.load("whole/checkpoint.pt", weights_only=True)["history"][-1]["lr_model"]
    assert rate == pytest.approx(0.01)
