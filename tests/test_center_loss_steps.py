"""Steps with CenterLoss: optimizers, update_centers, cost, torch.compile and torch.func."""

import itertools

import pytest
import torch
from oracles import (
    NORMALIZED,
    PLAIN,
    VARIANTS,
    Count,
    NoReads,
    Sizes,
    assert_equal,
    batch,
    build,
    each_dense,
    each_variant,
    name,
    oracle,
    run,
)
from torch import nn

import center_loss as module
from center_loss import CenterLoss


@each_variant
def test_update_centers_takes_the_step_of_sgd(variant):
    """Before and after backward, with frozen centers, under autocast; all else stays as it was."""
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
        loss.to("meta").update_centers(
            torch.empty(8, 4, device="meta"), torch.empty(8, device="meta").long()
        )


@each_dense
def test_frozen_centers_cost_nothing(variant):
    """As many operations as with the plain gradient: neither Delta nor counts are computed."""
    x, y, c = batch()
    with Count() as frozen:
        build(c, **variant).requires_grad_(False)(x, y)
    with Count() as plain:
        build(c, **variant | dict(center_update="gradient")).requires_grad_(False)(x, y)
    with Count() as trained:
        build(c, **variant)(x, y)
    assert frozen.operations == plain.operations
    assert trained.operations > frozen.operations or variant["center_update"] == "gradient"


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


@each_variant
def test_off_the_cpu_nothing_reads_a_value_back(variant):
    # Tensors on the meta device have no values, so whatever depends on one would raise, too.
    loss = CenterLoss(4, 3, use_gpu=False, **variant).to("meta")
    features = torch.empty(6, 3, device="meta", requires_grad=True)
    with NoReads():
        value = loss(features, torch.empty(6, dtype=torch.long, device="meta"))
        value.backward()
    assert value.shape == () and features.grad.shape == (6, 3)


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
    beyond = variant["radius"] < 1.5  # class 0 is within it
    moved = (two[0] != two[-1]).any(dim=1).tolist()
    assert moved == [beyond, True, True, False, True]  # class 3 has no sample


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
    """Across an overflow and a changing scale: unscale both, step both, update once."""
    x, y, c = batch(torch.float32)
    paths = []
    for enabled in (False, True):
        torch.manual_seed(0)
        network, loss = nn.Linear(3, 3), build(c, center_update="paper")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        optimizer_cent = torch.optim.SGD(loss.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(
            "cpu",
            enabled=enabled,
            init_scale=2.0**127,
            backoff_factor=2.0**-120,
            growth_interval=1,
        )
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
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    whole = [run(build(c, center_update=center_update), *part)[2] for part in parts]
    torch.testing.assert_close(loss.centers.grad, sum(whole) / 2)
    if center_update == "gradient":
        torch.testing.assert_close(loss.centers.grad, run(build(c), x, y)[2])


@pytest.mark.parametrize("variant", PLAIN[::4] + PLAIN[1::12] + NORMALIZED[1::3], ids=name)
def test_compile_traces_the_whole_loss(variant):
    torch._dynamo.reset()
    x, y, c = batch(torch.float32)
    compiled = build(c, **variant)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for size in (8, 5):
        compiled.centers.grad = None
        expected = run(build(c, **variant), x[:size], y[:size])
        assert_equal(run(compiled, x[:size], y[:size]), expected, rtol=1e-5, atol=1e-6)


no_sparse = pytest.mark.skipif(
    torch.__version__ < "2.6", reason="torch 2.5 cannot compile sparse ones"
)


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
    # vmap hides the labels from the range check, not from the lookup.
    with pytest.raises(IndexError):
        torch.func.vmap(pure, in_dims=(None, 0, 0))(c, x[:, None], y[:, None] + 1)


@pytest.mark.parametrize("variant", [VARIANTS[0], *NORMALIZED], ids=name)
def test_update_centers_takes_features_of_inference_mode(variant):
    x, y, c = batch(torch.float32)
    expected = build(c, **variant)
    expected.update_centers(x, y)
    loss = build(c, **variant)
    with torch.inference_mode():
        features, labels = x + 0, y + 0
        loss.update_centers(features, labels)
        made_there = build(c, **variant).requires_grad_(False)
        made_there.update_centers(features, labels)
    outside = build(c, **variant)
    outside.update_centers(features, labels)
    assert not torch.equal(expected.centers, c) and not loss.centers.is_inference()
    for other in (loss, made_there, outside):
        assert torch.equal(other.centers, expected.centers)
