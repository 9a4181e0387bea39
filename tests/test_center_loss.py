"""CenterLoss against slow, obvious loops: values, gradients, distances, numerics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    ALL,
    NORMALIZED,
    VARIANTS,
    Sizes,
    assert_equal,
    batch,
    build,
    each_dense,
    each_plain,
    each_variant,
    name,
    oracle,
    run,
)
from torch import nn

import center_loss as module
from center_loss import CenterLoss


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
    # Directions are rounded at 1, whatever the distance between them.
    smallest = 1e-15 if variant["normalize"] else 1e-18
    expected = oracle(features, labels, centers, **variant)
    assert_equal((value, grad_x, grad_c), expected, 1e-9, smallest)
    order = torch.randperm(len(draw), generator=generator)
    loss.centers.grad = None
    shuffled = run(loss, features[order], labels[order])
    assert_equal(shuffled, (value, grad_x[order], grad_c), 1e-12, 1e-15)


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
    elif not variant["radius"] and not variant["normalize"]:
        # The derivative of Eq. 4 by the centers: n_j / (1 + n_j) on the diagonal.
        hessian = torch.func.hessian(of_centers)(c)
        n = torch.tensor([2, 2, 3, 0, 1], dtype=torch.float64)
        divisor = 1 + n if variant["center_update"] == "paper" else n.clamp(min=1)
        expected = torch.einsum(
            "j,jk,ab->jakb", n / divisor, torch.eye(5).double(), torch.eye(3).double()
        )
        torch.testing.assert_close(hessian, expected)


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
    assert_equal(
        [build(c, ignore_index=255)(x, y.to(torch.uint8))], [build(c, ignore_index=255)(x, y)]
    )
    for wrong in (254, 5):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), got {wrong}"):
            build(c, ignore_index=255)(x, torch.where(y == 4, wrong, y))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got 255"):
        build(c)(x, y)


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
        torch.autograd.gradcheck(
            lambda x, c, block=block: module.pairwise(x, c, distance, block), (away, loss.centers)
        )
    (grad,) = torch.autograd.grad(loss.distances(x)[3, 2], x)
    assert torch.equal(grad, torch.zeros_like(x))


def test_distances_are_exact_far_from_the_origin_and_float32_whatever_the_features():
    generator = torch.Generator().manual_seed(0)
    centers = 100 + torch.randn(4, 512, generator=generator)
    features = centers[[0, 1, 2, 3, 0]] + 1e-3 * torch.randn(5, 512, generator=generator)
    expected = (features.double()[:, None] - centers.double()).pow(2).sum(2)
    torch.testing.assert_close(
        build(centers).distances(features).double(), expected, rtol=1e-5, atol=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        distances = build(centers).distances(features.bfloat16())
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances, build(centers).distances(features.bfloat16().float()))


def test_distances_of_many_classes_take_little_more_memory_than_their_result():
    loss, features = CenterLoss(40_000, 64, use_gpu=False), torch.randn(8, 64, requires_grad=True)
    with Sizes(exempt=loss.centers) as sizes:
        loss.distances(features).square().sum().backward()
    # The centers' gradient is the largest; all offsets would be eight times that.
    assert sizes.largest <= 40_000 * 64
    with torch.no_grad(), Sizes(exempt=loss.centers) as sizes:
        loss.distances(features)
    assert sizes.largest <= 2**20


@each_plain
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


def test_normalized_with_half_the_scale_it_is_one_minus_the_cosine():
    x, y, c = batch()
    x.requires_grad_()
    own = c.clone().requires_grad_()
    expected = (1 - nn.functional.cosine_similarity(x, own[y])).mean()
    grad_x, grad_c = torch.autograd.grad(expected, (x, own))
    loss = build(c, scale=0.5, normalize=True)
    assert_equal(run(loss, x.detach(), y), (expected.detach(), grad_x, grad_c), 1e-12, 1e-15)
    cosines = nn.functional.cosine_similarity(x[:, None], c, dim=2)
    torch.testing.assert_close(loss.distances(x), 2 * (1 - cosines))


@pytest.mark.parametrize("variant", NORMALIZED, ids=name)
def test_normalized_features_of_any_length_have_finite_gradients(variant):
    _, y, c = batch(torch.float32)
    c[4] = 0
    for length in (0, 1e-30, 1e-3, 1e15):
        value, grad_x, grad_c = run(build(c, **variant), torch.full((8, 3), float(length)), y)
        assert value.isfinite() and grad_x.isfinite().all() and grad_c.isfinite().all()


def test_normalized_centers_start_on_the_sphere():
    torch.manual_seed(0)
    centers = CenterLoss(5, 64, use_gpu=False, normalize=True).centers
    torch.testing.assert_close(centers.norm(dim=1), torch.ones(5))
    torch.manual_seed(0)
    torch.testing.assert_close(centers, nn.functional.normalize(torch.randn(5, 64)))


@pytest.mark.parametrize("many", [0, module.MANY])
def test_samples_are_counted_alike_among_few_and_many_classes(many, monkeypatch):
    monkeypatch.setattr(module, "MANY", many)
    generator = torch.Generator().manual_seed(0)
    loss = CenterLoss(7, 2, use_gpu=False)
    for size in (0, 1, 40):
        labels = torch.randint(7, (size,), generator=generator)
        expected = [labels.tolist().count(label) for label in labels.tolist()]
        assert loss._count(labels, None).tolist() == expected
        kept = torch.rand(size, generator=generator) < 0.5
        counts = loss._count(labels, kept)
        assert counts[kept].tolist() == [labels[kept].tolist().count(j) for j in labels[kept]]
        assert (counts >= 1).all()  # ignored ones too, since everything is divided by it


# ------------------------------------------------------------------------------------- start_from


@pytest.mark.parametrize("normalize", [False, True])
def test_start_from_sets_class_means_over_batches(normalize):
    x, y, c = batch()
    y[6] = -1
    loss = build(c, normalize=normalize, ignore_index=-1)
    drawn = []

    def batches():
        for part in (slice(0, 3), slice(3, 8), slice(8, 8)):
            drawn.append(torch.is_grad_enabled())
            yield x[part], y[part]

    loss.start_from(batches())
    assert drawn == [False] * 3
    for j in range(5):
        own = nn.functional.normalize(x[y == j]) if normalize else x[y == j]
        mean = own.mean(0)
        mean = nn.functional.normalize(mean, dim=0) if normalize else mean
        torch.testing.assert_close(loss.centers[j].detach(), mean if len(own) else c[j])
    assert loss.centers.requires_grad and loss.centers.is_leaf


def test_start_from_takes_half_precision_and_inference_and_refuses_what_the_loss_refuses():
    x, y, c = batch(torch.float32)
    loss = build(c.bfloat16())
    with torch.inference_mode():
        features = x.half() + 0
    loss.start_from([(features, y)])
    torch.testing.assert_close(loss.centers[1].float(), x[1:3].mean(0), rtol=1e-2, atol=1e-2)
    before = loss.centers.detach().clone()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got 5"):
        loss.start_from([(x, y), (x, y + 1)])
    assert torch.equal(loss.centers, before)
