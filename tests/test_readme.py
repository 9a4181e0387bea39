"""README and docs: their links lead somewhere, their commands parse, their Python snippets run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
import datasets
import models
import predict
from plots.__main__ import build_parser as plots_build_parser
from plots.__main__ import parse_args as plots_parse_args
from tools import results
from tools.bench import __main__ as bench
from tools.bench import loss, train

ROOT = Path(cli.__file__).resolve().parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
MARKED = re.compile(r"<!-- tested: ([\w-]+) -->\n+```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPETS = {name: code for text in PAGES.values() for name, code in MARKED.findall(text)}
# Flags of torchrun, pytest, Docker and tests/kill_runs.py.
FOREIGN = {
    "--ipc",
    "--shm-size",
    "--standalone",
    "--nproc_per_node",
    "--nnodes",
    "--node-rank",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--dist",
    "--signal",
    "--only",
}


def links(page: str) -> list[tuple[Path, str]]:
    """The files and headings of this repository to which a page links."""
    targets = [
        target.partition("#")
        for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
        if ":" not in target
    ]
    return [
        ((ROOT / page).parent / file if file else ROOT / page, anchor)
        for file, _, anchor in targets
    ]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M),
        re.MULTILINE,
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def code(page: str) -> list[str]:
    """The lines of its indented blocks, without comments, and its inline code."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    lines = [
        line.partition("  #")[0].strip() for line in re.findall(r"^    (.*)$", text, re.MULTILINE)
    ]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))
    return [*lines, *(" ".join(span.split()) for span in spans)]


def test_the_readme_is_of_one_sitting():
    assert len((ROOT / "README.md").read_bytes()) < 12_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), (path, anchor)


def test_every_committed_picture_stands_on_a_page():
    shown = {path.resolve() for page in PAGES for path, _ in links(page)}
    pictures = [
        path for kind in ("png", "gif") for path in (ROOT / "log" / "reference").rglob(f"*.{kind}")
    ]
    assert pictures and set(pictures) <= shown
    assert all(path.stat().st_size < 1.5e6 for path in pictures)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse(command): parses it as the program would, which then does nothing.

    Returns False where the command is another program's.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg"):
        Path(name).touch()
    saved = vars(cli.parse_args([]))
    monkeypatch.setattr(cli.utils, "load_checkpoint", lambda path: dict(args=saved))
    monkeypatch.setitem(models.MODELS, "linear", None)  # those of docs/change.md
    monkeypatch.setitem(datasets.SPECS, "bars", datasets.SPECS["digits"])
    for module in (loss, train):
        monkeypatch.setattr(module, "run", lambda args: None)
    parsers = {
        "tools.bench": bench.main,
        "tools.results": results.build_parser().parse_args,
        "plots": plots_parse_args,
        "predict.py": predict.parse_args,
    }

    def call(command: str) -> bool:
        words = shlex.split(command)
        if command.startswith("--") and " " in command:  # a part of a command
            cli.build_parser().parse_args(words)
        elif "main.py" in words and {"python", "torchrun"} & set(words):
            cli.parse_args(words[words.index("main.py") + 1 :])
        elif words[:1] == ["python"]:
            name, *flags = [word for word in words[1:] if word != "-m"]
            if name in parsers and flags:
                parsers[name](flags)
            elif name.endswith(".py"):
                assert (ROOT / name).exists(), name
        else:
            return False
        return True

    return call


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, parse, capsys):
    for command in code(page):
        try:
            parse(command)
        except ValueError:  # no command: an odd number of quotes
            assert "main.py" not in command
        except SystemExit as end:
            assert end.code == 0, (command, capsys.readouterr().err)  # 0: -h


def test_commands_that_do_not_parse_are_found(parse, capsys):
    for command in (
        "python main.py --recipe none",
        "pip install x && python main.py --plots",
        "python -m tools.bench plot",
        "torchrun --nnodes=2 main.py --gpu 0,1",
        "--optimizer lion --plot",
        "python predict.py --same",
        "python -m plots --nothing",
    ):
        with pytest.raises(SystemExit) as end:
            parse(command)
        assert end.value.code == 2
    assert not parse("pip install -r requirements.txt") and not parse("--plot")


def test_every_flag_that_is_mentioned_exists(capsys):
    helps = [cli.build_parser().format_help(), plots_build_parser().format_help()]
    helps.append(results.build_parser().format_help())
    for parse_help in (
        lambda: bench.main(["loss", "-h"]),
        lambda: bench.main(["train", "-h"]),
        lambda: predict.parse_args(["-h"]),
    ):
        with pytest.raises(SystemExit):
            parse_help()
        helps.append(capsys.readouterr().out)
    flag = re.compile(r"(?<![\w-])--[\w-]+")
    known = FOREIGN.union(*map(flag.findall, helps))
    mentioned = {name for page in PAGES for each in code(page) for name in flag.findall(each)}
    assert mentioned and mentioned - known == set()


def test_every_python_snippet_is_tested():
    """Here, or, where files are named, by tests/test_docs_change.py."""
    text = "\n".join(PAGES.values())
    assert SNIPPETS and text.count("```python") == len(re.findall(r"<!-- tested: \S+ -->", text))


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name, run, tmp_path, capsys):
    """Where data/train/<class>/ has images, and log/ a run of 100 epochs with features."""
    for number in range(16):
        path = tmp_path / "data" / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 200 * (number % 2) + 3 * number, np.uint8)).save(path)
    if "log/" in SNIPPETS[name]:
        run("--save-features", "--max-epoch", "1")
        Path("log/features/epoch_1.npz").rename("log/features/epoch_100.npz")
    exec(compile(SNIPPETS[name], name, "exec"), dict(__name__="__main__"))
    printed = capsys.readouterr().out
    assert all(np.isfinite(float(number)) for number in re.findall(r"nan|inf|\d+\.\d+", printed))
