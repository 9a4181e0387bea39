"""Tiny image folders, and main.py run in this process as from the command line."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

# The cache of compiled code does not tell apart the instruction sets that ATEN_CPU_CAPABILITY chooses.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(
        tempfile.gettempdir(),
        "center-loss-compiled-" + os.environ.get("ATEN_CPU_CAPABILITY", "default"),
    ),
)
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one of several test processes, a core each; read when torch is loaded
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import main

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = (
    1.0  # seconds that torch waits for workers once one has raised
)
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    """Marked tests are skipped, with the reason, where they cannot run."""
    no_mnist = pytest.mark.skip(reason=f"real MNIST is not in {SHARED_DATA}")
    no_gpu = pytest.mark.skip(reason="there is no GPU")
    no_browser = pytest.mark.skip(
        reason="there is no Chromium: apt-get install chromium chromium-driver"
    )
    for item in items:
        if item.get_closest_marker("mnist") and not (SHARED_DATA / "MNIST").is_dir():
            item.add_marker(no_mnist)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("browser") and not all(
            map(shutil.which, ("chromium", "chromedriver"))
        ):
            item.add_marker(no_browser)


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """24 training and 12 test images of 8x8 pixels, grey, in three classes."""
    return make_folder(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    """run(*flags) trains on the tiny folder within tmp_path; gives exit status, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, base=True):
        common = [
            "--dataset",
            "folder",
            "--data-root",
            str(folder),
            "--image-size",
            "8",
            "--batch-size",
            "10",
            "--max-epoch",
            "2",
            "--print-freq",
            "1",
            "--eval-freq",
            "1",
            "--use-cpu",
        ]
        return program([*(common if base else []), *flags]), *capsys.readouterr()

    return call


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(directory): a copy that a test may change."""
    return lambda directory: Path(shutil.copytree(directory, tmp_path / "copy"))


PYTHON = sys.executable
