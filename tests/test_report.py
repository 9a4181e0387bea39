"""The page of a run: its data are those of the files of the run."""

import base64
import io
import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import utils
from plots import report
from plots.saved import read_run
from tests.epochs import Images, make_run

CLASSES = ("<img src=x onerror=alert(1)>", "\"quoted\" & 'odd'", "日本の猫")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "small", CLASSES)


def data_of(page: str) -> dict:
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, page, re.DOTALL)[1])


def data_in(directory: Path) -> dict:
    return data_of((directory / "report.html").read_text(encoding="utf-8"))


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").astype(int)


def test_the_page_holds_what_the_run_has_written(directory):
    data = data_in(directory)
    (run,) = data["runs"]
    assert (data["names"], data["known"]) == (list(CLASSES), 3)
    assert len(data["colors"]) == len(data["marks"]) == 3
    assert run["args"] == json.loads((directory / "args.json").read_text())
    assert [row["epoch"] for row in run["history"]] == [1, 2, 3]
    assert run["log"] == "Currently using CPU\n" and run["facts"]["elapsed"] == 1.5
    for split, count in (("train", 24), ("test", 15)):
        kept = run["splits"][split]
        assert (kept["count"], kept["of"], kept["epochs"]) == (count, count, [1, 2, 3])
        points = unpack(kept["points"]).reshape(3, 2, count)
        labels = unpack(kept["labels"]).reshape(3, count)
        predictions = unpack(kept["predictions"]).reshape(3, count)
        for index, epoch in enumerate(kept["epochs"]):
            saved = np.load(directory / split / f"epoch_{epoch}.npz")
            rows = np.arange(count)
            if split == "train":
                rows = np.argsort(saved["labels"], kind="stable")
            assert labels[index].tolist() == saved["labels"][rows].tolist()
            assert predictions[index].tolist() == saved["predictions"][rows].tolist()
            low_x, step_x, low_y, step_y = kept["grids"][index]
            shown = np.array([low_x, low_y]) + np.array([step_x, step_y]) * points[index].T
            error = float(np.ptp(saved["points"], axis=0).max()) / 65_000
            assert shown == pytest.approx(saved["points"][rows], abs=error)
            assert kept["centers"][index] == saved["centers"].tolist()


def test_the_sprite_holds_the_image_of_each_test_row(directory):
    data = data_in(directory)
    (run,) = data["runs"]
    images = data["images"]
    source = base64.b64decode(images["source"].partition(",")[2])
    sprite = np.asarray(Image.open(io.BytesIO(source)))
    assert run["splits"]["test"]["rows"] == list(range(15))
    for place, whole in enumerate(Images(15, seed=0).images):
        top = place // images["columns"] * 8
        left = place % images["columns"] * 8
        assert (sprite[top : top + 8, left : left + 8] == whole[0]).all()


def test_no_class_name_is_markup(directory):
    text = (directory / "report.html").read_text(encoding="utf-8")
    assert "<img" not in text and "日本の猫" in data_of(text)["names"]
    assert text.count("</script>") == 2


def test_a_class_that_closes_the_script_stays_within_the_data(directory, tmp_path):
    copy = Path(shutil.copytree(directory, tmp_path / "run"))
    names = ["</script><script>alert(1)</script>", "<!-- <script>", "{{js}}"]
    source = copy / "test" / "epoch_3.npz"
    utils.save_arrays(source, dict(np.load(source)) | {"classes": names})
    report.write_page(copy / "report.html", [copy])
    assert data_in(copy)["names"] == names


def test_unknown_classes_have_their_names_and_labels(tmp_path):
    run = make_run(tmp_path / "run", ["ant", "bee"], ["cat", "dog"], ("train", "unknown"))
    data = data_in(run)
    assert (data["names"], data["known"]) == (["ant", "bee", "cat", "dog"], 2)
    assert data["colors"][2:] == data["colors"][:2]  # of a test with unknown classes alone
    test = data["runs"][0]["splits"]["test"]
    assert unpack(test["labels"])[:10].tolist() == [2] * 5 + [3] * 5


def test_large_runs_are_sampled_and_thinned_out(directory, monkeypatch):
    monkeypatch.setattr(report, "TRAIN_POINTS", 10)
    monkeypatch.setattr(report, "TEST_POINTS", 6)
    monkeypatch.setattr(report, "EPOCHS", 2)
    packed = report.pack_run(read_run(directory))
    train = packed["splits"]["train"]
    test = packed["splits"]["test"]
    assert (train["epochs"], train["count"]) == ([1, 3], 10)
    rows = test["rows"]
    assert len(set(rows)) == 6 and rows == sorted(rows)
    assert rows == report.pack_run(read_run(directory))["splits"]["test"]["rows"]
    labels = np.load(directory / "test" / "epoch_3.npz")["labels"]
    assert unpack(test["labels"]).reshape(2, 6)[1].tolist() == labels[rows].tolist()


def test_many_colour_images_become_jpeg(directory, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(directory, tmp_path / "run"))
    noise = np.random.default_rng(0).integers(0, 256, (15, 3, 32, 32), np.uint8)
    utils.save_arrays(copy / "test" / "images.npz", {"images": noise})
    monkeypatch.setattr(report, "SPRITE_BYTES", 12_000)
    assert report.pack_images(read_run(copy))["source"].startswith("data:image/jpeg")
