"""The page of a run in a real browser, without a network."""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from plots.looks import shorten
from plots.report import write_page
from tests.epochs import make_run

CLASSES = ("<img src=x onerror=alert(1)>", "\"quoted\" & 'odd'", "日本の猫")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A run of three epochs, and beside it `large`, the same with points ten times as far apart."""
    root = tmp_path_factory.mktemp("page")
    make_run(root / "large", CLASSES, scale=10.0)
    return make_run(root / "small", CLASSES)


@pytest.fixture(scope="module")
def compared(directory) -> Path:
    page = directory.parent / "compare.html"
    write_page(page, [directory.parent / "large", directory])
    return page


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
    """page(path) opens it and gives what runs JavaScript in it; it may leave no console error."""

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
              const {canvas, caption} = panels[1];
              const cursor = document.querySelector('.cursor').getAttribute('x1');
              const confusion = $('confusion').textContent;
              return [canvas.toDataURL(), cursor, confusion, caption.textContent,
                      canvas.dataset.limits]"""
    last = run(look)
    slider = browser.find_element("id", "epoch")
    slider.send_keys(browser_key("HOME"))
    first = run(look)
    assert (
        all(one != other for one, other in zip(first[:4], last[:4], strict=True))
        and first[4] == last[4]
    )
    assert first[3] == "test, epoch 1: accuracy 76.00 %"
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
    names = list(CLASSES)
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
        f"{label} {name}" for label, name in enumerate(shorten(CLASSES, 20))
    ]
    titles = [
        button.get_attribute("title")
        for button in browser.find_elements("css selector", "#legend button")
    ]
    assert (
        titles == list(CLASSES) and run("return document.querySelectorAll('body img').length") == 0
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
    assert run("return panels[0].caption.textContent").startswith(
        f"{directory.parent.name}/large · test"
    )


LABELS = """const labels = [];
eachPoint(panels[1].split, (i, x, y, label) => labels.push(label));
return labels"""
PIXELS = "panels.forEach(draw); return panels[1].canvas.toDataURL()"


@pytest.mark.browser
def test_unknown_classes_are_named_can_be_switched_off_and_are_no_mistakes(page, browser, tmp_path):
    tested = ("train", "test", "unknown")
    run = page(make_run(tmp_path / "run", "ab", ("cat", "dog"), tested) / "report.html")
    assert run("return panels[1].caption.textContent") == "test, epoch 3: accuracy 78.00 %"
    buttons = browser.find_elements("css selector", "#legend button")
    assert [button.text for button in buttons] == ["a", "b", "cat", "dog"]
    assert run(LABELS) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    cells = browser.find_elements("css selector", ".matrix td button")
    assert len(cells) == 4 and sum(int(cell.text or 0) for cell in cells) == 10
    browser.find_element("id", "mistakes").click()
    assert run(LABELS) and max(run(LABELS)) < 2
    browser.find_element("id", "mistakes").click()
    before = run(PIXELS)
    buttons[2].click()
    assert run(LABELS) == [0] * 5 + [1] * 5 + [3] * 5 and run(PIXELS) != before
    browser.find_element("id", "none").click()
    assert run(LABELS) == []
    buttons[3].click()
    run("pointAt(panels[1], 17)")
    lines = browser.find_element("id", "point").text.splitlines()
    assert lines[0] == "class dog (not trained)" and lines[3] == "test image 17"


@pytest.mark.browser
def test_a_test_of_unknown_classes_alone_has_no_accuracy_and_no_confusion(page, browser, tmp_path):
    directory = make_run(tmp_path / "run", "ab", ("cat", "dog"), ("train", "unknown"))
    run = page(directory / "report.html")
    captions = run("return panels.map((panel) => panel.caption.textContent)")
    assert captions[1] == "test, epoch 3: classes that were not trained"
    assert not browser.find_element("id", "confusion").is_displayed()
    assert "accuracy" not in browser.find_element("id", "summary").text
    assert run(LABELS) == [2] * 5 + [3] * 5
    keys = run("return [...document.querySelectorAll('.key')].map((each) => each.textContent)")
    assert "test" not in " ".join(keys)


@pytest.mark.browser
def test_validation_is_named_so(page, tmp_path):
    run = page(make_run(tmp_path / "run", tested=("train", "val")) / "report.html")
    assert run("return panels[1].caption.textContent").startswith("validation, epoch 3")


@pytest.mark.browser
def test_the_commands_of_a_resumed_run_are_told_apart(page, directory, browser):
    page(directory / "report.html")
    cells = browser.find_elements("css selector", "#facts tr:first-child td div")
    commands = ["python main.py --plot", "python main.py --resume --max-epoch 3"]
    assert [cell.text for cell in cells] == commands
    assert cells[0].location["y"] < cells[1].location["y"]


def browser_key(name: str) -> str:
    from selenium.webdriver.common.keys import Keys

    return getattr(Keys, name)
