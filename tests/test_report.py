"""The page of a run: its data are those of the run's files, and a real browser shows them, without a network."""

import base64
import io
import json
import re
import shutil
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_folder, program
from PIL import Image

import plots
import utils
from plots import report

CLASSES = ("<img src=x onerror=alert(1)>", "\"quoted\" & 'odd'", "日本の猫")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A run of three epochs, and beside it `large`, the same with points ten times as far apart."""
    root = tmp_path_factory.mktemp("report")
    folder = make_folder(root / "images", classes=CLASSES, train=8, test=5, size=(8, 8))
    flags = [
        "--max-epoch",
        "3",
        "--batch-size",
        "10",
        "--eval-freq",
        "1",
        "--plot",
        "--use-cpu",
        "--optimizer",
        "adamw",
        "--lr-model",
        "0.003",
        "--weight-cent",
        "0.01",
    ]
    data = ["--dataset", "folder", "--data-root", folder, "--image-size", "8"]
    assert program([*data, *flags, "--save-dir", root / "small"]) == 0
    shutil.copytree(root / "small", root / "large")
    for path in (root / "large").glob("t*/epoch_*.npz"):
        shown = report.read_arrays(path)
        utils.save_arrays(
            path, shown | dict(points=shown["points"] * 10, centers=shown["centers"] * 10)
        )
    return root / "small"


@pytest.fixture(scope="module")
def compared(directory) -> Path:
    page = directory.parent / "compare.html"
    plots.write_page(page, [directory.parent / "large", directory])
    return page


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def unpack(text: str) -> np.ndarray:
    low, high = (
        np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(2, -1).astype(int)
    )
    return low + 256 * high


def test_the_page_holds_what_the_run_has_written(directory):
    data = data_of(directory / "report.html")
    (run,) = data["runs"]
    assert data["classes"] == sorted(CLASSES) and len(data["colors"]) == len(data["marks"]) == 3
    assert run["args"] == json.loads((directory / "args.json").read_text())
    assert [row["epoch"] for row in run["history"]] == [1, 2, 3] and run["log"].startswith(
        "Currently using CPU\n"
    )
    assert run["facts"]["commands"][0].startswith("python ") and run["facts"]["elapsed"] > 0
    for split, count in (("train", 24), ("test", 15)):
        kept = run["splits"][split]
        assert (kept["count"], kept["of"], kept["epochs"]) == (count, count, [1, 2, 3])
        points, labels = (
            unpack(kept["points"]).reshape(3, 2, count),
            unpack(kept["labels"]).reshape(3, count),
        )
        predictions = unpack(kept["predictions"]).reshape(3, count)
        for index, epoch in enumerate(kept["epochs"]):
            saved = np.load(directory / split / f"epoch_{epoch}.npz")
            rows = (
                np.argsort(saved["labels"], kind="stable") if split == "train" else np.arange(count)
            )
            assert labels[index].tolist() == saved["labels"][rows].tolist()
            assert predictions[index].tolist() == saved["predictions"][rows].tolist()
            low_x, step_x, low_y, step_y = kept["grids"][index]
            shown = np.array([low_x, low_y]) + np.array([step_x, step_y]) * points[index].T
            error = float(np.ptp(saved["points"], axis=0).max()) / 65_000
            assert shown == pytest.approx(saved["points"][rows], abs=error)
            assert kept["centers"][index] == saved["centers"].tolist()


def test_the_sprite_holds_the_image_of_each_test_row(directory):
    (run,) = data_of(directory / "report.html")["runs"]
    images, rows = run["images"], run["splits"]["test"]["rows"]
    sprite = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(images["source"].partition(",")[2])))
    )
    files = sorted((directory.parent / "images" / "test").rglob("*.png"))
    whole = [np.asarray(Image.open(file)) for file in files]
    assert rows == list(range(15))
    for place, row in enumerate(rows):
        top, left = place // images["columns"] * 8, place % images["columns"] * 8
        assert (sprite[top : top + 8, left : left + 8] == whole[row]).all()


def test_no_class_name_is_markup(directory):
    text = (directory / "report.html").read_text(encoding="utf-8")
    assert "<img" not in text and "日本の猫" in data_of(directory / "report.html")["classes"]
    assert text.count("</script>") == 2


def test_a_class_that_closes_the_script_stays_within_the_data(directory, tmp_path):
    run = report.read_run(directory)
    run.classes = ["</script><script>alert(1)</script>", "<!-- <script>", "{{js}}"]
    report.write(
        tmp_path / "page.html",
        [run],
        colors=["#000000"] * 3,
        marks=["0", "1", "2"],
        short=run.classes,
    )
    assert data_of(tmp_path / "page.html")["classes"] == run.classes


def test_points_that_are_not_finite_are_told_from_others():
    points = np.array([[0.0, 1.0], [np.nan, 2.0], [4.0, 3.0], [1.0, np.inf]])
    steps, grid = report.quantise(points)
    assert steps.tolist() == [[0, report.GRID + 1, report.GRID, report.GRID + 1]] * 2
    assert grid == pytest.approx([0, 4 / report.GRID, 1, 2 / report.GRID])
    assert report.quantise(points[1:2])[0].tolist() == [[report.GRID + 1]] * 2


def test_large_runs_are_sampled_and_thinned_out(directory, monkeypatch):
    monkeypatch.setattr(report, "TRAIN_POINTS", 10)
    monkeypatch.setattr(report, "TEST_POINTS", 6)
    monkeypatch.setattr(report, "EPOCHS", 2)
    packed = report.pack_run(report.read_run(directory))
    assert (
        packed["splits"]["train"]["epochs"] == [1, 3] and packed["splits"]["train"]["count"] == 10
    )
    rows = packed["splits"]["test"]["rows"]
    assert len(set(rows)) == 6 and rows == sorted(rows)
    assert rows == report.pack_run(report.read_run(directory))["splits"]["test"]["rows"]
    labels = np.load(directory / "test" / "epoch_3.npz")["labels"]
    assert (
        unpack(packed["splits"]["test"]["labels"]).reshape(2, 6)[1].tolist()
        == labels[rows].tolist()
    )
    assert packed["images"] is None  # the run has kept all fifteen, in other places of the sprite


def test_colour_images_become_smaller_until_they_fit(directory, tmp_path, monkeypatch):
    copy = shutil.copytree(directory, tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 256, (15, 3, 32, 32)).astype(np.uint8)
    utils.save_arrays(copy / "test" / "images.npz", dict(rows=np.arange(15), images=noise))
    monkeypatch.setattr(report, "SPRITE_BYTES", 12_000)
    images = report.pack_images(report.read_run(copy), range(15))
    assert images["source"].startswith("data:image/jpeg") and len(images["source"]) < 16_100


def test_what_is_no_run_is_refused(directory, tmp_path):
    def refusal(path):
        with pytest.raises(utils.RunError) as caught:
            report.read_run(path)
        return str(caught.value)

    assert "is no run" in refusal(tmp_path) and "is no run" in refusal(tmp_path / "missing")
    copy = shutil.copytree(directory, tmp_path / "copy")
    (copy / "test" / "epoch_3.npz").write_bytes(b"PK damaged")
    assert f"cannot read {copy / 'test' / 'epoch_3.npz'}" in refusal(copy)
    utils.save_arrays(copy / "test" / "epoch_3.npz", dict(points=np.zeros((2, 2))))
    assert "has no labels" in refusal(copy)
    shutil.rmtree(copy / "test")
    assert "has no points of a tested epoch: train with --plot" in refusal(copy)
    (copy / "args.json").write_text("{")
    assert "is no run" in refusal(copy)


def test_runs_of_other_data_are_not_compared(directory, tmp_path):
    runs = [report.read_run(directory), report.read_run(directory)]
    runs[1].args = runs[1].args | dict(dataset="digits")
    with pytest.raises(utils.RunError, match="differ in their dataset"):
        report.check_comparable(runs)
    runs[1] = report.read_run(directory)
    runs[1].classes = ["a", "b", "c"]
    with pytest.raises(utils.RunError, match="differ in their classes"):
        report.check_comparable(runs)


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, for which there is no network."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--window-size=1200,1000",
            "--lang=en",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        yield driver
        driver.quit()


@pytest.fixture
def page(browser):
    """page(path) opens it and gives a function that runs JavaScript in it; no console error may be left at the end."""

    def open_page(path: Path):
        browser.get(path.as_uri())
        wait(lambda: browser.execute_script("return document.body.dataset.ready"))
        return browser.execute_script

    yield open_page
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


def wait(condition, seconds: float = 10):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the page does not do what it should"
        time.sleep(0.02)
    return found


# Draws at once, and counts the pixels of a class in a panel.
COUNT = """panels.forEach(draw);
const {canvas} = panels[arguments[0]], color = data.colors[arguments[1]], wanted = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let count = 0;
for (let i = 0; i < pixels.length; i += 4) count += wanted.every((part, index) => pixels[i + index] === part);
return count;"""  # noqa: E501


@pytest.mark.browser
def test_the_slider_changes_what_the_canvas_the_curves_and_the_matrix_show(
    page, directory, browser
):
    run = page(directory / "report.html")
    look = """panels.forEach(draw);
              return [panels[1].canvas.toDataURL(), document.querySelector('.cursor').getAttribute('x1'),
                      $('confusion').textContent, panels[1].caption.textContent, panels[1].canvas.dataset.limits]"""
    last = run(look)
    slider = browser.find_element("id", "epoch")
    slider.send_keys(browser_key("HOME"))
    first = run(look)
    assert (
        all(one != other for one, other in zip(first[:4], last[:4], strict=True))
        and first[4] == last[4]
    )
    accuracy = report.read_run(directory).history[0]["test_accuracy"]
    assert first[3] == f"test, epoch 1: accuracy {accuracy:.2f} %"
    slider.send_keys(browser_key("END"))
    assert run(look) == last


@pytest.mark.browser
def test_playing_ends_at_the_last_epoch_and_can_be_paused(page, directory, browser):
    run = page(directory / "report.html")
    play = browser.find_element("id", "play")
    play.click()
    assert play.text == "Pause" and run("return state.position") < 1
    wait(lambda: run("return state.position") > 0.2)
    play.click()
    assert play.text == "Play" and run("return state.position % 1") == 0
    play.click()
    wait(lambda: run("return state.playing === null && state.position") == 2)


@pytest.mark.browser
def test_pointing_at_a_point_shows_its_image_class_and_prediction(page, directory, browser):
    from selenium.webdriver import ActionChains

    run = page(directory / "report.html")
    saved, shown = (
        np.load(directory / "test" / "epoch_3.npz"),
        np.load(directory / "test" / "images.npz")["images"],
    )
    distances = np.linalg.norm(saved["points"][:, None] - saved["points"], axis=2) + 1e9 * np.eye(
        15
    )
    row = int(distances.min(1).argmax())  # the loneliest: no other lies under the pointer
    browser.find_element("id", "fit-epoch").click()
    x, y = run(
        "const [x, y] = toPixel(panels[1], ...arguments); "
        "return [x - panels[1].canvas.clientWidth / 2, y - panels[1].canvas.clientHeight / 2]",
        *map(float, saved["points"][row]),
    )
    canvas = browser.find_elements("css selector", "#panels canvas")[1]
    run("arguments[0].scrollIntoView({block: 'center'})", canvas)
    ActionChains(browser, duration=0).move_to_element_with_offset(
        canvas, round(x), round(y)
    ).perform()
    box = browser.find_element("id", "point")
    assert box.is_displayed()
    names = sorted(CLASSES)
    lines = box.text.splitlines()
    assert lines[:2] == [
        f"class {names[saved['labels'][row]]}",
        f"predicted {names[saved['predictions'][row]]}",
    ]
    assert lines[2].startswith("epoch 3: (") and lines[3] == f"test image {row}"
    pixels = run(
        "const canvas = document.querySelector('#point canvas'); return [...canvas.getContext('2d')"
        ".getImageData(0, 0, 8, 8).data].filter((_, i) => i % 4 === 0)"
    )
    assert pixels == shown[row, 0].ravel().tolist()
    ActionChains(browser, duration=0).move_to_element(browser.find_element("id", "title")).perform()
    assert not box.is_displayed()


@pytest.mark.browser
def test_a_class_that_is_switched_off_disappears_and_comes_back(page, directory, browser):
    run = page(directory / "report.html")
    buttons = browser.find_elements("css selector", "#legend button")
    before = [run(COUNT, 1, label) for label in range(3)]
    assert min(before) > 0
    buttons[1].click()
    assert buttons[1].get_attribute("aria-pressed") == "false"
    off = [run(COUNT, 1, label) for label in range(3)]
    assert off[1] == 0 and off[0] >= before[0] and off[2] >= before[2]
    buttons[1].click()
    assert [run(COUNT, 1, label) for label in range(3)] == before


@pytest.mark.browser
def test_a_cell_of_the_matrix_shows_its_images(page, directory, browser):
    page(directory / "report.html")
    saved = np.load(directory / "test" / "epoch_3.npz")
    label, predicted = int(saved["labels"][0]), int(saved["predictions"][0])
    rows = np.flatnonzero((saved["labels"] == label) & (saved["predictions"] == predicted))
    cells = browser.find_elements("css selector", ".matrix td button")
    assert sum(int(cell.text or 0) for cell in cells) == 15
    cells[3 * label + predicted].click()
    images = browser.find_elements("css selector", "#images div button")
    assert [image.get_attribute("title").partition(":")[0] for image in images] == [
        f"test image {row}" for row in rows
    ]


@pytest.mark.browser
def test_the_keyboard_alone_reaches_zoom_and_mistakes(page, directory, browser):
    run = page(directory / "report.html")
    canvas = browser.find_elements("css selector", "#panels canvas")[1]
    span = run("return state.view.span")
    canvas.send_keys("+", browser_key("ARROW_LEFT"))
    assert run("return state.view.span") == pytest.approx(span / 1.5)
    canvas.send_keys("0")
    assert run("return state.view.span") == pytest.approx(span)
    canvas.send_keys("n")
    saved = np.load(directory / "test" / "epoch_3.npz")
    wrong = np.flatnonzero(saved["labels"] != saved["predictions"]).tolist()
    assert wrong and run("return state.point.index") in wrong
    assert canvas.get_attribute("aria-label").startswith("Features, test, epoch 3: accuracy ")


@pytest.mark.browser
def test_names_are_shown_as_they_are_and_nothing_is_fetched(page, directory, browser):
    run = page(directory / "report.html")
    assert [button.text for button in browser.find_elements("css selector", "#legend button")] == [
        f"{label} {name}" for label, name in enumerate(plots.shorten(sorted(CLASSES), 20))
    ]
    titles = [
        button.get_attribute("title")
        for button in browser.find_elements("css selector", "#legend button")
    ]
    assert (
        titles == sorted(CLASSES)
        and run("return document.querySelectorAll('body img').length") == 0
    )
    fetched = run("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert all(name.startswith(("data:", "blob:")) for name in fetched)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 380])
def test_the_page_is_no_wider_than_the_window(width, page, directory, browser):
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    run = page(directory / "report.html")
    assert (
        run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        == 0
    )
    tops = run("return panels.map((panel) => panel.canvas.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) == (width > 1000)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_compared_runs_have_the_same_axes_and_each_its_points(page, compared, directory, browser):
    run = page(compared)
    limits = run("panels.forEach(draw); return panels.map((panel) => panel.canvas.dataset.limits)")
    assert len(limits) == 4 and len(set(limits)) == 1
    x0, x1, y0, y1 = map(float, limits[0].split())
    for path in (directory.parent / "large").glob("t*/epoch_*.npz"):
        points = np.load(path)["points"]
        assert (points > (x0, y0)).all() and (points < (x1, y1)).all()
    extents = run("""return panels.map((panel) => {
        let far = 0;
        eachPoint(panel.split, (i, x, y) => far = Math.max(far, Math.hypot(x, y)));
        return far;
    })""")
    assert extents[0] == pytest.approx(10 * extents[1], rel=1e-3)
    assert run("return panels[0].caption.textContent").startswith("large · test, epoch 3")


@pytest.mark.browser
@pytest.mark.parametrize("tested, title", [("test", "test"), ("val", "validation")])
def test_unknown_classes_can_be_switched_off_and_are_no_mistakes(
    tested, title, page, directory, browser, tmp_path
):
    copy = Path(shutil.copytree(directory, tmp_path / "run"))
    for path in copy.glob("t*/epoch_*.npz"):
        shown = report.read_arrays(path)
        unknown = shown["labels"] == 2 if path.parent.name == "test" else None
        labels = np.where(shown["labels"] == 2, 4 if unknown is not None else 0, shown["labels"])
        utils.save_arrays(
            path,
            shown
            | dict(
                labels=labels,
                predictions=np.minimum(shown["predictions"], 1),
                classes=shown["classes"][:2],
                centers=shown["centers"][:2],
            ),
        )
    (copy / "test").rename(copy / tested)
    plots.write_page(copy / "report.html", [copy])
    run = page(copy / "report.html")
    assert run("return panels[1].caption.textContent").startswith(f"{title}, epoch 3")
    labels = """const labels = [];
        eachPoint(panels[1].split, (i, x, y, label) => labels.push(label));
        return labels"""
    buttons = browser.find_elements("css selector", "#legend button")
    assert [button.text for button in buttons][2] == "unknown" and run(labels) == [0] * 5 + [
        1
    ] * 5 + [2] * 5
    cells = browser.find_elements("css selector", ".matrix td button")
    assert len(cells) == 4 and sum(int(cell.text or 0) for cell in cells) == 10
    browser.find_element("id", "mistakes").click()
    assert 2 not in run(labels)
    browser.find_element("id", "mistakes").click()
    pixels = "panels.forEach(draw); return panels[1].canvas.toDataURL()"
    before = run(pixels)
    buttons[2].click()
    assert run(labels) == [0] * 5 + [1] * 5 and run(pixels) != before
    browser.find_element("id", "none").click()
    assert run(labels) == []
    buttons[2].click()
    run("pointAt(panels[1], 12)")
    lines = browser.find_element("id", "point").text.splitlines()
    assert lines[0] == "class unknown" and lines[3] == f"{title} image 12"


def browser_key(name: str) -> str:
    from selenium.webdriver.common.keys import Keys

    return getattr(Keys, name)
