"""Training without files, flags or prints: one update of network and centers, an epoch of them, a test, their metrics.

step = Step(net, center_loss, optimizers, weight=0.01)
output = step(images, labels)   # all still on the device; nothing waits
step = captured(step, 128)      # the same call; on a GPU a CUDA graph
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from center_loss import CenterLoss, pairwise
from processes import Ranks


class Output(NamedTuple):
    """What a step computed before its update of the weights, on the device. A captured step overwrites its last."""

    xent: Tensor  # scalar; over several ranks, this rank's share of the mean cross-entropy of the joined batch
    center: Tensor  # scalar, λ · center loss of the joined batch
    features: Tensor  # (B, D)
    predictions: Tensor  # (B,)
    means: Tensor  # (3,), this rank's part of mean cross-entropy, λ · center loss and share of correct predictions


class Step:
    """One update of a network and of its class centers with cross-entropy + λ · center loss.

    Args:
        net: images (B, C, H, W) to features (B, D) and logits (B, C); may be compiled or parallel.
        center_loss: whose centers are in one of the optimizers.
        optimizers: by name; all of them take a step.
        weight: λ. At 0 there is no center loss, and the centers stay where they are.
        lr_ratio: the centers' learning rate over the optimizer's, if network and centers share one optimizer.
        label_smoothing: share of the cross-entropy's target that is spread evenly over all classes.
        amp: run the network under bfloat16 autocast.
        ranks: the processes that share each batch.
    """

    def __init__(
        self,
        net: nn.Module,
        center_loss: CenterLoss,
        optimizers: Mapping[str, Optimizer],
        *,
        weight: float,
        lr_ratio: float = 1.0,
        label_smoothing: float = 0.0,
        amp: bool = False,
        ranks: Ranks = Ranks(),  # noqa: B008  (immutable)
    ):
        self.net, self.center_loss, self.optimizers = net, center_loss, optimizers
        self.weight, self.lr_ratio, self.label_smoothing = weight, lr_ratio, label_smoothing
        self.amp, self.ranks = amp, ranks

    @property
    def device(self) -> torch.device:
        return self.center_loss.centers.device

    def __call__(self, images: Tensor, labels: Tensor, size: int | None = None) -> Output:
        """Takes the step. `size`: samples in the joined batch of all ranks, by default those of this one."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            features, logits = self.net(images)
        xent = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        xent = xent / (size or len(labels))
        center = self.weight * self.center_loss(features, labels) if self.weight else torch.zeros_like(xent)

        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        # DistributedDataParallel averages the ranks' gradients, of which the sum is wanted.
        (self.ranks.size * (xent + center)).backward()
        if self.weight:
            self.center_loss.rescale_center_grad(self.ranks.size * self.weight, self.lr_ratio)
        for optimizer in self.optimizers.values():
            optimizer.step()
        xent, center, predictions = xent.detach(), center.detach(), logits.detach().argmax(1)
        correct = (predictions == labels).sum() / (size or len(labels))
        means = torch.stack([xent, center / self.ranks.size, correct])
        return Output(xent, center, features.detach(), predictions, means)


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
        with torch.cuda.stream(self.stream), torch.cuda.graph(
            self.graph, stream=self.stream, capture_error_mode="thread_local"
        ):  # fmt: skip
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

    def __init__(self, step: Step, batch_size: int, notice: Callable[[str], object], graph: CudaGraph):
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
        return [{name: group[name] for name in group.keys() - {"params", "lr"}} for group in self.groups()]

    @contextlib.contextmanager
    def _rates_in_tensors(self, **options: bool) -> Iterator[None]:
        """In its context the parameter groups have tensors as learning rates, and those of `options` that they know."""
        before = [dict(group) for group in self.groups()]
        for group, rate in zip(self.groups(), self.rates, strict=True):
            group.update(lr=rate, **{name: value for name, value in options.items() if name in group})
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


@dataclass
class Epoch:
    """Running sums of a pass over the training data; a checkpoint holds these fields of an interrupted one."""

    batches: int = 0
    samples: int = 0
    sums: Tensor | None = None  # (3,) float64, over the samples: cross-entropy, λ · center loss, correct predictions
    kept: list[Tensor] | None = None  # features (N, D), labels (N,) and predictions (N,), where wanted from the start
    rng: Tensor | None = None  # random state after the last step, from which dropout goes on

    def results(self) -> dict:
        """The mean losses, the accuracy (%) and, where they were kept, features, labels and predictions.

        Waits for the device.
        """
        xent, center, correct = (self.sums / self.samples).tolist()
        kept = zip(("features", "labels", "predictions"), self.kept or (), strict=False)
        return dict(loss=xent + center, xent=xent, center=center, accuracy=100 * correct, **dict(kept))


class Progress(NamedTuple):
    """What `train_epoch` passes to `stop` after each step."""

    epoch: Epoch  # whose sums are this rank's
    latest: Tensor  # (3,), `means` of the step's Output
    ranks: Ranks

    def losses(self) -> tuple[float, float, float, float]:
        """Cross-entropy and λ · center loss of this step, and their means over the pass. Waits for the device."""
        latest, sums = self.ranks.total(torch.stack([self.latest, self.epoch.sums])).tolist()
        return *latest[:2], *(total / self.epoch.samples for total in sums[:2])


def train_epoch(
    step: Step,
    batches: Iterable[tuple[Tensor, Tensor, int]],
    scheduler: LRScheduler,
    begun: Epoch | None = None,
    keep: bool = False,
    stop: Callable[[Progress], bool] = lambda progress: False,
) -> Epoch:
    """One pass over the batches, or until `stop`, called after each step, returns True.

    Args:
        batches: images, labels and the size of the batch over all ranks.
        scheduler: takes a step after each of the optimizers'.
        begun: an interrupted pass, of which `batches` is the rest.
        keep: gather features, labels and predictions as well, unless `begun` lacks those of its batches.

    Returns the sums over all ranks.
    """
    step.net.train()
    ranks, begun = step.ranks, begun or Epoch()
    epoch = Epoch(begun.batches, begun.samples, torch.zeros(3, dtype=torch.float64, device=step.device))
    kept = []
    if begun.batches:
        first, keep = ranks.rank == 0, keep and begun.kept is not None
        if first:  # the sums of all ranks go on in one of them
            epoch.sums += begun.sums.to(step.device)
        kept = [[(each if first else each[:0]).to(step.device) for each in begun.kept]] if keep else []

    for images, labels, size in _from_state(begun.rng, batches):
        output = step(images, labels, size)
        scheduler.step()
        epoch.batches, epoch.samples = epoch.batches + 1, epoch.samples + size
        epoch.sums += output.means * size
        if keep:
            kept.append([output.features.clone(), labels, output.predictions.clone()])
        if stop(Progress(epoch, output.means, ranks)):
            break

    # Ranks with unequal shares draw unequal numbers for dropout, but the order of the next batches must be the same.
    epoch.rng = ranks.gather(torch.get_rng_state().unsqueeze(0))[0]
    torch.set_rng_state(epoch.rng)
    epoch.sums = ranks.total(epoch.sums)
    epoch.kept = [ranks.gather(torch.cat(each)) for each in zip(*kept, strict=True)] if keep else None
    return epoch


def _from_state(rng: Tensor | None, batches: Iterable) -> Iterator:
    """The batches; the random state becomes `rng` once their order has been drawn from the one before."""
    batches = iter(batches)
    batch = next(batches, None)
    if rng is not None:
        torch.set_rng_state(rng)
    while batch is not None:
        yield batch
        batch = next(batches, None)


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[tuple], amp: bool = False, ranks: Ranks = Ranks()) -> dict:  # noqa: B008
    """Features (N, D), logits (N, C), labels and predictions (N,) of a network on the batches of all ranks.

    They are in the order of the data set.
    """
    model.eval()
    outputs, seen = [], 0
    for images, labels, size in batches:
        rows = ranks.share(torch.arange(seen, seen + size, device=labels.device))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            outputs.append((*model(images), labels, rows))
        seen += size
    *gathered, rows = (ranks.gather(torch.cat(each)) for each in zip(*outputs, strict=True))
    order = rows.argsort()  # that of the data set
    features, logits, labels = (each[order] for each in gathered)
    return dict(features=features, logits=logits, labels=labels, predictions=logits.argmax(1))


@torch.no_grad()
def test(model: nn.Module, batches: Iterable[tuple], amp: bool = False, ranks: Ranks = Ranks()) -> dict:  # noqa: B008
    """The outputs of `predict`, with the cross-entropy and the accuracy (%)."""
    tested = predict(model, batches, amp, ranks)
    return tested | dict(xent=F.cross_entropy(tested["logits"], tested["labels"]).item(),
                         accuracy=percentage(tested["predictions"] == tested["labels"]))  # fmt: skip


@torch.no_grad()
def center_metrics(features: Tensor, labels: Tensor, centers: Tensor) -> dict[str, float]:
    """Accuracy (%) of the nearest center, mean distance from one's own center, smallest distance of two centers."""
    nearest = [pairwise(some, centers).argmin(1) for some in features.split(4096)]
    return dict(
        nearest_center_accuracy=percentage(torch.cat(nearest) == labels),
        intra_distance=(features - centers[labels]).norm(dim=1).mean().item(),
        inter_distance=torch.pdist(centers).min().item(),
    )


def percentage(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean feature of each class (num_classes, D); 0 for a class without features."""
    sums = torch.zeros(num_classes, features.shape[1], device=features.device).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num_classes).clamp(min=1).unsqueeze(1)


def state_sum(module: nn.Module) -> float:
    """The sum of a module's state: finite where all of it is. Waits for the device."""
    return sum(tensor.double().sum() for tensor in module.state_dict().values()).item()
