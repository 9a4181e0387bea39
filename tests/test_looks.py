"""Colours and names."""

import itertools

import numpy as np
import pytest

from plots.looks import palette, shorten


def seen_by(kind: str, color: str) -> np.ndarray:
    """CIELAB of a colour as a reader sees it who lacks a cone (Machado et al., 2009)."""
    matrix = dict(
        normal=np.eye(3),
        deuteranopia=[
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
        protanopia=[
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
    )[kind]
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.clip(
        matrix @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1
    )
    xyz = (
        np.array(
            [
                [0.4124564, 0.3575761, 0.1804375],
                [0.2126729, 0.7151522, 0.072175],
                [0.0193339, 0.119192, 0.9503041],
            ]
        )
        @ linear
        / (0.95047, 1, 1.08883)
    )
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", ["normal", "deuteranopia", "protanopia"])
def test_readers_who_are_red_green_blind_can_tell_ten_classes_apart(kind):
    seen = [seen_by(kind, color) for color in palette(10)]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 17


def test_names_are_cut_in_the_middle_but_never_alike():
    names = ["short", "a_very_long_class_name"]
    assert shorten(names, 12) == ["short", "a_very…_name"]
    names = [f"image_set_{i}_of_the_third_kind" for i in range(40)]
    short = shorten(names, 24)
    assert len(set(short)) == 40 and max(map(len, short)) == 24
    assert shorten(names, 12) == names  # rather than alike
