"""The command line: flags, their checks, and exit statuses."""

import argparse
import contextlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable

import torch

import center_loss
import datasets
import models
import utils
from engine.device import multiplies_bfloat16
from engine.ranks import Ranks, RanksError
from engine.sources import WorkerError
from recipes import OPTIMIZERS, RECIPES, SCHEDULES
from tools.run_files import check_save_dir, is_moved

# Beyond these, 1/λ, rates or gradients would leave the range of float32.
TINY = 1e-30
HUGE = 1e30


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; `free`: flags that a resumed run may change."""

    def __init__(self, **options):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=style, allow_abbrev=False, **options)
        self.free = set()

    def group(self, title: str) -> Callable:
        """Flags under a title, which the returned function adds.

        `kind` is a type, a table of choices, or bool for --name and --no-name.
        """
        section = self.add_argument_group(title)

        def add(names: str, kind, default, help: str, *, free: bool = False, **options) -> None:
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(kind, dict | tuple):
                options["choices"] = sorted(kind)
            elif kind:
                options["type"] = kind
            if default is not None:
                help += " (default: %(default)s)"
            names = names.split()
            action = section.add_argument(*names, default=default, help=help, **options)
            if free:
                self.free.add(action.dest)

        return add

    def error(self, message: str):
        is_first = os.environ.get("RANK", "0") == "0"
        self.exit(2, f"{self.prog}: error: {message}\n" if is_first else None)


def number(
    kind: type, low: float, high: float | None = None, *, or_zero: bool = False
) -> Callable[[str], float]:
    """A type for argparse: an int or float of at least low and at most high; or 0."""
    if high is None:
        high = 10**9 if kind is int else HUGE
    name = "an integer" if kind is int else "a number"
    rule = f"must be {'0 or ' * or_zero}{name} of at least {low} and at most {high}"

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high or (or_zero and value == 0):
                return value
        raise argparse.ArgumentTypeError(f"{rule}, got {text}")

    return convert


def model_name(text: str) -> str:
    """A type for argparse: a network."""
    if not models.is_known(text):
        names = ", ".join(sorted(models.MODELS))
        raise argparse.ArgumentTypeError(
            f"must be one of {names} or a classification network of torchvision, got {text}"
        )
    return text


def gpu_index(text: str) -> str:
    """A type for argparse: the index of one GPU."""
    text = text.replace(" ", "")
    if "," in text:
        count = text.count(",") + 1
        raise argparse.ArgumentTypeError(
            f"takes one index, got {text}; for several: CUDA_VISIBLE_DEVICES={text} torchrun "
            f"--standalone --nproc_per_node={count} main.py ..."
        )
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be the index of a GPU, such as 0, got {text}")
    return text


class ImageSize(argparse.Action):
    """One number, a square, or height and width."""

    def __call__(self, parser, args, values, option=None):
        if len(values) > 2:
            parser.error(f"{option} takes one number or two, got {len(values)}")
        args.image_size = values[0] if len(values) == 1 else values


def build_parser(description: str = "") -> Parser:
    parser = Parser(prog="main.py", description=description)
    share = number(float, 0, 1)
    factor = number(float, TINY)
    positive = number(float, 0)
    count = number(int, 0)

    add = parser.group("experiment")
    add("--recipe", RECIPES, "zhou2018", "defaults of the other flags; with -h, shows its own")
    add("--seed", number(int, 0, 2**63 - 1), 1, "of the network, the centers and the batches")
    add("--max-epoch", number(int, 1), 100, "epochs", free=True)
    add("--max-iter", count, 0, "training steps, in place of --max-epoch if not 0")

    add = parser.group("data")
    help = "data set; for folder, cifar10 and cifar100 use --recipe images"
    add("-d --dataset", datasets.SPECS, "mnist", help)
    help = "directory of the data sets, downloaded on first use, or of train/ and test/"
    add("--data-root", utils.path, "data", help, free=True)
    help = "pixels, for data sets without a size of their own; one number is a square"
    size = dict(nargs="+", action=ImageSize, metavar=("H", "W"))
    add("--image-size", number(int, 8, 1024), 32, help, **size)
    help = "share of the training images that chooses the best epoch, alone tested then"
    add("--val-share", share, 0.0, help)
    help = "shift the training images at random and, except for digits, mirror them"
    add("--augment", bool, False, help)
    help = "hide a grey square at random in each training image; its side over the image's"
    add("--erase", share, 0.0, help)
    help = "of pixels p: by mean and deviation of the data set; (p - 127.5) / 128; or p / 255"
    add("--scaling", datasets.SCALINGS, "standard", help)
    help = "classes, by name or number, to leave out of the training and to test as unknown"
    add("--unseen", str, [], help, nargs="+", metavar="CLASS")
    add("--batch-size", number(int, 1), 128, "images per step, over all ranks")
    help = "worker processes that read images; 0: all images are kept on the device"
    add("-j --workers", number(int, 0, 1024), 0, help, free=True)

    add = parser.group("network")
    help = f"{', '.join(sorted(models.MODELS))}, or one of torchvision, such as resnet50"
    add("--model", model_name, "cnn", help, metavar="NAME")
    help = "start from torchvision's weights, downloaded on first use"
    add("--pretrained", bool, False, help)
    help = "D, dimensions of the features; 0: the width of torchvision's network"
    add("--feat-dim", number(int, 0, 10**6), 2, help)
    add("--init", models.INITS, "default", "how weights and centers start")

    add = parser.group("loss: cross-entropy + λ · center loss")
    help = "λ, weight of the center loss; 0: softmax only"
    add("--weight-cent", number(float, TINY, or_zero=True), 1.0, help)
    help = "share of the cross-entropy's target that is spread over all classes"
    add("--label-smoothing", share, 0.0, help)
    add("--distance", center_loss.DISTANCES, "squared", "of a feature from its center")
    add("--radius", positive, 0.0, "r: a feature this close to its center is not pulled")
    add("--loss-scale", factor, 1.0, "factor of the center loss")
    help = "divide each sample's term by the size of its class in the batch"
    add("--class-average", bool, False, help)
    help = "what the centers follow; paper: its Eq. 4"
    add("--center-update", center_loss.CENTER_UPDATES, "gradient", help)

    add = parser.group("optimization")
    add("--optimizer", OPTIMIZERS, "sgd", "of the network; the centers use SGD")
    add("--lr-model", factor, 0.001, "learning rate of the network; for onecycle its peak")
    add("--lr-cent", positive, 0.5, "α, learning rate of the centers")
    add("--momentum", share, 0.9, "of the network's SGD")
    add("--momentum-cent", share, 0.0, "of the centers' SGD")
    add("--weight-decay", positive, 5e-4, "of the network")
    help = "biases have twice the learning rate and no weight decay"
    add("--caffe-biases", bool, False, help)
    help = "the centers are in the network's SGD and follow its schedule"
    add("--one-optimizer", bool, False, help)
    add("--schedule", SCHEDULES, "step", "of the learning rate")
    add("--stepsize", count, 20, "for step: epochs between two decays; 0: constant")
    help = "for milestones: steps after which to decay"
    add("--milestones", number(int, 1), [5000, 8000], help, nargs="+", metavar="STEP")
    add("--gamma", number(float, TINY, 100), 0.5, "factor of a decay")

    add = parser.group("output")
    add("--save-dir", utils.path, "log", "directory of the run's files", free=True)
    add("--overwrite", bool, False, "let a run replace files of others", free=True)
    help = "epochs between two tests; 0: only the last (default: 10; 1 to validate and for films)"
    add("--eval-freq", count, None, help, free=True)
    help = "test with the means of images and mirror images, not of digits; concat: for --pairs"
    add("--mirror", models.MIRRORS, False, help, nargs="?", const="mean")
    off = dict(dest="mirror", action="store_false")
    add("--no-mirror", None, None, "test without mirror images", **off)
    add("--verify", bool, False, "test how distances separate pairs of images", free=True)
    add("--print-freq", number(int, 1), 50, "steps between two lines of the log", free=True)
    help = "plot the features of each epoch and write the page report.html"
    add("--plot", bool, False, help, free=True)
    add("--save-features", bool, False, "write the features of each epoch", free=True)
    add("--tensorboard", bool, False, "write metrics and pictures for TensorBoard", free=True)

    add = parser.group("trained networks")
    file = dict(free=True, metavar="CHECKPOINT")
    help = "continue from a checkpoint, by default the one in --save-dir, with its run's flags"
    add("--resume", utils.path, None, help, nargs="?", const=True, **file)
    help = "test the network of a checkpoint; goes with --plot and --save-features"
    add("--evaluate", utils.path, None, help, **file)
    help = "with --evaluate: test the pairs of LFW's pairs.txt or of lines 'path path 0|1'"
    add("--pairs", utils.path, None, help, free=True, metavar="FILE")

    add = parser.group("machine")
    add("--gpu", gpu_index, "0", "index of the GPU; without one, the CPU is used", free=True)
    add("--use-cpu", bool, False, "use the CPU", free=True)
    add("--amp", bool, False, "run the convolutions in bfloat16; auto: if the hardware supports it")
    add("--cuda-graph", bool, True, "run steps on a single GPU as a CUDA graph", free=True)
    add("--compile", bool, False, "compile the network")
    add("--deterministic", bool, False, "the same metrics each time on the same GPU; slower")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return parse(argv)[0]


def parse(argv: list[str] | None, description: str = "") -> tuple[argparse.Namespace, dict | None]:
    """The flags, on top of their recipe's defaults or of a checkpoint's, and that checkpoint."""
    parser = build_parser(description)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", nargs="?")
    recipe = early.parse_known_args(argv)[0].recipe
    parser.set_defaults(**RECIPES.get(recipe, {}))  # before argparse handles -h, which shows them
    given = parser.parse_args(argv, argparse.Namespace(max_epoch=None, gpu=None))
    if given.evaluate and given.resume is not None:
        parser.error("--evaluate tests and --resume trains on: give one of them")
    try:
        saved = None
        if given.evaluate or given.resume is not None:
            path = given.evaluate or given.resume
            if path is True:
                path = os.path.join(given.save_dir, "checkpoint.pt")
            if os.path.isdir(path):
                path = os.path.join(path, "checkpoint.pt")
            saved = utils.load_checkpoint(path)
            with utils.reading(path):
                args = _with_checkpoint(parser, argv, path, saved["args"], given.evaluate)
        else:
            if given.max_epoch:  # it wins over a recipe's steps
                parser.set_defaults(max_iter=0)
            args = parser.parse_args(argv)
        _check_together(args)
        _choose_hardware(args, given.gpu)
        datasets.check_save_dir(args.data_root, args.save_dir)
        overwrite = args.overwrite or bool(args.resume and not is_moved(args))
        check_save_dir(args.save_dir, args.dataset, overwrite, evaluate=bool(args.evaluate))
    except (utils.RunError, datasets.DatasetError) as error:
        parser.error(str(error))
    return args, saved


def upgrade(args: dict) -> dict:
    """The flags of an older version's run: newer ones had their defaults."""
    known = vars(build_parser().parse_args([]))
    args = known | {name: value for name, value in args.items() if name in known}
    if args["mirror"] is True:  # before there was concat
        args["mirror"] = "mean"
    return args


def _with_checkpoint(
    parser: Parser, argv: list[str] | None, path: str, saved: dict, evaluate: bool
) -> argparse.Namespace:
    """The flags of a run to resume or evaluate, of which only the `free` ones may differ."""
    if saved["dataset"] not in datasets.SPECS:  # before it becomes part of a path
        raise ValueError(f"unknown data set {saved['dataset']!r}")
    saved = upgrade(saved)
    # A link stands for the run that it points to.
    directory = os.path.dirname(os.path.realpath(path) if os.path.islink(path) else path) or "."
    parser.set_defaults(**saved | dict(save_dir=directory, overwrite=False))
    if evaluate:
        parser.set_defaults(plot=False, save_features=False, tensorboard=False, verify=False)
    args = parser.parse_args(argv)
    args.evaluate = path if evaluate else None
    args.resume = None if evaluate else path
    fixed = saved.keys() - parser.free
    if evaluate:
        fixed -= {"batch_size", "mirror"}
    if saved["max_iter"] or SCHEDULES[saved["schedule"]].fixed_length:
        fixed.add("max_epoch")
    for name in sorted(fixed):
        if getattr(args, name) != saved[name]:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} must be {saved[name]}, as in {path}, got {getattr(args, name)}")
    return args


def _check_together(args: argparse.Namespace) -> None:
    """Raises RunError if two flags do not go together."""
    ratio = args.lr_cent / args.lr_model / (args.weight_cent or 1)
    rates = f"--lr-cent / (--lr-model * --weight-cent) must be at most {HUGE:g}"
    is_own = args.model in models.MODELS
    has_board = importlib.util.find_spec("tensorboard") is not None
    mistakes = [
        (args.pairs and not args.evaluate, "--pairs needs --evaluate CHECKPOINT, to be tested"),
        (args.mirror == "concat" and not args.pairs, "--mirror concat goes with --pairs"),
        (args.one_optimizer and args.optimizer != "sgd", "--one-optimizer needs --optimizer sgd"),
        (args.one_optimizer and ratio > HUGE, f"--one-optimizer: {rates}, got {ratio:g}"),
        (args.pretrained and is_own, "--pretrained needs a network of torchvision: resnet18, say"),
        (args.pretrained and args.init != "default", "--pretrained goes with --init default"),
        (args.tensorboard and not has_board, "--tensorboard needs pip install tensorboard"),
    ]
    for made, message in mistakes:
        if made:
            raise utils.RunError(message)


def _choose_hardware(args: argparse.Namespace, gpu: str | None) -> None:
    """Fills in what depends on the machine: the GPU, and --amp where a recipe leaves it open."""
    local = Ranks.of_environment().local
    if local is not None and gpu:
        raise utils.RunError(f"--gpu must be left out under torchrun, got {gpu}")
    args.gpu = gpu or str(local or 0)
    args.mirror = args.mirror if datasets.SPECS[args.dataset].flip else False
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if gpus and int(args.gpu) >= gpus:
        raise utils.RunError(f"--gpu must be below {gpus}, the number of GPUs, got {args.gpu}")
    if args.amp == "auto":
        args.amp = multiplies_bfloat16(int(args.gpu) if gpus else None)


def advice(accuracy: float, epoch: int, classes: int, batches: int) -> list[str]:
    """What may help if the accuracy (%) is at chance after 200 steps, not in epoch 1; said once."""
    chance = 100 / classes
    first = max(2, math.ceil(200 / batches))
    if epoch != first or accuracy >= chance + min(2, chance / 5):
        return []
    return [
        f"The training accuracy is still about {chance:.3g} %: --recipe images, --init xavier, "
        "another --lr-model or a lower --weight-cent may help"
    ]


def run(
    main: Callable[[argparse.Namespace, dict | None], None],
    argv: list[str] | None = None,
    description: str = "",
) -> int:
    """Parses the flags and runs `main`; prints one line on what ended it; returns the status."""
    utils.prepare_output()
    ranks = Ranks()
    try:
        ranks = Ranks.of_environment()
        args, saved = parse(argv, description)
        with ranks.joined():
            main(args, saved)
        return 0
    except utils.Stopped as stop:
        status = stop.status
        message = str(stop)
    except KeyboardInterrupt:
        status = 130
        message = "interrupted"
    except (utils.RunError, datasets.DatasetError, models.ModelError, RanksError) as error:
        status = getattr(error, "status", 2)
        message = f"error: {error}"
    except (MemoryError, OSError, RuntimeError) as error:
        status = 1
        message = _failure(error, ranks)
        if not message:
            raise
    if ranks.rank == 0 or status == 1:
        with contextlib.suppress(OSError):  # no one can read it; the status remains
            line = " ".join(message.splitlines())  # a name may have a line break
            print(f"main.py: {line}", file=sys.stderr, flush=True)
    return status


def _failure(error: Exception, ranks: Ranks) -> str:
    """What is said of a failure that is no fault of the program; empty if it may be one."""
    line = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or "DefaultCPUAllocator" in line:  # torch's own error for the CPU is a RuntimeError
        return f"error: out of memory (a smaller --batch-size, or -j 4, needs less): {line}"
    if isinstance(error, OSError | WorkerError):
        return f"error: {line}"
    if ranks.size > 1:
        return f"error: rank {ranks.rank} has failed or lost the others: {line}"
    return ""
