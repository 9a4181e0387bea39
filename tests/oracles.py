"""What the tests of CenterLoss share: all of its losses, a slow and obvious one, and watchers."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from center_loss import CenterLoss

# Every loss there is.
CHOICES = {
    "distance": ("squared", "euclidean"),
    "radius": (0.0, 1.5),
    "scale": (1.0, 0.5),
    "class_average": (False, True),
    "center_update": ("gradient", "paper", "mean"),
    "sparse": (False, True),
    "normalize": (False, True),
}
ALL = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
COSINE = dict(zip(CHOICES, ("squared", 0.0, 0.5, False, "gradient", False, True), strict=True))
SPHERE = dict(zip(CHOICES, ("euclidean", 0.5, 1.0, True, "gradient", True, True), strict=True))
# Where all of them would take too long, the scale goes with the radius, and two are normalized.
PLAIN = [
    variant
    for variant in ALL
    if (variant["scale"] == 0.5) == (variant["radius"] > 0) and not variant["normalize"]
]
NORMALIZED = [
    normalized | dict(center_update=update)
    for normalized in (COSINE, SPHERE)
    for update in CHOICES["center_update"]
]
VARIANTS = PLAIN + NORMALIZED
DENSE = [variant for variant in VARIANTS if not variant["sparse"]]


def name(variant):
    return "-".join(str(value) for value in variant.values())


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name)
each_plain = pytest.mark.parametrize("variant", PLAIN, ids=name)
each_dense = pytest.mark.parametrize("variant", DENSE, ids=name)


def norm_of(vector):
    return math.sqrt(math.fsum(value * value for value in vector))


def direction(vector):
    return [value / norm_of(vector) for value in vector]


def onto_sphere(grad, vector):
    """The gradient of a function of vector / |vector|, from that with respect to the quotient."""
    along = sum(g * u for g, u in zip(grad, direction(vector), strict=True))
    pairs = zip(grad, direction(vector), strict=True)
    return [(g - along * u) / norm_of(vector) for g, u in pairs]


def oracle(
    features,
    labels,
    centers,
    *,
    distance,
    radius,
    scale,
    class_average,
    center_update,
    sparse=False,
    normalize=False,
):
    """Value and both gradients by loops over samples and coordinates, in float64."""
    x, c, y = features.double().tolist(), centers.double().tolist(), labels.tolist()
    size, dim = len(x), len(c[0])
    if normalize:
        long_x, long_c = x, c
        x, c = [direction(row) for row in x], [direction(row) for row in c]
    loss = 0.0
    grad_x = [[0.0] * dim for _ in x]
    grad_c = [[0.0] * dim for _ in c]
    for i in range(size):
        j = y[i]
        n = y.count(j)
        offset = [x[i][k] - c[j][k] for k in range(dim)]
        norm = norm_of(offset)
        beyond = max(norm - radius, 0.0)
        factor = scale / size / (n if class_average else 1)
        loss += factor * (beyond**2 if distance == "squared" else beyond)
        for k in range(dim if beyond > 0 else 0):
            unit = offset[k] / norm
            slope = 2 * beyond * unit if distance == "squared" else unit
            grad_x[i][k] += factor * slope
            if center_update == "gradient":
                grad_c[j][k] -= factor * slope
            else:
                grad_c[j][k] -= beyond * unit / (1 + n if center_update == "paper" else n)
    if normalize:
        grad_x = [onto_sphere(*pair) for pair in zip(grad_x, long_x, strict=True)]
        grad_c = [onto_sphere(*pair) for pair in zip(grad_c, long_c, strict=True)]
    grad_x = torch.tensor(grad_x, dtype=torch.float64).reshape(size, dim)
    grad_c = torch.tensor(grad_c, dtype=torch.float64)
    return torch.tensor(loss, dtype=torch.float64), grad_x, grad_c


def build(centers, **variant):
    """A CenterLoss with the given centers, in their dtype."""
    loss = CenterLoss(*centers.shape, use_gpu=False, **variant).to(centers.dtype)
    with torch.no_grad():
        loss.centers.copy_(centers)
    return loss


def run(loss, features, labels, weight=1.0):
    """Value, features' gradient and (dense) center gradient of weight * loss."""
    features = features.clone().requires_grad_()
    value = loss(features, labels)
    (weight * value).backward()
    assert loss.centers.grad.is_sparse == loss.sparse
    return value.detach(), features.grad, loss.centers.grad.to_dense().clone()


def batch(dtype=torch.float64, seed=0):
    """8 samples of 5 classes: one class missing, one single, one feature exactly on its center."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 0, 4])
    features = torch.randn(8, 3, generator=generator, dtype=torch.float64).to(dtype)
    centers = torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype)
    features[3] = centers[2]
    return features, labels, centers


def assert_equal(actual, expected, rtol=1e-12, atol=1e-13):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


class Count(TorchDispatchMode):
    """Counts operations."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Sizes(TorchDispatchMode):
    """Collects the size of every tensor that an operation makes, forward and backward."""

    def __init__(self, exempt):
        super().__init__()
        self.exempt, self.largest = exempt.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, torch.Tensor):
                parts = [made._indices(), made._values()] if made.is_sparse else [made]
                for part in parts:
                    if part.data_ptr() != self.exempt:
                        self.largest = max(self.largest, part.numel())
        return result


class NoReads(TorchDispatchMode):
    """Fails where Python asks for a tensor's value: on a GPU that would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read back"
        return func(*args, **(kwargs or {}))
