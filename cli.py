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
from engine import device
from engine.ranks import Ranks
from recipes import OPTIMIZERS, RECIPES, SCHEDULES

TINY = 1e-30  # with smaller factors, 1/λ or the gradients would leave the range of float32


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage.

    `free`: names of the flags that a resumed run may change.
    """

    def __init__(self, **options):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        self.free = set()

    def group(self, title: str) -> Callable[..., None]:
        """A new group of flags: returns a function that adds a flag, with its default in the help."""
        section = self.add_argument_group(title)

        def add(*names: str, help: str, free: bool = False, **options) -> None:
            action = section.add_argument(*names, help=help, **options)
            if "default" in options:
                action.help += " (default: %(default)s)"
            if free:
                self.free.add(action.dest)

        return add

    def error(self, message: str):
        self.exit(
            2, f"{self.prog}: error: {message}\n" if Ranks.of_environment().rank == 0 else None
        )


def number(
    kind: type, low: float, high: float = math.inf, *, above: bool = False, or_zero: bool = False
) -> Callable[[str], float]:
    """A type for argparse: a finite int or float of at least low, or above it, and at most high; or 0."""
    rule = f"must be {'0 or ' * or_zero}{'an integer' if kind is int else 'a number'} "
    rule += f"{'above' if above else 'of at least'} {low}"
    rule += f" and at most {high}" if high < math.inf else ""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (
                math.isfinite(value)
                and low <= value <= high
                and not (above and value == low)
                or or_zero
                and not value
            ):
                return value
        raise argparse.ArgumentTypeError(f"{rule}, got {text}")

    return convert


def model_name(text: str) -> str:
    """A type for argparse: a network."""
    if not models.is_known(text):
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(sorted(models.MODELS))} or a classification network of torchvision, such as "
            f"resnet18, got {text}"
        )
    return text


def gpu_index(text: str) -> str:
    """A type for argparse: the index of one GPU."""
    indices = text.replace(" ", "").split(",")
    if len(indices) > 1 and all(index.isdecimal() for index in indices):
        raise argparse.ArgumentTypeError(
            f"takes one index, got {text}; for several GPUs: CUDA_VISIBLE_DEVICES={','.join(indices)} "
            f"torchrun --standalone --nproc_per_node={len(indices)} main.py and the other flags"
        )
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be the index of a GPU, such as 0, got {text}")
    return text


def build_parser(description: str = "") -> Parser:
    parser = Parser(prog="main.py", description=description)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = parser.group("experiment")
    add(
        "--recipe",
        choices=sorted(RECIPES),
        default="zhou2018",
        help="defaults of the other flags; -h shows those of the recipe",
    )
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=1,
        help="of the network, the centers and the batches",
    )
    add("--max-epoch", type=number(int, 1), default=100, free=True, help="epochs")
    add(
        "--max-iter",
        type=number(int, 0),
        default=0,
        help="training steps, instead of --max-epoch; 0: use that",
    )

    add = parser.group("data")
    add(
        "-d",
        "--dataset",
        choices=sorted(datasets.SPECS),
        default="mnist",
        help="data set; for folder, cifar10 and cifar100 use --recipe images",
    )
    add(
        "--data-root",
        default="data",
        free=True,
        help="directory of the data sets, downloaded to it on first use; for "
        "--dataset folder the directory that holds train/<class>/* and test/<class>/*",
    )
    add(
        "--val-share",
        type=number(float, 0, 1),
        default=0.0,
        help="share of each class's training images that "
        "chooses the best epoch, the only one that is tested then; 0: none",
    )
    add(
        "--augment",
        **switch,
        help="shift the training images at random and, except for digits, mirror them",
    )
    add(
        "--erase",
        type=number(float, 0, 1),
        default=0.0,
        help="hide a grey square at a random place in each "
        "training image; its side as a share of the image's; 0: none",
    )
    add(
        "--image-size",
        type=number(int, 8, 1024),
        default=32,
        help="pixels per side, for --dataset folder",
    )
    add(
        "--scaling",
        choices=sorted(datasets.SCALINGS),
        default="standard",
        help="of pixels p: standard, by mean and "
        "deviation of the data set (0.5 and 0.5 for folder); symmetric, (p - 127.5) / 128; unit, p / 255",
    )
    add(
        "--unseen",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="names or numbers of classes to leave out of the "
        "training and the test; --verify and --evaluate measure how well the network recognises them as unknown",
    )
    add(
        "--batch-size",
        type=number(int, 1, 10**9),
        default=128,
        help="images per step, over all ranks",
    )
    add(
        "-j",
        "--workers",
        type=number(int, 0),
        default=0,
        free=True,
        help="worker processes that read images; 0: none, all images are kept on the device",
    )

    add = parser.group("network")
    add(
        "--model",
        type=model_name,
        default="cnn",
        metavar="NAME",
        help="network: "
        + ", ".join(sorted(models.MODELS))
        + ", or a classification network of torchvision, such as resnet50",
    )
    add(
        "--pretrained",
        **switch,
        help="start from torchvision's weights of the network, downloaded on first use",
    )
    add(
        "--feat-dim",
        type=number(int, 0, 10**6),
        default=2,
        help="D, dimensions of the features; 0: the width of "
        "torchvision's network, without an embedding",
    )
    add(
        "--init",
        choices=sorted(models.INITS),
        default="default",
        help="initialisation of weights and centers",
    )

    add = parser.group("loss: cross-entropy + λ · center loss")
    add(
        "--weight-cent",
        type=number(float, TINY, or_zero=True),
        default=1.0,
        help="λ, weight of the center loss; 0: softmax only",
    )
    add(
        "--label-smoothing",
        type=number(float, 0, 1),
        default=0.0,
        help="of the cross-entropy: share of the target that is spread evenly over all classes",
    )
    add(
        "--distance",
        choices=sorted(center_loss.DISTANCES),
        default="squared",
        help="of a feature from its center",
    )
    add(
        "--radius",
        type=number(float, 0),
        default=0.0,
        help="r: a feature this close to its center is not pulled",
    )
    add(
        "--loss-scale",
        type=number(float, 0, above=True),
        default=1.0,
        help="factor of the center loss",
    )
    add(
        "--class-average",
        **switch,
        help="divide each sample's term by the size of its class in the batch",
    )
    add(
        "--center-update",
        choices=sorted(center_loss.CENTER_UPDATES),
        default="gradient",
        help="what the centers follow: the gradient of the loss, the paper's Eq. 4, or the means of their classes",
    )

    add = parser.group("optimization")
    add(
        "--optimizer",
        choices=sorted(OPTIMIZERS),
        default="sgd",
        help="of the network; the centers use SGD",
    )
    add(
        "--lr-model",
        type=number(float, TINY),
        default=0.001,
        help="learning rate of the network; its peak for onecycle",
    )
    add("--lr-cent", type=number(float, 0), default=0.5, help="α, learning rate of the centers")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of the network's SGD")
    add("--momentum-cent", type=number(float, 0, 1), default=0.0, help="of the centers' SGD")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of the network")
    add("--caffe-biases", **switch, help="biases have twice the learning rate and no weight decay")
    add(
        "--one-optimizer",
        **switch,
        help="the centers are in the network's SGD and follow its schedule",
    )
    add("--schedule", choices=sorted(SCHEDULES), default="step", help="of the learning rate")
    add(
        "--stepsize",
        type=number(int, 0),
        default=20,
        help="epochs between two decays, for step; 0: constant",
    )
    add(
        "--milestones",
        type=number(int, 1),
        nargs="+",
        default=[5000, 8000],
        metavar="ITERATION",
        help="training steps after which to decay, for milestones",
    )
    add("--gamma", type=number(float, 0, 100, above=True), default=0.5, help="factor of a decay")

    add = parser.group("output")
    add("--save-dir", default="log", free=True, help="directory of the run's files")
    add(
        "--eval-freq",
        type=number(int, 0),
        free=True,
        help="epochs between two tests; 0: only after the last "
        "(default: 10; 1 with --val-share, and with --plot where a test takes less than a tenth of an epoch)",
    )
    add(
        "--mirror",
        **switch,
        help="test with the mean features of each image and, except for "
        "digits, of its mirror image",
    )
    add(
        "--verify",
        **switch,
        free=True,
        help="measure in each test how well distances tell which pairs "
        "of images are of one class, and write evaluation.json",
    )
    add(
        "--print-freq",
        type=number(int, 1),
        default=50,
        free=True,
        help="training steps between two lines of the log",
    )
    add(
        "--plot",
        **switch,
        free=True,
        help="plot the features of each epoch and write the page report.html",
    )
    add(
        "--save-features",
        **switch,
        free=True,
        help="write the features of each epoch to features/epoch_<N>.npz",
    )
    add(
        "--tensorboard",
        **switch,
        free=True,
        help="write settings, metrics and --plot's pictures for TensorBoard",
    )
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        free=True,
        help="continue from a checkpoint, by default the one in --save-dir, with the flags of its run",
    )
    add(
        "--evaluate",
        metavar="CHECKPOINT",
        free=True,
        help="test the network of a checkpoint, without training, and "
        "write evaluation.json; with --plot also confusion.png and roc.png, with --save-features features/test.npz",
    )
    add(
        "--predict",
        nargs="+",
        metavar="PATH",
        free=True,
        help="with --evaluate, instead of the test: write "
        "predictions.csv for these images and all images in these directories",
    )

    add = parser.group("machine")
    add(
        "--gpu",
        type=gpu_index,
        default="0",
        free=True,
        help="index of the GPU; without a GPU, the CPU is used",
    )
    add("--use-cpu", **switch, free=True, help="use the CPU")
    add(
        "--amp",
        **switch,
        help="run the convolutions in bfloat16; auto: if the hardware supports it",
    )
    add(
        "--cuda-graph",
        **switch | dict(default=True),
        free=True,
        help="run steps on a single GPU as a CUDA graph",
    )
    add("--compile", **switch, help="compile the network")
    add(
        "--deterministic",
        action="store_true",
        help="the same metrics each time on the same GPU; slower",
    )
    return parser


def parse_args(argv: list[str] | None = None, description: str = "") -> argparse.Namespace:
    """The flags, on top of their recipe's defaults or, to resume or evaluate, of their values in the checkpoint."""
    parser, local = build_parser(description), Ranks.of_environment().local
    if local is not None:
        parser.set_defaults(gpu=None)
    parser.set_defaults(
        **RECIPES.get(_recipe(argv), {})
    )  # before argparse handles -h, which shows them
    args = parser.parse_args(argv, argparse.Namespace(max_epoch=None))  # None where it is not given
    if args.evaluate == "":
        parser.error("--evaluate must be the path of a checkpoint, got an empty one")
    if args.evaluate and args.resume is not None:
        parser.error("--evaluate tests and --resume trains on: give one of them")
    if args.predict and not args.evaluate:
        parser.error("--predict needs --evaluate CHECKPOINT, the network that predicts")
    for name in ("plot", "save_features", "tensorboard", "verify") if args.predict else ():
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} needs the test, which --predict replaces")
    try:
        if args.evaluate or args.resume is not None:
            args = _with_checkpoint(parser, argv, args)
        else:
            if args.max_epoch:  # it wins over a recipe's steps
                parser.set_defaults(max_iter=0)
            args = parser.parse_args(argv)
        utils.check_save_dir(args.save_dir)
    except utils.RunError as error:
        parser.error(str(error))
    if args.one_optimizer and args.optimizer != "sgd":
        parser.error(f"--one-optimizer goes with --optimizer sgd, got {args.optimizer}")
    if args.pretrained and args.model in models.MODELS:
        parser.error(
            f"--pretrained needs a network of torchvision, such as resnet18, got --model {args.model}"
        )
    if args.pretrained and args.init != "default":
        parser.error(f"--pretrained goes with --init default, got {args.init}")
    if (
        args.one_optimizer
        and args.weight_cent
        and args.lr_cent / args.lr_model / args.weight_cent > 1 / TINY
    ):
        parser.error(
            f"--lr-cent / (--lr-model * --weight-cent) must be at most {1 / TINY:g} with --one-optimizer, got "
            f"{args.lr_cent:g} / ({args.lr_model:g} * {args.weight_cent:g})"
        )
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs a package that is not installed: pip install tensorboard")
    if local is not None and args.gpu:
        parser.error(
            f"--gpu must be left out under torchrun, whose local ranks are the indices, got {args.gpu}"
        )
    args.mirror = args.mirror and datasets.SPECS[args.dataset].flip
    args.gpu = args.gpu or str(local)
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if gpus and int(args.gpu) >= gpus:
        parser.error(f"--gpu must be below {gpus}, the number of GPUs here, got {args.gpu}")
    if args.amp == "auto":
        args.amp = device.multiplies_bfloat16(int(args.gpu) if gpus else None)
    return args


def _recipe(argv: list[str] | None) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")
    return parser.parse_known_args(argv)[0].recipe


def _with_checkpoint(
    parser: Parser, argv: list[str] | None, given: argparse.Namespace
) -> argparse.Namespace:
    """The flags of a run to resume or evaluate: those of its checkpoint, of which only `free` ones may differ."""
    path = given.evaluate or given.resume or os.path.join(given.save_dir, "checkpoint.pt")
    saved = utils.load_checkpoint(path)["args"]
    if missing := {"recipe", "dataset", "model", "feat_dim"} - saved.keys():
        parser.error(f"the checkpoint {path} lacks --{min(missing).replace('_', '-')} of its run")
    saved = vars(build_parser().parse_args([])) | saved  # flags that are newer than the checkpoint
    parser.set_defaults(**saved | dict(save_dir=os.path.dirname(path) or ".", gpu=given.gpu))
    if given.evaluate:
        parser.set_defaults(plot=False, save_features=False, tensorboard=False)
    args = parser.parse_args(argv)
    args.resume = None if given.evaluate else path
    fixed = saved.keys() - parser.free - ({"batch_size", "mirror"} if given.evaluate else set())
    if saved.get("max_iter") or (
        saved.get("schedule") in SCHEDULES and SCHEDULES[saved["schedule"]].fixed_length
    ):
        fixed.add("max_epoch")
    for name in sorted(fixed):
        if getattr(args, name) != saved[name]:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} must be {saved[name]}, as in {path}, got {getattr(args, name)}")
    return args


def check_finite(values: dict[str, float], epoch: int, args: argparse.Namespace) -> None:
    """Raises Diverged, with the flags to change, if one of the values is no longer finite."""
    if broken := [name for name, value in values.items() if not math.isfinite(value)]:
        advice = "lower --lr-model"
        if args.weight_cent:
            advice += (
                f", --lr-cent or --weight-cent: the center loss is a sum over the {args.feat_dim} dimensions, "
                "so that λ goes with 1/D, and a λ above 1 needs a --lr-model lower by as much"
            )
        raise utils.Diverged(
            f"the training has diverged in epoch {epoch}: {' and '.join(broken)} no longer finite, with --weight-cent "
            f"{args.weight_cent:g} --lr-model {args.lr_model:g} --lr-cent {args.lr_cent:g}; {advice}"
        )


def run(
    main: Callable[[argparse.Namespace], None], argv: list[str] | None = None, description: str = ""
) -> int:
    """Parses the flags and runs `main`; prints one line on what ended it early; returns the exit status."""
    kept = "the files in --save-dir are those of the last whole epoch"
    ranks = Ranks.of_environment()
    _open_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="replace"
        )  # λ, where the terminal or the file has no such letter
    try:
        args = parse_args(argv, description)
        with ranks.joined():
            main(args)
        return 0
    except utils.Stopped as stop:
        status, message = (
            stop.status,
            str(stop),
        )  # keeping the exception would keep the workers alive
    except KeyboardInterrupt:
        status, message = 130, f"interrupted; {kept}"
    except utils.RunError as error:
        status, message = error.status, f"error: {error}"
    except (datasets.DatasetError, models.ModelError) as error:
        status, message = 2, f"error: {str(error).strip()}"
    except (EOFError, MemoryError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        if (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "can't allocate memory" in reason
        ):
            reason = f"out of memory; a smaller --batch-size or --feat-dim, or -j 4, needs less: {reason}"
        elif isinstance(error, ConnectionError | EOFError) or reason.startswith(
            "DataLoader worker (pid"
        ):
            reason = f"a worker has died, and a smaller -j needs less memory: {reason}"
        elif ranks.size == 1 and not isinstance(error, OSError):
            raise
        if ranks.size > 1:
            reason = f"rank {ranks.rank} has failed or lost the others ({reason})"
        status, message = 1, f"error: {reason}; {kept}; to go on: --resume"
    if ranks.rank == 0 or status == 1:
        with contextlib.suppress(OSError):  # no one can read it; the status remains
            print(f"main.py: {message}", file=sys.stderr, flush=True)
    return status


def _open_closed_streams() -> None:
    """Points streams closed by `>&-` or `2>&-` at the null device, so that no other file takes their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null := os.open(os.devnull, os.O_RDWR), number)
            if null != number:
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
