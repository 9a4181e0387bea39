"""Measures speed beside a plain baseline, in turns on the same machine.

python -m tools.bench loss    a step of the center loss alone, for 10 to 1,000,000 classes
python -m tools.bench train   training and test of zhou2018's recipe, beside a plain script

CUDA_VISIBLE_DEVICES= measures the CPU of a machine with a GPU.
"""

import argparse
import sys

from cli import number
from tools.bench import hardware, loss, train


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    runs = dict(loss=loss.run, train=train.run)
    count = number(int, 1)
    add("what", choices=runs)
    add("--quick", action="store_true", help="a check, not a measurement")
    add("--classes", type=count, nargs="+", default=[10**n for n in range(1, 7)], help="for loss")
    add("--batch-size", type=count, default=128, help="for loss")
    add("--feat-dim", type=count, default=128, help="for loss")
    add("--turns", type=count, default=5, help="for train")
    args = parser.parse_args(argv)
    print(hardware())
    runs[args.what](args)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # also where the system's encoding lacks ·
    main()
