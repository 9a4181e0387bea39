"""Commands beside main.py: `python -m tools.results`, `python -m tools.bench`."""

import importlib
import importlib.util
import runpy
from pathlib import Path

own = runpy.run_path(str(Path(__file__).parents[1] / "engine" / "own.py"))


def __getattr__(name: str):
    """`from tools import results` in a program that has another `utils`."""
    if importlib.util.find_spec(f"tools.{name}") is None:
        raise AttributeError(name)
    with own["own_modules"]():
        return importlib.import_module(f"tools.{name}")
