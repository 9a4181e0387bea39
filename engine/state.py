"""What a run carries from epoch to epoch; with the states of its modules it is a checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

TESTED = ("xent", "accuracy", "nearest_center_accuracy", "intra_distance", "inter_distance")


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
        self.history = (*self.history[:-1], self.history[-1] | test_columns(splits))
        self.best_tested = True

    def is_best(self, validated: dict) -> bool:
        """Whether the validation accuracy is the best so far; among equals the loss counts."""
        rows = [row for row in self.history if row["val_accuracy"] is not None]
        earlier = [(row["val_accuracy"], -row["val_xent"]) for row in rows]
        return (validated["accuracy"], -validated["xent"]) > max(earlier, default=(-1.0, 0.0))


def new_row(epoch: int, rate: float, splits: dict[str, dict], validates: bool = False) -> dict:
    """The epoch's row of metrics.csv: None for what was not measured."""
    row = dict(epoch=epoch, lr_model=rate)
    for name in ("loss", "xent", "center", "accuracy"):
        row[f"train_{name}"] = splits.get("train", {}).get(name)
    for name in TESTED[:3] if validates else ():
        row[f"val_{name}"] = splits.get("val", {}).get(name)
    return row | test_columns(splits)


def test_columns(splits: dict[str, dict]) -> dict:
    """The metrics of the test; those of features alone are not called test_."""
    tested = splits.get("test", {})
    names = ("test_xent", "test_accuracy", *TESTED[2:])
    return dict(zip(names, map(tested.get, TESTED), strict=True))


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
        if [row["epoch"] for row in state.history] != list(range(1, state.epoch + 1)):
            raise ValueError("a row an epoch")
        if len({tuple(row) for row in state.history}) > 1:
            raise ValueError("rows with the same columns")
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        torch.set_rng_state(state.rng)
    except Exception as error:  # whatever the modules make of a foreign state
        raise ValueError("it does not fit this network and its optimizers") from error
    return state
