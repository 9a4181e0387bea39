"""What goes from epoch to epoch is what a checkpoint holds, and comes back from it."""

import copy

import pytest
import torch
from small import make_batches, make_step

from engine.state import State, from_checkpoint, new_row, to_checkpoint

CPU = torch.device("cpu")


def trained():
    """A step that was taken, its modules by name, and the state after an epoch."""
    step = make_step()
    images, labels, _ = make_batches(1)[0]
    step(images, labels)
    modules = dict(model=step.net, center_loss=step.center_loss, optimizer=step.optimizers["model"])
    state = State(step.center_loss.centers.detach(), torch.get_rng_state())
    splits = dict(train=dict(loss=2.5, xent=2.0, center=0.5, accuracy=40.0))
    state.add_epoch(new_row(1, 0.1, splits), state.centers)
    return step, modules, state


def test_a_state_comes_back_with_its_modules_and_random_numbers():
    step, modules, state = trained()
    checkpoint = copy.deepcopy(to_checkpoint(state, modules))
    expected = torch.rand(3)  # the next ones after the state
    images, labels, _ = make_batches(1)[0]
    step(images, labels)
    torch.manual_seed(5)
    again = from_checkpoint(checkpoint, modules, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert (again.epoch, again.history) == (1, state.history)
    assert torch.equal(again.centers, step.center_loss.centers)
    for name, module in modules.items():
        restored = module.state_dict()
        assert str(restored) == str(checkpoint[name])


DAMAGE = {
    "network": dict(model={}),
    "shape": dict(center_loss=dict(centers=torch.zeros(5, 2))),
    "optimizer": dict(optimizer=dict(state={}, param_groups=[])),
    "random": dict(rng=torch.zeros(3)),
    "later epoch": dict(epoch=7),
    "no row": dict(history=[]),
    "rows": dict(history=[3]),
    "other columns": dict(epoch=2, history=[dict(epoch=1, lr_model=0.1), dict(epoch=2, more=3)]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_state_that_does_not_fit_is_a_value_error(what):
    _, modules, state = trained()
    checkpoint = to_checkpoint(state, modules) | DAMAGE[what]
    with pytest.raises(ValueError, match="does not fit"):
        from_checkpoint(checkpoint, modules, CPU)


def test_a_row_has_all_columns_and_none_where_nothing_was_measured():
    row = new_row(3, 0.1, dict(train=dict(loss=1.0), test=dict(accuracy=50.0)))
    assert list(row)[:4] == ["epoch", "lr_model", "train_loss", "train_xent"]
    assert (row["epoch"], row["train_loss"], row["test_accuracy"]) == (3, 1.0, 50.0)
    assert row["intra_distance"] is None and "val_accuracy" not in row
    validated = new_row(3, 0.1, dict(train={}, val=dict(accuracy=50.0, xent=0.5)), True)
    assert validated["val_accuracy"] == 50.0 and validated["test_accuracy"] is None
    assert list(new_row(4, 0.1, dict(train={}), True)) == list(validated)


def test_the_best_epoch_is_that_of_the_highest_accuracy_and_then_the_lowest_loss():
    state = State(torch.zeros(1), torch.get_rng_state())
    best = []
    for epoch, (accuracy, xent) in enumerate([(50, 1.0), (40, 0.1), (50, 0.9), (50, 0.9)], 1):
        validated = dict(accuracy=float(accuracy), xent=xent)
        if state.is_best(validated):
            best.append(epoch)
        state.add_epoch(new_row(epoch, 0.1, dict(train={}, val=validated), True), state.centers)
        state.add_epoch(new_row(epoch, 0.1, {}, True), state.centers)  # an epoch without a test
    assert best == [1, 3]


def test_the_test_of_the_best_epoch_is_in_the_last_row_until_an_epoch_follows():
    _, _, state = trained()
    state.add_best(dict(test=dict(accuracy=70.0)))
    assert state.best_tested and state.history[-1]["test_accuracy"] == 70.0
    state.add_epoch(new_row(2, 0.1, dict(train={})), state.centers)
    assert not state.best_tested
