"""The README's Python snippets run as they stand, on a tiny folder of images."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(
    r"<!-- tested: (?P<name>[\w-]+) -->\n+```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


def snippets():
    """Name -> code of each Python block under a comment `<!-- tested: NAME -->`."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    return {match["name"]: match["code"] for match in MARKED.finditer(text)}


@pytest.fixture
def image_folder(tmp_path):
    """data/train/<class>/*.png: 16 images of 32 pixels, in two classes."""
    for number in range(16):
        label = number % 2
        path = tmp_path / "data" / "train" / f"class{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200 * label, 10 * number, 90)).save(path)
    return tmp_path


def test_the_backbone_snippet_is_there():
    assert "resnet18" in snippets()


@pytest.mark.parametrize("name", snippets())
def test_snippet_runs(name, image_folder):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{snippets()[name]}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=image_folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    if name == "resnet18":
        printed = re.fullmatch(r"epoch 1: cross-entropy (\S+), center (\S+)\n", done.stdout)
        assert printed and all(0 < float(value) < 1e4 for value in printed.groups())
