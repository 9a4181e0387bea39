"""What --tensorboard writes."""

from collections.abc import Sequence
from pathlib import Path

import utils

METRICS = ("test_accuracy", "nearest_center_accuracy", "train_loss")  # beside the settings


class Board:
    """The settings as hparams, the metrics of each epoch and the pictures of --plot.

    Pictures are drawn in the background, so they are added when the next epoch ends or, the last
    ones, on leaving the context. Of a resumed run, `history` has the rows of metrics.csv so far;
    they are added if they have not been recorded.
    """

    def __init__(self, directory: Path, settings: dict, history: Sequence[dict]):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.directory = directory
        recorded = any(directory.glob(utils.EVENT_FILES))
        last = history[-1]["epoch"] if history else 0
        self.added = {path for epoch, path in self._pictures() if recorded and epoch <= last}
        self.writer = SummaryWriter(directory / "tensorboard", purge_step=last + 1)
        plain = {name: as_plain(value) for name, value in settings.items()}
        for summary in hparams(plain, dict.fromkeys(METRICS)):
            self.writer.file_writer.add_summary(summary)
        if not recorded:
            for row in history:
                self._add_metrics(row)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error) -> None:
        try:
            self._add_pictures()
        finally:
            self.writer.close()

    def add_epoch(self, row: dict) -> None:
        self._add_metrics(row)
        self._add_pictures()
        self.writer.flush()

    def _add_metrics(self, row: dict) -> None:
        for name, value in row.items():
            if value is not None and name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])

    def _pictures(self) -> list[tuple[int, Path]]:
        patterns = [f"{split}/epoch_*.png" for split in utils.SPLITS]
        return utils.epoch_files(self.directory, patterns)

    def _add_pictures(self) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for epoch, path in self._pictures():
            if path in self.added:
                continue
            image = Summary.Image(colorspace=3, encoded_image_string=path.read_bytes())
            value = Summary.Value(tag=f"{path.parent.name} features", image=image)
            self.writer.file_writer.add_summary(Summary(value=[value]), epoch)
            self.added.add(path)


def as_plain(value) -> bool | int | float | str:
    """A setting as hparams takes it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
