"""What a run carries from epoch to epoch; with the states of its modules it is a checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

# The columns of metrics.csv after epoch and lr_model: the split and the metric of each.
TRAIN_COLUMNS = {
    "train_loss": ("train", "loss"),
    "train_xent": ("train", "xent"),
    "train_center": ("train", "center"),
    "train_accuracy": ("train", "accuracy"),
}
VAL_COLUMNS = {
    "val_xent": ("val", "xent"),
    "val_accuracy": ("val", "accuracy"),
    "val_nearest_center_accuracy": ("val", "nearest_center_accuracy"),
}
TEST_COLUMNS = {
    "test_xent": ("test", "xent"),
    "test_accuracy": ("test", "accuracy"),
    "nearest_center_accuracy": ("test", "nearest_center_accuracy"),
    "intra_distance": ("test", "intra_distance"),
    "inter_distance": ("test", "inter_distance"),
}


@dataclass
class State:
    """The run after `epoch` epochs."""

    centers: Tensor  # (C, D), those of metrics and pictures
    rng: Tensor  # of torch's random numbers
    epoch: int = 0
    history: tuple[dict, ...] = ()  # the rows of metrics.csv
    best_tested: bool = False  # with validation images: whether the best epoch has been tested
    elapsed: float = 0.0  # seconds
    log_bytes: int = 0  # the length of the log

    def add_epoch(self, row: dict, centers: Tensor) -> None:
        self.epoch = row["epoch"]
        self.history = (*self.history, row)
        self.centers = centers
        self.best_tested = False
        self.rng = torch.get_rng_state()

    def add_best(self, splits: dict[str, dict]) -> None:
        """Adds the test of the epoch that was best by validation to the last row."""
        self.history = (*self.history[:-1], self.history[-1] | columns(splits, TEST_COLUMNS))
        self.best_tested = True

    def is_best(self, validated: dict) -> bool:
        """Whether the validation accuracy is the best so far; among equals the loss counts."""
        rows = [row for row in self.history if row["val_accuracy"] is not None]
        earlier = [(row["val_accuracy"], -row["val_xent"]) for row in rows]
        return (validated["accuracy"], -validated["xent"]) > max(earlier, default=(-1.0, 0.0))


def new_row(epoch: int, rate: float, splits: dict[str, dict], validates: bool = False) -> dict:
    """The epoch's row of metrics.csv: None for what was not measured."""
    names = TRAIN_COLUMNS | (VAL_COLUMNS if validates else {}) | TEST_COLUMNS
    return dict(epoch=epoch, lr_model=rate) | columns(splits, names)


def columns(splits: dict[str, dict], names: dict[str, tuple[str, str]]) -> dict:
    return {column: splits.get(split, {}).get(metric) for column, (split, metric) in names.items()}


def to_checkpoint(state: State, modules: Mapping) -> dict:
    """The entries of a checkpoint; `modules` have state dicts."""
    states = {name: module.state_dict() for name, module in modules.items()}
    return asdict(state) | dict(history=list(state.history)) | states


def from_checkpoint(checkpoint: Mapping, modules: Mapping, device: torch.device) -> State:
    """The state of a checkpoint, whose other entries are loaded into the modules.

    Raises ValueError if they do not fit.
    """
    try:
        names = [each.name for each in fields(State) if each.name in checkpoint]
        state = State(**{name: checkpoint[name] for name in names})
        state.history = tuple(state.history)
        state.centers = state.centers.to(device)
        centers = checkpoint["center_loss"]["centers"]
        whole = (
            [row["epoch"] for row in state.history] == list(range(1, state.epoch + 1))
            and len({tuple(row) for row in state.history}) <= 1
            and 0 <= state.elapsed < math.inf
            and state.log_bytes >= 0
            and (state.centers.shape, state.centers.dtype) == (centers.shape, centers.dtype)
        )
        if not whole:
            raise ValueError("its entries contradict each other")
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        torch.set_rng_state(state.rng)
    except Exception as error:  # whatever the modules make of a foreign state
        raise ValueError("it does not fit this network and its optimizers") from error
    return state
