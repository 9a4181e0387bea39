"""Measures speed beside a plain baseline, in turns on the same machine.

python -m tools.bench loss    a step of the center loss alone, for 10 to 1,000,000 classes
python -m tools.bench train   training and test of zhou2018's recipe, beside a plain script
"""

import argparse
import sys

import torch

from tools.bench import loss, train


def main(argv: list[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m tools.bench", description=__doc__, formatter_class=style
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in dict(loss=loss, train=train).items():
        command = commands.add_parser(name, description=module.__doc__, formatter_class=style)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        command.add_argument("--device", choices=("cpu", "cuda"), default=device)
        command.add_argument("--quick", action="store_true", help="a check, not a measurement")
        module.add_flags(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu, as there is no GPU that torch can use, got cuda")
    args.run(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # also where the system's encoding lacks λ
    main()
