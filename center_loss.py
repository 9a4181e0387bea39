"""Center loss: pulls every feature towards the learned center of its class.

Wen, Zhang, Li, Qiao: A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV
2016. This file needs nothing but torch, so it can be copied into any project.
"""

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.2.0"


def _squared(offsets: Tensor) -> Tensor:
    return (offsets * offsets).sum(-1)


def _euclidean(offsets: Tensor) -> Tensor:
    squares = _squared(offsets)
    # The slope of the root is infinite at 0; 1 in its place keeps all derivatives 0.
    on_center = squares == 0
    return squares.masked_fill(on_center, 1).sqrt().masked_fill(on_center, 0)


def _unit(vectors: Tensor) -> Tensor:
    norms = _euclidean(vectors)
    return vectors / norms.masked_fill(norms == 0, 1)[..., None]


# From offsets x - c (..., D) to distances (...).
DISTANCES = {"squared": _squared, "euclidean": _euclidean}

# From the count of a class in the batch to what divides its sum of offsets; None: the gradient.
CENTER_UPDATES = {
    "gradient": None,
    "paper": lambda counts: 1 + counts,
    "mean": lambda counts: counts,
}

Device = torch.device | str | int | None
Mask = Tensor | None  # (B,), or None where all samples are kept
MANY = 4096  # so many classes are counted without an array over all of them


class CenterLoss(nn.Module):
    r"""L = scale / B * sum_i d(x_i, c_{y_i}) / w_i, to be added to a classification loss.

    B features x_i have labels y_i, of which n_j belong to class j with the learned center c_j.
    d = max(|x - c| - radius, 0)^2 or, if "euclidean", its root; w_i = 1 or (class_average) n_{y_i}.

        >>> network, x, y = nn.Linear(8, 2), torch.randn(4, 8), torch.tensor([0, 1, 1, 2])
        >>> center_loss = CenterLoss(num_classes=3, feat_dim=2, use_gpu=False)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> optimizer_cent = torch.optim.SGD(center_loss.parameters(), lr=0.5)
        >>> loss = 0.01 * center_loss(network(x), y)  # + cross-entropy
        >>> loss.backward()
        >>> center_loss.rescale_center_grad(0.01)  # so that the weight does not slow the centers
        >>> optimizer.step(); optimizer_cent.step()

    Args:
        num_classes, feat_dim: C and D. The one parameter, ``centers``, is (C, D).
        use_gpu: put the centers on the current CUDA device if there is one; or a device for them.
        distance: "squared" or "euclidean" (with gradient 0 where a feature is its center).
        normalize: x / |x| and c / |c| for x and c; with scale=0.5, d is then 1 - cos(x, c).
        radius: features this close to their center are not pulled.
        scale: factor of the loss; the paper's loss has 0.5.
        class_average: divide each term by n_{y_i}.
        center_update: what the centers follow: see below.
        sparse: a sparse center gradient, so that a step costs the same for any C. For SGD without
            weight decay, SparseAdam and Adagrad.
        ignore_index: label of samples that count for nothing, as in ``cross_entropy``.
        device, dtype: of the centers. Half precision is for storage only.

    The features receive g * dL/dx, where g is the gradient that reaches the loss: λ in
    ``cross_entropy + λ * L``. The centers receive, by center_update:

        "gradient":  centers.grad = g * dL/dc
        "paper":     centers.grad = g * Delta, Delta_j = sum_{i: y_i = j} (c_j - x_i) / (1 + n_j)
        "mean":      the same, divided by n_j in place of 1 + n_j

    Delta is Eq. 4 of the paper and no gradient of L: each side sees the other as a constant, in
    double backward too. A radius shortens each c_j - x_i; normalize takes Delta through c / |c|.

    features (B, D) may be any floats, labels (B,) any integers; B = 0 gives 0. The loss is computed
    in float32, also under autocast, or in float64 if features or centers are. A wrong type is a
    TypeError, any other mistake a ValueError. On a GPU, a check of the labels' range would stall.

    With torch.distributed, every rank must call the loss: its value and centers.grad are those of
    the joined batch, whose parts may differ in size. As DistributedDataParallel averages over W
    ranks, weight it with λ * W and rescale by λ * W.
    """

    def __init__(
        self,
        num_classes: int = 10,
        feat_dim: int = 2,
        use_gpu: bool | str | torch.device = True,
        *,
        distance: str = "squared",
        normalize: bool = False,
        radius: float = 0.0,
        scale: float = 1.0,
        class_average: bool = False,
        center_update: str = "gradient",
        sparse: bool = False,
        ignore_index: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("feat_dim", feat_dim)):
            _check(name, size, Integral, "an integer of at least 1", lambda size: size >= 1)
        updates = tuple(CENTER_UPDATES)
        _check("distance", distance, str, f"one of {tuple(DISTANCES)}", DISTANCES.__contains__)
        _check("radius", radius, Real, "a finite number >= 0", lambda r: 0 <= r < math.inf)
        _check("scale", scale, Real, "a finite number > 0", lambda s: 0 < s < math.inf)
        _check("center_update", center_update, str, f"one of {updates}", updates.__contains__)
        if ignore_index is not None:
            _check("ignore_index", ignore_index, Integral, "an integer or None", lambda _: True)
        if dtype is not None:
            rule = "a floating-point dtype"
            _check("dtype", dtype, torch.dtype, rule, lambda dtype: dtype.is_floating_point)
        self.num_classes, self.feat_dim, self.use_gpu = num_classes, feat_dim, use_gpu
        self.distance, self.radius, self.scale = distance, radius, scale
        self.class_average, self.center_update, self.sparse = class_average, center_update, sparse
        self.ignore_index, self.normalize = ignore_index, normalize
        centers = torch.randn(num_classes, feat_dim)  # on the CPU: same start on any device
        if normalize:
            centers = _unit(centers)
        self.centers = nn.Parameter(centers.to(_choose_device(use_gpu, device), dtype))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of features (B, D) with integer labels (B,), each in [0, C)."""
        features, labels, kept = self._prepare(features, labels)
        return self._loss(features, self._look_up(labels, features.dtype), labels, kept)

    @torch.no_grad()
    def update_centers(self, features: Tensor, labels: Tensor, alpha: float = 0.5) -> None:
        """Move the centers as an SGD of their own with learning rate alpha >= 0 would, without λ.

        For centers in no optimizer: once a batch, before or after backward(), on every rank.
        """
        _check("alpha", alpha, Real, "a finite number >= 0", lambda alpha: 0 <= alpha < math.inf)
        features, labels, kept = self._prepare(features, labels)
        centers = self._look_up(labels, features.dtype)
        divisor = CENTER_UPDATES[self.center_update]
        if divisor and not self.normalize:
            counts = self._count(labels, kept)
            grad = self._offsets(centers, features, kept) / divisor(counts)[:, None]
        else:
            with torch.inference_mode(False), torch.enable_grad():
                features = features.detach().clone()  # those of inference mode have no graph
                centers = centers.clone().requires_grad_()
                loss = self._loss(features, centers, labels, kept)
                (grad,) = torch.autograd.grad(loss, centers)
        self._parameter().index_add_(0, labels, grad.to(self.centers.dtype), alpha=-alpha)

    @torch.no_grad()
    def start_from(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set each center to the mean of its class in batches of (features, labels).

        Classes without features stay; no gradients. Every rank must call it, with any number of
        batches of its own. With normalize: the direction of the mean direction.

            >>> center_loss = CenterLoss(3, 2, use_gpu=False)
            >>> center_loss.start_from([(torch.randn(4, 2), torch.tensor([0, 1, 1, 2]))])
        """
        centers = self._parameter()
        dtype = torch.promote_types(centers.dtype, torch.float32)
        sums = centers.new_zeros(self.num_classes, self.feat_dim + 1, dtype=dtype)
        for features, labels in batches:
            features = self._check_features(features)
            labels = self._check_labels(labels, features)
            if self.ignore_index is not None:
                kept = labels != self.ignore_index
                features, labels = features[kept], labels[kept]
            self._look_up(labels, dtype)  # refuses labels out of range
            if self.normalize:
                features = _unit(features)
            rows = F.pad(features, (0, 1), value=1)  # a last column of ones counts the samples
            sums.index_add_(0, labels, rows.to(dtype))
        if _world_size() > 1:
            dist.all_reduce(sums)
        sums, counts = sums[:, :-1], sums[:, -1:]
        means = _unit(sums) if self.normalize else sums / counts
        centers.copy_(means.to(centers.dtype).where(counts > 0, centers))

    def distances(self, features: Tensor) -> Tensor:
        """Return the distances (B, C) of features (B, D) from all centers, whatever the radius."""
        features = self._check_features(features)
        centers = self.centers.to(features.dtype)
        if self.normalize:
            features, centers = _unit(features), _unit(centers)
        return pairwise(features, centers, self.distance)

    def rescale_center_grad(
        self, weight: float | None = None, lr_ratio: float = 1.0, *, alpha: float | None = None
    ) -> None:
        """Multiply centers.grad, dense or sparse, by lr_ratio / weight, between backward and step.

        weight > 0 is λ (alpha: its old name). With one optimizer for all, lr_ratio >= 0 is the
        centers' learning rate over its own. Without a gradient, RuntimeError.
        """
        weight = alpha if weight is None else weight
        if weight is None:
            raise TypeError("rescale_center_grad needs the weight λ of this loss")
        if not 0 < weight < math.inf:
            why = "at λ = 0 there is no gradient, so leave the centers alone"
            raise ValueError(f"weight (λ) must be finite and > 0, got {weight!r}: {why}")
        if not 0 <= lr_ratio < math.inf:
            raise ValueError(f"lr_ratio must be finite and >= 0, got {lr_ratio!r}")
        centers = self._parameter()
        if not centers.requires_grad:
            raise RuntimeError("centers.requires_grad is False: there is no gradient to rescale")
        if centers.grad is None:
            raise RuntimeError("centers.grad is None: call rescale_center_grad after backward()")
        centers.grad.mul_(lr_ratio / weight)

    def _parameter(self) -> Tensor:
        """Return the centers, to be changed in place."""
        if "centers" not in self._parameters:
            raise RuntimeError("centers are parametrized: change their original yourself")
        return self.centers

    def _prepare(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Mask]:
        """Return the checked batch of all ranks and what is kept of it; the others become 0."""
        features = self._check_features(features)
        labels = self._check_labels(labels, features)
        if _world_size() > 1:
            features, labels = _join_ranks(features, labels)
        if self.ignore_index is None:
            return features, labels, None
        kept = labels != self.ignore_index
        return features.where(kept[:, None], 0), labels.where(kept, 0), kept

    def _loss(self, features: Tensor, centers: Tensor, labels: Tensor, kept: Mask) -> Tensor:
        """Return the loss of features (B, D), each with its center (B, D)."""
        divisor = CENTER_UPDATES[self.center_update] if centers.requires_grad else None
        offsets = self._offsets(features, centers.detach() if divisor else centers, kept)
        counts = self._count(labels, kept) if divisor or self.class_average else None
        if self.distance == "squared" and not self.class_average:
            distances = offsets * offsets  # (B, D): one sum in place of two
        else:
            distances = DISTANCES[self.distance](offsets)
            distances = distances / counts if self.class_average else distances
        size = max(labels.shape[0], 1) if kept is None else kept.sum().clamp(min=1)
        loss = distances.sum() / (size / self.scale)
        if divisor:  # half of pull has the gradient Delta; its value must not count
            offsets = self._offsets(features.detach(), centers, kept)
            pull = (offsets * offsets / divisor(counts)[:, None]).sum()
            loss = loss.add(pull - pull.detach(), alpha=0.5)
        return loss

    def _count(self, labels: Tensor, kept: Mask) -> Tensor:
        """Return how many samples of the batch have the class of each (B,)."""
        classes = labels if kept is None else labels.where(kept, self.num_classes)
        if self.num_classes < MANY:
            counts = classes.new_zeros(self.num_classes + 1)
            counts = counts.index_add(0, classes, torch.ones_like(classes))
            return counts.index_select(0, classes)
        ordered, classes = classes.sort().values, classes.contiguous()
        after = torch.searchsorted(ordered, classes, right=True)
        return after - torch.searchsorted(ordered, classes)

    def _offsets(self, features: Tensor, centers: Tensor, kept: Mask) -> Tensor:
        """Return the part of x - c (B, D) beyond the radius; 0 for samples that are not kept."""
        if self.normalize:
            features, centers = _unit(features), _unit(centers)
        # Subtract, then square: |x|^2 + |c|^2 - 2xc would cancel where x is near c.
        offsets = features - centers
        if kept is not None:
            offsets = offsets.masked_fill(~kept[:, None], 0)
        if self.radius:
            share = 1 - self.radius / _euclidean(offsets).clamp(min=self.radius)
            offsets = offsets * share[:, None]
        return offsets

    def _check_features(self, features: Tensor) -> Tensor:
        """Return them in the type that the loss is computed in."""
        centers = self.centers
        _check_tensor("features", features, centers.device)
        if not features.is_floating_point():
            raise TypeError(f"features must be floats, got {features.dtype}")
        shape = features.shape
        if len(shape) != 2 or shape[1] != self.feat_dim:
            hint = ": feat_dim is 2 (the default)" if self.feat_dim == 2 else ""
            hint = ": flatten(0, 1) features and labels" if len(shape) == 3 else hint
            rule = f"must have shape (B, {self.feat_dim})"
            raise ValueError(f"features {rule}, got {tuple(shape)}{hint}")
        wide = torch.float64 in (features.dtype, centers.dtype)
        return features.double() if wide else features.float()

    def _check_labels(self, labels: Tensor, features: Tensor) -> Tensor:
        """Return them as int64."""
        _check_tensor("labels", labels, features.device)
        dtype = labels.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {dtype}")
        size, shape = features.shape[0], tuple(labels.shape)
        if shape != (size,):
            hint = ": squeeze(1) them" if shape == (size, 1) else ""
            raise ValueError(f"labels must have shape ({size},), got {shape}{hint}")
        return labels.long()

    def _look_up(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the centers (B, D) of labels (B,)."""
        try:
            return F.embedding(labels, self.centers, sparse=self.sparse).to(dtype)
        except IndexError as error:
            try:
                wrong = labels[(labels < 0) | (labels >= self.num_classes)].min().item()
            except RuntimeError:  # vmap hides them
                raise error from None
            rule = f"labels must be in [0, {self.num_classes})"
            raise ValueError(f"{rule}, got {wrong}") from error


def pairwise(
    features: Tensor, centers: Tensor, distance: str = "squared", block: int = 2**20
) -> Tensor:
    """Return the distances (B, C) of features (B, D) from centers (C, D), block numbers a time."""
    from torch.utils.checkpoint import checkpoint  # torch 2.5 takes a third of a second to load it

    def distances(features: Tensor, centers: Tensor) -> Tensor:
        return DISTANCES[distance](features[:, None] - centers)

    parts = centers.split(max(1, block // max(1, features.numel())))
    if len(parts) == 1:
        return distances(features, centers)
    # A checkpoint computes the offsets (B, C, D) again in backward() instead of keeping them.
    done = [checkpoint(distances, features, part, use_reentrant=False) for part in parts]
    return torch.cat(done, 1)


def _check(name: str, value: object, kind: type, rule: str, holds: Callable[..., bool]) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {rule}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _check_tensor(name: str, value: Tensor, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like centers, got {value.device}")


def _choose_device(use_gpu: bool | str | torch.device, device: Device) -> torch.device | None:
    if isinstance(use_gpu, str | torch.device):
        if device is not None:
            both = f"{device!r} and {use_gpu!r}"
            raise ValueError(f"device must be left out where use_gpu is a device, got {both}")
        device = use_gpu
    elif device is None:
        return torch.device("cuda") if use_gpu and torch.cuda.is_available() else None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that torch knows, got {device!r}") from error


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _join_ranks(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Join the batches of all ranks in rank order; only this rank's features carry gradients."""

    def share(own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(_world_size())]
        dist.all_gather(parts, own)
        return parts

    sizes = torch.cat(share(torch.tensor([labels.shape[0]], device=labels.device))).tolist()

    def gather(rows: Tensor) -> list[Tensor]:
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # all_gather wants equal shapes
        padded[: rows.shape[0]] = rows
        return [part[:size] for part, size in zip(share(padded), sizes, strict=True)]

    parts = gather(features.detach())
    parts[dist.get_rank()] = features
    return torch.cat(parts), torch.cat(gather(labels))
