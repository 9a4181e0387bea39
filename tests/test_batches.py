"""Batches: a DataLoader's order, the same over ranks; augmentation and thumbnails."""

import numpy as np
import pytest
import torch
from conftest import make_folder
from data_files import batches
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

import datasets
from engine.batches import Augment, BatchRows
from engine.ranks import Ranks


@given(size=st.integers(1, 70), batch_size=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_batches_are_those_of_a_shuffling_dataloader(size, batch_size, seed):
    plain = DataLoader(TensorDataset(torch.arange(size)), batch_size, shuffle=True)
    ours = BatchRows(size, batch_size, True, "cpu", Ranks())
    for _ in range(2):  # the second epoch goes on from the first one's random state
        torch.manual_seed(seed)
        expected = [rows.tolist() for _ in range(2) for (rows,) in plain]
        torch.manual_seed(seed)
        assert [rows.tolist() for _ in range(2) for rows in ours] == expected


@given(size=st.integers(1, 60), batch_size=st.integers(1, 20), ranks=st.integers(1, 5))
def test_ranks_share_each_batch_without_loss_or_repetition(size, batch_size, ranks):
    shares = [
        list(BatchRows(size, batch_size, False, "cpu", Ranks(rank, ranks))) for rank in range(ranks)
    ]
    whole = list(BatchSampler(range(size), batch_size, drop_last=False))
    assert [sorted(torch.cat(parts).tolist()) for parts in zip(*shares, strict=True)] == whole
    assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_thumbnails_are_the_images_of_the_data_set_and_no_larger_than_asked(workers, tmp_path):
    root = make_folder(tmp_path / "images", size=(16, 16), mode="RGB")
    data = datasets.create("folder", root, 4, workers, image_size=16)
    whole = np.stack(
        [np.asarray(Image.open(path)) for path in sorted((root / "test").rglob("*.png"))]
    )
    assert (data.test.thumbnails([11, 2]) == whole[[11, 2]].transpose(0, 3, 1, 2)).all()
    halves = whole.reshape(12, 8, 2, 8, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert data.test.thumbnails(range(12), largest=8) == pytest.approx(halves, abs=0.51)
    data = datasets.create("folder", root, 4, workers, image_size=16, unseen=["bee"], val_share=0.5)
    assert (data.unknown.thumbnails([3, 0]) == whole[[7, 4]].transpose(0, 3, 1, 2)).all()
    validation = np.stack([np.asarray(Image.open(path)) for path in data.val.paths])
    assert (data.val.thumbnails(range(8)) == validation.transpose(0, 3, 1, 2)).all()


def test_testing_draws_nothing_from_the_training_randomness():
    data = datasets.create("digits", "nowhere", 500)
    torch.manual_seed(3)
    list(data.test)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(after, torch.get_rng_state())


def variants(image, flip):
    """All that Augment may make of an image of 8 pixels: shifted by -1 to 1, and mirrored."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    shifted = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    return [*shifted, *(each[:, :, ::-1] for each in shifted)] if flip else shifted


@pytest.mark.parametrize("flip", [False, True])
def test_each_image_is_shifted_and_mirrored_by_itself(flip):
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    changed, drawn = Augment(1, shift=True, flip=flip)(images, 400), []
    for before, after in zip(images.numpy(), changed.numpy(), strict=True):
        matches = [np.array_equal(after, each) for each in variants(before, flip)]
        assert sum(matches) == 1
        drawn.append(matches.index(True))
    assert set(drawn) == set(range(18 if flip else 9))
    assert changed.dtype == torch.uint8 and changed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("erase, sides", [(0.25, {1}), (0.5, {2, 3}), (1.0, {4, 5, 6, 7})])
def test_a_grey_square_is_erased_anywhere_in_each_image(erase, sides):
    images = torch.randint(0, 128, (400, 3, 8, 8), dtype=torch.uint8)
    changed, seen = Augment(1, erase=erase)(images, 400), torch.zeros(8, 8)
    found = set()
    for before, after in zip(images, changed, strict=True):
        grey = (after == 128).all(0)
        rows, columns = (grey.any(dim) for dim in (1, 0))
        assert torch.equal(grey, rows.outer(columns)) and torch.equal(
            after[:, ~grey], before[:, ~grey]
        )
        found |= {int(each.sum()) for each in (rows, columns)}
        seen += grey
    assert seen.min() > 0 and found == sides


def test_augmentation_goes_by_its_seed_alone_is_resumed_and_the_same_over_ranks():
    images = torch.randint(0, 256, (3, 7, 1, 8, 8), dtype=torch.uint8)
    changes = dict(shift=True, flip=True, erase=0.25)
    augment, again = (Augment(seed, **changes) for seed in (5, 6))
    global_state = torch.get_rng_state()
    first, state = augment(images[0], 7), augment.state_dict()
    rest = [augment(each, 7) for each in images[1:]]
    assert torch.equal(torch.get_rng_state(), global_state)
    assert not torch.equal(again(images[0], 7), first)
    again.load_state_dict(state)
    assert all(map(torch.equal, [again(each, 7) for each in images[1:]], rest))
    for rank in range(3):
        ranks = Ranks(rank, 3)
        shared = Augment(5, **changes, ranks=ranks)
        assert torch.equal(shared(ranks.share(images[0]), 7), ranks.share(first))
        assert torch.equal(shared(ranks.share(images[1]), 7), ranks.share(rest[0]))
    assert Augment(5, **changes, ranks=Ranks(2, 3))(images[0, :0], 2).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    "scaling, low, high", [("symmetric", -127.5 / 128, 127.5 / 128), ("unit", 0.0, 1.0)]
)
def test_scalings_map_0_and_255_to_their_formula(scaling, low, high):
    normalise = datasets.Normalise(*datasets.SCALINGS[scaling])
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert normalise(pixels).flatten().tolist() == pytest.approx([low, high], abs=1e-6)


def test_augmented_batches_are_the_same_for_every_number_of_workers(folder):
    loaded = []
    for workers in (0, 1):
        train = datasets.create("folder", folder, 7, workers, image_size=8).train
        plain = torch.cat([images for images, _ in batches(train)])
        train.augment = Augment(1, shift=True, flip=True, erase=0.25)
        loaded.append(torch.cat([images for images, _ in batches(train)]))
        assert not torch.equal(loaded[-1], plain)
    assert torch.equal(*loaded)


def test_images_that_are_no_squares_are_shifted_mirrored_and_erased_within_their_sides():
    """Pixels that tell their place: 16 rows of 10, and 10 columns."""
    rows = torch.arange(16).view(16, 1).expand(16, 10)
    columns = torch.arange(10).expand(16, 10)
    images = torch.stack([rows, columns]).to(torch.uint8).expand(300, 2, 16, 10)
    changed = Augment(1, shift=True, flip=True)(images, 300)
    down = changed[:, 0, 5, 0].int() - 5
    assert set(down.tolist()) == {-1, 0, 1}  # an eighth of the shorter side
    steps = changed[:, 1, 0, 5].int() - changed[:, 1, 0, 4].int()
    assert set(steps.tolist()) == {-1, 1}
    erased = Augment(1, erase=0.5)(torch.zeros_like(images), 300)[:, 0] == 128
    assert erased.any(0).all() and erased.sum((1, 2)).max() == 25
