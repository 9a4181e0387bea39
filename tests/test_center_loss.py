"""CenterLoss against slow, obvious loops, and every promise that its docstring makes."""

import ast
import copy
import doctest
import itertools
import math
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import center_loss as module
from center_loss import CenterLoss

# Every loss there is: 2 distances x 2 radii x 2 scales x 2 averages x 3 updates x 2 gradient layouts.
CHOICES = {
    "distance": ("squared", "euclidean"),
    "radius": (0.0, 1.5),
    "scale": (1.0, 0.5),
    "class_average": (False, True),
    "center_update": ("gradient", "paper", "mean"),
    "sparse": (False, True),
}
ALL = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
# Where all of them would take too long, the scale goes with the radius.
VARIANTS = [variant for variant in ALL if (variant["scale"] == 0.5) == (variant["radius"] > 0)]
DENSE = [variant for variant in VARIANTS if not variant["sparse"]]


def name(variant):
    return "-".join(str(value) for value in variant.values())


each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name)
each_dense = pytest.mark.parametrize("variant", DENSE, ids=name)


# ---------------------------------------------------------------------------------------------- oracle


def oracle(features, labels, centers, *, distance, radius, scale, class_average, center_update, sparse=False):
    """Value, features' gradient and center gradient by loops over samples and coordinates, in float64."""
    x, c, y = features.double().tolist(), centers.double().tolist(), labels.tolist()
    size, dim = len(x), len(c[0])
    loss = 0.0
    grad_x = [[0.0] * dim for _ in x]
    grad_c = [[0.0] * dim for _ in c]
    for i in range(size):
        j = y[i]
        n = y.count(j)
        offset = [x[i][k] - c[j][k] for k in range(dim)]
        norm = math.sqrt(math.fsum(o * o for o in offset))
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
    grad_x = torch.tensor(grad_x, dtype=torch.float64).reshape(size, dim)
    return torch.tensor(loss, dtype=torch.float64), grad_x, torch.tensor(grad_c, dtype=torch.float64)


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


# ------------------------------------------------------------------------------------ values, gradients


@pytest.mark.parametrize("variant", ALL, ids=name)
def test_value_and_both_gradients_match_the_loops(variant):
    features, labels, centers = batch()
    value, grad_x, grad_c = oracle(features, labels, centers, **variant)
    weight = 0.3  # λ: both gradients carry it, in the paper's update too
    expected = value, weight * grad_x, weight * grad_c
    assert_equal(run(build(centers, **variant), features, labels, weight), expected)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    variant=st.sampled_from(ALL),
    num_classes=st.integers(1, 6),
    dim=st.integers(1, 5),
    draw=st.lists(st.integers(0, 5), max_size=12),
    magnitude=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_any_batch_matches_the_loops_in_any_order(variant, num_classes, dim, draw, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([label % num_classes for label in draw], dtype=torch.long)
    centers = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(draw), dim, generator=generator, dtype=torch.float64)
    features = centers[labels] + magnitude * noise
    loss = build(centers, **variant)
    value, grad_x, grad_c = run(loss, features, labels)
    assert_equal((value, grad_x, grad_c), oracle(features, labels, centers, **variant), 1e-9, 1e-18)
    order = torch.randperm(len(draw), generator=generator)
    loss.centers.grad = None
    shuffled = run(loss, features[order], labels[order])
    assert_equal(shuffled, (value, grad_x[order], grad_c), 1e-12, 1e-15)


def test_each_reference_has_its_formula():
    x, y, c = batch()
    n = torch.stack([(y == label).sum() for label in y]).double()
    squares = ((x - c[y]) ** 2).sum(1)
    size = len(y)
    formulas = [
        (dict(scale=0.5, center_update="paper"), squares.sum() / (2 * size)),  # wen2016
        (dict(), squares.sum() / size),  # zhou2018
        (
            dict(scale=0.5, radius=1.5, center_update="mean"),  # wen2019
            (squares.sqrt() - 1.5).clamp(min=0).pow(2).sum() / (2 * size),
        ),
        (dict(scale=0.5, class_average=True), (squares / n).sum() / (2 * size)),  # zahn2024-v1.0
        (
            dict(scale=0.5, class_average=True, distance="euclidean"),  # zahn2024-v1.1, -v1.2
            (squares.sqrt() / n).sum() / (2 * size),
        ),
    ]
    for arguments, expected in formulas:
        torch.testing.assert_close(build(c, **arguments)(x, y), expected, rtol=1e-13, atol=0)


def test_wen2019_has_the_gradients_of_its_layers_and_without_a_radius_moves_centers_to_their_class_means():
    x, y, c = batch()
    offsets = x - c[y]
    pull = (1 - 1.5 / offsets.norm(dim=1, keepdim=True)).clamp(min=0) * offsets
    pull[3] = 0  # this one is its center
    assert 1 < (pull == 0).all(1).sum() < 8  # some samples are within the radius, some beyond
    _, grad_x, grad_c = run(build(c, scale=0.5, radius=1.5, center_update="mean"), x, y)
    torch.testing.assert_close(grad_x, pull / len(y))
    for j in range(5):
        torch.testing.assert_close(grad_c[j], -pull[y == j].sum(0) / (y == j).sum().clamp(min=1))
    loss = build(c, center_update="mean")
    loss.update_centers(x, y, alpha=0.25)
    for j in (0, 1, 2, 4):
        torch.testing.assert_close(loss.centers[j].detach(), 0.75 * c[j] + 0.25 * x[y == j].mean(0))


def test_paper_step_is_equation_4_and_gradient_is_2_1_plus_n_over_b_times_it():
    x, y, c = batch()
    delta = torch.stack([(c[j] - x[y == j]).sum(0) / (1 + (y == j).sum()) for j in range(5)])
    n = torch.stack([(y == j).sum() for j in range(5)])
    paper = run(build(c, center_update="paper"), x, y)[2]
    gradient = run(build(c), x, y)[2]
    torch.testing.assert_close(paper, delta, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient, delta * (2 * (1 + n) / len(y))[:, None], rtol=1e-13, atol=1e-15)


@each_dense
def test_gradcheck_and_double_backward(variant):
    x, y, c = batch()
    x = x + 0.1  # off the centers, where the euclidean distance has no derivative
    x.requires_grad_()
    loss = build(c, **variant)

    def of_features(features):
        return loss(features, y)

    def of_centers(centers):
        return torch.func.functional_call(loss, {"centers": centers}, (x.detach(), y))

    torch.autograd.gradcheck(of_features, (x,))
    torch.autograd.gradgradcheck(of_features, (x,))
    if variant["center_update"] == "gradient":
        torch.autograd.gradcheck(of_centers, (c.requires_grad_(),))
        torch.autograd.gradgradcheck(of_centers, (c,))
    elif not variant["radius"]:  # the derivative of Eq. 4 by the centers: n_j / (1 + n_j) on the diagonal
        hessian = torch.func.hessian(of_centers)(c)
        n = torch.tensor([2, 2, 3, 0, 1], dtype=torch.float64)
        divisor = 1 + n if variant["center_update"] == "paper" else n.clamp(min=1)
        expected = torch.einsum("j,ja,kb->jkab", n / divisor, torch.eye(5).double(), torch.eye(3).double())
        torch.testing.assert_close(hessian, expected.permute(0, 1, 2, 3).contiguous())


@each_variant
def test_a_feature_on_its_center_has_zero_gradients_of_any_order(variant):
    loss = build(torch.ones(2, 3), **variant)
    x = torch.ones(4, 3, requires_grad=True)
    value = loss(x, torch.tensor([0, 0, 1, 1]))
    assert value == 0
    (grad_x,) = torch.autograd.grad(value, x, create_graph=True)
    assert torch.equal(grad_x, torch.zeros(4, 3))
    if grad_x.requires_grad:
        (second,) = torch.autograd.grad(grad_x.sum(), x)
        assert second.isfinite().all()
    loss(x, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.equal(loss.centers.grad.to_dense(), torch.zeros(2, 3))


@each_variant
def test_an_empty_batch_gives_zero_and_zero_gradients(variant):
    loss = CenterLoss(4, 3, use_gpu=False, **variant)
    value, grad_x, grad_c = run(loss, torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    assert value == 0 and grad_x.shape == (0, 3)
    assert torch.equal(grad_c, torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_is_a_label(dtype):
    x, y, c = batch()
    assert torch.equal(build(c)(x, y.to(dtype)), build(c)(x, y))


def test_gradients_accumulate_and_frozen_centers_get_none():
    x, y, c = batch()
    loss = build(c, sparse=True)
    once = run(loss, x, y)[2]
    twice = run(loss, x, y)[2]
    torch.testing.assert_close(twice, 2 * once)
    frozen = build(c, center_update="paper").requires_grad_(False)
    x.requires_grad_()
    frozen(x, y).backward()
    assert frozen.centers.grad is None and x.grad is not None


# ----------------------------------------------------------------------------------------- ignore_index


@pytest.mark.parametrize("ignored", [-100, 1, 255])
@each_variant
def test_ignored_samples_count_for_nothing(variant, ignored):
    """Not even their NaNs; the rest is the loss of the other samples."""
    x, y, c = batch()
    mask = torch.tensor([False, True, False, False, True, False, True, False]) | (y == ignored)
    x[mask], y[mask] = torch.nan, ignored
    loss, others = build(c, ignore_index=ignored, **variant), build(c, **variant)
    value, grad_x, grad_c = run(loss, x, y)
    expected = run(others, x[~mask], y[~mask])
    assert_equal((value, grad_x[~mask], grad_c), expected)
    assert torch.equal(grad_x[mask], torch.zeros_like(x[mask]))
    loss.update_centers(x, y)
    others.update_centers(x[~mask], y[~mask])
    assert_equal([loss.centers], [others.centers])


@each_variant
def test_a_batch_of_ignored_samples_gives_zero(variant):
    x, _, c = batch()
    loss = build(c, ignore_index=-1, **variant)
    for size in (8, 0):
        value, grad_x, grad_c = run(loss, x[:size], torch.full((size,), -1))
        assert value == 0 and not grad_x.any() and not grad_c.any()
    loss.update_centers(x, torch.full((8,), -1))
    assert torch.equal(loss.centers, c)


def test_of_unsigned_labels_and_of_classes_any_may_be_ignored_and_the_others_are_still_checked():
    x, y, c = batch()
    y[[0, 6]] = 255
    assert_equal([build(c, ignore_index=255)(x, y.to(torch.uint8))], [build(c, ignore_index=255)(x, y)])
    for wrong in (254, 5):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), got {wrong}"):
            build(c, ignore_index=255)(x, torch.where(y == 4, wrong, y))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got 255"):
        build(c)(x, y)


# ----------------------------------------------------------------------------- centers without an optimizer


@each_variant
def test_update_centers_takes_the_step_of_sgd(variant):
    """To the rounding, before and after backward, with frozen centers and under autocast; and leaves all else alone."""
    x, y, c = batch(torch.float32)
    x = x.half()
    expected, grad_x, grad_c = run(build(c, **variant), x, y)
    for frozen, before, autocast in itertools.product((False, True), repeat=3):
        loss = build(c, **variant).requires_grad_(not frozen)
        centers, features = loss.centers.data_ptr(), x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(features, y)
            if before:
                loss.update_centers(features, y, alpha=0.7)
            value.backward()
            if not before:
                loss.update_centers(features, y, alpha=0.7)
        assert torch.equal(value, expected) and torch.equal(features.grad, grad_x)
        assert loss.centers.data_ptr() == centers and loss.centers.requires_grad != frozen
        torch.testing.assert_close(loss.centers.detach(), c - 0.7 * grad_c, rtol=1e-6, atol=1e-7)
        assert frozen or torch.equal(loss.centers.grad.to_dense(), grad_c)


@each_variant
def test_update_centers_makes_no_tensor_of_the_number_of_classes_and_waits_for_nothing(variant):
    loss = CenterLoss(5000, 4, use_gpu=False, ignore_index=7, **variant)
    with Sizes(exempt=loss.centers) as sizes:
        loss.update_centers(torch.randn(8, 4), torch.randint(5000, (8,)))
    assert sizes.largest <= 8 * 4
    with NoReads():
        loss.to("meta").update_centers(torch.empty(8, 4, device="meta"), torch.empty(8, device="meta").long())


class Count(TorchDispatchMode):
    """Counts operations."""

    operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


@each_dense
def test_frozen_centers_cost_nothing(variant):
    """The loss takes the operations of one whose centers are given: no Delta is computed, and no counts for it."""
    x, y, c = batch()
    with Count() as frozen:
        build(c, **variant).requires_grad_(False)(x, y)
    with Count() as plain:
        build(c, **variant | dict(center_update="gradient")).requires_grad_(False)(x, y)
    with Count() as trained:
        build(c, **variant)(x, y)
    assert frozen.operations == plain.operations
    assert trained.operations > frozen.operations or variant["center_update"] == "gradient"


@pytest.mark.parametrize(
    ("alpha", "error"), [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)]
)
def test_update_centers_refuses_wrong_rates_and_inputs_and_moves_nothing(alpha, error):
    x, y, c = batch()
    loss = build(c)
    with pytest.raises(error, match=f"alpha must be a finite number >= 0, got {alpha!r}"):
        loss.update_centers(x, y, alpha)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got 5"):
        loss.update_centers(x, y + 1)
    assert torch.equal(loss.centers, c)


# ------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("distance", module.DISTANCES)
def test_distances_and_their_gradients_match_the_loops_whatever_the_block(distance):
    x, y, c = batch()
    x.requires_grad_()
    loss = build(c, distance=distance, radius=1.5, scale=0.5)
    expected = [[(x[i] - c[j]).detach().norm().item() for j in range(5)] for i in range(8)]
    power = 2 if distance == "squared" else 1
    expected = torch.tensor(expected, dtype=torch.float64) ** power
    torch.testing.assert_close(loss.distances(x), expected)
    assert torch.equal(loss.distances(x).argmin(1), expected.argmin(1))
    assert loss.distances(x)[3, 2] == 0 and loss.distances(x[:0]).shape == (0, 5)
    for block in (1, 50, 2**20):
        away = x.detach().add(0.1).requires_grad_()  # off the centers
        torch.autograd.gradcheck(lambda x, c, block=block: module.pairwise(x, c, distance, block), (away, loss.centers))
    (grad,) = torch.autograd.grad(loss.distances(x)[3, 2], x)
    assert torch.equal(grad, torch.zeros_like(x))


def test_distances_are_exact_far_from_the_origin_and_float32_whatever_the_features():
    generator = torch.Generator().manual_seed(0)
    centers = 100 + torch.randn(4, 512, generator=generator)
    features = centers[[0, 1, 2, 3, 0]] + 1e-3 * torch.randn(5, 512, generator=generator)
    expected = (features.double()[:, None] - centers.double()).pow(2).sum(2)
    torch.testing.assert_close(build(centers).distances(features).double(), expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        distances = build(centers).distances(features.bfloat16())
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, build(centers).distances(features.bfloat16().float()))


def test_distances_of_many_classes_take_little_more_memory_than_their_result():
    loss, features = CenterLoss(40_000, 64, use_gpu=False), torch.randn(8, 64, requires_grad=True)
    with Sizes(exempt=loss.centers) as sizes:
        loss.distances(features).square().sum().backward()
    assert sizes.largest <= 40_000 * 64  # the centers' gradient; all offsets would be eight times that
    with torch.no_grad(), Sizes(exempt=loss.centers) as sizes:
        loss.distances(features)
    assert sizes.largest <= 2**20


def test_distances_refuse_what_the_loss_refuses():
    with pytest.raises(ValueError, match=r"features must have shape \(B, 2\), got \(4, 1\)"):
        CenterLoss(use_gpu=False).distances(X[:, :1])
    with pytest.raises(TypeError, match="features must be floats, got torch.int64"):
        CenterLoss(use_gpu=False).distances(X.long())


# -------------------------------------------------------------------------------------------- numerics


@each_variant
def test_no_cancellation_far_from_the_origin(variant):
    generator = torch.Generator().manual_seed(0)
    centers = 100 + torch.randn(4, 512, generator=generator)
    labels = torch.arange(16) % 4
    features = centers[labels] + 1e-3 * torch.randn(16, 512, generator=generator)
    variant = variant | dict(radius=variant["radius"] and 0.02)  # the offsets are about 0.0226 long
    expected = oracle(features, labels, centers, **variant)
    actual = run(build(centers, **variant), features, labels)
    assert actual[0].dtype == torch.float32
    rtol = 1e-4 if variant["radius"] else 1e-5  # what is beyond a radius is a difference
    assert_equal([part.double() for part in actual], expected, rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_variant
def test_half_precision_features_give_a_float32_loss(variant, dtype):
    x, y, c = batch(torch.float32)
    x = (200 * x).to(dtype)  # squares that float16 could not hold
    value, grad_x, grad_c = oracle(x, y, c, **variant)
    actual = run(build(c, **variant), x, y)
    assert [part.dtype for part in actual] == [torch.float32, dtype, torch.float32]
    assert_equal((actual[0], actual[2]), (value.float(), grad_c.float()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[1], grad_x.to(dtype))


@pytest.mark.parametrize("features_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("centers_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_float64_on_either_side_is_computed_in_float64(features_dtype, centers_dtype):
    x, y, c = batch()
    x, c = x.to(features_dtype), c.to(centers_dtype)
    value, grad_x, grad_c = run(build(c, center_update="paper"), x, y)
    expected = torch.float64 if torch.float64 in (features_dtype, centers_dtype) else torch.float32
    assert value.dtype == expected
    assert (grad_x.dtype, grad_c.dtype) == (features_dtype, centers_dtype)


def test_float8_features_are_floats_too():
    x, y, c = batch(torch.float32)
    x = x.to(torch.float8_e4m3fn)
    torch.testing.assert_close(build(c)(x, y), oracle(x, y, c, **VARIANTS[0])[0].float())


@each_variant
def test_autocast_changes_nothing(variant):
    x, y, c = batch(torch.float32)
    plain = run(build(c, **variant), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(build(c, **variant), x, y)
    assert_equal(cast, plain, rtol=0, atol=0)


@each_variant
def test_grad_scaler_takes_the_same_steps(variant):
    x, y, c = batch(torch.float32)
    paths = []
    for enabled in (False, True):
        torch.manual_seed(0)
        network, loss = nn.Linear(3, 3), build(c, **variant)
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (network, loss)]
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            scaler.scale(0.25 * loss(network(x), y)).backward()
            loss.rescale_center_grad(0.25)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        paths.append([*network.parameters(), *loss.parameters()])
    assert_equal(*paths, rtol=1e-6, atol=1e-7)
    assert not torch.equal(paths[0][-1], c)


# ------------------------------------------------------------------------------ torch.compile, torch.func


@pytest.mark.parametrize("variant", VARIANTS[::4] + VARIANTS[1::12], ids=name)
def test_compile_traces_the_whole_loss(variant):
    torch._dynamo.reset()
    x, y, c = batch(torch.float32)
    compiled = build(c, **variant)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for size in (8, 5):
        compiled.centers.grad = None
        expected = run(build(c, **variant), x[:size], y[:size])
        assert_equal(run(compiled, x[:size], y[:size]), expected, rtol=1e-5, atol=1e-6)


no_sparse = pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5's compiler has no sparse embedding")


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=no_sparse)])
def test_compile_generates_right_code(sparse):
    torch._dynamo.reset()
    x, y, c = batch(torch.float32)
    variant = dict(distance="euclidean", class_average=True, center_update="paper", sparse=sparse)
    compiled = build(c, **variant)
    compiled.compile(fullgraph=True)
    assert_equal(run(compiled, x, y), run(build(c, **variant), x, y), rtol=1e-5, atol=1e-6)


def test_network_and_loss_compile_together():
    """In one graph, with ignored labels, distances and an update of frozen centers."""
    torch._dynamo.reset()
    x, y, c = batch(torch.float32)
    y[0] = -1

    def total(network, loss, x, y):
        features = network(x)
        return loss(features, y) + loss.distances(features).logsumexp(1).mean()

    paths = []
    for compile in (lambda function, **_: function, torch.compile):
        torch.manual_seed(0)
        network, loss = nn.Linear(3, 3), build(c, center_update="mean", radius=0.5, ignore_index=-1)
        compile(total, fullgraph=True, backend="aot_eager")(network, loss, x, y).backward()
        paths.append([parameter.grad for parameter in (*network.parameters(), *loss.parameters())])
    assert_equal(*paths, rtol=1e-5, atol=1e-6)


@each_dense
def test_torch_func_gives_the_same_gradients(variant):
    x, y, c = batch()
    loss = build(c, **variant)
    value, grad_x, grad_c = oracle(x, y, c, **variant)

    def pure(centers, features, labels):
        return torch.func.functional_call(loss, {"centers": centers}, (features, labels))

    grads, result = torch.func.grad_and_value(pure, argnums=(0, 1))(c, x, y)
    assert_equal((result, grads[1], grads[0]), (value, grad_x, grad_c))
    # One batch of one sample at a time, as for per-sample gradients.
    each = torch.func.vmap(torch.func.grad(pure), in_dims=(None, 0, 0))(c, x[:, None], y[:, None])
    for i in range(len(y)):
        torch.testing.assert_close(each[i], oracle(x[i : i + 1], y[i : i + 1], c, **variant)[2])
    with pytest.raises(IndexError):  # vmap hides the labels from the range check, not from the lookup
        torch.func.vmap(pure, in_dims=(None, 0, 0))(c, x[:, None], y[:, None] + 1)


# ------------------------------------------------------------------------------------------------ cost


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


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["sparse"]], ids=name)
def test_a_sparse_step_makes_no_tensor_of_the_number_of_classes(variant):
    loss = CenterLoss(5000, 4, use_gpu=False, **variant)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    features, labels = torch.randn(8, 4, requires_grad=True), torch.randint(5000, (8,))
    with Sizes(exempt=loss.centers) as sizes:
        optimizer.zero_grad()
        loss(features, labels).backward()
        loss.rescale_center_grad(0.1)
        optimizer.step()
    assert sizes.largest <= 8 * 4


@each_dense
def test_a_dense_step_makes_nothing_larger_than_the_center_gradient(variant):
    loss = CenterLoss(5000, 4, use_gpu=False, **variant)
    with Sizes(exempt=loss.centers) as sizes:
        value = loss(torch.randn(8, 4), torch.randint(5000, (8,)))
    assert sizes.largest <= 8 * 4
    with Sizes(exempt=loss.centers) as sizes:
        value.backward()
    assert sizes.largest == 5000 * 4


class NoReads(TorchDispatchMode):
    """Fails where Python asks for a tensor's value: on a GPU that would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read back"
        return func(*args, **(kwargs or {}))


@each_variant
def test_off_the_cpu_nothing_reads_a_value_back(variant):
    # Tensors on the meta device have no values, so whatever depends on one would raise, too.
    loss = CenterLoss(4, 3, use_gpu=False, **variant).to("meta")
    features = torch.empty(6, 3, device="meta", requires_grad=True)
    with NoReads():
        value = loss(features, torch.empty(6, dtype=torch.long, device="meta"))
        value.backward()
    assert value.shape == () and features.grad.shape == (6, 3)


def test_the_file_needs_only_torch_and_the_standard_library():
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert "torch" in names
    assert names - {"torch"} <= sys.stdlib_module_names


# ---------------------------------------------------------------------------------------- optimization


def train(variant, *, optimizers, weight, momentum=0.0, steps=4, fixed=False):
    """Center path and network after a few steps; the two ways to optimize must agree."""
    x, y, c = batch(torch.float64)
    torch.manual_seed(0)
    network, loss = nn.Linear(3, 3).double(), build(c, **variant)
    lr, alpha = 0.05, 0.4
    if optimizers == 2:
        steppers = [
            torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum),
            torch.optim.SGD(loss.parameters(), lr=alpha, momentum=momentum),
        ]
    else:
        both = [*network.parameters(), *loss.parameters()]
        steppers = [torch.optim.SGD(both, lr=lr, momentum=momentum)]
    path = []
    for _ in range(steps):
        for stepper in steppers:
            stepper.zero_grad()
        features = x if fixed else network(x)
        (weight * loss(features, y)).backward()
        loss.rescale_center_grad(weight, lr_ratio=1.0 if optimizers == 2 else alpha / lr)
        for stepper in steppers:
            stepper.step()
        path.append(loss.centers.detach().clone())
    return torch.stack(path), [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@each_variant
def test_one_optimizer_with_lr_ratio_and_two_optimizers_take_the_same_steps(variant, momentum):
    two, network_two = train(variant, optimizers=2, weight=0.02, momentum=momentum)
    one, network_one = train(variant, optimizers=1, weight=0.02, momentum=momentum)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert_equal(network_one, network_two, rtol=1e-10)
    beyond = not variant["radius"]  # class 0 is within it
    assert (two[0] != two[-1]).any(dim=1).tolist() == [beyond, True, True, False, True]  # class 3 has no sample


@each_variant
def test_the_weight_has_no_influence_on_the_centers_path_when_features_are_fixed(variant):
    paths = [train(variant, optimizers=2, weight=w, fixed=True)[0] for w in (1.0, 1e-5, 200.0)]
    for path in paths[1:]:
        torch.testing.assert_close(path, paths[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@each_dense
def test_sparse_and_dense_gradients_take_the_same_steps(variant, momentum):
    dense = train(variant, optimizers=2, weight=0.02, momentum=momentum)[0]
    sparse = train({**variant, "sparse": True}, optimizers=2, weight=0.02, momentum=momentum)[0]
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.Adagrad])
def test_sparse_centers_move_with_other_optimizers(optimizer):
    x, y, c = batch(torch.float32)
    loss = build(c, sparse=True)
    stepper = optimizer(loss.parameters(), lr=0.1)
    before = loss(x, y).item()
    for _ in range(5):
        stepper.zero_grad()
        loss(x, y).backward()
        stepper.step()
    assert loss(x, y).item() < before


@pytest.mark.parametrize("sparse", [False, True])
def test_rescale_multiplies_by_lr_ratio_over_alpha(sparse):
    x, y, c = batch()
    loss = build(c, sparse=sparse)
    grad = run(loss, x, y)[2]
    assert loss.rescale_center_grad(0.25, lr_ratio=3.0) is None
    torch.testing.assert_close(loss.centers.grad.to_dense(), grad * 12)
    loss.rescale_center_grad(1.0, lr_ratio=0)
    assert not loss.centers.grad.to_dense().any()


def test_two_optimizers_with_one_scaler_take_the_steps_of_float32():
    """Across an overflow and a change of the scale after every step: unscale both, step both, update once."""
    x, y, c = batch(torch.float32)
    paths = []
    for enabled in (False, True):
        torch.manual_seed(0)
        network, loss = nn.Linear(3, 3), build(c, center_update="paper")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        optimizer_cent = torch.optim.SGD(loss.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**127, backoff_factor=2.0**-120,
                                      growth_interval=1)  # fmt: skip
        scales = []
        for step in range(5):
            if step == 0 and not enabled:
                continue  # the one that overflows
            optimizer.zero_grad()
            optimizer_cent.zero_grad()
            scaler.scale(64 * loss(network(x), y)).backward()
            scaler.unscale_(optimizer)
            scaler.unscale_(optimizer_cent)
            loss.rescale_center_grad(64)
            nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.step(optimizer_cent)
            scaler.update()
            scales.append(scaler.get_scale())
            assert step or torch.equal(loss.centers, c)
        paths.append([*network.parameters(), *loss.parameters()])
    assert scales == [2.0**7, 2.0**8, 2.0**9, 2.0**10, 2.0**11]
    assert_equal(*paths, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("center_update", module.CENTER_UPDATES)
def test_gradients_of_parts_of_a_batch_add_up(center_update):
    """To the batch's gradient, which is a mean; to the mean of the parts' Delta."""
    x, y, c = batch()
    loss = build(c, center_update=center_update)
    for part in (slice(0, 4), slice(4, 8)):
        (0.3 * loss(x[part], y[part]) / 2).backward()
    loss.rescale_center_grad(0.3)
    whole = [run(build(c, center_update=center_update), x[part], y[part])[2] for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(loss.centers.grad, sum(whole) / 2)
    if center_update == "gradient":
        torch.testing.assert_close(loss.centers.grad, run(build(c), x, y)[2])


# --------------------------------------------------------------------------------- in zhou2018's place


def matrix_form(features, labels, centers):
    """The loss as a masked B x C distance matrix, with the bounds that keep its value positive."""
    distances = ((features[:, None] - centers[None]) ** 2).sum(2)
    mask = labels[:, None] == torch.arange(len(centers))
    return torch.where(mask, distances, 0).clamp(1e-12, 1e12).sum() / len(features)


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("sparse", [False, True])
def test_it_replaces_the_widespread_file_unchanged(optimizers, sparse):
    x, y, c = batch()
    alpha, lr, lr_cent = 0.01, 0.1, 0.5
    loss = CenterLoss(num_classes=5, feat_dim=3, use_gpu=True, sparse=sparse).cpu().double()
    loss.load_state_dict({"centers": c})
    assert list(loss.state_dict()) == ["centers"]
    theirs = nn.Parameter(c.clone())
    optimizer = torch.optim.SGD(loss.parameters(), lr=lr_cent if optimizers == 2 else lr)
    for _ in range(5):
        value = loss(x, y) * alpha
        optimizer.zero_grad()
        value.backward()
        for param in loss.parameters():  # the loops as they stand in other people's projects
            param.grad.data *= 1.0 / alpha if optimizers == 2 else lr_cent / (alpha * lr)
        optimizer.step()
        expected = matrix_form(x, y, theirs)
        (grad,) = torch.autograd.grad(expected, theirs)
        torch.testing.assert_close(value, alpha * expected, rtol=1e-9, atol=0)
        theirs.data -= lr_cent * grad
        torch.testing.assert_close(loss.centers, theirs, rtol=1e-9, atol=1e-12)


def test_defaults_positions_and_random_numbers_are_those_of_the_widespread_file():
    torch.manual_seed(1)
    loss, after = CenterLoss(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(loss.centers.cpu(), torch.randn(10, 2))
    assert torch.equal(after, torch.rand(1))
    assert CenterLoss(7, 3, False).centers.shape == (7, 3)
    assert (loss.num_classes, loss.feat_dim, loss.use_gpu) == (10, 2, True)
    assert loss.centers.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert CenterLoss(use_gpu=False).centers.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "device", "dtype"),
    [
        (dict(use_gpu=False), "cpu", torch.float32),
        (dict(use_gpu=torch.device("cpu")), "cpu", torch.float32),
        (dict(use_gpu="cpu"), "cpu", torch.float32),
        (dict(use_gpu=torch.device("meta")), "meta", torch.float32),
        (dict(device="cpu"), "cpu", torch.float32),
        (dict(device=torch.device("meta"), dtype=torch.float64), "meta", torch.float64),
        (dict(use_gpu=False, device="meta"), "meta", torch.float32),
        (dict(device="cpu", dtype=torch.bfloat16), "cpu", torch.bfloat16),
    ],
)
def test_device_and_dtype_say_where_and_in_what_the_centers_start(arguments, device, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # which does not matter where a device is given
    torch.manual_seed(1)
    loss = CenterLoss(5, 3, **arguments)
    torch.manual_seed(1)
    assert (loss.centers.device.type, loss.centers.dtype) == (device, dtype)
    assert device == "meta" or torch.equal(loss.centers, torch.randn(5, 3).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_centers_are_computed_with_in_float32(dtype):
    x, y, c = batch(torch.float32)
    loss = CenterLoss(5, 3, device="cpu", dtype=dtype, center_update="mean")
    loss.load_state_dict({"centers": c})
    stored = loss.centers.detach().float()
    assert_equal(run(loss, x, y)[:2], run(build(stored, center_update="mean"), x, y)[:2], 0, 0)
    assert torch.equal(loss.distances(x), build(stored).distances(x))
    loss.update_centers(x, y)
    other = build(stored, center_update="mean")
    other.update_centers(x, y)
    error = 2 * torch.finfo(dtype).eps  # a rounding for each of the two additions to a center
    torch.testing.assert_close(loss.centers.float(), other.centers, rtol=error, atol=error)


def test_copies_and_state_survive():
    x, y, c = batch()
    loss = build(c, distance="euclidean", class_average=True, radius=0.5, ignore_index=1)
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(copied(x, y), loss(x, y))
    average = torch.optim.swa_utils.AveragedModel(loss, avg_fn=lambda mean, new, count: 0.5 * mean + 0.5 * new)
    average.update_parameters(loss)  # the first is taken over
    loss.update_centers(x, y)
    average.update_parameters(loss)
    assert torch.equal(average.module.centers, 0.5 * c + 0.5 * loss.centers)
    assert average(x, y).isfinite()
    loss = build(c, distance="euclidean", class_average=True)
    other = CenterLoss(5, 3, use_gpu=False, distance="euclidean", class_average=True).double()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(x, y), loss(x, y))


# ---------------------------------------------------------------------------------------------- errors

X, Y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(num_classes=0), ValueError, "num_classes must be an integer of at least 1, got 0"),
        (dict(feat_dim=-3), ValueError, "feat_dim must be an integer of at least 1, got -3"),
        (dict(num_classes=2.5), TypeError, "num_classes must be an integer of at least 1, got 2.5"),
        (dict(feat_dim="2"), TypeError, "feat_dim must be an integer of at least 1, got '2'"),
        (
            dict(distance="cosine"),
            ValueError,
            r"distance must be one of \('squared', 'euclidean'\), got 'cosine'",
        ),
        (
            dict(center_update="eq4"),
            ValueError,
            r"center_update must be one of \('gradient', 'paper', 'mean'\), got 'eq4'",
        ),
        (dict(scale=0), ValueError, "scale must be a finite number > 0, got 0"),
        (dict(scale=math.nan), ValueError, "scale must be a finite number > 0, got nan"),
        (dict(scale=math.inf), ValueError, "scale must be a finite number > 0, got inf"),
        (dict(scale="1"), TypeError, "scale must be a finite number > 0, got '1'"),
        (dict(distance=["squared"]), TypeError, r"distance must be one of .*, got \['squared'\]"),
        (dict(radius=-0.5), ValueError, "radius must be a finite number >= 0, got -0.5"),
        (dict(radius=math.nan), ValueError, "radius must be a finite number >= 0, got nan"),
        (dict(radius=math.inf), ValueError, "radius must be a finite number >= 0, got inf"),
        (dict(radius=None), TypeError, "radius must be a finite number >= 0, got None"),
        (dict(radius=True), TypeError, "radius must be a finite number >= 0, got True"),
        (dict(ignore_index=1.0), TypeError, "ignore_index must be an integer or None, got 1.0"),
        (dict(ignore_index=False), TypeError, "ignore_index must be an integer or None, got False"),
        (dict(dtype=torch.int32), ValueError, "dtype must be a floating-point dtype, got torch.int32"),
        (dict(dtype=torch.cfloat), ValueError, "dtype must be a floating-point dtype, got torch.complex64"),
        (dict(dtype="float32"), TypeError, "dtype must be a floating-point dtype, got 'float32'"),
        (dict(device="gpu"), ValueError, "device must be one that torch knows, got 'gpu'"),
        (dict(device=0.5), ValueError, "device must be one that torch knows, got 0.5"),
        (dict(use_gpu="no"), ValueError, "device must be one that torch knows, got 'no'"),
        (dict(use_gpu="cpu", device="meta"), ValueError, "device must be left out .*, got 'meta' and 'cpu'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        CenterLoss(**{"use_gpu": False, **arguments})


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        ([[0.0, 0.0]], Y, TypeError, "features must be a tensor, got list"),
        (X, [0, 0, 0, 0], TypeError, "labels must be a tensor, got list"),
        (X.long(), Y, TypeError, "features must be floats, got torch.int64"),
        (X.cfloat(), Y, TypeError, "features must be floats, got torch.complex64"),
        (X, Y.float(), TypeError, "labels must be integers, got torch.float32"),
        (X, Y.bool(), TypeError, "labels must be integers, got torch.bool"),
        (X, Y.cfloat(), TypeError, "labels must be integers, got torch.complex64"),
        (X[:, :1], Y, ValueError, r"features must have shape \(B, 2\), got \(4, 1\)"),
        (X[0], Y, ValueError, r"features must have shape \(B, 2\), got \(2,\)"),
        (X[None], Y, ValueError, r"features must have shape \(B, 2\), got \(1, 4, 2\)"),
        (X, Y[:3], ValueError, r"labels must have shape \(4,\), got \(3,\)"),
        (X, Y[:, None], ValueError, r"labels must have shape \(4,\), got \(4, 1\)"),
        (X, Y + 10, ValueError, r"labels must be in \[0, 10\), got 10"),
        (X, Y - 1, ValueError, r"labels must be in \[0, 10\), got -1"),
        (X, torch.tensor([3, 0, 99, 1]), ValueError, r"labels must be in \[0, 10\), got 99"),
        (X, torch.tensor([3, 0, -7, 99]).to(torch.int8), ValueError, r"labels must be in \[0, 10\), got -7"),
        (X.to("meta"), Y, ValueError, "features must be on cpu like centers, got meta"),
        (X, Y.to("meta"), ValueError, "labels must be on cpu like centers, got meta"),
    ],
)
def test_wrong_inputs_are_refused(features, labels, error, message):
    with pytest.raises(error, match=message):
        CenterLoss(10, 2, use_gpu=False)(features, labels)


def test_the_first_and_the_last_class_are_accepted():
    assert CenterLoss(10, 2, use_gpu=False)(X, torch.tensor([0, 9, 9, 0])).isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "alpha must be finite and > 0, got 0: .* weight 0 .* leave the centers alone"),
        ((-0.1,), "alpha must be finite and > 0, got -0.1"),
        ((math.nan,), "alpha must be finite and > 0, got nan"),
        ((math.inf,), "alpha must be finite and > 0, got inf"),
        ((1.0, -2.0), "lr_ratio must be finite and >= 0, got -2.0"),
        ((1.0, math.nan), "lr_ratio must be finite and >= 0, got nan"),
        ((1.0, math.inf), "lr_ratio must be finite and >= 0, got inf"),
    ],
)
def test_rescale_refuses_wrong_factors_and_leaves_the_gradient(arguments, message):
    x, y, c = batch()
    loss = build(c)
    grad = run(loss, x, y)[2]
    with pytest.raises(ValueError, match=message):
        loss.rescale_center_grad(*arguments)
    assert torch.equal(loss.centers.grad, grad)


def test_rescale_before_backward_says_so():
    with pytest.raises(RuntimeError, match="centers.grad is None: call rescale_center_grad after backward"):
        CenterLoss(use_gpu=False).rescale_center_grad(0.1)


# ----------------------------------------------------------------------------------------------- ranks

IGNORED = 0  # of this class, most splits have one sample on each rank
SPLITS = [(4, 4), (5, 3), (8, 0), (0, 8), (0, 0)]  # class 4 is always missing on one rank, class 3 on both
DDP_SPLITS = [(4, 4), (5, 3)]


def split_batch(split, dtype=torch.float64):
    features, labels, centers = batch(dtype)
    total = sum(split)
    return features[:total], labels[:total], centers


def ddp_steps(features, labels, centers, variant, ranks=1, slice_=slice(None)):
    """Parameters after three steps of a network with center loss, on one process or as one of several."""
    torch.manual_seed(0)
    network = nn.Linear(3, 3).double()
    wrapped = nn.parallel.DistributedDataParallel(network) if ranks > 1 else network
    loss = build(centers, **variant)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in (network, loss)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (0.3 * ranks * loss(wrapped(features[slice_]), labels[slice_])).backward()
        loss.rescale_center_grad(0.3 * ranks)
        for optimizer in optimizers:
            optimizer.step()
    return [parameter.detach() for parameter in (*network.parameters(), loss.centers)]


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for split in SPLITS:
        features, labels, centers = split_batch(split)
        own = slice(0, split[0]) if rank == 0 else slice(split[0], None)
        for variant in VARIANTS:
            loss = build(centers, ignore_index=IGNORED, **variant)
            results[split, name(variant)] = run(loss, features[own], labels[own], weight=0.3)
            loss.update_centers(features[own], labels[own], alpha=0.3)
            results["updated", split, name(variant)] = loss.centers.detach()
        if split in DDP_SPLITS:
            for variant in VARIANTS:
                steps = ddp_steps(features, labels, centers, variant, 2, own)
                results["ddp", split, name(variant)] = steps
    half = batch(torch.bfloat16)
    results["bfloat16"] = run(build(half[2].float()), half[0][4 * rank :][:4], half[1][4 * rank :][:4])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two gloo processes compute, everything in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@each_variant
def test_two_ranks_give_what_one_process_gives_on_the_joined_batch(ranks, variant, split):
    first, second = (results[split, name(variant)] for results in ranks)
    features, labels, centers = split_batch(split)
    loss = build(centers, ignore_index=IGNORED, **variant)
    value, grad_x, grad_c = run(loss, features, labels, weight=0.3)
    assert_equal(
        (first[0], torch.cat([first[1], second[1]]), first[2]), (value, grad_x, grad_c), 1e-13, 1e-15
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])  # to the bit
    loss.update_centers(features, labels, alpha=0.3)
    for results in ranks:
        torch.testing.assert_close(results["updated", split, name(variant)], loss.centers.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("split", DDP_SPLITS, ids=str)
@each_variant
def test_distributed_data_parallel_takes_the_steps_of_one_process(ranks, variant, split):
    first, second = (results["ddp", split, name(variant)] for results in ranks)
    assert_equal(first, ddp_steps(*split_batch(split), variant), rtol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_ranks_with_bfloat16_features(ranks):
    features, labels, centers = batch(torch.bfloat16)
    value, grad_x, grad_c = run(build(centers.float()), features, labels)
    first, second = (results["bfloat16"] for results in ranks)
    joined = torch.cat([first[1], second[1]])
    assert joined.dtype == torch.bfloat16
    assert_equal((first[0], joined, first[2]), (value, grad_x, grad_c), 1e-6, 1e-7)


# ------------------------------------------------------------------------------------------- docstrings


def test_the_snippets_in_the_docstrings_run():
    result = doctest.testmod(module)
    assert result.attempted >= 10 and result.failed == 0
