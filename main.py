"""Trains a small network with softmax and center loss and plots its features (Wen et al., ECCV 2016).

python main.py --gpu 0 --plot                 MNIST, on the GPU where there is one
python main.py --recipe digits --plot         without a download and a GPU, in a minute or two
python main.py --resume                       go on where the run in --save-dir stopped
python main.py --evaluate log/checkpoint.pt   test metrics of a trained network
"""

import argparse
import functools
import itertools
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import datasets
import models
import plots
import training
import utils
from center_loss import CenterLoss
from processes import Ranks, StopRequest
from recipes import SCHEDULES, create_optimizers


def main(args: argparse.Namespace) -> None:
    start, ranks = time.monotonic(), Ranks.of_environment()
    log = utils.Log(quiet=ranks.rank > 0)
    device = choose_device(args, log)

    log(f"Creating dataset: {args.dataset}")
    with ranks.first_alone():
        data = datasets.create(args.dataset, args.data_root, args.batch_size, args.workers, device,
                               image_size=args.image_size, scaling=args.scaling, ranks=ranks)  # fmt: skip
    steps = args.max_iter or args.max_epoch * len(data.train)
    epochs = math.ceil(steps / len(data.train))

    log(f"Creating model: {args.model}")
    model, step, scheduler = build(args, data, device, steps)
    modules = dict(model=model, center_loss=step.center_loss, scheduler=scheduler, **step.optimizers)
    run = dict(epoch=0, partial=None, history=[], centers=step.center_loss.centers.detach(), elapsed=0.0, log_bytes=0,
               rng=torch.get_rng_state(), data=dict(classes=data.classes, images=data.train.rows.size))  # fmt: skip
    if args.resume or args.evaluate:
        run = utils.restore(args.resume or args.evaluate, run, modules, to_train=bool(args.resume))
        start -= run["elapsed"]

    if args.evaluate:
        return evaluate(model, data, run["centers"].to(device), args, log)
    if run["epoch"] >= epochs:
        longer = "" if args.max_iter or SCHEDULES[args.schedule].fixed_length else "; a larger --max-epoch goes on"
        log(f"The run of {args.resume} is finished after {run['epoch']} epochs{longer}")
        if not args.plot or Path(args.resume).resolve().parent != Path(args.save_dir).resolve():
            return None

    files = utils.RunFiles(args, run, log, start) if ranks.rank == 0 else utils.NoFiles()
    pictures = plots.Plotter() if args.plot and ranks.rank == 0 else None
    every = epochs_between_tests(args, data)
    with files, StopRequest() as stop:
        files.save(run, modules)  # so that a run that is killed in its first epoch can be resumed as well
        while run["epoch"] < epochs and not (stopped := ranks.any(stop.signal)):
            number, begun = run["epoch"] + 1, training.Epoch(**run["partial"] or {})
            last = min(len(data.train), steps - run["epoch"] * len(data.train))

            log(f"==> Epoch {number}/{epochs}")
            batches = itertools.islice(data.train.after(begun.batches), last - begun.batches)
            batches = progress_bar(batches, f"epoch {number}", last, begun.batches)
            report = functools.partial(report_step, number=number, total=len(data.train), args=args, log=log, stop=stop)
            keep = args.plot or args.save_features or args.weight_cent == 0
            epoch = training.train_epoch(step, batches, scheduler, begun, keep, report)
            trained = epoch.results()
            check_finite({"cross entropy": trained["xent"], "center loss": trained["center"]}, number, args)
            check_finite({"network's weights": training.state_sum(model),
                          "centers": training.state_sum(step.center_loss)}, number, args)  # fmt: skip
            if epoch.batches < last:
                run["partial"] = vars(epoch)
            else:
                splits, centers = dict(train=trained), step.center_loss.centers.detach()
                ranks.check_equal("centers", centers)
                if not args.weight_cent:  # they are not trained; the class means stand in for them
                    centers = training.class_means(epoch.kept[0], epoch.kept[1], len(data.classes))
                if number == epochs or (every and number % every == 0):
                    log("==> Test")
                    tested = splits["test"] = test(model, data, centers, args, log)
                    check_finite({"cross entropy of the test": tested["xent"],
                                  "distances from the centers": tested["intra_distance"]}, number, args)
                row = record(number, scheduler.get_last_lr()[0], splits)
                run |= dict(epoch=number, partial=None, history=[*run["history"], row], centers=centers,
                            rng=torch.get_rng_state())
                files.save_epoch(row, splits, centers)
                if pictures:
                    plots.plot_epoch(pictures, files.directory, number, splits, centers, data)
            files.save(run, modules)

        undrawn = plots.plot_run(pictures, files.directory, run["history"]) if pictures and run["history"] else []
        for error in undrawn:
            log(f"A picture could not be drawn: {error}")
        if run["epoch"] < epochs:
            raise utils.Stopped(stopped, run, args.save_dir)
        log(f"Finished. Total elapsed time (h:m:s): {timedelta(seconds=round(time.monotonic() - start))}")
        if pictures:
            log(f"Pictures in {files.directory}, page {files.directory / 'report.html'}")
        if undrawn:
            raise utils.WriteError(f"{undrawn[0]}; --resume draws what is missing")


def choose_device(args: argparse.Namespace, log: utils.Log) -> torch.device:
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.use_cpu or not torch.cuda.is_available():
        log("Currently using CPU")
        return torch.device("cpu")
    log(f"Currently using GPU: {args.gpu}")
    device = torch.device("cuda", int(args.gpu))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = not args.deterministic
    return device


def build(args: argparse.Namespace, data: datasets.Data, device: torch.device, steps: int) -> tuple:
    """The network, the step that trains it (compiled or in parallel), and the schedule of a run of so many steps."""
    ranks, num_classes = Ranks.of_environment(), len(data.classes)
    torch.manual_seed(args.seed)
    model = models.create(args.model, num_classes, data.in_channels, data.image_size, args.feat_dim, args.init)
    center_loss = CenterLoss(num_classes, args.feat_dim, use_gpu=False, distance=args.distance, scale=args.loss_scale,
                             class_average=args.class_average, center_update=args.center_update)  # fmt: skip
    models.INITS[args.init](center_loss.centers)
    model.to(device, memory_format=torch.channels_last)  # faster, in float32 as well
    center_loss.to(device)
    net = ranks.parallel(model)
    if args.compile and not args.evaluate:
        net = models.Compiled(net, len(ranks.share(torch.empty(args.batch_size))))
    optimizers = create_optimizers(model, center_loss, args)
    lr_ratio = args.lr_cent / args.lr_model if args.one_optimizer else 1.0
    step = training.Step(net, center_loss, optimizers, weight=args.weight_cent, lr_ratio=lr_ratio, amp=args.amp,
                         ranks=ranks)  # fmt: skip
    scheduler = SCHEDULES[args.schedule].create(optimizers["optimizer_model"], args, len(data.train), steps)
    return model, step, scheduler


def epochs_between_tests(args: argparse.Namespace, data: datasets.Data) -> int:
    """--eval-freq, or without it 10, and 1 for the films of --plot where a test takes less than a tenth of an epoch.

    A training image costs about three forward passes, a test image one. Counting images, not seconds, so that a
    resumed run tests after the same epochs.
    """
    if args.eval_freq is not None:
        return args.eval_freq
    return 1 if args.plot and data.test.rows.size < 3 * data.train.rows.size / 10 else 10


def progress_bar(batches, what: str, total: int, done: int = 0) -> tqdm:
    """The batches, and on a terminal a bar that shows how far they are."""
    hidden = None if Ranks.of_environment().rank == 0 else True  # None: where the output is no terminal
    return tqdm(batches, disable=hidden, leave=False, desc=what, initial=done, total=total, unit="batch")


def report_step(progress: training.Progress, number: int, total: int, args, log: utils.Log, stop: StopRequest) -> bool:
    """Logs every --print-freq steps; tells whether a signal asks to stop."""
    batch = progress.epoch.batches
    if batch % args.print_freq == 0:
        xent, center, mean_xent, mean_center = progress.losses()
        check_finite({"cross entropy": mean_xent, "center loss": mean_center}, number, args)
        log(f"Batch {batch}/{total}\t Loss {xent + center:.6f} ({mean_xent + mean_center:.6f}) "
            f"XentLoss {xent:.6f} ({mean_xent:.6f}) CenterLoss {center:.6f} ({mean_center:.6f})")  # fmt: skip
    return bool(progress.ranks.any(stop.signal))


def check_finite(values: dict[str, float], epoch: int, args: argparse.Namespace) -> None:
    """Raises Diverged, with what to change, where one of the values is no longer finite."""
    if broken := [name for name, value in values.items() if not math.isfinite(value)]:
        advice = "lower --lr-model"
        if args.weight_cent:
            advice += (f", --lr-cent or --weight-cent: the center loss is a sum over the {args.feat_dim} dimensions, "
                       "so that λ goes with 1/D, and a λ above 1 needs a --lr-model lower by as much")
        raise utils.Diverged(
            f"the training has diverged in epoch {epoch}: {' and '.join(broken)} no longer finite, with --weight-cent "
            f"{args.weight_cent:g} --lr-model {args.lr_model:g} --lr-cent {args.lr_cent:g}; {advice}"
        )


def test(model: torch.nn.Module, data: datasets.Data, centers: Tensor, args, log: utils.Log) -> dict:
    """Tests the network, logs the metrics and returns them with features, labels and predictions."""
    batches = progress_bar(data.test, "test", len(data.test))
    tested = training.test(model, batches, args.amp, Ranks.of_environment())
    tested |= training.center_metrics(tested["features"], tested["labels"], centers)
    log(f"Accuracy (%): {tested['accuracy']:.2f}\t Error rate (%): {100 - tested['accuracy']:.2f}")
    log(f"Nearest-center accuracy (%): {tested['nearest_center_accuracy']:.2f}\t Intra-class distance (mean): "
        f"{tested['intra_distance']:.4f}\t Inter-class distance (min): {tested['inter_distance']:.4f}")
    return tested


def record(epoch: int, lr: float, splits: dict[str, dict]) -> dict:
    """The epoch's row of metrics.csv."""
    trained, tested = splits["train"], splits.get("test", {})
    row = dict(epoch=epoch, lr_model=lr)
    row |= {f"train_{name}": trained[name] for name in ("loss", "xent", "center", "accuracy")}
    row |= {f"test_{name}": tested.get(name) for name in ("xent", "accuracy")}
    return row | {name: tested.get(name) for name in ("nearest_center_accuracy", "intra_distance", "inter_distance")}


def evaluate(model: torch.nn.Module, data: datasets.Data, centers: Tensor, args, log: utils.Log) -> None:
    """Logs the test metrics of a trained network and its confusion matrix, which --plot draws."""
    log("==> Test")
    tested, count = test(model, data, centers, args, log), len(data.classes)
    confusion = torch.bincount(tested["labels"] * count + tested["predictions"], minlength=count**2).view(count, count)
    log("\n".join(utils.confusion_lines(confusion.tolist(), data.classes)))
    if args.plot and Ranks.of_environment().rank == 0:
        picture, title = Path(args.save_dir, "confusion.png"), f"test: accuracy {tested['accuracy']:.2f} %"
        picture.parent.mkdir(parents=True, exist_ok=True)
        counts = confusion.cpu().numpy()
        utils.replace_file(picture, lambda part: plots.draw_confusion(part, counts, data.classes, title))


if __name__ == "__main__":
    sys.exit(cli.run(main, description=__doc__))
