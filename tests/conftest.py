"""Tiny image folders, and main.py run in this process as from the command line."""
# ruff: noqa: E402  (some of the environment is read when torch is loaded)

import os
import shutil
import sys
import tempfile
from pathlib import Path

# The cache of compiled code does not tell apart the instruction sets that ATEN_CPU_CAPABILITY has.
capability = os.environ.get("ATEN_CPU_CAPABILITY", "default")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"center-loss-compiled-{capability}"),
)
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each; read when torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import main

PYTHON = sys.executable
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# 24 images of 8x8 pixels in batches of 10: three steps an epoch.
FLAGS = "--dataset folder --image-size 8 --batch-size 10 --max-epoch 2 --print-freq 1".split()
FLAGS += "--eval-freq 1 --use-cpu".split()


def pytest_collection_modifyitems(items):
    """Marked tests are skipped, with the reason, where they cannot run."""
    has_browser = all(map(shutil.which, ("chromium", "chromedriver")))
    needed = {
        "mnist": ((SHARED_DATA / "MNIST").is_dir(), f"real MNIST is not in {SHARED_DATA}"),
        "gpu": (torch.cuda.is_available(), "there is no GPU"),
        "browser": (has_browser, "there is no Chromium: apt-get install chromium chromium-driver"),
    }
    for item in items:
        for name, (there, reason) in needed.items():
            if item.get_closest_marker(name) and not there:
                item.add_marker(pytest.mark.skip(reason=reason))


def program(argv: list) -> int:
    """Runs main.py in this process; its exit status."""
    try:
        return cli.run(main.main, [str(each) for each in argv], main.__doc__)
    except SystemExit as exit:
        return exit.code


def make_folder(
    root: Path, classes=("ant", "bee", "cat"), train=8, test=4, size=(8, 8), mode="L"
) -> Path:
    """PNG images whose brightness tells the class, with noise."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            directory = root / split / name
            directory.mkdir(parents=True)
            for index in range(count):
                shape = size if mode == "L" else (*size, 3)
                pixels = random.integers(0, 60, shape) + label * 180 // max(len(classes) - 1, 1)
                Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{index}.png")
    return root


def files(directory="log") -> dict[Path, bytes]:
    """The files of a directory, with their contents."""
    return {path: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def checkpoint(directory="log") -> dict:
    return torch.load(Path(directory, "checkpoint.pt"), weights_only=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """24 training and 12 test images of 8x8 pixels, grey, in three classes."""
    return make_folder(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, folder) -> Path:
    """The directory of a finished run of two epochs; to be copied, not changed."""
    directory = tmp_path_factory.mktemp("finished") / "log"
    flags = ["--data-root", folder, "--lr-model", "0.05", "--save-dir", directory]
    assert program([*FLAGS, *flags]) == 0
    return directory


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    """run(*flags) trains on the tiny folder within tmp_path.

    Gives the exit status, standard output and error. base=False: without FLAGS.
    """
    monkeypatch.chdir(tmp_path)

    def call(*flags, base=True):
        common = [*FLAGS, "--data-root", folder] if base else []
        return program([*common, *flags]), *capsys.readouterr()

    return call


@pytest.fixture
def log(finished, run):
    """A copy of the finished run as log/, in the directory where `run` works."""
    return Path(shutil.copytree(finished, "log"))
