"""What --tensorboard writes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils


class Board:
    """The settings as hparams, the metrics of each epoch and the pictures of --plot.

    Pictures, which are drawn in the background, are added when the next epoch ends and on leaving
    the context. `history`: the rows of metrics.csv of a resumed run, added if that was not done.
    """

    def __init__(self, directory: Path, settings: dict, history: Sequence[dict]):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.directory = directory
        is_recorded = any(directory.glob(utils.EVENT_FILES))
        self.added = set(self._pictures()) if is_recorded else set()
        self.writer = SummaryWriter(directory / "tensorboard", purge_step=len(history) + 1)
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        metrics = ["test_accuracy", "nearest_center_accuracy", "train_loss"]
        for summary in hparams(plain, dict.fromkeys(metrics)):
            self.writer.file_writer.add_summary(summary)
        for row in [] if is_recorded else history:
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
        from PIL import Image

        for epoch, path in self._pictures():
            if (epoch, path) not in self.added:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                self.writer.add_image(
                    f"{path.parent.name} features", pixels, epoch, dataformats="HWC"
                )
                self.added.add((epoch, path))
