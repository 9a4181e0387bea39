"""Arguments, wrong inputs, copies and promises of center_loss.py as a file."""

import ast
import copy
import doctest
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from oracles import (
    batch,
    build,
    run,
)
from torch import nn

import center_loss as module
from center_loss import CenterLoss

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
        (
            dict(dtype=torch.int32),
            ValueError,
            "dtype must be a floating-point dtype, got torch.int32",
        ),
        (
            dict(dtype=torch.cfloat),
            ValueError,
            "dtype must be a floating-point dtype, got torch.complex64",
        ),
        (dict(dtype="float32"), TypeError, "dtype must be a floating-point dtype, got 'float32'"),
        (dict(device="gpu"), ValueError, "device must be one that torch knows, got 'gpu'"),
        (dict(device=0.5), ValueError, "device must be one that torch knows, got 0.5"),
        (dict(use_gpu="no"), ValueError, "device must be one that torch knows, got 'no'"),
        (
            dict(use_gpu="cpu", device="meta"),
            ValueError,
            "device must be left out .*, got 'meta' and 'cpu'",
        ),
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
        (
            X[:, :1],
            Y,
            ValueError,
            r"features must have shape \(B, 2\), got \(4, 1\): feat_dim is 2 \(the default\)$",
        ),
        (X[0], Y, ValueError, r"features must have shape \(B, 2\), got \(2,\)"),
        (
            X[None],
            Y[None],
            ValueError,
            r"features must have shape \(B, 2\), got \(1, 4, 2\): flatten\(0, 1\) features",
        ),
        (X, Y[:3], ValueError, r"labels must have shape \(4,\), got \(3,\)$"),
        (
            X,
            Y[:, None],
            ValueError,
            r"labels must have shape \(4,\), got \(4, 1\): squeeze\(1\) them",
        ),
        (X, Y + 10, ValueError, r"labels must be in \[0, 10\), got 10"),
        (X, Y - 1, ValueError, r"labels must be in \[0, 10\), got -1"),
        (X, torch.tensor([3, 0, 99, 1]), ValueError, r"labels must be in \[0, 10\), got 99"),
        (
            X,
            torch.tensor([3, 0, -7, 99]).to(torch.int8),
            ValueError,
            r"labels must be in \[0, 10\), got -7",
        ),
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
        ((0,), r"weight \(λ\) must be finite and > 0, got 0: .* λ = 0 .* leave the centers alone"),
        ((-0.1,), r"weight \(λ\) must be finite and > 0, got -0.1"),
        ((math.nan,), r"weight \(λ\) must be finite and > 0, got nan"),
        ((math.inf,), r"weight \(λ\) must be finite and > 0, got inf"),
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
    with pytest.raises(RuntimeError, match="centers.grad is None: call .* after backward"):
        CenterLoss(use_gpu=False).rescale_center_grad(0.1)


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
def test_device_and_dtype_are_those_of_the_centers(arguments, device, dtype, monkeypatch):
    # Where a device is given, it does not matter whether there is a GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(1)
    loss = CenterLoss(5, 3, **arguments)
    torch.manual_seed(1)
    assert (loss.centers.device.type, loss.centers.dtype) == (device, dtype)
    assert device == "meta" or torch.equal(loss.centers, torch.randn(5, 3).to(dtype))


def test_copies_and_state_survive():
    x, y, c = batch()
    loss = build(c, distance="euclidean", class_average=True, radius=0.5, ignore_index=1)
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(copied(x, y), loss(x, y))

    def mean_of(mean, new, count):
        return 0.5 * mean + 0.5 * new

    average = torch.optim.swa_utils.AveragedModel(loss, avg_fn=mean_of)
    average.update_parameters(loss)  # the first is taken over
    loss.update_centers(x, y)
    average.update_parameters(loss)
    assert torch.equal(average.module.centers, 0.5 * c + 0.5 * loss.centers)
    assert average(x, y).isfinite()
    loss = build(c, distance="euclidean", class_average=True)
    other = CenterLoss(5, 3, use_gpu=False, distance="euclidean", class_average=True).double()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(x, y), loss(x, y))


def test_distances_refuse_what_the_loss_refuses():
    with pytest.raises(ValueError, match=r"features must have shape \(B, 2\), got \(4, 1\)"):
        CenterLoss(use_gpu=False).distances(X[:, :1])
    with pytest.raises(TypeError, match="features must be floats, got torch.int64"):
        CenterLoss(use_gpu=False).distances(X.long())


@pytest.mark.parametrize(
    ("alpha", "error"),
    [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)],
)
def test_update_centers_refuses_wrong_rates_and_inputs_and_moves_nothing(alpha, error):
    x, y, c = batch()
    loss = build(c)
    with pytest.raises(error, match=f"alpha must be a finite number >= 0, got {alpha!r}"):
        loss.update_centers(x, y, alpha)
    for wrong, label in ((y + 1, 5), (y - 1, -1)):
        for change in (loss.update_centers, lambda *batch: loss.start_from([batch])):
            with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), got {label}"):
                change(x, wrong)
    assert torch.equal(loss.centers, c)


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


def test_the_snippets_in_the_docstrings_run():
    result = doctest.testmod(module)
    assert result.attempted >= 10 and result.failed == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_is_a_label(dtype):
    x, y, c = batch()
    assert torch.equal(build(c)(x, y.to(dtype)), build(c)(x, y))


def test_a_width_that_was_given_is_not_called_a_default():
    with pytest.raises(ValueError, match=r"features must have shape \(B, 3\), got \(4, 2\)$"):
        CenterLoss(10, 3, use_gpu=False)(X, Y)


def test_rescale_takes_the_weight_by_its_old_name_too():
    x, y, c = batch()
    grads = []
    for arguments in (dict(weight=0.25), dict(alpha=0.25)):
        loss = build(c)
        run(loss, x, y)
        loss.rescale_center_grad(lr_ratio=2, **arguments)
        grads.append(loss.centers.grad)
    assert torch.equal(*grads)
    with pytest.raises(TypeError, match="rescale_center_grad needs the weight λ"):
        loss.rescale_center_grad()


def test_fixed_centers_have_no_gradient_to_rescale():
    x, y, c = batch()
    loss = build(c).requires_grad_(False)
    loss(x.requires_grad_(), y).backward()
    with pytest.raises(RuntimeError, match="centers.requires_grad is False: there is no gradient"):
        loss.rescale_center_grad(0.1)


class Unit(nn.Module):
    def forward(self, centers):
        return nn.functional.normalize(centers)


def test_parametrized_centers_train_but_are_not_changed_in_place():
    x, y, c = batch()
    loss = build(c)
    nn.utils.parametrize.register_parametrization(loss, "centers", Unit())
    original = loss.parametrizations.centers.original
    loss(x, y).backward()
    assert original.grad.any()
    for change in (
        lambda: loss.rescale_center_grad(0.1),
        lambda: loss.update_centers(x, y),
        lambda: loss.start_from([(x, y)]),
    ):
        with pytest.raises(RuntimeError, match="centers are parametrized: change their original"):
            change()
    assert torch.equal(original, c)
