"""Measures speed and memory beside a plain baseline, in turns on the same machine.

python -m tools.bench loss    a step of the center loss alone, for 10 to 1,000,000 classes
python -m tools.bench train   training and test of zhou2018's recipe, beside a plain script

Each takes --quick: a check in seconds, not a measurement.
"""

import argparse
import sys

import torch

from tools.bench import loss, train


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (loss, train):
        module.add_command(commands)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu, as there is no GPU that torch can use, got cuda")
    args.run(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # also where the system's encoding lacks λ
    main()
