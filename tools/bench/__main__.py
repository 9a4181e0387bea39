"""Measures speed and memory, and prints ratios to a plain baseline.

python -m bench loss    the center loss as the number of classes grows, 10 to 1,000,000
python -m bench train   training steps and epochs of zhou2018's recipe, against a plain script

Each takes --quick: a check in seconds, not a measurement.
"""

import argparse
import sys

import torch

from tools.bench import loss, train


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (loss, train):
        module.add_command(commands)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu, as there is no GPU that torch can use, got cuda")
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
