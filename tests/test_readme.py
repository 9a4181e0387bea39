"""README and docs: their links lead somewhere, their commands parse, their Python snippets run."""

import argparse
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
import plots
from tools import results
from tools.bench import __main__ as bench

ROOT = Path(cli.__file__).resolve().parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
MARKED = re.compile(r"<!-- tested: ([\w-]+) -->\n+```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPETS = {name: code for text in PAGES.values() for name, code in MARKED.findall(text)}
# Flags of torchrun, pytest and tests/kill_runs.py.
FOREIGN = {
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
    """parse(command): parses it as the program would, which then does nothing; False where it is another's."""
    monkeypatch.chdir(tmp_path)
    saved = vars(cli.parse_args([]))
    monkeypatch.setattr(cli.utils, "load_checkpoint", lambda path: dict(args=saved))
    for module in (bench.loss, bench.train):
        monkeypatch.setattr(module, "run", lambda args: None)

    def call(command: str) -> bool:
        program, _, rest = command.partition("main.py")
        flags = command if command.startswith("--") and " " in command else rest
        if re.search(r"(^|&& |\s)(python|torchrun\b.*)\s$", program) or flags == command:
            cli.parse_args(shlex.split(flags))
        elif command.startswith("python -m bench"):
            bench.main(shlex.split(command)[3:])
        elif command.startswith("python plots.py"):
            plots.parse_args(shlex.split(command)[2:])
        elif script := re.match(r"python ([\w/]+\.py)( |$)", command):
            assert (ROOT / script[1]).exists()
        else:
            return False
        return True

    return call


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, parse, capsys):
    for command in code(page):
        try:
            parse(command)
        except SystemExit as end:
            assert end.code == 0, (command, capsys.readouterr().err)  # 0: -h


def test_commands_that_do_not_parse_are_found(parse, capsys):
    for command in (
        "python main.py --recipe none",
        "pip install x && python main.py --plots",
        "python -m bench plot",
        "torchrun --nnodes=2 main.py --gpu 0,1",
        "--optimizer lion --plot",
    ):
        with pytest.raises(SystemExit) as end:
            parse(command)
        assert end.value.code == 2
    assert not parse("pip install -r requirements.txt") and not parse("--plot")


def test_every_flag_that_is_mentioned_exists():
    commands = argparse.ArgumentParser().add_subparsers()
    bench.loss.add_command(commands)
    bench.train.add_command(commands)
    parsers = [
        cli.build_parser(),
        plots.build_parser(),
        results.build_parser(),
        *commands.choices.values(),
    ]
    known = FOREIGN | {
        name for parser in parsers for action in parser._actions for name in action.option_strings
    }
    mentioned = {
        flag
        for page in PAGES
        for each in code(page)
        for flag in re.findall(r"(?<![\w-])--[\w-]+", each)
    }
    assert mentioned and not mentioned - known


def test_every_python_snippet_is_tested():
    assert SNIPPETS and sum(text.count("```python") for text in PAGES.values()) == len(SNIPPETS)


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name, run, tmp_path, capsys):
    """Where data/train/<class>/ has images, and log/ a run of 100 epochs with its features (in fact of one)."""
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
