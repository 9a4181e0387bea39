"""The processes that torchrun starts, and the signals that ask a run to stop."""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class RanksError(Exception):
    """The environment is not as torchrun sets it: one line for the user."""


class Interrupted(Exception):
    """A signal asks to stop in the middle of a pass over batches."""


class StopRequest:
    """In its context the first SIGINT or SIGTERM only sets `signal`, read between batches.

    A single process that waits for a batch is interrupted at once, since that may take for ever; a
    second SIGINT always interrupts. In a thread no signal arrives.
    """

    def __init__(self, ranks: "Ranks"):
        self.ranks = ranks
        self.signal = 0
        self.waiting = False
        self.handlers = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, OSError):  # in a thread, or not of this system
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def requested(self) -> int:
        """The signal that has reached any rank; 0: none."""
        return self.ranks.largest(self.signal)

    def urgent(self) -> bool:
        """Whether there is no time to draw: a cluster's SIGTERM is followed by SIGKILL."""
        return self.signal == signal.SIGTERM

    def watch(self, batches: Iterable) -> Iterator:
        """The batches; raises Interrupted after the one in which a signal has reached any rank."""
        iterator = iter(batches)
        while True:
            if self.requested():
                raise Interrupted
            self.waiting = self.ranks.size == 1
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waiting = False
            yield batch

    def _note(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.waiting:
            raise Interrupted


class Ranks(NamedTuple):
    """This process among those of torchrun; without torchrun it is the only one."""

    rank: int = 0
    size: int = 1
    local: int | None = None  # on this machine

    @classmethod
    def of_environment(cls) -> "Ranks":
        """RanksError, with its name, where a variable of torchrun's is missing or wrong."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        numbers = [os.environ.get(name, "") for name in names]
        if not any(name in os.environ for name in names):
            return cls()
        for name, number in zip(names, numbers, strict=True):
            if not number.isdecimal():
                _refuse(name, f"a number, got {number or 'nothing'}")
        rank, size, local = map(int, numbers)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if size > 1 and not os.environ.get(name):
                _refuse(name, f"set where WORLD_SIZE is {size}")
        return cls(rank, size, local)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """In its context the ranks can communicate: by NCCL between GPUs, by gloo between CPUs."""
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield
        finally:
            if self.size > 1:
                dist.destroy_process_group()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets rank 0 through before the others: for downloads."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a batch: every row goes to exactly one rank."""
        return batch[self.rank :: self.size]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in rank order; the ranks may have different numbers of them."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients and BatchNorm over the batch of all ranks."""
        if self.size == 1:
            return model
        if next(model.parameters()).is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:  # torch's SyncBatchNorm needs a GPU
            for module in model.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = BatchNormOverRanks
        return nn.parallel.DistributedDataParallel(model)


def _refuse(name: str, rule: str):
    raise RanksError(
        f"{name} must be {rule}: start the ranks by torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK"
    )


class BatchNormOverRanks(nn.BatchNorm2d):
    """BatchNorm2d over the batch of all ranks, on CPUs, where torch has no SyncBatchNorm."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(images)
        from torch.distributed.nn.functional import all_reduce  # gradients go through it

        dtype = images.dtype
        images = images.to(torch.promote_types(dtype, torch.float32))
        over = (0, 2, 3)
        pixels = images.new_tensor([images.numel() / images.shape[1]])
        total = all_reduce(torch.cat([images.sum(over), pixels]))
        mean = total[:-1] / total[-1]
        count = total[-1].item()
        centered = images - mean.view(1, -1, 1, 1)
        variance = all_reduce(centered.square().sum(over)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(dtype)
