"""CenterLoss against the formulas of the papers and of other projects."""

import pytest
import torch
from oracles import batch, build, run
from torch import nn

from center_loss import CenterLoss


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


def test_wen2019_has_the_gradients_of_its_layers_and_moves_centers_to_class_means():
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
    torch.testing.assert_close(
        gradient, delta * (2 * (1 + n) / len(y))[:, None], rtol=1e-13, atol=1e-15
    )


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


def facenet_step(x, y, c, alfa):
    """facenet: each sample moves its center, by the centers that the batch began with."""
    loss = ((x - c[y]) ** 2).mean()
    return loss, c.index_add(0, y, (1 - alfa) * (c[y] - x), alpha=-1)


def test_facenets_centers_add_up_their_offsets():
    x, y, c = batch()
    value, moved = facenet_step(x, y, c, alfa=0.95)
    loss = build(c, scale=1 / 3)
    torch.testing.assert_close(loss(x, y), value)
    loss.update_centers(x, y, alpha=(1 - 0.95) * 8 * 3 / 2)
    torch.testing.assert_close(loss.centers.detach(), moved)


def eq_4(x, y, c):
    """Delta of Eq. 4, class by class; divided by 1 + n_j."""
    rows = [(c[j] - x[y == j]).sum(0) / (1 + (y == j).sum()) for j in range(len(c))]
    return torch.stack(rows)


def test_jxgu1016_and_torcheeg_divide_equation_4_by_the_batch_size_and_leave_out_the_weight():
    x, y, c = batch()
    weight = 0.3
    loss = build(c, scale=0.5, center_update="paper")
    value, grad_x, _ = run(loss, x, y, weight)
    loss.rescale_center_grad(weight, lr_ratio=1 / len(y))
    torch.testing.assert_close(value, ((x - c[y]) ** 2).sum() / 2 / len(y))
    torch.testing.assert_close(grad_x, weight * (x - c[y]) / len(y))
    torch.testing.assert_close(loss.centers.grad, eq_4(x, y, c) / len(y))


def test_keras_insightface_and_paddle_take_half_the_square_and_equation_4():
    x, y, c = batch()
    samples = 0.5 * ((x - c[y]) ** 2).sum(1)  # Paddle's are one a sample
    loss = build(c, scale=0.5, center_update="paper")
    torch.testing.assert_close(loss(x, y), samples.mean())
    loss.update_centers(x, y, alpha=0.1)
    torch.testing.assert_close(loss.centers.detach(), c - 0.1 * eq_4(x, y, c))


def test_pytorch_ood_divides_by_the_classes_and_ignores_unknown_samples():
    x, y, c = batch()
    y[2] = -1
    known = y >= 0
    distances = torch.cdist(x[known], c) ** 2
    mask = nn.functional.one_hot(y[known], 5)
    value = (mask * distances).clamp(0, 1e6).mean()
    torch.testing.assert_close(build(c, scale=1 / 5, ignore_index=-1)(x, y), value)


def test_neomls_value_and_gradient_are_of_two_scales():
    x, y, c = batch()
    offsets = x - c[y]
    value, gradient = (offsets**2).sum() / len(y), offsets / len(y)
    torch.testing.assert_close(run(build(c, scale=1), x, y)[0], value)
    torch.testing.assert_close(run(build(c, scale=0.5), x, y)[1], gradient)


def test_quaterion_normalizes_the_features_alone():
    x, y, c = batch()
    unit = x / x.norm(dim=1, keepdim=True)
    value = nn.functional.mse_loss(unit, c[y]) / 2
    torch.testing.assert_close(build(c, scale=0.5 / 3)(unit, y), value)
