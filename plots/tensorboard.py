"""What --tensorboard writes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils


class Board:
    """The settings as hparams, the metrics of each epoch and the pictures of --plot.

    Pictures, which are drawn in the background, are added when the next epoch ends and on leaving
    the context. `history`: the rows of a resumed run, in place of those that earlier files have.
    """

    def __init__(self, directory: Path, settings: dict, history: Sequence[dict]):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.directory = directory
        self.added = set()
        self.writer = SummaryWriter(directory / "tensorboard", purge_step=1)
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        metrics = ["test_accuracy", "nearest_center_accuracy", "train_loss"]
        for summary in hparams(plain, dict.fromkeys(metrics)):
            self.writer.file_writer.add_summary(summary)
        for row in history:
            self.add_epoch(row)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error) -> None:
        self._add_pictures()
        self.writer.close()

    def add_epoch(self, row: dict) -> None:
        for name, value in row.items():
            if value is not None and name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])
        self._add_pictures()
        self.writer.flush()

    def _add_pictures(self) -> None:
        from PIL import Image

        patterns = [f"{split}/epoch_*.png" for split in utils.SPLITS]
        for epoch, path in utils.epoch_files(self.directory, patterns):
            if path not in self.added:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                name = f"{path.parent.name} features"
                self.writer.add_image(name, pixels, epoch, dataformats="HWC")
                self.added.add(path)
