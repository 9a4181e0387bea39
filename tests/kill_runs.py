"""Ends runs by a signal at random moments, resumes them, and compares each with one never stopped.

python tests/kill_runs.py --kills 100
python tests/kill_runs.py --kills 100 --signal TERM --only plots

A run that gets a SIGTERM must end by itself; the longest time that one took is told. The processes
are forked from this one, which has imported torch: that saves seconds a kill, and they are as real.
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

COMMON = "--dataset folder --image-size 8 --batch-size 10 --print-freq 1 --eval-freq 5 --use-cpu"
# What each run is, on 24 images of 8x8 pixels.
SETTINGS = {
    "zhou2018 -j 0": "--max-epoch 60",
    "wen2016 -j 2, features": "--recipe wen2016 --image-size 16 --max-iter 61 --milestones 20 40 "
    "-j 2 --save-features",
    "zahn2024-v1.2": "--recipe zahn2024-v1.2 --max-epoch 8 --stepsize 2",
    "adamw onecycle, bfloat16": "--optimizer adamw --schedule onecycle --amp --max-epoch 40",
    "validation": "--val-share 0.2 --max-epoch 40",
    "euclidean, plots": "--distance euclidean --plot --eval-freq 2 --max-epoch 10",
    "softmax only, plots": "--weight-cent 0 --plot --eval-freq 4 --max-epoch 10",
}
FREE = {"elapsed", "log_bytes", "args.resume", "args.save_dir", "args.workers"}
SAID = ("Batch", "Accuracy", "Nearest", "Best")  # lines of the log that are compared


def differences(run: Path, other: Path) -> list[str]:
    """What two directories of runs do not have in common, to the bit; times and paths aside."""
    found = []

    def compare(name: str, one, two) -> None:
        if name in FREE:
            return
        if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
            for key in one:
                compare(f"{name}.{key}".strip("."), one[key], two[key])
        elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
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
            texts = [[line for line in lines if line.startswith(SAID)] for lines in texts]
        if texts[0] != texts[1]:
            found.append(name)
    names = [
        {path.relative_to(each).as_posix() for path in each.rglob("*")} for each in (run, other)
    ]
    found += sorted(names[0] ^ names[1])
    for name in sorted(names[0] & names[1]):
        if name.endswith((".npz", ".png", ".gif")):
            if (run / name).read_bytes() != (other / name).read_bytes():
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


def check(status: int, allowed: tuple, output: Path) -> None:
    if status not in allowed:
        sys.exit(f"{output}: exit status {status}: {output.read_text()[-2000:]}")


def phase(output: Path) -> str:
    """Where a run is, by the last line that it has printed."""
    lines = output.read_text().splitlines() if output.exists() else []
    last = lines[-1] if lines else ""
    if last.startswith(("==> Epoch", "Batch")):
        return "training"
    if last.startswith(("==> Test", "==> Val", "Accuracy", "Nearest")):
        return "test"
    if last.startswith("Epoch"):
        return "checkpoint or drawing"
    return "end" if last.startswith("Finished") else "start"


def end(child: int, output: Path, number: int, moments: dict, waits: list) -> None:
    """Ends a run by the signal."""
    moments[phase(output)] = moments.get(phase(output), 0) + 1
    os.kill(child, number)
    began = time.monotonic()
    status = finish(child)
    waits.append(time.monotonic() - began)
    # At the start a SIGTERM is not noted yet, at the end no longer.
    check(status, (143, -number, 0), output)


def kill_and_resume(flags, directory: Path, kills: int, longest: float, *ending) -> tuple[int, int]:
    """Ends a run up to `kills` times, most of them while it trains, at random within `longest` s.

    Gives the kills, and how many of them came before there was anything to resume. At the end the
    run is whole.
    """
    done = early = 0
    output = directory.with_suffix(".out")
    while True:
        there = (directory / "checkpoint.pt").exists()
        output.unlink(missing_ok=True)
        child = start([*flags, "--save-dir", directory, *["--resume"] * there], output)
        if done < kills:
            if random.random() < 0.8:
                while is_alive(child) and b"==> Epoch" not in (
                    output.read_bytes() if output.exists() else b""
                ):
                    time.sleep(0.01)
            time.sleep(random.uniform(0, longest))
            if is_alive(child):
                end(child, output, *ending)
                done += 1
                early += not there
                continue
        check(finish(child), (0,), output)
        return done, early


def run(kills: int, seed: int, number: int, only: str) -> int:
    random.seed(seed)
    failures = total = early = runs = 0
    moments = {}
    waits = []
    settings = {name: own for name, own in SETTINGS.items() if only in name}
    share = max(-(-kills // len(settings)), 4)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch, "images"), test=60)
        for index, (name, own) in enumerate(settings.items()):
            flags = [*COMMON.split(), "--data-root", folder, *own.split()]
            whole = Path(scratch, f"whole{index}")
            wanted = min(share, kills - total)
            if not wanted:
                break
            began = time.monotonic()
            child = start([*flags, "--save-dir", whole], whole.with_suffix(".out"))
            check(finish(child), (0,), whole.with_suffix(".out"))
            longest = max((time.monotonic() - began) / 3, 0.5)
            while wanted > 0:
                runs += 1
                killed = Path(scratch, f"killed{runs}")
                ending = (number, moments, waits)
                done, before = kill_and_resume(flags, killed, wanted, longest, *ending)
                found = differences(whole, killed)
                failures += bool(found)
                wanted -= done
                total += done
                early += before
                told = "; ".join(found) or "the same to the bit"
                print(f"{name}: {done} kills, {told}", flush=True)
    print(
        f"{total} kills ({early} before the first checkpoint) of {runs} runs: {failures} runs "
        "differ from those that were never stopped"
    )
    print(f"they came during {moments}; the longest took {max(waits, default=0):.2f} s to end")
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
    chosen = signal.Signals[f"SIG{arguments.signal}"]
    sys.exit(run(arguments.kills, arguments.seed, chosen, arguments.only))
