"""A stand-in for a CUDA graph where there is no GPU."""

from torch import Tensor

from engine.cuda_graph import CapturedStep
from engine.step import Output, Step


class StandIn:
    """As training.CudaGraph: a replay calls the function on the recorded tensors, with the numbers of the recording."""

    def __init__(self, optimizers):
        self.optimizers, self.output, self.replays = optimizers, None, 0

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def run(self, function, *tensors: Tensor) -> Output:
        return function(*tensors)

    def record(self, function, *tensors: Tensor) -> None:
        self.function, self.tensors = function, tensors
        self.numbers = [dict(group) for group in self.groups()]

    def replay(self) -> Output:
        self.replays += 1
        now = [dict(group) for group in self.groups()]
        for group, recorded in zip(self.groups(), self.numbers, strict=True):
            group.update(recorded)
        output = self.function(*self.tensors)
        for group, numbers in zip(self.groups(), now, strict=True):
            group.update(numbers)
        self.output = self.output or output
        for static, value in zip(self.output, output, strict=True):
            static.copy_(value)
        return self.output


def captured(
    step: Step, batch_size: int, notice=print, kind=CapturedStep, graph=StandIn
) -> CapturedStep:
    """As training.captured on a GPU, whose optimizers are fused."""
    for optimizer in step.optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = True
    return kind(step, batch_size, notice, graph(step.optimizers))
