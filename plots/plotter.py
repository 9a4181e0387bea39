"""Drawing in background processes."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from types import ModuleType

import utils


class Plotter:
    """Draws in background processes while the training goes on; `finish` waits for them.

    What could not be written is said once and tried again by `retry`. An interrupt in its context
    ends the processes, and so does `finish` if asked to stop.
    """

    def __init__(self, log: Callable[[str], None] = print):
        self.log = log
        self.pool: ProcessPoolExecutor | None = None
        self.drawers = set()
        self.drawings: dict[Path, tuple] = {}  # of each picture, its function and arguments
        self.futures: dict[Path, Future] = {}
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
        self.drawings[path] = (draw, *arguments)
        if self.pool is None:
            workers = max(1, min(4, (os.cpu_count() or 1) // 2))
            self.pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_drawing)
        before = set(active_children())
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("")  # else processes import the script, and so torch
        try:
            self.futures[path] = self.pool.submit(draw_to, path, draw, *arguments)
        except (BrokenProcessPool, OSError) as error:  # no process can start: training goes on
            self.futures[path] = Future()
            self.futures[path].set_exception(error)
        finally:
            sys.modules["__main__"] = script
        self.drawers |= set(active_children()) - before

    def save(self, path: Path, arrays: dict) -> bool:
        """Writes arrays, in a directory that may be missing; returns whether that worked."""
        self.unsaved[path] = arrays
        try:
            path.parent.mkdir(exist_ok=True)
            utils.save_arrays(path, arrays)
        except (OSError, utils.RunError) as error:
            self._complain(error)
            return False
        del self.unsaved[path]
        return True

    def retry(self) -> None:
        """Tries again what could not be written."""
        for path, arrays in list(self.unsaved.items()):
            self.save(path, arrays)
        for path, drawing in self.drawings.items():
            error = self.futures[path].done() and self.futures[path].exception()
            if error:
                self._complain(error)
                self(path, *drawing)

    def _complain(self, error: BaseException) -> None:
        if not self.has_complained:
            self.log(f"A picture could not be written and is tried again later: {error}")
        self.has_complained = True

    def finish(self, stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Waits until all is drawn or `stop` returns True; returns, and logs, what is missing."""
        pending = set(self.futures.values())
        while pending and not stop():
            pending = wait(pending, timeout=0.1).not_done
        if pending:
            self._kill()
        errors = [f"{path}: could not be written" for path in self.unsaved]
        for path, future in self.futures.items():
            error = "stopped" if future in pending else future.exception()
            if error:
                errors.append(f"{path}: {' '.join(str(error).split())}")
        if errors:
            self.log(f"Pictures that could not be drawn: {len(errors)}, the first {errors[0]}")
        self.drawings = {}
        self.futures = {}
        return errors

    def _kill(self) -> None:
        for drawer in self.drawers:
            drawer.kill()
            drawer.join()
            for path in self.drawings:
                utils.part_of(path, drawer.pid).unlink(missing_ok=True)


def draw_to(path: Path, draw: Callable, *arguments) -> None:
    """Lets draw(part, *arguments) write `path`."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may be of a package that this Python lacks
    utils.replace_file(path, lambda part: draw(part, *arguments))


def _start_drawing() -> None:
    """Ignores Ctrl-C and SIGTERM, which reach all processes of a run, to finish the picture.

    The process watches for the end of a killed run itself, since nothing else would end it.
    """
    warnings.simplefilter("ignore")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)  # the training goes first
    threading.Thread(target=_end_with_run, daemon=True).start()


def _end_with_run() -> None:
    parent_process().join()
    os._exit(1)
