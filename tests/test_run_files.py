"""A run's directory: whose files are in it, one run at a time, and what happens where one fails."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, files, program

import plots
import utils
from engine import epoch
from tools import run_files
from tools.run_files import check_save_dir, claim, clear

FOREIGN = [
    "best.pt",
    "checkpoint.pt",
    "report.html",
    "files.txt",
    "log_folder.txt",
    "train/epoch_1.png",
    "tensorboard/events.out.tfevents.1.host",
]


def add(root, *names):
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of another project")


def names_in(root) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in files(root))


# ------------------------------------------------------------------------------- files of others


@pytest.mark.parametrize("name", FOREIGN)
def test_a_run_does_not_start_among_files_of_others_that_it_would_replace(name, run):
    add("log", name)
    before = files("log")
    status, out, err = run()
    assert status == 2 and out == "" and err.count("\n") == 1
    assert f"got log with {name}: choose another directory, or --overwrite" in err
    assert files("log") == before


def test_a_run_starts_among_files_of_others_that_it_leaves_alone(run):
    others = ["notes.txt", "train/a/1.png", "log_notes.txt", "train/epoch_best.png", "model.pt"]
    add("log", *others)
    for _ in range(2):
        assert run("--max-epoch", "1")[0] == 0
    assert set(others) < set(names_in("log"))
    assert all("another project" in Path("log", name).read_text() for name in others)


def test_overwrite_replaces_what_the_run_writes_and_deletes_nothing(run):
    add("log", *FOREIGN)
    assert run("--overwrite", "--max-epoch", "1")[0] == 0
    assert checkpoint()["epoch"] == 1
    for name in ("best.pt", "report.html", "train/epoch_1.png"):
        assert "another project" in Path("log", name).read_text()
    assert run("--max-epoch", "1")[0] == 2  # they are still not ours


def test_a_new_run_replaces_an_older_one_of_ours_and_says_so(log, run):
    add("log", "notes.txt", "features/epoch_best.npz")
    assert run("--max-epoch", "3", "--save-features")[0] == 0
    (log / ".checkpoint.pt.17.part").touch()  # of a killed run
    status, out, _ = run("--max-epoch", "1", "--save-features")
    assert status == 0 and "Replacing the earlier run in log" in out.splitlines()
    assert names_in("log") == [
        "args.json",
        "checkpoint.pt",
        "features/epoch_1.npz",
        "features/epoch_best.npz",
        "files.txt",
        "log_folder.txt",
        "metrics.csv",
        "notes.txt",
    ]


def test_a_run_before_there_was_a_list_is_not_replaced(log, run):
    (log / utils.FILES).unlink()
    before = files()
    status, _, err = run("--max-epoch", "1")
    assert status == 2 and "choose another directory, or --overwrite" in err and files() == before


def test_an_evaluation_replaces_no_files_of_others_either(finished, run):
    add(".", "evaluation.json")
    shutil.copy(finished / "checkpoint.pt", "network.pt")
    status, _, err = run("--evaluate", "network.pt", base=False)
    assert status == 2 and "with evaluation.json: choose another directory" in err
    for _ in range(2):
        assert run("--evaluate", "network.pt", "--save-dir", "tested", base=False)[0] == 0
    assert names_in("tested") == ["evaluation.json", "files.txt"]


def test_links_to_directories_are_not_followed_when_files_are_removed(run):
    assert run("--max-epoch", "1", "--save-features")[0] == 0
    shutil.move("log/features", "elsewhere")
    Path("log/features").symlink_to("../elsewhere")
    status, _, err = run("--max-epoch", "1")
    assert status == 2 and "no links to directories of others" in err
    assert run("--max-epoch", "1", "--overwrite")[0] == 0
    assert os.listdir("elsewhere") == ["epoch_1.npz"]


def test_clear_takes_listed_files_or_those_of_later_epochs(tmp_path):
    ours = ["metrics.csv", "train/epoch_2.png", "train/epoch_12.npz", "features/epoch_12.npz"]
    others = ["train/epoch_13.png", "best.pt", "notes.txt"]
    utils.start_list(tmp_path)
    for name in ours:
        add(tmp_path, name)
        utils.record(tmp_path / name)
    add(tmp_path, *others)
    assert clear(tmp_path, after=11) is True
    assert names_in(tmp_path) == sorted([*ours[:2], *others, utils.FILES])
    assert clear(tmp_path, after=11) is False
    assert clear(tmp_path) is True
    assert names_in(tmp_path) == sorted([*others, utils.FILES])


# ----------------------------------------------------------------------------- whose directory


def test_save_dir_must_be_or_become_a_writable_directory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_save_dir(tmp_path / "new" / "deep", "folder", overwrite=False, evaluate=False)
    assert not (tmp_path / "new").exists()
    for path in ("file", "file/below"):
        with pytest.raises(utils.RunError, match="must be a writable directory"):
            check_save_dir(tmp_path / path, "folder", overwrite=True, evaluate=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(utils.RunError, match="must be a writable directory"):
        check_save_dir(tmp_path, "folder", overwrite=True, evaluate=False)


def test_a_directory_has_one_run_at_a_time(run, monkeypatch):
    original = epoch.train_epoch
    seen = []

    def train(*arguments):
        monkeypatch.setattr(epoch, "train_epoch", original)
        before = files()
        for flags in (["--dataset", "digits", "--use-cpu", "--max-iter", "1"], ["--resume"]):
            seen.append(program(flags))
        assert files() == before
        return original(*arguments)

    monkeypatch.setattr(epoch, "train_epoch", train)
    status, _, err = run("--max-epoch", "1")
    assert status == 0 and seen == [2, 2]
    message = "main.py: error: --save-dir log is in use by another run\n"
    assert err == message * 2


def test_a_disk_without_locks_is_said_and_used(run, monkeypatch):
    """Network disks answer EBADF, ENOLCK, ENOSYS or EOPNOTSUPP."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", flock)
    status, out, err = run("--max-epoch", "1")
    assert (status, err) == (0, "")
    assert "--save-dir log cannot be locked against other runs: Bad file descriptor" in out


def test_without_fcntl_a_run_goes_unlocked(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert run("--max-epoch", "1")[::2] == (0, "")


def test_the_lock_ends_with_its_run_though_forked_processes_live_on(tmp_path):
    read, write = os.pipe()
    with claim(tmp_path, print):
        worker = os.fork()
        if worker == 0:
            os.write(write, b"up")
            signal.pause()
        os.read(read, 2)
    try:
        with claim(tmp_path, print):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


# ----------------------------------------------------------------- files that cannot be written


def fail_for(name, monkeypatch, times=10**9):
    """Lets files with `name` in their paths fail a number of times; returns what was tried."""
    original = utils.replace_file
    tried = []

    def replace_file(path, write):
        if name in str(path):
            tried.append(path)
            if len(tried) <= times:
                raise utils.WriteError(f"cannot write {path}: it is in use")
        original(path, write)

    monkeypatch.setattr(utils, "replace_file", replace_file)
    return tried


@pytest.mark.parametrize("name", ["metrics.csv", "features/epoch_1.npz", "evaluation.json"])
def test_a_file_that_fails_is_said_once_and_written_after_the_next_epoch(name, run, monkeypatch):
    tried = fail_for(name, monkeypatch, times=1)
    status, out, err = run("--save-features", "--verify")
    assert (status, err) == (0, "") and len(tried) > 1
    assert out.count(f"cannot write log/{name}: it is in use; it is tried again later") == 1
    assert Path("log", name).exists()


@pytest.mark.parametrize("name", ["metrics.csv", "features/epoch_1.npz", "evaluation.json"])
def test_a_file_that_always_fails_ends_a_whole_run_with_status_1(name, run, monkeypatch):
    fail_for(name, monkeypatch)
    status, out, err = run("--save-features", "--verify")
    assert status == 1 and err == f"main.py: error: cannot write log/{name}: it is in use\n"
    assert out.count("it is tried again later") == 1 and "Finished." in out
    assert checkpoint()["epoch"] == 2 and not Path("log", name).exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "args.json", "log_folder.txt", "best.pt"])
def test_a_file_that_a_run_cannot_do_without_ends_it(name, run, monkeypatch):
    fail_for(name, monkeypatch)
    status, out, err = run("--val-share", "0.2")
    assert status == 1 and err == f"main.py: error: cannot write log/{name}: it is in use\n"
    assert "Finished." not in out


@pytest.mark.parametrize("then", ["gone", "replaced", "moved"])
def test_a_directory_that_vanishes_ends_the_run_with_one_line(then, run, monkeypatch):
    original = epoch.train_epoch

    def train(*arguments):
        shutil.move("log", "elsewhere") if then == "moved" else shutil.rmtree("log")
        if then == "replaced":
            os.mkdir("log")
        return original(*arguments)

    monkeypatch.setattr(epoch, "train_epoch", train)
    status, _, err = run("--max-epoch", "1", "--save-features")
    message = "main.py: error: --save-dir log was removed while the run was writing to it\n"
    assert (status, err) == (1, message)
    assert sorted(os.listdir()) == dict(gone=[], replaced=["log"], moved=["elsewhere"])[then]
    assert not Path("log").exists() or os.listdir("log") == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with little room."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", path]
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("this user may not mount a file system")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path, leave: int) -> None:
    with open(path / "filler", "wb", buffering=0) as file:
        while file.write(b"\0" * 4096) == 4096 and shutil.disk_usage(path).free > leave:
            pass


@pytest.mark.parametrize("leave", [0, 400_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    leave, run, small_disk, monkeypatch
):
    log = small_disk / "log"
    assert run("--max-epoch", "1", "--save-dir", log)[0] == 0
    before = checkpoint(log)
    original = epoch.train_epoch

    def train(*arguments):
        fill(small_disk, leave)
        return original(*arguments)

    monkeypatch.setattr(epoch, "train_epoch", train)
    status, _, err = run("--resume", "--max-epoch", "2", "--save-dir", log, base=False)
    assert status == 1 and err.count("\n") == 1
    assert err.startswith("main.py: error: cannot write ") and "No space left on device" in err
    now = checkpoint(log)
    assert all(torch.equal(now["model"][name], value) for name, value in before["model"].items())
    assert not list(log.rglob("*.part"))
    monkeypatch.setattr(epoch, "train_epoch", original)
    (small_disk / "filler").unlink()
    assert run("--resume", "--max-epoch", "2", "--save-dir", log, base=False)[0] == 0


def test_a_picture_that_cannot_be_drawn_makes_the_end_status_1(run, monkeypatch):
    monkeypatch.setattr(plots, "plot_epoch", lambda *_: None)
    monkeypatch.setattr(plots, "plot_run", lambda *_: ["log/curves.png: it is in use"])
    status, out, err = run("--plot", "--max-epoch", "1")
    assert status == 1 and "Finished." in out and "Pictures in" not in out
    assert err == (
        "main.py: error: log/curves.png: it is in use; to draw what is missing: "
        "python -m plots log\n"
    )


def test_what_a_run_says_of_itself_for_the_page(run, monkeypatch):
    monkeypatch.setattr(plots, "plot_epoch", lambda *_: None)
    monkeypatch.setattr(plots, "plot_run", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["main.py", "--save-dir", "My Drive"])
    assert run("--plot", "--max-epoch", "1")[0] == 0
    assert run("--resume", "--max-epoch", "2", base=False)[0] == 0
    facts = utils.read_facts(Path("log"))
    assert facts["commands"] == ["python main.py --save-dir 'My Drive'"] * 2
    assert facts["ranks"] == 1 and facts["device"].startswith("CPU") and facts["elapsed"] > 0
    Path("log/run.json").write_text("[3")
    assert utils.read_facts(Path("log")) == {}


def test_is_moved_tells_whether_a_resumed_run_has_a_new_directory(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint.pt").touch()
    (tmp_path / "link.pt").symlink_to(tmp_path / "a" / "checkpoint.pt")
    for resumed in ("a/checkpoint.pt", "link.pt"):
        for save_dir, moved in (("a", False), ("b", True)):
            args = type("Args", (), dict(resume=tmp_path / resumed, save_dir=tmp_path / save_dir))
            assert run_files.is_moved(args) == moved
