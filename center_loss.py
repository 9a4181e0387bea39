"""Center loss: pulls every feature towards the learned center of its class.

Wen, Zhang, Li, Qiao: A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016.
This file needs nothing but torch, so it can be copied into any project.
"""

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.2.0"


def _squared(offsets: Tensor) -> Tensor:
    return offsets.pow(2).sum(-1)


def _euclidean(offsets: Tensor) -> Tensor:
    squares = _squared(offsets)
    # The slope of the root is infinite at 0; 1 in its place keeps all derivatives 0.
    on_center = squares == 0
    return squares.masked_fill(on_center, 1).sqrt().masked_fill(on_center, 0)


# From offsets x - c (..., D) to distances (...).
DISTANCES = {"squared": _squared, "euclidean": _euclidean}

# What a center's sum of offsets is divided by, as a function of the class's count in the batch; None: the centers
# receive the gradient of the loss.
CENTER_UPDATES = {
    "gradient": None,
    "paper": lambda counts: 1 + counts,
    "mean": lambda counts: counts,
}


class CenterLoss(nn.Module):
    r"""L = scale / B * sum_i d(x_i, c_{y_i}) / w_i, to be added to a classification loss.

    B features x_i have labels y_i, of which n_j belong to class j with the learned center c_j.
    d = max(|x - c| - radius, 0)^2 or, if "euclidean", its root; w_i = 1 or, with class_average, n_{y_i}.

        >>> network, x, y = nn.Linear(8, 2), torch.randn(4, 8), torch.tensor([0, 1, 1, 2])
        >>> center_loss = CenterLoss(num_classes=3, feat_dim=2, use_gpu=False)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> optimizer_cent = torch.optim.SGD(center_loss.parameters(), lr=0.5)
        >>> loss = 0.01 * center_loss(network(x), y)  # + cross-entropy
        >>> loss.backward()
        >>> center_loss.rescale_center_grad(0.01)  # centers move by their learning rate alone, whatever the weight
        >>> optimizer.step(); optimizer_cent.step()

    Args:
        num_classes, feat_dim: C and D, at least 1. The one parameter, ``centers``, has shape (C, D).
        use_gpu: put the centers on the current CUDA device if there is one; or a device to put them on.
        distance: "squared" or "euclidean" (with gradient 0 where a feature is its center).
        radius: features this close to their center are not pulled. Finite and >= 0.
        scale: factor of the loss, finite and > 0. The paper's loss has 0.5.
        class_average: divide each term by the number of samples of its class in the batch.
        center_update: what the centers follow, "gradient", "paper" or "mean": see below.
        sparse: give the centers a sparse gradient, which makes the cost of a step independent of C.
            For optimizers that accept one: SGD without weight decay, SparseAdam, Adagrad.
        ignore_index: label of samples that count for nothing, as in ``cross_entropy``.
        device, dtype: of the centers, as in torch's modules. Half precision is for storage, not for computing.

    The features always receive g * dL/dx, where g is the gradient that reaches the loss, so the weight λ in
    ``cross_entropy + λ * L``. What the centers receive depends on center_update:

        "gradient":  centers.grad = g * dL/dc
        "paper":     centers.grad = g * Delta,  Delta_j = sum_{i: y_i = j} (c_j - x_i) / (1 + n_j)
        "mean":      the same, divided by n_j in place of 1 + n_j

    Delta is Eq. 4 of the paper. It is no gradient of L: each side sees the other as a constant, in double
    backward too. A radius shortens each c_j - x_i by itself. Centers without requires_grad cost nothing.

    features (B, D) may have any float type, labels (B,) any integer type. The scalar loss is computed in
    float32, also for half precision and under autocast, or in float64 if features or centers are float64.
    B = 0 gives 0. A wrong type is a TypeError; a wrong shape, device, argument or label a ValueError. Labels are
    range-checked on the CPU only, since a check would stall a GPU: there, a wrong index fails inside torch.

    With torch.distributed initialised, the loss is that of one process over the batches of all ranks, which
    may differ in size: every rank must call it, and value, centers.grad and update_centers are the same on all.
    DistributedDataParallel averages the network's gradients over W ranks: weight this loss with λ * W and
    call ``rescale_center_grad(λ * W)`` to take the same steps as one process.
    """

    def __init__(
        self,
        num_classes: int = 10,
        feat_dim: int = 2,
        use_gpu: bool | str | torch.device = True,
        *,
        distance: str = "squared",
        radius: float = 0.0,
        scale: float = 1.0,
        class_average: bool = False,
        center_update: str = "gradient",
        sparse: bool = False,
        ignore_index: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(
            "num_classes", num_classes, Integral, "an integer of at least 1", lambda size: size >= 1
        )
        _check("feat_dim", feat_dim, Integral, "an integer of at least 1", lambda size: size >= 1)
        _check("distance", distance, str, f"one of {tuple(DISTANCES)}", DISTANCES.__contains__)
        _check(
            "radius", radius, Real, "a finite number >= 0", lambda radius: 0 <= radius < math.inf
        )
        _check("scale", scale, Real, "a finite number > 0", lambda scale: 0 < scale < math.inf)
        _check(
            "center_update",
            center_update,
            str,
            f"one of {tuple(CENTER_UPDATES)}",
            CENTER_UPDATES.__contains__,
        )
        if ignore_index is not None:
            _check("ignore_index", ignore_index, Integral, "an integer or None")
        if dtype is not None:
            _check(
                "dtype",
                dtype,
                torch.dtype,
                "a floating-point dtype",
                lambda dtype: dtype.is_floating_point,
            )
        self.num_classes, self.feat_dim, self.use_gpu = num_classes, feat_dim, use_gpu
        self.distance, self.radius, self.scale = distance, radius, scale
        self.class_average, self.center_update, self.sparse = class_average, center_update, sparse
        self.ignore_index = ignore_index
        centers = torch.randn(num_classes, feat_dim)  # on the CPU: same start on any device
        self.centers = nn.Parameter(centers.to(_choose_device(use_gpu, device), dtype))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of features (B, D) with integer labels (B,) in [0, num_classes)."""
        features, labels, kept = self._prepare(features, labels)
        centers = F.embedding(labels, self.centers, sparse=self.sparse).to(
            features.dtype
        )  # (B, D), one per sample
        return self._loss(features, centers, labels, kept)

    @torch.no_grad()
    def update_centers(self, features: Tensor, labels: Tensor, alpha: float = 0.5) -> None:
        """Move the centers by center_update as an SGD of their own, with learning rate alpha >= 0, would; without λ.

        For centers that are in no optimizer. Call it once a batch, before or after backward(), on every rank.

            >>> features, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 2])
            >>> center_loss = CenterLoss(3, 2, use_gpu=False).requires_grad_(False)
            >>> loss = 0.01 * center_loss(features, labels)  # + cross-entropy
            >>> center_loss.update_centers(features, labels, alpha=0.5)
        """
        _check("alpha", alpha, Real, "a finite number >= 0", lambda alpha: 0 <= alpha < math.inf)
        features, labels, kept = self._prepare(features, labels)
        with torch.enable_grad():
            centers = self.centers.detach()[labels].to(features.dtype).requires_grad_()  # (B, D)
            (grad,) = torch.autograd.grad(
                self._loss(features.detach(), centers, labels, kept), centers
            )
        self.centers.index_add_(0, labels, grad.to(self.centers.dtype), alpha=-alpha)

    def distances(self, features: Tensor) -> Tensor:
        """Return the distances (B, C) of features (B, D) from all centers, squared or euclidean, whatever the radius.

        ``center_loss.distances(features).argmin(1)`` are the nearest centers. Gradients reach features and centers.
        """
        features = self._check_features(features)
        return pairwise(features, self.centers.to(features.dtype), self.distance)

    def rescale_center_grad(self, alpha: float, lr_ratio: float = 1.0) -> None:
        """Multiply centers.grad, dense or sparse, by lr_ratio / alpha; call it between backward and step.

        alpha > 0 is the weight λ of this loss in the total. With one optimizer for network and centers, lr_ratio >= 0
        is the centers' learning rate over the optimizer's. Without a gradient to multiply, a RuntimeError.
        """
        if not 0 < alpha < math.inf:
            why = "the center gradient carries this weight; at weight 0 it is 0, so leave the centers alone"
            raise ValueError(f"alpha must be finite and > 0, got {alpha!r}: {why}")
        if not 0 <= lr_ratio < math.inf:
            raise ValueError(f"lr_ratio must be finite and >= 0, got {lr_ratio!r}")
        if self.centers.grad is None:
            raise RuntimeError("centers.grad is None: call rescale_center_grad after backward()")
        self.centers.grad.mul_(lr_ratio / alpha)

    def _prepare(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the checked batch of all ranks and which samples are kept (B,); ignored labels become 0."""
        features = self._check_features(features)
        labels = self._check_labels(labels, features)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            features, labels = _join_ranks(features, labels)
        if self.ignore_index is None:
            return features, labels, None
        kept = labels != self.ignore_index
        return features, labels.where(kept, 0), kept

    def _loss(
        self, features: Tensor, centers: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return the loss of features (B, D), each with its center (B, D)."""
        divisor = CENTER_UPDATES[self.center_update] if centers.requires_grad else None
        distances = DISTANCES[self.distance](
            self._offsets(features, centers.detach() if divisor else centers, kept)
        )
        if self.class_average or divisor:
            classes = labels if kept is None else labels.where(kept, -1)
            ordered = classes.sort().values  # counts without an array over all classes
            counts = torch.searchsorted(ordered, classes, right=True) - torch.searchsorted(
                ordered, classes
            )
        if self.class_average:
            distances = distances / counts
        loss = (
            self.scale
            * distances.sum()
            / (max(labels.shape[0], 1) if kept is None else kept.sum().clamp(min=1))
        )
        if divisor:
            # Delta is the gradient of this sum with respect to the centers; its value must not count.
            pull = (
                _squared(self._offsets(features.detach(), centers, kept))
                .div(2 * divisor(counts))
                .sum()
            )
            loss = loss + (pull - pull.detach())
        return loss

    def _offsets(self, features: Tensor, centers: Tensor, kept: Tensor | None) -> Tensor:
        """Return the part of x - c (B, D) beyond the radius; 0 for samples that are not kept."""
        # Subtract, then square: |x|^2 + |c|^2 - 2xc would cancel where features are near their centers.
        offsets = features - centers
        if kept is not None:
            offsets = offsets.masked_fill(~kept[:, None], 0)
        if self.radius:
            offsets = (
                offsets * (1 - self.radius / _euclidean(offsets).clamp(min=self.radius))[:, None]
            )
        return offsets

    def _check_features(self, features: Tensor) -> Tensor:
        """Return them in the type that the loss is computed in."""
        if not isinstance(features, Tensor):
            raise TypeError(f"features must be a tensor, got {type(features).__name__}")
        dtype, shape, centers = features.dtype, features.shape, self.centers
        if not dtype.is_floating_point:
            raise TypeError(f"features must be floats, got {dtype}")
        if len(shape) != 2 or shape[1] != self.feat_dim:
            raise ValueError(f"features must have shape (B, {self.feat_dim}), got {tuple(shape)}")
        if features.device != centers.device:
            raise ValueError(
                f"features must be on {centers.device} like centers, got {features.device}"
            )
        return features.to(
            torch.float64 if torch.float64 in (dtype, centers.dtype) else torch.float32
        )

    def _check_labels(self, labels: Tensor, features: Tensor) -> Tensor:
        """Return them as int64."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        dtype = labels.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {dtype}")
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"labels must have shape ({features.shape[0]},), got {tuple(labels.shape)}"
            )
        if labels.device != features.device:
            raise ValueError(
                f"labels must be on {features.device} like centers, got {labels.device}"
            )
        labels = labels.long().contiguous()
        if labels.is_cpu and not torch.compiler.is_compiling():
            try:
                known = labels if self.ignore_index is None else labels[labels != self.ignore_index]
                low, high = map(int, known.aminmax()) if known.numel() else (0, 0)
            except RuntimeError:  # vmap hides the labels' values; the lookup refuses wrong ones
                low = high = 0
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels must be in [0, {self.num_classes}), got {low if low < 0 else high}"
                )
        return labels


def pairwise(
    features: Tensor, centers: Tensor, distance: str = "squared", block: int = 2**20
) -> Tensor:
    """Return the distances (B, C) of features (B, D) from centers (C, D), computed block numbers at a time."""
    from torch.utils.checkpoint import checkpoint  # torch 2.5 takes a third of a second to load it

    def distances(features: Tensor, centers: Tensor) -> Tensor:
        return DISTANCES[distance](
            features[:, None] - centers
        )  # a difference is exact also far from the origin

    parts = centers.split(max(1, block // max(1, features.numel())))
    if len(parts) == 1:
        return distances(features, centers)
    # A checkpoint computes the offsets (B, C, D) again in backward() instead of keeping them.
    return torch.cat(
        [checkpoint(distances, features, part, use_reentrant=False) for part in parts], 1
    )


def _check(
    name: str, value: object, kind: type, rule: str, holds: Callable[..., bool] = lambda value: True
) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be {rule}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _choose_device(
    use_gpu: bool | str | torch.device, device: torch.device | str | int | None
) -> torch.device | None:
    if isinstance(use_gpu, str | torch.device):
        if device is not None:
            raise ValueError(
                f"device must be left out where use_gpu is a device, got {device!r} and {use_gpu!r}"
            )
        device = use_gpu
    elif device is None:
        return torch.device("cuda") if use_gpu and torch.cuda.is_available() else None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that torch knows, got {device!r}") from error


def _join_ranks(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Join the batches of all ranks in rank order; only this rank's features carry gradients."""
    ranks = range(dist.get_world_size())
    own_size = torch.tensor([labels.shape[0]], device=labels.device)
    all_sizes = [torch.empty_like(own_size) for _ in ranks]
    dist.all_gather(all_sizes, own_size)
    sizes = torch.cat(all_sizes).tolist()

    def gather(rows: Tensor) -> list[Tensor]:
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # all_gather wants equal shapes
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in ranks]
        dist.all_gather(parts, padded)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    parts = gather(features.detach())
    parts[dist.get_rank()] = features
    return torch.cat(parts), torch.cat(gather(labels))
