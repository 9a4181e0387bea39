"""The processes of torchrun, and the signals that ask a run to stop."""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Interrupted(Exception):
    """A signal asks to stop in the middle of a pass over batches."""


class StopRequest:
    """In its context, the first SIGINT or SIGTERM only sets `signal`, which is checked between batches.

    A second SIGINT interrupts at once.
    """

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self.handlers = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def is_urgent(self) -> bool:
        """A cluster's SIGTERM is followed by SIGKILL: there is no time to draw what is missing."""
        return self.signal == signal.SIGTERM

    def watch(self, batches: Iterable, ranks: "Ranks") -> Iterator:
        """The batches; raises Interrupted after the one in which a signal has reached any rank."""
        for batch in batches:
            yield batch
            if ranks.any(self.signal):
                raise Interrupted

    def _note(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Ranks(NamedTuple):
    """This process among those that torchrun started; without torchrun it is the only one."""

    rank: int = 0
    size: int = 1
    local: int | None = None  # on this machine

    @classmethod
    def of_environment(cls) -> "Ranks":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return (
            cls(*(int(os.environ[name]) for name in names))
            if all(name in os.environ for name in names)
            else cls()
        )

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

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets rank 0 through before the others: for downloads."""
        if self.size > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.rank == 0:
            dist.barrier()

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a batch: every row goes to exactly one rank."""
        return batch[self.rank :: self.size]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, number: int | None) -> int:
        """The largest of the ranks' numbers; None counts as 0."""
        if self.size == 1:
            return number or 0
        largest = torch.tensor(number or 0)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in rank order; the ranks may have different numbers of them."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)

    def check_equal(self, name: str, values: torch.Tensor) -> None:
        """Raises RunError if the ranks' values differ, as far as their sums show."""
        sums = torch.stack([values.double().sum(), values.double().square().sum()]).cpu()
        if len(self.gather(sums.unsqueeze(0)).unique(dim=0)) > 1:
            raise RuntimeError(f"the ranks' {name} are no longer the same")

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients and BatchNorm over the joined batch; without other ranks, as it is."""
        if self.size == 1:
            return model
        if next(model.parameters()).is_cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:  # torch's SyncBatchNorm needs a GPU
            for module in model.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = BatchNormOverRanks
        return nn.parallel.DistributedDataParallel(model)


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, through which gradients go back to all of them."""

    @staticmethod
    def forward(context, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    backward = forward


class BatchNormOverRanks(nn.BatchNorm2d):
    """BatchNorm2d over the joined batch of all ranks, on CPUs, which torch's SyncBatchNorm does not support."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(images)
        dtype, images = images.dtype, images.to(torch.promote_types(images.dtype, torch.float32))
        over, count = (0, 2, 3), images.new_tensor([images.numel() / images.shape[1]])
        total = SumOverRanks.apply(torch.cat([images.sum(over), count]))
        mean, count = total[:-1] / total[-1], total[-1].item()
        centered = images - mean.view(1, -1, 1, 1)
        variance = SumOverRanks.apply(centered.square().sum(over)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(dtype)
