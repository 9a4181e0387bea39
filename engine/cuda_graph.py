"""The step as a CUDA graph."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.step import Output, Step


class CudaGraph:
    """A CUDA graph of a function of tensors: run the function, record it, then replay it on the tensors' new values."""

    def __init__(self):
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run(self, function: Callable, *tensors: Tensor) -> Output:
        """Calls it on the recording's stream, where torch's libraries then set up what they need."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = function(*tensors)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def record(self, function: Callable, *tensors: Tensor) -> None:
        """Computes nothing yet; raises an error if the function cannot be captured."""
        # The outer context leaves the stream after a failure too. Loaders' threads may allocate in the meantime.
        with (
            torch.cuda.stream(self.stream),
            torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            self.output = function(*tensors)

    def replay(self) -> Output:
        self.graph.replay()
        return self.output


class CapturedStep(Step):
    """A step that replays a CUDA graph of itself: some 150 kernels in one launch, for batches of one size.

    The first few of these, and batches of any other size, run as in Step. Learning rates may change between steps. If
    another number of a parameter group changes, or the capture fails, all further steps run as in Step, and `notice` is
    told why.
    """

    EAGER = 3  # steps before the capture, in which libraries and compilers choose their kernels

    def __init__(
        self, step: Step, batch_size: int, notice: Callable[[str], object], graph: CudaGraph
    ):
        vars(self).update(vars(step))
        self.batch_size, self.notice, self.graph = batch_size, notice, graph
        self.eager, self.batch = self.EAGER, None
        # A graph keeps numbers as they were at its capture, so learning rates are in tensors, filled when they change.
        self.rates = [torch.full((), math.nan, device=self.device) for _ in self.groups()]
        self.filled = [math.nan] * len(self.rates)

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def __call__(self, images: Tensor, labels: Tensor, size: int | None = None) -> Output:
        if self.graph is None:
            return super().__call__(images, labels, size)
        self._fill_rates()
        if len(images) != self.batch_size:
            with self._rates_in_tensors():
                return super().__call__(images, labels, size)
        if self.eager:
            self.eager -= 1
            with self._rates_in_tensors():
                return self.graph.run(super().__call__, images, labels)
        if self.batch is None:
            self._capture(images, labels)
        elif self.frozen != self._other_numbers():
            self._give_up("a number of an optimizer other than its learning rate has changed")
        if self.graph is None:
            return super().__call__(images, labels, size)
        for static, given in zip(self.batch, (images, labels), strict=True):
            static.copy_(given)
        return self.graph.replay()

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.batch, self.frozen = (images.clone(), labels.clone()), self._other_numbers()
        try:
            with self._rates_in_tensors(capturable=True):
                self.graph.record(super().__call__, *self.batch)
        except Exception as error:  # its context is the cause, where a capture fails at its end
            self._give_up(str(error.__context__ or error).strip().partition("\n")[0])

    def _give_up(self, reason: str) -> None:
        self.graph = self.batch = None
        self.notice(f"The training goes on without a CUDA graph: {reason}")

    def _fill_rates(self) -> None:
        for index, group in enumerate(self.groups()):
            if group["lr"] != self.filled[index]:
                self.filled[index] = group["lr"]
                self.rates[index].fill_(group["lr"])

    def _other_numbers(self) -> list[dict]:
        return [
            {name: group[name] for name in group.keys() - {"params", "lr"}}
            for group in self.groups()
        ]

    @contextlib.contextmanager
    def _rates_in_tensors(self, **options: bool) -> Iterator[None]:
        """In its context the parameter groups have tensors as learning rates, and those of `options` that they know."""
        before = [dict(group) for group in self.groups()]
        for group, rate in zip(self.groups(), self.rates, strict=True):
            group.update(
                lr=rate, **{name: value for name, value in options.items() if name in group}
            )
        try:
            yield
        finally:
            for group, values in zip(self.groups(), before, strict=True):
                group.update(values)


def captured(step: Step, batch_size: int, notice: Callable[[str], object] = print) -> Step:
    """The step as a CUDA graph for batches of that size if it runs on one GPU; else the step itself."""
    if step.device.type != "cuda" or step.ranks.size > 1:
        return step
    return CapturedStep(step, batch_size, notice, CudaGraph())
