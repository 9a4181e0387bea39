"""Imports of this repository's modules, whose names other packages have, too."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = {path.stem for path in ROOT.glob("*.py")}
NAMES |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
ASIDE = f"{ROOT}/"  # begins the names in sys.modules of own ones that would hide others


@contextlib.contextmanager
def own_modules() -> Iterator[None]:
    """In this context `import datasets` is this repository's; afterwards, what it was before.

    A module that a user imports begins with these lines, where `root` is the repository's Path:

        own = runpy.run_path(str(root / "engine" / "own.py"))
        with own["own_modules"]():  # and here its imports from the repository
    """
    imported = NAMES & sys.modules.keys()
    foreign = {name for name in imported if not _is_own(name, sys.modules[name].__spec__)}
    others = _take(foreign)
    for name in [name for name in sys.modules if name.startswith(ASIDE)]:
        sys.modules.setdefault(name.removeprefix(ASIDE), sys.modules[name])
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))
        for name in (NAMES & sys.modules.keys()) - (imported - foreign):
            own = _take({name})
            if name in foreign or not _is_own(name, importlib.util.find_spec(name)):
                own = {f"{ASIDE}{each}": module for each, module in own.items()}
            sys.modules.update(own)
        sys.modules.update(others)


def _take(packages: set[str]) -> dict:
    """Removes these modules, and those within them, from sys.modules."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


def _is_own(name: str, spec: ModuleSpec | None) -> bool:
    places = ROOT / f"{name}.py", ROOT / name / "__init__.py"
    return bool(spec and spec.origin) and Path(spec.origin).resolve() in places
