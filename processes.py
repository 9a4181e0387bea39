"""Other processes: signals that ask this one to stop, and the ranks that torchrun has started beside it."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from utils import RunError


class StopRequest:
    """In its context, the first SIGINT or SIGTERM only sets `signal`, which the training looks at between batches.

    A second SIGINT interrupts at once.
    """

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Ranks(NamedTuple):
    """This process among those that torchrun has started; one alone without it."""

    rank: int = 0
    size: int = 1
    local: int | None = None  # on this machine

    @classmethod
    def of_environment(cls) -> "Ranks":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ[name]) for name in names)) if all(name in os.environ for name in names) else cls()

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """In its context, the ranks can speak to each other: NCCL between GPUs, gloo between CPUs."""
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield
        finally:
            if self.size > 1:
                dist.destroy_process_group()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets rank 0 through, and then the others: for downloads."""
        if self.size > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, number: int | None) -> int:
        """The largest of the ranks' numbers, of which None is 0."""
        if self.size == 1:
            return number or 0
        largest = torch.tensor(number or 0)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, which may have different numbers of them, in the order of the ranks."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)

    def check_equal(self, name: str, values: torch.Tensor) -> None:
        """Raises RunError where a rank's values differ, as far as their sums tell."""
        sums = torch.stack([values.double().sum(), values.double().square().sum()]).cpu()
        if len(self.gather(sums.unsqueeze(0)).unique(dim=0)) > 1:
            raise RunError(f"the ranks' {name} are no longer the same")
