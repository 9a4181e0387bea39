"""Commands beside main.py: `python -m tools.results`, `python -m tools.bench`."""
