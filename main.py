"""Trains a small network with softmax and center loss and plots its features (Wen et al., ECCV 2016).

python main.py --gpu 0 --plot                 MNIST, on the GPU where there is one
python main.py --resume                       go on where the run in --save-dir stopped
python main.py --evaluate log/checkpoint.pt   test figures of a trained network

Without a download and a GPU, in a minute or two:

python main.py --dataset digits --init xavier --lr-model 0.01 --weight-cent 0.1 --batch-size 16 --max-epoch 12 --plot
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
from tqdm import tqdm

import datasets
import models
import plots
import utils
from center_loss import CenterLoss
from processes import Ranks, StopRequest
from recipes import SCHEDULES, create_optimizers, parse_args


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
        seen = [[each.to(device) for each in partial["seen"]]] if keep and partial["seen"] else []

    bar = tqdm(loader, disable=None if ranks.rank == 0 else True, leave=False, desc=f"epoch {epoch}", initial=done,
               total=last, unit="batch")
    for batch, (images, labels) in enumerate(bar, done + 1):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        count = min(args.batch_size, size - (batch - 1) * args.batch_size)  # of all ranks
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            features, logits = net(images)
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
        ending = batch == last or ranks.any(stop.signal)
        if batch % args.print_freq == 0 or ending:
            (xent, center, _), (*totals, _) = ranks.total(torch.stack([values, sums])).tolist()
            check_finite({"cross entropy": totals[0], "center loss": totals[1]}, epoch, args)
            if batch % args.print_freq == 0:
                means = [total / min(batch * args.batch_size, size) for total in totals]
                log(f"Batch {batch}/{steps}\t Loss {xent + center:.6f} ({sum(means):.6f}) "
                    f"XentLoss {xent:.6f} ({means[0]:.6f}) CenterLoss {center:.6f} ({means[1]:.6f})")
        if ending:
            break
    bar.close()

    sums, seen = ranks.total(sums), [ranks.gather(torch.cat(each)) for each in zip(*seen, strict=True)]
    if batch < last:
        return dict(batches=batch, sums=sums, seen=seen)
    xent, center, right = (sums / min(last * args.batch_size, size)).tolist()
    return dict(loss=xent + center, xent=xent, center=center, accuracy=100 * right,
                **dict(zip(("features", "labels", "predictions"), seen, strict=False)))


def check_finite(values: dict[str, float], epoch: int, args) -> None:
    if broken := [name for name, value in values.items() if not math.isfinite(value)]:
        advice = "lower --lr-model"
        if args.weight_cent:
            advice += (f", --lr-cent or --weight-cent: the center loss is a sum over the {args.feat_dim} dimensions, "
                       "so that λ goes with 1/D, and a λ above 1 needs a --lr-model lower by as much")
        raise utils.Diverged(
            f"the training has diverged in epoch {epoch}: {' and '.join(broken)} no longer finite, with --weight-cent "
            f"{args.weight_cent:g} --lr-model {args.lr_model:g} --lr-cent {args.lr_cent:g}; {advice}"
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
        seen.append((features, logits, labels.to(device, non_blocking=True)))
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
    return sums / torch.bincount(labels, minlength=num_classes).clamp(min=1).unsqueeze(1)  # a cut pass may lack one


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


def evaluate(model, data, centers, args, ranks, log) -> None:
    """Prints the test figures of a trained network, and with --plot draws its confusion matrix."""
    tested = test(model, data.test, args, ranks)
    tested |= center_figures(tested["features"], tested["labels"], centers)
    log("==> Test")
    log_test(log, tested)
    count = len(data.classes)
    confusion = torch.bincount(tested["labels"] * count + tested["predictions"], minlength=count**2).view(count, count)
    log("\n".join(utils.confusion_lines(confusion.tolist(), data.classes)))
    if args.plot and ranks.rank == 0:
        picture, title = Path(args.save_dir, "confusion.png"), f"test: accuracy {tested['accuracy']:.2f} %"
        picture.parent.mkdir(parents=True, exist_ok=True)
        utils.replace_file(picture, functools.partial(
            plots.draw_confusion, counts=confusion.cpu().numpy(), classes=data.classes, title=title))


def build(args, data, device, ranks) -> tuple:
    """The network, what trains it (compiled or in parallel), the center loss, all optimizers and the schedule."""
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
    if args.compile and not args.evaluate:
        net = models.Compiled(net, len(range(ranks.rank, args.batch_size, ranks.size)))
    optimizers = create_optimizers(model, center_loss, args)
    scheduler = SCHEDULES[args.schedule](optimizers["optimizer_model"], args, len(data.train))
    return model, net, center_loss, optimizers, scheduler


def main(args: argparse.Namespace) -> None:
    ranks = Ranks.of_environment()
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
    model, net, center_loss, optimizers, scheduler = build(args, data, device, ranks)

    # A checkpoint holds `modules` by their state dicts and `run` as it is.
    modules = dict(model=model, center_loss=center_loss, scheduler=scheduler, **optimizers)
    run = dict(epoch=0, partial=None, history=[], centers=center_loss.centers.detach(), rng=torch.get_rng_state(),
               elapsed=0.0, log_bytes=0, data=dict(classes=data.classes, images=data.train_rows.size))
    if path := args.resume or args.evaluate:
        checkpoint = utils.load_checkpoint(path)
        utils.check_data(checkpoint["data"], run["data"], path, to_train=bool(args.resume))
        try:
            for name, module in modules.items():
                module.load_state_dict(checkpoint[name])
            run = {name: checkpoint[name] for name in run}
            torch.set_rng_state(run["rng"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise utils.RunError(f"the checkpoint {path} does not fit this network and its optimizers") from error
        start -= run["elapsed"]
    if args.evaluate:
        return evaluate(model, data, run["centers"].to(device), args, ranks, log)
    if run["epoch"] >= args.max_epoch:
        longer = "" if args.max_iter or args.schedule == "onecycle" else "; a larger --max-epoch goes on"
        log(f"The run of {args.resume} is finished after {run['epoch']} epochs{longer}")
        if not args.plot or Path(args.resume).resolve().parent != Path(args.save_dir).resolve():
            return

    # Only rank 0 has files, and so writes.
    files = utils.RunFiles(args, run, log, start) if ranks.rank == 0 else None
    plotter, undrawn = plots.Plotter(), []
    with files or contextlib.nullcontext(), StopRequest() as stop:
        if files:
            files.save(run, modules)  # so that a run which is killed in its first epoch can be resumed as well
        while run["epoch"] < args.max_epoch and not (stopped := ranks.any(stop.signal)):
            epoch, partial = run["epoch"] + 1, run["partial"]
            log(f"==> Epoch {epoch}/{args.max_epoch}")
            data.train_rows.skip = partial["batches"] if partial else 0
            trained = train(net, center_loss, list(optimizers.values()), scheduler, data.train, args, ranks, log, stop,
                            epoch, partial)
            check_finite({"network's weights": utils.total(model), "centers": utils.total(center_loss)}, epoch, args)
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
                    check_finite({"cross entropy of the test": tested["xent"],
                                  "distances from the centers": tested["intra_distance"]}, epoch, args)
                row = record(epoch, scheduler.get_last_lr()[0], trained, splits.get("test", {}))
                run |= dict(epoch=epoch, partial=None, history=[*run["history"], row], centers=centers,
                            rng=torch.get_rng_state())
                if files:
                    files.save_epoch(row, splits, centers)
                if files and args.plot:
                    plots.plot_epoch(plotter, files.directory, epoch, splits, centers, data.classes)
            if files:
                files.save(run, modules)

        if files and args.plot and run["history"]:
            undrawn = plots.plot_run(plotter, files.directory, run["history"])
            for error in undrawn:
                log(f"A picture could not be drawn: {error}")
        if run["epoch"] < args.max_epoch:
            done = f"epoch {run['epoch']}" + (f" and {run['partial']['batches']} batches" if run["partial"] else "")
            name = signal.Signals(stopped).name
            raise utils.Stopped(stopped, f"stopped by {name}; {args.save_dir} holds all up to {done}; to go on: "
                                f"python main.py --resume --save-dir {args.save_dir}")
        log(f"Finished. Total elapsed time (h:m:s): {timedelta(seconds=round(time.monotonic() - start))}")
        if undrawn:
            raise utils.WriteError(f"{undrawn[0]}; --resume draws what is missing")


def cli(argv: list[str] | None = None) -> int:
    """Parses, runs, and tells in one line what ended the run; returns the exit status."""
    kept = "the files in --save-dir are those of the last whole epoch"
    ranks = Ranks.of_environment()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # λ, where the terminal or the file has no such letter
    try:
        args = parse_args(argv, __doc__)
        with ranks.joined():
            main(args)
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
    except (MemoryError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in reason:
            reason = f"out of memory; a smaller --batch-size or --feat-dim, or -j 4, needs less: {reason}"
        elif ranks.size == 1:
            raise
        if ranks.size > 1:
            reason = f"rank {ranks.rank} has failed or lost the others ({reason})"
        status, message = 1, f"error: {reason}; {kept}; to go on: --resume"
    if ranks.rank == 0 or status == 1:
        print(f"main.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(cli())
