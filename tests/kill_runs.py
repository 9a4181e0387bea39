"""Ends runs by a signal at random moments, resumes them, and compares each with one that was never stopped.

python tests/kill_runs.py --kills 100
python tests/kill_runs.py --kills 100 --signal TERM --only plots

A third of the SIGKILLs come shortly after a SIGTERM, so that they also hit the checkpoint in the middle of an epoch.
A run that gets a SIGTERM alone must end by itself; the longest time that one took is told.
The processes are forked from this one, which has imported torch: that saves seconds a kill, and they are as real.
"""

import argparse
import csv
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # these two are imported where they are used; here, once for all processes
import torchvision  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import make_folder, program

# What each run is, on 24 images of 8x8 pixels in batches of 10.
SETTINGS = {
    "zhou2018 -j 0": ["--max-epoch", 60],
    "wen2016 -j 2, features": [
        "--recipe",
        "wen2016",
        "--image-size",
        16,
        "--max-iter",
        61,
        "--milestones",
        20,
        40,
        "-j",
        2,
        "--save-features",
    ],
    "zahn2024-v1.2": ["--recipe", "zahn2024-v1.2", "--max-epoch", 8, "--stepsize", 2],
    "adamw onecycle, bfloat16": [
        "--optimizer",
        "adamw",
        "--schedule",
        "onecycle",
        "--amp",
        "--max-epoch",
        40,
    ],
    "euclidean, plots": ["--distance", "euclidean", "--plot", "--eval-freq", 2, "--max-epoch", 10],
    "softmax only, plots": ["--weight-cent", 0, "--plot", "--eval-freq", 4, "--max-epoch", 10],
}
FREE = {"elapsed", "log_bytes", "args.resume", "args.save_dir", "args.workers"}


def differences(run: Path, other: Path) -> list[str]:
    """What two directories of runs do not have in common, to the bit; times and paths aside."""
    found = []

    def compare(name: str, one, two) -> None:
        if name in FREE:
            return
        if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
            for key in one:
                compare(f"{name}.{key}".strip("."), one[key], two[key])
        elif (
            isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two)
        ):
            for index, pair in enumerate(zip(one, two, strict=True)):
                compare(f"{name}[{index}]", *pair)
        elif isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            if one.dtype != two.dtype or not torch.equal(one, two):
                found.append(name)
        elif type(one) is not type(two) or one != two:
            found.append(f"{name}: {one} and {two}")

    compare("", *(torch.load(each / "checkpoint.pt", weights_only=True) for each in (run, other)))
    for name in ("metrics.csv", "log_folder.txt"):
        texts = [(each / name).read_text().splitlines() for each in (run, other)]
        if name.startswith("log"):
            texts = [
                [line for line in lines if line.startswith(("Batch", "Accuracy", "Nearest"))]
                for lines in texts
            ]
        if texts[0] != texts[1]:
            found.append(name)
    names = [
        sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (run, other)
    ]
    found += sorted(set(names[0]) ^ set(names[1]))
    for name in set(names[0]) & set(names[1]):
        if (
            name.endswith((".npz", ".png", ".gif"))
            and (run / name).read_bytes() != (other / name).read_bytes()
        ):
            found.append(name)
    with open(run / "metrics.csv") as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    if epochs != list(range(1, len(epochs) + 1)):
        found.append(f"epochs in metrics.csv: {epochs}")
    return found


def start(flags: list, output: Path) -> int:
    """The id of a process that runs main.py."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)
        os.dup2(1, 2)
        status = 70
        try:
            status = program(flags)
        finally:
            sys.stdout.flush()
            if status == 0:  # waits for what a whole process waits for
                import concurrent.futures.process as pools

                pools._python_exit()
            os._exit(status)
    return child


def is_alive(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def phase(output: Path) -> str:
    """Where a run is, by the last line that it has printed."""
    lines = output.read_text().splitlines() if output.exists() else []
    words = {
        "==> Epoch": "training",
        "Batch": "training",
        "==> Test": "test",
        "Nearest": "checkpoint or drawing",
        "Finished": "end",
        "The run": "drawing",
    }
    return next((words[word] for word in words if lines and lines[-1].startswith(word)), "start")


def end(
    child: int, output: Path, gentle: bool, moments: dict[str, int], waits: list[float]
) -> None:
    """Ends a run by SIGTERM alone if `gentle`, else by SIGKILL."""
    moments[phase(output)] = moments.get(phase(output), 0) + 1
    if gentle or random.random() < 1 / 3:
        os.kill(child, signal.SIGTERM)
    if not gentle:
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
    began, status = time.monotonic(), finish(child)
    waits.append(time.monotonic() - began)
    if gentle and status not in (
        143,
        -signal.SIGTERM,
        0,
    ):  # at the start it is not noted yet, at the end no longer
        sys.exit(f"exit status {status} after a SIGTERM: {output.read_text()[-2000:]}")


def kill_and_resume(
    flags: list, directory: Path, kills: int, longest: float, gentle: bool, **notes
) -> tuple[int, int]:
    """Ends a run up to `kills` times, most of them while it trains, at most `longest` seconds after it has begun to.

    Gives the kills, and how many of them came before there was anything to resume. At the end the run is whole.
    """
    done = early = 0
    output = directory.with_suffix(".out")
    while True:
        there = (directory / "checkpoint.pt").exists()
        output.unlink(missing_ok=True)
        child = start([*flags, "--save-dir", directory, *(["--resume"] if there else [])], output)
        if done < kills:
            if random.random() < 0.8:
                while not (output.exists() and b"==> Epoch" in output.read_bytes()) and is_alive(
                    child
                ):
                    time.sleep(0.01)
            time.sleep(random.uniform(0, longest))
            if is_alive(child):
                end(child, output, gentle, **notes)
                done, early = done + 1, early + (not there)
                continue
        if status := finish(child):
            sys.exit(f"{directory}: exit status {status}: {output.read_text()[-2000:]}")
        return done, early


def run(kills: int, seed: int, gentle: bool, only: str) -> int:
    random.seed(seed)
    failures = total = early = runs = 0
    moments, waits = {}, []
    settings = {name: own for name, own in SETTINGS.items() if only in name}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch, "images"), test=60)
        common = [
            "--dataset",
            "folder",
            "--data-root",
            folder,
            "--image-size",
            8,
            "--batch-size",
            10,
            "--print-freq",
            1,
            "--eval-freq",
            5,
            "--use-cpu",
        ]
        share = max(-(-kills // len(settings)), 5)
        for name, own in settings.items():
            if total == kills:
                break
            flags, whole = [*common, *own], Path(scratch, "whole")
            began = time.monotonic()
            if status := finish(start([*flags, "--save-dir", whole], whole.with_suffix(".out"))):
                sys.exit(
                    f"{name}: exit status {status}: {whole.with_suffix('.out').read_text()[-2000:]}"
                )
            seconds, wanted = time.monotonic() - began, min(share, kills - total)
            while wanted > 0:
                runs += 1
                killed = Path(scratch, f"killed{runs}")
                done, before = kill_and_resume(
                    flags,
                    killed,
                    wanted,
                    max(seconds / 3, 0.5),
                    gentle,
                    moments=moments,
                    waits=waits,
                )
                found = differences(whole, killed)
                failures += bool(found)
                wanted, total, early = wanted - done, total + done, early + before
                print(
                    f"{name}: {done} kills, {'; '.join(found) or 'the same to the bit'}", flush=True
                )
            for path in (whole, whole.with_suffix(".out")):
                path.rename(path.with_name(f"{path.name}.{name}"))
    print(
        f"{total} kills ({early} before the first checkpoint) of {runs} runs: {failures} runs differ from those that "
        "were never stopped"
    )
    print(
        f"they came during {moments}; the longest that one took to end: {max(waits, default=0):.2f} s"
    )
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--only", default="", help="settings that have this in their names")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    sys.exit(run(arguments.kills, arguments.seed, arguments.signal == "TERM", arguments.only))
