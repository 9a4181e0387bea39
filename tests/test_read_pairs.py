"""Lists of pairs: LFW's pairs.txt and lines of two paths; what is refused."""

import numpy as np
import pytest
from PIL import Image

from datasets import DatasetError, read_pairs


@pytest.fixture
def people(tmp_path):
    """Three images each of a, b and c as LFW names them; two of them with other endings."""
    for name in "abc":
        (tmp_path / name).mkdir()
        for number, ending in ((1, "jpg"), (2, "png"), (3, "jpg")):
            Image.new("L", (4, 4)).save(tmp_path / name / f"{name}_000{number}.{ending}")
    return tmp_path


def read(people, text):
    (people / "pairs.txt").write_text(text, encoding="utf-8")
    return read_pairs(people / "pairs.txt", people)


def refusal(people, text) -> str:
    with pytest.raises(DatasetError) as error:
        read(people, text)
    assert "\n" not in str(error.value)
    return str(error.value)


LFW = "2\t1\na\t1\t2\na\t1\tb\t3\nb\t1\t2\nc\t3\tb\t1\n"


@pytest.mark.parametrize(
    "text", [LFW, LFW.replace("\t", " "), "\ufeff" + LFW.replace("\n", "\r\n")]
)
def test_lfws_file(people, text):
    pairs = read(people, text)
    names = [path.removeprefix(f"{people}/") for path in pairs.paths]
    assert len(names) == len(set(names)) == 6
    read_as = [(names[i], names[j]) for i, j in zip(pairs.first, pairs.second, strict=True)]
    assert read_as == [
        ("a/a_0001.jpg", "a/a_0002.png"),
        ("a/a_0001.jpg", "b/b_0003.jpg"),
        ("b/b_0001.jpg", "b/b_0002.png"),
        ("c/c_0003.jpg", "b/b_0001.jpg"),
    ]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.folds.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_lists_of_paths_have_ten_folds_of_both_kinds(people, order):
    lines = ["a/a_0001.jpg a/a_0002.png 1", "b/b_0001.jpg c/c_0001.jpg 0"] * 20
    if order == "sorted":
        lines.sort()
    pairs = read(people, "\n".join(lines) + "\n\n")
    assert pairs.same.sum() == 20 and len(pairs.paths) == 4
    for kind in (True, False):
        assert pairs.folds[pairs.same == kind].tolist() == np.repeat(range(10), 2).tolist()


def test_paths_may_hold_spaces_where_tabs_part_them(people):
    Image.new("L", (4, 4)).save(people / "a" / "with space.png")
    lines = ["a/with space.png\ta/a_0001.jpg\t1", "a/with space.png\tb/b_0001.jpg\t0"] * 10
    assert read(people, "\n".join(lines)).paths[0] == f"{people}/a/with space.png"


@pytest.mark.parametrize(
    "text, said",
    [
        ("a/a_0001.jpg a/a_0002.png 2", "line 1 of"),
        ("a/a_0001.jpg a/a_0002.png 1\na b", "line 2 of"),
        ("1 1\na 1 2\na 1 b", "line 3 of"),
        ("1 1\na 1 x\na 1 b 1", "must be name i j or name i name j, got 'a 1 x'"),
        ("", "got 0 pairs of one class and 0 of two"),
        ("2 2\na 1 2\na 1 b 1", "at least two folds, complete"),
        (
            "2 1\na 1 2\na 1 3\na 1 b 1\na 1 b 2",
            "pairs of both kinds, got 2 pairs of one class and 2 of two",
        ),
        ("x.png y.png 1", "does not hold: x.png, y.png"),
        ("\n".join(f"{n}.png a/a_0001.jpg 0" for n in range(9)), "3.png, 4.png and 4 more"),
    ],
)
def test_what_cannot_be_used_is_a_line(people, text, said):
    assert said in refusal(people, text)


def test_a_missing_file_is_a_line(people):
    with pytest.raises(DatasetError, match="--pairs: cannot read"):
        read_pairs(people / "none.txt", people)
