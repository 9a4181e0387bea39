"""A stand-in for a CUDA graph where there is no GPU."""

from torch import Tensor

from engine.cuda_graph import CapturedStep
from engine.step import Output, Step


class StandIn:
    """As CudaGraph: a replay calls the function on the recorded tensors.

    With the numbers and the optimizers' tensors of the recording, which a graph keeps; what is in
    tensors, as learning rates are, is that of now.
    """

    def __init__(self, step: Step):
        self.optimizers = step.optimizers
        self.output = None
        self.replays = 0

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def run(self, function, *tensors: Tensor) -> Output:
        return function(*tensors)

    def record(self, function, *tensors: Tensor) -> None:
        self.function = function
        self.tensors = tensors
        self.numbers = [dict(group) for group in self.groups()]
        self.states = [dict(optimizer.state) for optimizer in self.optimizers.values()]

    def replay(self) -> Output:
        self.replays += 1
        numbers = [dict(group) for group in self.groups()]
        states = [dict(optimizer.state) for optimizer in self.optimizers.values()]
        self._use(self.numbers, self.states)
        output = self.function(*self.tensors)
        self._use(numbers, states)
        self.output = self.output or output
        for static, value in zip(self.output, output, strict=True):
            static.copy_(value)
        return self.output

    def _use(self, numbers: list[dict], states: list[dict]) -> None:
        for group, values in zip(self.groups(), numbers, strict=True):
            group.update(values)
        for optimizer, state in zip(self.optimizers.values(), states, strict=True):
            optimizer.state.update(state)


def captured(
    step: Step, batch_size: int, notice=print, kind=CapturedStep, graph=StandIn
) -> CapturedStep:
    """As engine.cuda_graph.captured on a GPU, whose optimizers are fused."""
    for optimizer in step.optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = True
    return kind(step, batch_size, notice, lambda device: graph(step))
