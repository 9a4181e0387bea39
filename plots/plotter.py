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
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import ModuleType

import utils


class Plotter:
    """Draws in background processes while the training goes on; `finish` waits for them, logs and returns their errors.

    An interrupt in its context kills them, and so does `finish` if asked to stop.
    """

    def __init__(self, log: Callable[[str], None] = print):
        self.log, self.pool, self.tasks, self.drawers = log, None, [], set()

    def __enter__(self) -> "Plotter":
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        if kind is KeyboardInterrupt:
            self._kill()
        if self.pool:
            self.pool.shutdown()  # at the interpreter's end its thread might close what Python then still writes to

    @property
    def paths(self) -> set[Path]:
        return {path for path, _ in self.tasks}

    def __call__(self, path: Path, draw: Callable, *arguments) -> None:
        """Lets draw(part, *arguments) write `path`."""
        if self.pool is None:
            workers = max(1, min(4, (os.cpu_count() or 1) // 2))
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_drawing)
        before = set(active_children())
        try:
            with _without_main():
                task = self.pool.submit(draw_to, path, draw, *arguments)
        except (
            BrokenProcessPool
        ) as error:  # a drawing process has died: the training goes on without pictures
            task = Future()
            task.set_exception(error)
        self.drawers |= set(active_children()) - before
        self.tasks.append((path, task))

    def finish(self, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Waits until all is drawn or `stop` returns True; returns the error of each missing picture."""
        pending = {task for _, task in self.tasks}
        while pending and not stop():
            pending = wait(pending, timeout=0.1).not_done
        if pending:
            self._kill()
        failed = [
            (path, "stopped" if task in pending else task.exception()) for path, task in self.tasks
        ]
        errors = [f"{path}: {' '.join(str(error).split())}" for path, error in failed if error]
        notes = set().union(
            *(
                task.result()
                for _, task in self.tasks
                if task not in pending and not task.exception()
            )
        )
        for line in (
            *sorted(notes),
            *(f"A picture could not be drawn: {error}" for error in errors),
        ):
            self.log(line)
        self.tasks = []
        return errors

    def _kill(self) -> None:
        for drawer in self.drawers:
            drawer.kill()
            drawer.join()
            for path, _ in self.tasks:
                utils.part_of(path, drawer.pid).unlink(missing_ok=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """A process spawned in its context does not import the running script, main.py, and so not torch: seconds."""
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def draw_to(path: Path, draw: Callable, *arguments) -> set[str]:
    """Lets draw(part, *arguments) write `path`; returns its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # pyparsing's are both
        utils.replace_file(path, lambda part: draw(part, *arguments))
    return {str(warning.message) for warning in caught}


def _start_drawing() -> None:
    """Ignores Ctrl-C and SIGTERM, which reach all processes of a run, to finish the current picture.

    The process watches for the end of a killed run itself, since nothing else would end it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)  # the training goes first
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
