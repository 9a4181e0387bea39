"""Drawing in background processes."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import ModuleType

import utils


@dataclass
class Task:
    """A picture that is being drawn: draw(part, *arguments) writes it."""

    future: Future
    draw: Callable
    arguments: tuple
    tries: int = 1

    def error(self) -> str:
        """Why it could not be drawn; empty if it could. Waits for the end."""
        error = self.future.exception()
        if isinstance(error, BrokenProcessPool):
            return "the drawing process could not start or was killed"
        return one_line(error) if error else ""


class Plotter:
    """Draws in background processes while the training goes on; `finish` waits for them.

    What could not be written is said once and tried again by `retry`. An interrupt in its context
    ends the processes, and so does `finish` if asked to stop.
    """

    def __init__(self, log: Callable[[str], None] = print):
        self.log = log
        self.pool: ProcessPoolExecutor | None = None
        self.drawers = set()
        self.tasks: dict[Path, Task] = {}
        self.unsaved: dict[Path, dict] = {}
        self.has_complained = False

    def __enter__(self) -> "Plotter":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if kind is KeyboardInterrupt:
            self._kill()
        if self.pool:
            self.pool.shutdown()  # else its thread may close what Python still writes to at its end

    def __call__(self, path: Path, draw: Callable, *arguments) -> None:
        """Lets draw(part, *arguments) write `path`."""
        self.tasks[path] = Task(self._submit(path, draw, *arguments), draw, arguments)

    def _submit(self, *drawing) -> Future:
        if self.pool is None:
            workers = max(1, min(4, (os.cpu_count() or 1) // 2))
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_drawing)
        before = set(active_children())
        try:
            with _without_main():
                future = self.pool.submit(draw_to, *drawing)
        except (BrokenProcessPool, OSError) as error:  # no process can start: training goes on
            future = Future()
            future.set_exception(error)
        self.drawers |= set(active_children()) - before
        return future

    def save(self, path: Path, arrays: dict) -> bool:
        """Writes arrays, in a directory that may be missing; returns whether that worked."""
        try:
            path.parent.mkdir(exist_ok=True)
            utils.save_arrays(path, arrays)
        except (OSError, utils.RunError) as error:
            self.unsaved[path] = arrays
            self._complain(one_line(error))
        else:
            self.unsaved.pop(path, None)
        return path not in self.unsaved

    def retry(self, last: bool = False) -> None:
        """Tries again what could not be written: each picture once, and a `last` time."""
        for path, arrays in list(self.unsaved.items()):
            self.save(path, arrays)
        for path, task in self.tasks.items():
            if task.tries < 2 + last and task.future.done() and task.error():
                self._complain(f"{path}: {task.error()}")
                task.future = self._submit(path, task.draw, *task.arguments)
                task.tries += 1

    def _complain(self, error: str) -> None:
        if not self.has_complained:
            self.log(f"A picture could not be written and is tried again later: {error}")
        self.has_complained = True

    def finish(self, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Waits until all is drawn or `stop` returns True; returns the errors of what is missing.

        Logs a line on what has failed, and one on what a stop has left undrawn.
        """
        pending = {task.future for task in self.tasks.values()}
        while pending and not stop():
            pending = wait(pending, timeout=0.1).not_done
        if pending:
            self._kill()
        failed = [f"{path}: could not be written" for path in self.unsaved]
        stopped = []
        notes = set()
        for path, task in self.tasks.items():
            if task.future in pending:
                stopped.append(path)
            elif task.error():
                failed.append(f"{path}: {task.error()}")
            else:
                notes |= task.future.result()
        undrawn = [path.name for path in stopped if not path.exists()]
        if failed:
            notes.add(f"Pictures that could not be drawn: {len(failed)}, the first {failed[0]}")
        if undrawn:
            notes.add(f"Pictures not drawn before the stop: {len(undrawn)}, the first {undrawn[0]}")
        for note in sorted(notes):
            self.log(note)
        self.tasks = {}
        return failed + [f"{path}: stopped" for path in stopped]

    def _kill(self) -> None:
        for drawer in self.drawers:
            drawer.kill()
            drawer.join()
            for path in self.tasks:
                utils.part_of(path, drawer.pid).unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A process spawned in its context does not import the running script, and so not torch."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def draw_to(path: Path, draw: Callable, *arguments) -> set[str]:
    """Lets draw(part, *arguments) write `path`; returns its warnings."""
    with warnings.catch_warnings(record=True) as caught, _without_backend():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # pyparsing's are both
        utils.replace_file(path, lambda part: draw(part, *arguments))
    return {str(warning.message) for warning in caught}


@contextlib.contextmanager
def _without_backend() -> Iterator[None]:
    """Hides MPLBACKEND while matplotlib is loaded: it may name a package that this Python lacks."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _start_drawing() -> None:
    """Ignores Ctrl-C and SIGTERM, which reach all processes of a run, to finish the picture.

    The process watches for the end of a killed run itself, since nothing else would end it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)  # the training goes first
    threading.Thread(target=_end_with_run, daemon=True).start()


def _end_with_run() -> None:
    parent_process().join()
    os._exit(1)
