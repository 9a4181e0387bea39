"""Center loss: pulls every feature towards the learned center of its class.

Wen, Zhang, Li, Qiao: A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016.
This file needs nothing but torch, so it can be copied into any project.
"""

import math
from numbers import Integral

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def _squared(offsets: Tensor) -> Tensor:
    return offsets.pow(2).sum(1)


def _euclidean(offsets: Tensor) -> Tensor:
    squares = _squared(offsets)
    # The slope of the root is infinite at 0; 1 stands in there to keep all derivatives 0.
    on_center = squares == 0
    return squares.masked_fill(on_center, 1).sqrt().masked_fill(on_center, 0)


# From offsets x - c (B, D) to distances (B,).
DISTANCES = {"squared": _squared, "euclidean": _euclidean}

# What a center's sum of offsets is divided by, as a function of the class's count in the batch; None: the centers
# receive the gradient of the loss.
CENTER_UPDATES = {"gradient": None, "paper": lambda counts: 1 + counts}


class CenterLoss(nn.Module):
    r"""Center loss with one learned center c_j per class, to be added to a classification loss.

    For B features x_i with labels y_i, of which n_j belong to class j:

        L = scale / B * sum_i d(x_i, c_{y_i}) / w_i
        d = |x - c|^2 ("squared") or |x - c| ("euclidean");  w_i = 1, or n_{y_i} with class_average

    The features always receive the gradient of L. What the centers receive depends on center_update,
    where g is the gradient that reaches the loss, so the weight λ in ``cross_entropy + λ * L``:

        "gradient":  centers.grad = g * dL/dc
        "paper":     centers.grad = g * Delta,  Delta_j = sum_{i: y_i = j} (c_j - x_i) / (1 + n_j)

    Delta is Eq. 4 of the paper. It is no gradient of L: each side sees the other as a constant, in
    double backward too. Either way centers.grad carries λ; :meth:`rescale_center_grad` takes it out,
    so that α alone (the learning rate of the centers) decides how fast the centers move.

    Args:
        num_classes: number of classes, at least 1.
        feat_dim: dimension D of the features, at least 1.
        use_gpu: put the centers on the current CUDA device if there is one; ``.to(device)`` works too.
        distance: "squared", or "euclidean" for its root (with gradient 0 where a feature is its center).
        scale: factor of the loss, finite and > 0. The paper's loss has 0.5.
        class_average: divide each term by the number of samples of its class in the batch.
        center_update: "gradient" or "paper".
        sparse: give the centers a sparse gradient, which makes the cost of a step independent of
            num_classes. For optimizers that accept one: SGD without weight decay, SparseAdam, Adagrad.

    Shapes:
        features (B, D), any float type; labels (B,), any integer type; the loss is a scalar. It is
        computed in float32, also for half-precision features and under autocast (float64 if features
        or centers are float64). Gradients come back in the features' type. B = 0 gives 0.

    Raises:
        TypeError: features are not floats, labels are not integers, or a size is not an integer.
        ValueError: an argument, a shape, a device or a label is out of range. Labels are range-checked
            on the CPU only, since a check would stall a GPU; there, and in compiled code, a wrong
            index fails inside torch.

    With torch.distributed initialised, the loss is that of one process over the batches of all ranks,
    which may differ in size: every rank must call it, the value and centers.grad are the same on every
    rank and need no synchronisation, and features get their share of that one loss's gradient. The
    ranks exchange features and labels, never centers, and wait once for the batch sizes. Because
    DistributedDataParallel averages the network's gradients over W ranks, weight this loss with λ * W
    and call ``rescale_center_grad(λ * W)`` to take the same steps as one process.

    Two optimizers, the centers with their own learning rate α:

        >>> _ = torch.manual_seed(0)
        >>> network, x, y = nn.Linear(8, 2), torch.randn(4, 8), torch.tensor([0, 1, 1, 2])
        >>> center_loss = CenterLoss(num_classes=3, feat_dim=2, use_gpu=False)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> optimizer_cent = torch.optim.SGD(center_loss.parameters(), lr=0.5)
        >>> loss = 0.01 * center_loss(network(x), y)  # + cross-entropy
        >>> optimizer.zero_grad(); optimizer_cent.zero_grad()
        >>> loss.backward()
        >>> center_loss.rescale_center_grad(0.01)
        >>> optimizer.step(); optimizer_cent.step()

    One optimizer for both; lr_ratio is the centers' learning rate over the optimizer's:

        >>> params = [*network.parameters(), *center_loss.parameters()]
        >>> optimizer = torch.optim.SGD(params, lr=0.1)
        >>> loss = 0.01 * center_loss(network(x), y)  # + cross-entropy
        >>> optimizer.zero_grad()
        >>> loss.backward()
        >>> center_loss.rescale_center_grad(0.01, lr_ratio=0.5 / 0.1)
        >>> optimizer.step()
    """

    def __init__(
        self,
        num_classes: int = 10,
        feat_dim: int = 2,
        use_gpu: bool = True,
        *,
        distance: str = "squared",
        scale: float = 1.0,
        class_average: bool = False,
        center_update: str = "gradient",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("feat_dim", feat_dim)):
            if not isinstance(size, Integral):
                raise TypeError(f"{name} must be an integer, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {tuple(DISTANCES)}, got {distance!r}")
        if center_update not in CENTER_UPDATES:
            raise ValueError(f"center_update must be one of {tuple(CENTER_UPDATES)}, got {center_update!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be finite and > 0, got {scale!r}")
        self.num_classes, self.feat_dim, self.use_gpu = num_classes, feat_dim, use_gpu
        self.distance, self.scale = distance, scale
        self.class_average, self.center_update, self.sparse = class_average, center_update, sparse
        centers = torch.randn(num_classes, feat_dim)  # on the CPU: same start on any device
        self.centers = nn.Parameter(centers.cuda() if use_gpu and torch.cuda.is_available() else centers)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of features (B, D) with integer labels (B,) in [0, num_classes)."""
        self._check(features, labels)
        wide = torch.float64 in (features.dtype, self.centers.dtype)
        dtype = torch.float64 if wide else torch.float32
        features, labels = features.to(dtype), labels.long().contiguous()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            features, labels = _join_ranks(features, labels)

        divisor = CENTER_UPDATES[self.center_update]
        centers = F.embedding(labels, self.centers, sparse=self.sparse).to(dtype)  # (B, D), one per sample
        # Subtract, then square: |x|^2 + |c|^2 - 2xc would cancel where features are near their centers.
        distances = DISTANCES[self.distance](features - (centers.detach() if divisor else centers))  # (B,)
        if self.class_average or divisor:
            ordered = labels.sort().values  # counts without an array over all classes
            counts = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
        if self.class_average:
            distances = distances / counts
        loss = self.scale * distances.sum() / max(labels.shape[0], 1)
        if divisor:
            # Delta is the gradient of this sum with respect to the centers; its value must not count.
            pull = (centers - features.detach()).pow(2).sum(1).div(2 * divisor(counts)).sum()
            loss = loss + (pull - pull.detach())
        return loss

    def rescale_center_grad(self, alpha: float, lr_ratio: float = 1.0) -> None:
        """Multiply centers.grad, dense or sparse, by lr_ratio / alpha; call it between backward and step.

        Args:
            alpha: the weight λ of this loss in the total loss, finite and > 0.
            lr_ratio: with one optimizer for network and centers, the centers' learning rate over the
                optimizer's; 1 with two optimizers. Finite and >= 0.

        Raises:
            ValueError: alpha or lr_ratio is out of range.
            RuntimeError: the centers have no gradient, as before backward() or after zero_grad().
        """
        if not 0 < alpha < math.inf:
            why = "the center gradient carries this weight; at weight 0 it is 0, so leave the centers alone"
            raise ValueError(f"alpha must be finite and > 0, got {alpha!r}: {why}")
        if not 0 <= lr_ratio < math.inf:
            raise ValueError(f"lr_ratio must be finite and >= 0, got {lr_ratio!r}")
        if self.centers.grad is None:
            raise RuntimeError("centers.grad is None: call rescale_center_grad after backward()")
        self.centers.grad.mul_(lr_ratio / alpha)

    def _check(self, features: Tensor, labels: Tensor) -> None:
        for name, value in (("features", features), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not features.is_floating_point():
            raise TypeError(f"features must be floats, got {features.dtype}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if features.ndim != 2 or features.shape[1] != self.feat_dim:
            raise ValueError(f"features must have shape (B, {self.feat_dim}), got {tuple(features.shape)}")
        if labels.shape != features.shape[:1]:
            raise ValueError(f"labels must have shape ({features.shape[0]},), got {tuple(labels.shape)}")
        if not features.device == labels.device == self.centers.device:
            got = f"got features on {features.device} and labels on {labels.device}"
            raise ValueError(f"features and labels must be on {self.centers.device} like centers, {got}")
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
            return
        try:
            low, high = (int(label) for label in labels.long().aminmax())
        except RuntimeError:  # under vmap labels show no values; the lookup refuses wrong ones
            return
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels must be in [0, {self.num_classes}), got {low if low < 0 else high}")


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
