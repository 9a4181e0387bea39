"""The step as a CUDA graph: some 150 kernels in one launch.

step = captured(step, 128)      # called as before; on one GPU a graph, elsewhere the step itself
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine.step import Output, Step


class CudaGraph:
    """A function of tensors: run it, record it, replay it on new values."""

    def __init__(self, device: torch.device):
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(device)

    def run(self, function: Callable, *tensors: Tensor) -> Output:
        """Calls it on the recording's stream, where torch's libraries set up what they need."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            output = function(*tensors)
        current.wait_stream(self.stream)
        return output

    def record(self, function: Callable, *tensors: Tensor) -> None:
        """Computes nothing yet; raises an error if the function cannot be captured."""
        gc.collect()  # an older graph that is freed meanwhile would end the capture
        capture = torch.cuda.graph(
            self.graph,
            stream=self.stream,
            capture_error_mode="thread_local",  # loaders' threads may allocate in the meantime
        )
        try:
            # The outer context leaves the stream, and its device, after a failure too.
            with torch.cuda.stream(self.stream), capture:
                self.output = function(*tensors)
        except BaseException:
            self._free_generator()
            raise

    def _free_generator(self) -> None:
        """A new state for the generator: a capture that CUDA has ended holds the old one."""
        device = self.stream.device
        generator = torch.cuda.default_generators[device.index]
        fresh = torch.Generator(device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())

    def replay(self) -> Output:
        self.graph.replay()
        return self.output


class CapturedStep(Step):
    """A step that replays a CUDA graph of itself, for batches of one size.

    The first few of these, and batches of any other size, run as in Step. Learning rates may
    change between steps. If another number of a parameter group changes, or the capture fails, all
    further steps run as in Step, and `notice` is told why.
    """

    EAGER = 3  # steps before the capture, in which libraries and compilers choose their kernels

    def __init__(
        self,
        step: Step,
        batch_size: int,
        notice: Callable[[str], object],
        new_graph: Callable[[torch.device], CudaGraph] = CudaGraph,
    ):
        super().__init__(**vars(step))
        self.batch_size = batch_size
        self.notice = notice
        self.new_graph = new_graph
        self.given_up = False
        # A graph keeps numbers as they were, so learning rates are in tensors, filled when they
        # change.
        self.rates = [torch.full((), math.nan, device=self.device) for _ in self.groups()]
        self.filled = [math.nan] * len(self.rates)
        self._start_anew()
        for optimizer in self.optimizers.values():  # its new tensors are not those of the graph
            optimizer.register_load_state_dict_post_hook(self._start_anew)

    def _start_anew(self, *loaded) -> None:
        self.graph = self.new_graph(self.device)
        self.batch = None  # the graph's images and labels, once it is captured
        self.eager = self.EAGER

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def __call__(self, images: Tensor, labels: Tensor, size: int | None = None) -> Output:
        step = super().__call__
        if self.given_up:
            return step(images, labels, size)
        self._fill_rates()
        if len(images) != self.batch_size:
            with self._rates_in_tensors():
                output = step(images, labels, size)
            if self.batch is not None and self.device.type == "cuda":
                torch.cuda.empty_cache()  # the graph keeps the memory of its own
            return output
        if self.eager:
            self.eager -= 1
            with self._rates_in_tensors():
                return self.graph.run(step, images, labels)
        if self.batch is None:
            self._capture(step, images, labels)
        elif self.frozen != self._other_numbers():
            self._give_up("a number of an optimizer other than its learning rate has changed")
        if self.given_up:
            return step(images, labels, size)
        for static, given in zip(self.batch, (images, labels), strict=True):
            static.copy_(given)
        return self.graph.replay()

    def _capture(self, step: Callable, images: Tensor, labels: Tensor) -> None:
        self.batch = (images.clone(), labels.clone())
        self.frozen = self._other_numbers()
        try:
            with self._rates_in_tensors(capturable=True):
                self.graph.record(step, *self.batch)
        except Exception as error:  # its context is the cause, where a capture fails at its end
            self._give_up(str(error.__context__ or error).strip().partition("\n")[0])

    def _give_up(self, reason: str) -> None:
        self.given_up = True
        self.graph = None
        self.batch = None
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
        """In its context the groups have tensors as rates, and the `options` that they know."""
        before = [dict(group) for group in self.groups()]
        for group, rate in zip(self.groups(), self.rates, strict=True):
            known = {name: value for name, value in options.items() if name in group}
            group.update(lr=rate, **known)
        try:
            yield
        finally:
            for group, values in zip(self.groups(), before, strict=True):
                group.update(values)


def captured(step: Step, batch_size: int, notice: Callable[[str], object] = print) -> Step:
    """The step as a graph for batches of that size if it runs on one GPU; else the step itself."""
    if step.device.type != "cuda" or step.ranks.size > 1:
        return step
    return CapturedStep(step, batch_size, notice)
