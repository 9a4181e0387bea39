"""Trains a small network with softmax and center loss and plots its features (Wen et al., ECCV 2016).

python main.py --dataset digits --recipe wen2016 --plot    no download, no GPU, a minute
python main.py --gpu 0 --plot                              MNIST, on the GPU where there is one
python main.py --resume                                    go on where the run in --save-dir stopped
python main.py --evaluate log/checkpoint.pt                test figures of a trained network
"""

import argparse
import contextlib
import functools
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from tqdm import tqdm

import datasets
import models
import plots
import utils
from center_loss import CenterLoss

# The reference systems as defaults of the flags. zhou2018 is what the parser itself has.
RECIPES = {
    "zhou2018": {},
    "wen2016": dict(
        model="cnn-wen2016",
        init="xavier",
        scaling="symmetric",
        loss_scale=0.5,
        center_update="paper",
        weight_cent=0.01,
        lr_model=0.01,
        lr_cent=0.01,
        momentum_cent=0.9,
        caffe_biases=True,
        one_optimizer=True,
        schedule="milestones",
        milestones=[5000, 8000],
        gamma=0.8,
        max_iter=10000,
    ),
    "zahn2024-v1.0": dict(
        model="bn-deep",
        scaling="unit",
        batch_size=256,
        loss_scale=0.5,
        class_average=True,
        weight_decay=0.0,
        gamma=0.8,
        max_epoch=500,
    ),
}
RECIPES["zahn2024-v1.1"] = RECIPES["zahn2024-v1.0"] | dict(distance="euclidean")
RECIPES["zahn2024-v1.2"] = RECIPES["zahn2024-v1.1"] | dict(model="bn-shallow")

# Factories from (parameter groups, args), and from (optimizer, args, steps an epoch). All schedules step by iteration.
OPTIMIZERS = {
    "sgd": lambda groups, args: torch.optim.SGD(groups, args.lr_model, args.momentum, weight_decay=args.weight_decay),
    "adamw": lambda groups, args: torch.optim.AdamW(groups, args.lr_model, weight_decay=args.weight_decay),
}
SCHEDULES = {
    "step": lambda sgd, args, steps: lr_scheduler.StepLR(sgd, args.stepsize * steps or sys.maxsize, args.gamma),
    "milestones": lambda sgd, args, steps: lr_scheduler.MultiStepLR(sgd, args.milestones, args.gamma),
    "onecycle": lambda sgd, args, steps: lr_scheduler.OneCycleLR(sgd, args.lr_model, args.max_epoch * steps),
}

# What a resumed or evaluated run may have otherwise than its checkpoint.
FREE_ON_RESUME = set(
    "resume evaluate save_dir data_root workers gpu use_cpu max_epoch max_iter plot save_features tensorboard "
    "eval_freq print_freq".split()
)


# fmt: off  (a flag a line, where it fits)
def build_parser() -> utils.Parser:
    parser = utils.Parser(prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)

    def group(title: str):
        section = parser.add_argument_group(title)

        def add(*names: str, help: str, **options) -> None:
            with_default = "default" in options and "action" not in options
            section.add_argument(*names, help=help + " (default: %(default)s)" * with_default, **options)

        return add

    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = group("experiment")
    add("--recipe", choices=sorted(RECIPES), default="zhou2018", help="system that sets the other flags' defaults")
    add("--seed", type=utils.number(int, 0, 2**63 - 1), default=1, help="of the network, the centers and the batches")
    add("--max-epoch", type=utils.number(int, 1), default=100, help="epochs")
    add("--max-iter", type=utils.number(int, 0), default=0, help="steps, in place of --max-epoch; 0: no such limit")

    add = group("data")
    add("-d", "--dataset", choices=sorted(datasets.SPECS), default="mnist", help="data set")
    add("--data-root", default="data", help="directory of the data sets, downloaded to it on first use; for --dataset "
        "folder the directory that holds train/<class>/* and test/<class>/*")
    add("--image-size", type=utils.number(int, 8, 1024), default=32, help="pixels a side, for --dataset folder")
    add("--scaling", choices=sorted(datasets.SCALINGS), default="standard", help="of pixels p: by the data set's mean "
        "and deviation (standard), (p - 127.5) / 128 (symmetric), p / 255 (unit)")
    add("--batch-size", type=utils.number(int, 1), default=128, help="images a step, over all ranks")
    add("-j", "--workers", type=utils.number(int, 0), default=0, help="processes that read images; 0: none, all images "
        "lie on the device")

    add = group("network")
    add("--model", choices=sorted(models.MODELS), default="cnn", help="network")
    add("--feat-dim", type=utils.number(int, 1), default=2, help="D, dimensions of the features")
    add("--init", choices=sorted(models.INITS), default="default", help="first weights and centers")

    add = group("loss: cross-entropy + λ · center loss")
    add("--weight-cent", type=utils.number(float, 0), default=1.0, help="λ, weight of the center loss; 0: softmax only")
    add("--distance", choices=["squared", "euclidean"], default="squared", help="of a feature from its center")
    add("--loss-scale", type=utils.number(float, 0, above=True), default=1.0, help="factor of the center loss")
    add("--class-average", **switch, help="divide a sample's term by the number of its class in the batch")
    add("--center-update", choices=["gradient", "paper"], default="gradient", help="or the paper's Eq. 4")

    add = group("optimization")
    add("--optimizer", choices=sorted(OPTIMIZERS), default="sgd", help="of the network; the centers have SGD")
    add("--lr-model", type=utils.number(float, 0, above=True), default=0.001, help="learning rate of the network")
    add("--lr-cent", type=utils.number(float, 0), default=0.5, help="α, learning rate of the centers")
    add("--momentum", type=utils.number(float, 0, 1), default=0.9, help="of the network's SGD")
    add("--momentum-cent", type=utils.number(float, 0, 1), default=0.0, help="of the centers' SGD")
    add("--weight-decay", type=utils.number(float, 0), default=5e-4, help="of the network")
    add("--caffe-biases", **switch, help="biases have twice the learning rate and no weight decay")
    add("--one-optimizer", **switch, help="the centers are in the network's SGD and follow its schedule")
    add("--schedule", choices=sorted(SCHEDULES), default="step", help="of the learning rate")
    add("--stepsize", type=utils.number(int, 0), default=20, help="epochs between two factors gamma; 0: constant")
    add("--milestones", type=utils.number(int, 1), nargs="+", default=[5000, 8000], metavar="ITERATION",
        help="training steps after which to apply gamma, for milestones")
    add("--gamma", type=utils.number(float, 0, above=True), default=0.5, help="factor of the learning rate")

    add = group("output")
    add("--save-dir", default="log", help="directory of the run's files")
    add("--eval-freq", type=utils.number(int, 0), default=10, help="epochs between two tests; 0: only after the last")
    add("--print-freq", type=utils.number(int, 1), default=50, help="steps between two lines")
    add("--plot", action="store_true", help="plot the features of each epoch")
    add("--save-features", action="store_true", help="write the features of each epoch to features/epoch_<N>.npz")
    add("--tensorboard", action="store_true", help="write the figures of each epoch for TensorBoard")
    add("--resume", nargs="?", const="", metavar="CHECKPOINT",
        help="go on from a checkpoint, or from the one in --save-dir, with that run's flags")
    add("--evaluate", metavar="CHECKPOINT", help="test the network of a checkpoint, without training")

    add = group("machine")
    add("--gpu", type=utils.gpu_index, default="0", help="index of the GPU; where there is none, the CPU is used")
    add("--use-cpu", action="store_true", help="use the CPU")
    add("--amp", **switch, help="run the network in bfloat16")
    add("--compile", **switch, help="compile the network")
    add("--deterministic", action="store_true", help="the same figures each time on the same GPU; slower")
    return parser
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, on top of their recipe's defaults or, to resume or evaluate, of their values in the checkpoint."""
    parser, local = build_parser(), utils.Ranks.of_environment().local
    if local is not None:
        parser.set_defaults(gpu=None)
    args = parser.parse_args(argv)
    path = args.evaluate or args.resume
    try:
        if path is None:
            parser.set_defaults(**RECIPES[args.recipe])
            args = parser.parse_args(argv)
        else:
            path = path or os.path.join(args.save_dir, "checkpoint.pt")
            saved = utils.load_checkpoint(path)["args"]
            parser.set_defaults(**saved | dict(save_dir=args.save_dir, gpu=args.gpu))
            args = parser.parse_args(argv)
            args.resume = None if args.evaluate else path
            for name in saved.keys() - FREE_ON_RESUME:
                if getattr(args, name) != saved[name]:
                    flag = "--" + name.replace("_", "-")
                    parser.error(f"{flag} must be {saved[name]}, as in {path}, got {getattr(args, name)}")
        utils.check_save_dir(args.save_dir)
    except utils.RunError as error:
        parser.error(str(error))
    if args.one_optimizer and args.optimizer != "sgd":
        parser.error(f"--one-optimizer goes with --optimizer sgd, got {args.optimizer}")
    if local is not None and args.gpu:
        parser.error(f"--gpu must be left out under torchrun, whose local ranks are the indices, got {args.gpu}")
    args.gpu = args.gpu or str(local)
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if gpus and int(args.gpu) >= gpus:
        parser.error(f"--gpu must be below {gpus}, the number of GPUs here, got {args.gpu}")
    return args


def create_optimizers(model, center_loss, args) -> dict[str, torch.optim.Optimizer]:
    """The network's optimizer and, unless it has both, the centers'; named as in a checkpoint."""
    parameters = dict(model.named_parameters())
    biases = [parameters.pop(name) for name in list(parameters) if args.caffe_biases and name.endswith(".bias")]
    groups = [dict(params=list(parameters.values()))]
    if biases:
        groups.append(dict(params=biases, lr=2 * args.lr_model, weight_decay=0.0))
    if args.one_optimizer:
        groups.append(dict(params=center_loss.parameters(), momentum=args.momentum_cent, weight_decay=0.0))
        return dict(optimizer_model=OPTIMIZERS[args.optimizer](groups, args))
    return dict(
        optimizer_model=OPTIMIZERS[args.optimizer](groups, args),
        optimizer_cent=torch.optim.SGD(center_loss.parameters(), lr=args.lr_cent, momentum=args.momentum_cent),
    )


def train(net, center_loss, optimizers, scheduler, loader, args, ranks, log, stop, epoch, partial=None) -> dict:
    """One pass over the training data, or the rest of one from `partial`, what an interrupted pass has returned.

    Returns the means of the losses, the accuracy (%) and, where they are wanted, the features (N, D) of the pass.
    """
    net.train()
    device, steps, size = center_loss.centers.device, len(loader), len(loader.dataset)
    last = min(steps, args.max_iter - (epoch - 1) * steps) if args.max_iter else steps
    lr_ratio = args.lr_cent / args.lr_model if args.one_optimizer else 1.0
    keep = args.plot or args.save_features or args.weight_cent == 0
    # This rank's sums over samples of cross-entropy, λ · center loss and right predictions; on the device.
    sums, seen, done = torch.zeros(3, dtype=torch.float64, device=device), [], partial["batches"] if partial else 0
    if partial and ranks.rank == 0:
        sums += partial["sums"].to(device)
        seen = [[each.to(device) for each in partial["seen"]]] if keep else []

    bar = tqdm(loader, disable=None if ranks.rank == 0 else True, leave=False, desc=f"epoch {epoch}", initial=done,
               total=last, unit="batch")
    for batch, (images, labels) in enumerate(bar, done + 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        count = min(args.batch_size, size - (batch - 1) * args.batch_size)  # of all ranks
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            features, logits = net(images)
        features, logits = features.float(), logits.float()
        xent = F.cross_entropy(logits, labels, reduction="sum") / count  # this rank's share of the mean
        # The center loss is that of the joined batch, the same on every rank.
        center = args.weight_cent * center_loss(features, labels) if args.weight_cent else torch.zeros_like(xent)

        for optimizer in optimizers:
            optimizer.zero_grad()
        (ranks.size * (xent + center)).backward()  # the ranks' gradients are averaged, where their sum is wanted
        if args.weight_cent:
            center_loss.rescale_center_grad(ranks.size * args.weight_cent, lr_ratio)
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()

        predictions = logits.detach().argmax(1)
        values = torch.stack([xent.detach(), center.detach() / ranks.size, (predictions == labels).sum() / count])
        sums += values * count
        if keep:
            seen.append([features.detach(), labels, predictions])
        stop.signal = ranks.any(stop.signal)
        if batch % args.print_freq == 0 or batch == last or stop.signal:
            (xent, center, _), (*totals, _) = ranks.total(torch.stack([values, sums])).tolist()
            check_finite(dict(cross_entropy=totals[0], center_loss=totals[1]), epoch, args)
            if batch % args.print_freq == 0:
                means = [total / min(batch * args.batch_size, size) for total in totals]
                log(f"Batch {batch}/{steps}\t Loss {xent + center:.6f} ({sum(means):.6f}) "
                    f"XentLoss {xent:.6f} ({means[0]:.6f}) CenterLoss {center:.6f} ({means[1]:.6f})")
        if batch == last or stop.signal:
            break
    bar.close()

    sums, seen = ranks.total(sums), [ranks.gather(torch.cat(each)) for each in zip(*seen, strict=True)]
    if batch < last:
        return dict(batches=batch, sums=sums, seen=seen)
    xent, center, right = (sums / min(last * args.batch_size, size)).tolist()
    return dict(loss=xent + center, xent=xent, center=center, accuracy=100 * right,
                **dict(zip(("features", "labels", "predictions"), seen, strict=False)))


def check_finite(sums: dict[str, float], epoch: int, args) -> None:
    for name, value in sums.items():
        if not math.isfinite(value):
            raise utils.Diverged(
                f"the {name.replace('_', ' ')} is no longer finite in epoch {epoch}, with --weight-cent "
                f"{args.weight_cent:g} --lr-model {args.lr_model:g} --lr-cent {args.lr_cent:g}; lower --lr-model, or "
                f"--weight-cent: the center loss is a sum over the {args.feat_dim} dimensions, so that λ goes with 1/D"
            )


@torch.no_grad()
def test(model, loader, args, ranks) -> dict:
    """Cross-entropy, accuracy (%), features (N, D), labels and predictions (N,) of the test data."""
    model.eval()
    device, seen = next(model.parameters()).device, []
    hidden = None if ranks.rank == 0 else True  # None: where the output is no terminal
    for images, labels in tqdm(loader, disable=hidden, leave=False, desc="test", unit="batch"):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            features, logits = model(images.to(device, non_blocking=True))
        seen.append((features.float(), logits.float(), labels.to(device, non_blocking=True)))
    features, logits, labels = (ranks.gather(torch.cat(each)) for each in zip(*seen, strict=True))
    predictions = logits.argmax(1)
    return dict(xent=F.cross_entropy(logits, labels).item(), accuracy=percentage(predictions == labels),
                features=features, labels=labels, predictions=predictions)


@torch.no_grad()
def center_figures(features: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor) -> dict:
    """Accuracy (%) of the nearest center, mean distance from one's own center, smallest distance of two centers."""
    exact = "donot_use_mm_for_euclid_dist"
    nearest = [torch.cdist(some, centers, compute_mode=exact).argmin(1) for some in features.split(4096)]
    return dict(nearest_center_accuracy=percentage(torch.cat(nearest) == labels),
                intra_distance=(features - centers[labels]).norm(dim=1).mean().item(),
                inter_distance=torch.pdist(centers).min().item())


def percentage(right: torch.Tensor) -> float:
    return 100 * right.double().mean().item()


def class_means(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    sums = torch.zeros(num_classes, features.shape[1], device=features.device).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=num_classes).unsqueeze(1)


def log_test(log, tested: dict) -> None:
    log(f"Accuracy (%): {tested['accuracy']:.2f}\t Error rate (%): {100 - tested['accuracy']:.2f}")
    log(f"Nearest-center accuracy (%): {tested['nearest_center_accuracy']:.2f}\t Intra-class distance (mean): "
        f"{tested['intra_distance']:.4f}\t Inter-class distance (min): {tested['inter_distance']:.4f}")


def record(epoch: int, lr: float, trained: dict, tested: dict) -> dict:
    """The epoch's row of metrics.csv."""
    row = dict(epoch=epoch, lr_model=lr)
    row |= {f"train_{name}": trained[name] for name in ("loss", "xent", "center", "accuracy")}
    row |= {f"test_{name}": tested.get(name) for name in ("xent", "accuracy")}
    return row | {name: tested.get(name) for name in ("nearest_center_accuracy", "intra_distance", "inter_distance")}


def plot(plotter, save_dir: Path, epoch: int, splits: dict, centers: torch.Tensor, classes: list[str]) -> None:
    """Draws <split>/epoch_<N>.png; the plane that they show is fitted on the training features."""
    project, axes = plots.plane(splits["train"]["features"].cpu().numpy())
    for name, split in splits.items():
        points, picture = (save_dir / name / f"epoch_{epoch}.{ending}" for ending in ("npz", "png"))
        title = f"{name}, epoch {epoch}: accuracy {split['accuracy']:.2f} %"
        arrays = [each.cpu().numpy() for each in (split["features"], split["labels"], centers)]
        utils.replace_file(points, functools.partial(plots.save_points, *arrays, classes, project, axes, title))
        plotter(picture, plots.draw_points, points)


def evaluate(model, data, centers, args, ranks, log) -> None:
    """Prints the test figures of a trained network, and with --plot draws its features and confusion matrix."""
    tested = test(model, data.test, args, ranks)
    tested |= center_figures(tested["features"], tested["labels"], centers)
    log("==> Test")
    log_test(log, tested)
    count = len(data.classes)
    confusion = torch.bincount(tested["labels"] * count + tested["predictions"], minlength=count**2).view(count, count)
    log("Accuracy (%) of each class, and its predictions:")
    width = max(map(len, data.classes))
    for name, row, right in zip(data.classes, confusion.tolist(), confusion.diag().tolist(), strict=True):
        shown = [f"{data.classes[label]}: {number}" for label, number in enumerate(row) if number]
        log(f"  {name:{width}} {100 * right / max(sum(row), 1):6.2f}   {', '.join(shown)}")
    if args.plot and ranks.rank == 0:
        save_dir, title = Path(args.save_dir), f"test: accuracy {tested['accuracy']:.2f} %"
        utils.replace_file(save_dir / "confusion.png", functools.partial(
            plots.draw_confusion, counts=confusion.cpu().numpy(), classes=data.classes, title=title))


def main(args: argparse.Namespace, ranks: utils.Ranks) -> None:
    start, log = time.monotonic(), utils.Log(quiet=ranks.rank > 0)
    if args.use_cpu or not torch.cuda.is_available():
        device = torch.device("cpu")
        log("Currently using CPU")
    else:
        device = torch.device("cuda", int(args.gpu))
        log(f"Currently using GPU: {args.gpu}")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    log(f"Creating dataset: {args.dataset}")
    with ranks.first_alone():
        data = datasets.create(args.dataset, args.data_root, args.batch_size, args.workers, device,
                               image_size=args.image_size, scaling=args.scaling, rank=ranks.rank, world_size=ranks.size)
    if args.max_iter:
        args.max_epoch = math.ceil(args.max_iter / len(data.train))

    log(f"Creating model: {args.model}")
    torch.manual_seed(args.seed)
    model = models.create(args.model, len(data.classes), data.in_channels, data.image_size, args.feat_dim, args.init)
    center_loss = CenterLoss(len(data.classes), args.feat_dim, use_gpu=False, distance=args.distance,
                             scale=args.loss_scale, class_average=args.class_average, center_update=args.center_update)
    models.INITS[args.init](center_loss.centers)
    model.to(device, memory_format=torch.channels_last)  # the quicker one in float32 as well
    center_loss.to(device)
    net = model
    if ranks.size > 1:
        net = DistributedDataParallel(SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model)
    if args.compile:
        net = models.Compiled(net, len(range(ranks.rank, args.batch_size, ranks.size)))
    optimizers = create_optimizers(model, center_loss, args)
    scheduler = SCHEDULES[args.schedule](optimizers["optimizer_model"], args, len(data.train))

    # A checkpoint holds `modules` by their state dicts and `run` as it is.
    modules = dict(model=model, center_loss=center_loss, scheduler=scheduler, **optimizers)
    run = dict(epoch=0, partial=None, history=[], centers=center_loss.centers.detach(), rng=torch.get_rng_state(),
               elapsed=0.0, log_bytes=0)
    if args.resume or args.evaluate:
        checkpoint = utils.load_checkpoint(args.resume or args.evaluate)
        try:
            for name, module in modules.items():
                module.load_state_dict(checkpoint[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise utils.RunError(f"{args.resume or args.evaluate} fits neither this network nor data set") from error
        run = {name: checkpoint[name] for name in run}
        torch.set_rng_state(run["rng"])
        start -= run["elapsed"]
    if args.evaluate:
        return evaluate(model, data, run["centers"].to(device), args, ranks, log)
    if run["epoch"] >= args.max_epoch:
        return log(f"The run in {args.save_dir} is finished: {run['epoch']} epochs; go on with a larger --max-epoch")

    save_dir = Path(args.save_dir)
    plotter = utils.Plotter()
    with utils.claim(save_dir) if ranks.rank == 0 else contextlib.nullcontext(), utils.StopRequest() as stop:
        if args.resume:
            log(f"Resuming after epoch {run['epoch']}")
            for points in save_dir.glob("t*/epoch_*.npz"):
                if args.plot and not points.with_suffix(".png").exists():  # a killed run's drawers end with it
                    plotter(points.with_suffix(".png"), plots.draw_points, points)
        elif ranks.rank == 0 and utils.clear(save_dir):
            log(f"Replacing the earlier run in {save_dir}")
        if ranks.rank == 0:
            log.open(save_dir / f"log_{args.dataset}.txt", run["log_bytes"])
            utils.write_json(save_dir / "args.json", vars(args))

        while run["epoch"] < args.max_epoch and not stop.signal:
            epoch, partial = run["epoch"] + 1, run["partial"]
            run["rng"] = torch.get_rng_state()
            log(f"==> Epoch {epoch}/{args.max_epoch}")
            data.train_rows.skip = partial["batches"] if partial else 0
            trained = train(net, center_loss, list(optimizers.values()), scheduler, data.train, args, ranks, log, stop,
                            epoch, partial)
            if "batches" in trained:
                run["partial"] = trained
            else:
                centers = center_loss.centers.detach()
                ranks.check_equal("centers", centers)
                if args.weight_cent == 0:
                    centers = class_means(trained["features"], trained["labels"], len(data.classes))
                splits = dict(train=trained)
                if epoch == args.max_epoch or (args.eval_freq and epoch % args.eval_freq == 0):
                    log("==> Test")
                    tested = splits["test"] = test(model, data.test, args, ranks)
                    tested |= center_figures(tested["features"], tested["labels"], centers)
                    log_test(log, tested)
                row = record(epoch, scheduler.get_last_lr()[0], trained, splits.get("test", {}))
                run |= dict(epoch=epoch, partial=None, history=[*run["history"], row], centers=centers,
                            rng=torch.get_rng_state())
                if ranks.rank == 0:
                    utils.write_metrics(save_dir / "metrics.csv", run["history"])
                if ranks.rank == 0 and args.plot:
                    plot(plotter, save_dir, epoch, splits, centers, data.classes)
                if ranks.rank == 0 and args.save_features:
                    utils.save_features(save_dir / "features" / f"epoch_{epoch}.npz", splits, centers)
            if ranks.rank == 0:
                run |= dict(elapsed=time.monotonic() - start, log_bytes=log.position())
                states = {name: module.state_dict() for name, module in modules.items()}
                utils.save_checkpoint(save_dir / "checkpoint.pt", dict(args=vars(args), **run, **states))

        if ranks.rank == 0 and args.plot and run["history"]:
            plotter(save_dir / "curves.png", plots.draw_curves, run["history"])
            for split in ("train", "test"):
                if any((save_dir / split).glob("epoch_*.npz")):
                    plotter(save_dir / f"{split}.gif", plots.draw_film, save_dir / split)
            for error in plotter.finish():
                log(f"A picture could not be drawn: {error}")
        if run["epoch"] < args.max_epoch:
            done = f"epoch {run['epoch']}" + (f" and {run['partial']['batches']} batches" if run["partial"] else "")
            name = signal.Signals(stop.signal).name
            raise utils.Stopped(stop.signal, f"stopped by {name}; {save_dir} holds all up to {done}; to go on: "
                                f"python main.py --resume --save-dir {save_dir}")
        log(f"Finished. Total elapsed time (h:m:s): {timedelta(seconds=round(time.monotonic() - start))}")


def cli(argv: list[str] | None = None) -> int:
    """Parses, runs, and tells in one line what ended the run; returns the exit status."""
    kept = "the files in --save-dir are those of the last whole epoch"
    ranks = utils.Ranks.of_environment()
    try:
        args = parse_args(argv)
        with ranks.joined():
            main(args, ranks)
        return 0
    except utils.Stopped as stop:
        status, message = stop.status, stop
    except KeyboardInterrupt:
        status, message = 130, f"interrupted; {kept}"
    except utils.RunError as error:
        status, message = error.status, f"error: {error}"
    except (datasets.DatasetError, models.ModelError) as error:
        status, message = 2, f"error: {str(error).strip().splitlines()[-1]}"  # a worker's has its traceback before it
    except OSError as error:
        status, message = 1, f"error: {error}; {kept}"
    except RuntimeError as error:
        if ranks.size == 1:
            raise
        reason = str(error).strip().partition("\n")[0]
        status, message = 1, f"error: rank {ranks.rank} has lost the others ({reason}); {kept}; to go on: --resume"
    if ranks.rank == 0 or status == 1:
        print(f"main.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(cli())
