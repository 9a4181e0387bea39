"""docs/change.md: its snippets, put where it says, are trained with."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from conftest import PYTHON

ROOT = Path(__file__).resolve().parents[1]
SNIPPET = r"<!-- tested: (\S+) -->\n```python\n(.*?)```"


def test_a_network_a_loss_term_and_a_data_set_are_added_as_the_page_says(tmp_path):
    snippets = dict(re.findall(SNIPPET, (ROOT / "docs" / "change.md").read_text(), re.S))
    assert set(snippets) == {"models.py", "engine/step.py", "datasets.py"}
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for package in ("engine", "plots", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for name in ("models.py", "datasets.py"):
        with open(tmp_path / name, "a") as file:
            file.write("\n\n" + snippets[name])
    step = tmp_path / "engine" / "step.py"
    before = "        loss = xent + center\n"
    text = step.read_text()
    assert text.count(before) == 1
    # The term, a thousand times as strong, so that it shows after four epochs.
    term = snippets["engine/step.py"].replace("0.001", "1")
    sizes = []
    for name, source in (("without", text), ("with", text.replace(before, before + term))):
        step.write_text(source)
        flags = ["--model", "linear", "--dataset", "bars", "--max-epoch", "4", "--lr-model", "2e-4"]
        flags += ["--weight-cent", "0", "--use-cpu", "--save-features", "--save-dir", name]
        command = [PYTHON, "main.py", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        saved = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert saved["data"]["classes"] == ["lying", "standing"]
        assert "embedding.weight" in saved["model"]
        features = np.load(tmp_path / name / "features" / "epoch_4.npz")["test_features"]
        sizes.append(np.square(features).mean())
    assert sizes[1] < 0.8 * sizes[0]
