"""Trains a small network with softmax and center loss and plots its features (Wen et al., ECCV 2016).

python main.py --gpu 0 --plot                 MNIST, on the GPU where there is one
python main.py --recipe digits --plot         without a download and a GPU, in a minute or two
python main.py --resume                       go on where the run in --save-dir stopped
python main.py --evaluate log/checkpoint.pt   test metrics of a trained network
"""

import argparse
import contextlib
import functools
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import datasets
import evaluation
import models
import plots
import training
import utils
from center_loss import CenterLoss
from hardware import choose_device
from processes import Interrupted, Ranks, StopRequest
from recipes import SCHEDULES, create_optimizers


def main(args: argparse.Namespace) -> None:
    start, ranks = time.monotonic(), Ranks.of_environment()
    log = utils.Log(quiet=ranks.rank > 0)
    device = choose_device(args, log)

    if args.predict:
        return evaluation.predict(args, device, log) if ranks.rank == 0 else None

    log(f"Creating dataset: {args.dataset}")
    scaling = models.pretrained_scaling(args.model) if args.pretrained else args.scaling
    known = utils.load_checkpoint(args.evaluate)["data"] if args.evaluate else None
    with ranks.first_alone():
        data = datasets.create(args.dataset, args.data_root, args.batch_size, args.workers, device,
                               image_size=args.image_size, scaling=scaling, unseen=args.unseen,
                               val_share=args.val_share, seed=args.seed, trained=known, ranks=ranks)  # fmt: skip
    steps = args.max_iter or args.max_epoch * len(data.train)
    epochs = math.ceil(steps / len(data.train))

    if SCHEDULES[args.schedule].fixed_length and steps < 10 and not args.evaluate:
        log(f"--schedule {args.schedule} has only {steps} steps to raise and lower the rate: a smaller --batch-size or "
            "a larger --max-epoch trains better")  # fmt: skip

    log(f"Creating model: {args.model}")
    model, step, scheduler = build(args, data, device, steps)
    if args.cuda_graph:
        step = training.captured(step, args.batch_size, log)
    modules = dict(model=model, center_loss=step.center_loss, scheduler=scheduler, **step.optimizers)
    if args.augment:
        flip = datasets.SPECS[args.dataset].flip
        modules["augment"] = data.train.augment = datasets.Augment(args.seed, flip, ranks)
    run = dict(epoch=0, partial=None, history=[], centers=step.center_loss.centers.detach(), elapsed=0.0, log_bytes=0,
               rng=torch.get_rng_state(), data=data.facts())  # fmt: skip
    if args.resume or args.evaluate:
        run = utils.restore(args.resume or args.evaluate, run, modules, to_train=bool(args.resume))
        start -= run["elapsed"]

    if args.evaluate:
        centers = run["centers"].to(device)
        splits = test(model, data, centers, args, log, StopRequest())
        if ranks.rank == 0:
            evaluation.report(splits, centers, run["epoch"], data, args, log)
            if args.save_features:
                evaluation.save_features(Path(args.save_dir), splits["test"], centers, data)
        return None
    if run["epoch"] >= epochs:
        longer = "" if args.max_iter or SCHEDULES[args.schedule].fixed_length else "; a larger --max-epoch goes on"
        log(f"The run of {args.resume} is finished after {run['epoch']} epochs{longer}")
        if not args.plot and Path(args.resume).resolve().parent == Path(args.save_dir).resolve():
            return None

    files = utils.RunFiles(args, run, log, start) if ranks.rank == 0 else utils.NoFiles()
    pictures = plots.Plotter(log) if args.plot and ranks.rank == 0 else None
    every = epochs_between_tests(args, data)
    with files, pictures or contextlib.nullcontext(), StopRequest() as stop:
        files.save(run, modules)  # so that a run that is killed in its first epoch can be resumed as well
        while run["epoch"] < epochs and not (stopped := ranks.any(stop.signal)):
            number, begun = run["epoch"] + 1, training.Epoch(**run["partial"] or {})
            last = min(len(data.train), steps - run["epoch"] * len(data.train))

            log(f"==> Epoch {number}/{epochs}")
            batches = progress_bar(data.train.after(begun.batches, last), f"epoch {number}", last, begun.batches)
            report = functools.partial(report_step, number=number, total=len(data.train), args=args, log=log, stop=stop)
            keep = args.plot or args.save_features or args.weight_cent == 0
            epoch = training.train_epoch(step, batches, scheduler, begun, keep, report)
            trained = epoch.results()
            check_finite({"cross entropy": trained["xent"], "center loss": trained["center"]}, number, args)
            check_finite({"network's weights": training.state_sum(model),
                          "centers": training.state_sum(step.center_loss)}, number, args)  # fmt: skip
            centers = step.center_loss.centers.detach()
            if not args.weight_cent:  # they are not trained; the class means stand in for them
                centers = training.class_means(epoch.kept[0], epoch.kept[1], len(data.classes))
            ranks.check_equal("centers", centers)
            run |= dict(partial=vars(epoch), centers=centers)  # unless the epoch and its test are completed
            if epoch.batches == last:
                with contextlib.suppress(Interrupted):
                    notice_chance(trained["accuracy"], number, len(data.train), len(data.classes), log)
                    splits, final, is_best, best = dict(train=trained), {}, False, (model, centers, number)
                    if number == epochs or (every and number % every == 0):
                        splits |= test(model, data, centers, args, log, stop)
                        tested = splits["val" if data.val else "test"]
                        check_finite({"cross entropy of the test": tested["xent"],
                                      "distances from the centers": tested["intra_distance"]}, number, args)
                        is_best = data.val and evaluation.is_best(tested, run["history"], args.save_dir)
                    if data.val and number == epochs:
                        best = best if is_best else evaluation.load_best(model, args.save_dir)
                        log(f"Best epoch by validation: {best[2]}")
                        final = test(best[0], data._replace(val=None), best[1], args, log, stop)
                    if args.verify and "test" in splits | final and ranks.rank == 0:
                        evaluation.report(splits | final, *best[1:], data, args, log)
                    row = record(number, scheduler.get_last_lr()[0], splits | final, args)
                    run |= dict(epoch=number, partial=None, history=[*run["history"], row], rng=torch.get_rng_state())
                    if is_best:
                        files.save(run, modules, "best.pt")
                    files.save_epoch(row, splits, centers)
                    if pictures:
                        plots.plot_epoch(pictures, files.directory, number, splits, centers, data)
            files.save(run, modules)

        undrawn = []
        if pictures and run["history"]:
            undrawn = plots.plot_run(pictures, files.directory, run["history"], stop.is_urgent)
        if run["epoch"] < epochs or (undrawn and stop.is_urgent()):
            raise utils.Stopped(stop.signal or stopped, run, args.save_dir)
        log(f"Finished. Total elapsed time (h:m:s): {timedelta(seconds=round(time.monotonic() - start))}")
        if pictures:
            log(f"Pictures in {files.directory}, page {files.directory / 'report.html'}")
        if undrawn:
            raise utils.WriteError(f"{undrawn[0]}; --resume draws what is missing")


def build(args: argparse.Namespace, data: datasets.Data, device: torch.device, steps: int) -> tuple:
    """The network, the step that trains it (compiled or in parallel), and the schedule of a run of so many steps."""
    ranks, num_classes = Ranks.of_environment(), len(data.classes)
    torch.manual_seed(args.seed)
    model = models.create(args.model, num_classes, data.in_channels, data.image_size, args.feat_dim, args.init,
                          args.pretrained and not (args.resume or args.evaluate))  # fmt: skip
    center_loss = CenterLoss(num_classes, model.classifier.in_features, use_gpu=False, distance=args.distance,
                             radius=args.radius, scale=args.loss_scale, class_average=args.class_average,
                             center_update=args.center_update)  # fmt: skip
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
    images = sum(split.rows.size for split in ([data.val] if data.val else [data.test, data.unknown]) if split)
    return 1 if args.plot and images < 3 * data.train.rows.size / 10 else 10


def progress_bar(batches, what: str, total: int, done: int = 0) -> tqdm:
    """The batches, and on a terminal a bar that shows how far they are."""
    hidden = None if Ranks.of_environment().rank == 0 else True  # None: where the output is no terminal
    tqdm.monitor_interval = 0  # no thread that watches the bar
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


def notice_chance(accuracy: float, number: int, batches: int, num_classes: int, log: utils.Log) -> None:
    """Says once, in the first epoch after 200 steps but not in epoch 1, that the training has not left chance."""
    chance = 100 / num_classes
    if number == max(2, math.ceil(200 / batches)) and accuracy < chance + min(2, chance / 5):
        log(f"The training accuracy is still about {chance:.3g} %, that of guessing: --recipe images (colour images), "
            "--init xavier, another --lr-model or a lower --weight-cent may help")  # fmt: skip


def test(
    model: torch.nn.Module, data: datasets.Data, centers: Tensor, args, log: utils.Log, stop: StopRequest
) -> dict[str, dict]:
    """Tests the network and logs the metrics: on the validation images, "val", where there are any, else "test".

    Returns these with features, labels and predictions and, beside "test", those of "unknown" classes, which were left
    out of the training. Interrupted by a stop.
    """
    ranks, name = Ranks.of_environment(), "val" if data.val else "test"
    log("==> Validation" if data.val else "==> Test")

    def watched(split: datasets.Batches, what: str) -> tqdm:
        return progress_bar(stop.watch(split, ranks), what, len(split))

    tested = training.test(model, watched(data.val or data.test, name), args.amp, ranks)
    tested |= training.center_metrics(tested["features"], tested["labels"], centers)
    log(f"Accuracy (%): {tested['accuracy']:.2f}\t Error rate (%): {100 - tested['accuracy']:.2f}")
    log(f"Nearest-center accuracy (%): {tested['nearest_center_accuracy']:.2f}\t Intra-class distance (mean): "
        f"{tested['intra_distance']:.4f}\t Inter-class distance (min): {tested['inter_distance']:.4f}")
    splits = {name: tested}
    if data.unknown and not data.val:
        splits["unknown"] = training.predict(model, watched(data.unknown, "unknown"), args.amp, ranks)
    return splits


def record(epoch: int, lr: float, splits: dict[str, dict], args: argparse.Namespace) -> dict:
    """The epoch's row of metrics.csv."""
    trained, validated, tested = (splits.get(name, {}) for name in ("train", "val", "test"))
    row = dict(epoch=epoch, lr_model=lr)
    row |= {f"train_{name}": trained[name] for name in ("loss", "xent", "center", "accuracy")}
    if args.val_share:
        row |= {f"val_{name}": validated.get(name) for name in ("xent", "accuracy", "nearest_center_accuracy")}
    row |= {f"test_{name}": tested.get(name) for name in ("xent", "accuracy")}
    return row | {name: tested.get(name) for name in ("nearest_center_accuracy", "intra_distance", "inter_distance")}


if __name__ == "__main__":
    sys.exit(cli.run(main, description=__doc__))
