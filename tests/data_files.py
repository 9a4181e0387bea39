"""What several tests of data sets do."""

import pytest
import torch

import datasets


def batches(split, seed=1):
    """Images and labels of each batch of a pass."""
    torch.manual_seed(seed)
    return [(images.clone(), labels.clone()) for images, labels, _ in split]


def refusal(*arguments, **options) -> str:
    """The line with which datasets.create refuses."""
    with pytest.raises(datasets.DatasetError) as error:
        datasets.create(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
