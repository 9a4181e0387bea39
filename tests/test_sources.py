"""Where images come from: worker processes from their start to their end, and the memory."""

import multiprocessing
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, make_folder
from data_files import refusal

import datasets
from engine import sources, splits


def test_a_truncated_image_ends_workers_with_its_name(tmp_path):
    bad = make_folder(tmp_path, size=(64, 64)) / "train" / "bee" / "3.png"
    bad.write_bytes(bad.read_bytes()[:2000])
    others = set(multiprocessing.active_children())
    loader = datasets.create("folder", tmp_path, 4, workers=1, image_size=8)
    with pytest.raises(datasets.DatasetError, match=r"^cannot read the image .*bee/3.png"):
        list(loader.train)
    del loader
    # Processes of earlier tests may end meanwhile; of this one none may be left.
    assert set(multiprocessing.active_children()) <= others


# A run whose second batch comes when a line is sent to it.
PROGRAM = """
import sys
import datasets
batches = iter(datasets.create("folder", sys.argv[1], 1, 2, image_size=8).train)
next(batches)
print("up", flush=True)
input()
print(1 + len(list(batches)))
"""


@pytest.fixture
def main_process(folder):
    """The program, which has started its workers and waits for a line."""
    process = subprocess.Popen(
        [PYTHON, "-c", PROGRAM, str(folder)],
        cwd=Path(datasets.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.communicate()


def descendants(pid: int) -> list[int]:
    """The processes of the program but for itself: all are of its session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            session = int((path / "stat").read_text().rpartition(")")[2].split()[3])
        except OSError:
            continue
        if session == pid and int(path.name) != pid:
            found.append(int(path.name))
    return found


def test_workers_end_with_a_killed_main_process(main_process):
    """Whoever lives holds the standard output open."""
    main_process.kill()
    assert select.select([main_process.stdout], [], [], 30)[0]
    assert main_process.stdout.read() == b""


def test_signals_to_all_processes_of_a_run_end_no_worker(main_process):
    """However long the main process takes for its batch; afterwards the workers end with it."""
    others = descendants(main_process.pid)
    assert len(others) >= 3  # a server and two workers
    for pid in others:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    out, err = main_process.communicate(b"\n", timeout=60)
    assert (out, err, main_process.returncode) == (b"24\n", b"", 0)
    deadline = time.monotonic() + 10
    while descendants(main_process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert descendants(main_process.pid) == []


def test_a_dead_worker_is_one_line(folder):
    train = datasets.create("folder", folder, 1, workers=1, image_size=8).train
    others = set(multiprocessing.active_children())
    batches = iter(train)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    with pytest.raises(sources.WorkerError, match=r"a worker of -j 1 died .*") as error:
        list(batches)
    assert "\n" not in str(error.value)


def test_workers_that_cannot_start_are_a_line_at_once(folder):
    """A socket's path has at most 107 bytes."""
    long = Path(folder.parent, "d" * 110)
    long.mkdir()
    code = f"import datasets; datasets.create('folder', {str(folder)!r}, 4, 1, image_size=8)"
    ended = subprocess.run(
        [PYTHON, "-c", code],
        cwd=Path(datasets.__file__).parent,
        env=os.environ | dict(TMPDIR=str(long)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    last = ended.stderr.splitlines()[-1]
    assert "DatasetError: -j 1: no worker can start" in last and "TMPDIR" in last


def test_a_set_too_large_for_memory_names_the_way_out(folder, monkeypatch):
    monkeypatch.setattr(sources, "_free_memory", lambda device: 1000)
    assert "-j 4" in refusal("folder", folder, 4, image_size=8)
    datasets.create("folder", folder, 4, workers=1, image_size=8)


@pytest.mark.parametrize(
    "limit, used",
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_memory_is_what_the_limit_of_a_container_leaves(tmp_path, limit, used):
    """A file cache counts as used, but the system gives it up."""
    (tmp_path / "memory").mkdir()
    (tmp_path / used).write_text("300\n")
    (tmp_path / used).with_name("memory.stat").write_text("anon 5\ninactive_file 20\n")
    unlimited = sources._free_memory(torch.device("cpu"), tmp_path)
    assert unlimited > 720
    (tmp_path / limit).write_text("max\n")
    assert sources._free_memory(torch.device("cpu"), tmp_path) > 720
    (tmp_path / limit).write_text("1000\n")
    assert sources._free_memory(torch.device("cpu"), tmp_path) == 720


def test_too_little_shared_memory_is_a_line(folder, monkeypatch):
    def fail(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: (28)")

    split = splits.of_classes(datasets.open_folder(folder, (8, 8))[0], ["ant", "bee"])
    batches = sources.WholeBatches(split, (1, 8, 8))
    monkeypatch.setattr("torch.Tensor.share_memory_", fail)
    line = batches.__getitems__([0, 1])
    assert "--shm-size" in line and "-j 0 needs none" in line and "(28)" in line


def test_data_in_memory_need_no_worker(tmp_path):
    others = set(multiprocessing.active_children())
    train = datasets.create("digits", tmp_path, 500, workers=2).train
    assert sum(len(labels) for _, labels, _ in train) == 1437
    assert set(multiprocessing.active_children()) <= others
