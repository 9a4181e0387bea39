"""An epoch against its steps, a test against slow loops; no files."""

import copy

import pytest
import torch
from small import constant, make_batches, make_step

from engine import epoch


def test_an_epoch_sums_up_its_steps():
    batches = [*make_batches(3), *make_batches(1, size=2)]
    step = make_step()
    trained = epoch.train_epoch(step, batches, constant(step), keep=True)
    alone = make_step()
    outputs = [alone(images, labels) for images, labels, _ in batches]
    sizes = [size for _, _, size in batches]
    means = [output.means.double() for output in outputs]
    sums = sum(size * mean for size, mean in zip(sizes, means, strict=True))
    xent, center, correct = (sums / 17).tolist()
    assert trained["xent"] == pytest.approx(xent)
    assert trained["center"] == pytest.approx(center)
    assert trained["loss"] == trained["xent"] + trained["center"]
    assert trained["accuracy"] == pytest.approx(100 * correct)
    assert torch.equal(trained["features"], torch.cat([output.features for output in outputs]))
    assert torch.equal(trained["labels"], torch.cat([labels for _, labels, _ in batches]))
    right = (trained["predictions"] == trained["labels"]).double().mean().item()
    assert trained["accuracy"] == pytest.approx(100 * right)


def test_what_is_reported_are_the_losses_of_the_step_and_the_means_of_the_pass():
    batches = make_batches(2)
    step = make_step()
    seen = []
    epoch.train_epoch(
        step,
        batches,
        constant(step),
        report=lambda progress: seen.append((progress.means(), progress.line(2))),
    )
    alone = make_step()
    first, second = (alone(images, labels).means[:2] for images, labels, _ in batches)
    means, line = seen[1]
    expected = ((first + second) / 2).tolist()
    assert [means["xent"], means["center"]] == pytest.approx(expected)
    loss = second.sum().item()
    assert line.startswith(f"Batch 2/2\t Loss {loss:.6f} ({means['loss']:.6f}) XentLoss ")


def test_the_scheduler_takes_a_step_after_each_batch():
    step = make_step()
    schedule = torch.optim.lr_scheduler.StepLR(step.optimizers["model"], 2, 0.5)
    epoch.train_epoch(step, make_batches(3), schedule)
    assert schedule.get_last_lr() == [0.05]


def test_a_test_has_the_metrics_of_slow_loops_and_trains_nothing():
    step = make_step()
    batches = make_batches(3)
    before = copy.deepcopy(step.net.state_dict())
    outputs = epoch.predict(step.net, batches)
    tested = epoch.measure(outputs, step.center_loss.centers)
    right = nearest = 0
    losses = []
    distances = []
    centers = step.center_loss.centers.detach()
    for images, labels, _ in batches:
        for image, label in zip(images, labels, strict=True):
            features, logits = step.net(image[None])
            right += logits.argmax().item() == label.item()
            losses.append(-logits.log_softmax(1)[0, label].item())
            to_centers = [(features[0] - center).norm().item() for center in centers]
            nearest += to_centers.index(min(to_centers)) == label.item()
            distances.append(to_centers[label])
    assert tested["accuracy"] == pytest.approx(100 * right / 15)
    assert tested["nearest_center_accuracy"] == pytest.approx(100 * nearest / 15)
    assert tested["xent"] == pytest.approx(sum(losses) / 15, rel=1e-5)
    assert tested["intra_distance"] == pytest.approx(sum(distances) / 15, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in step.net.state_dict().items())
    said = epoch.lines(tested)
    assert said[0].startswith(f"Accuracy (%): {tested['accuracy']:.2f}\t Error rate (%): ")


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_without_center_loss_the_centers_of_metrics_are_class_means(weight):
    step = make_step(weight)
    trained = epoch.train_epoch(step, make_batches(4), constant(step), keep=True)
    centers = epoch.current_centers(step, trained)
    for label in range(3):
        own = trained["features"][trained["labels"] == label].mean(0)
        expected = step.center_loss.centers[label] if weight else own
        assert torch.allclose(centers[label], expected, atol=1e-6)


def test_the_sum_of_a_state_shows_a_number_that_is_not_finite():
    step = make_step()
    expected = sum(value.sum().item() for value in step.net.state_dict().values())
    sums = epoch.state_sums(step)
    assert sums["network's weights"] == pytest.approx(expected, rel=1e-5)
    assert sums["centers"] == pytest.approx(step.center_loss.centers.sum().item(), rel=1e-5)
    with torch.no_grad():
        step.net.classifier.bias[1] = torch.inf
    assert epoch.state_sums(step)["network's weights"] == torch.inf
