"""What --tensorboard writes: each epoch's metrics and pictures once, also of a resumed run."""

import numpy as np
import pytest
from PIL import Image

from plots.tensorboard import Board

pytest.importorskip("tensorboard")


def rows(epochs: int) -> list[dict]:
    return [{"epoch": n, "train_loss": 1 / n, "test_xent": None} for n in range(1, epochs + 1)]


def records(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory / "tensorboard")).Reload()


def test_a_resumed_run_has_each_epoch_once(tmp_path):
    settings = {"lr": 0.5, "unseen": ["a"], "plot": True}
    (tmp_path / "test").mkdir()
    history = rows(3)
    for first, last in ((0, 2), (2, 3)):
        with Board(tmp_path, settings, history[:first]) as board:
            for row in history[first:last]:
                board.add_epoch(row)  # before its picture is drawn
                pixels = np.full((4, 5, 3), 10 * row["epoch"], np.uint8)
                Image.fromarray(pixels).save(tmp_path / "test" / f"epoch_{row['epoch']}.png")
    found = records(tmp_path)
    losses = {each.step: each.value for each in found.Scalars("train_loss")}
    assert losses == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert len(found.Scalars("train_loss")) == 3
    assert "test_xent" not in found.Tags()["scalars"]
    images = [(each.step, each.height, each.width) for each in found.Images("test features")]
    assert images == [(1, 4, 5), (2, 4, 5), (3, 4, 5)]
    assert "_hparams_/experiment" in found.summary_metadata


def test_earlier_epochs_are_added_where_they_were_not_recorded(tmp_path):
    with Board(tmp_path, {}, rows(2)) as board:
        board.add_epoch(rows(3)[2])
    assert [each.step for each in records(tmp_path).Scalars("train_loss")] == [1, 2, 3]
