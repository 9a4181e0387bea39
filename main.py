"""Trains a small network with softmax and center loss and plots its features (Wen et al., ECCV 2016).

python main.py --gpu 0 --plot                 MNIST, on the GPU where there is one
python main.py --recipe digits --plot         no download, no GPU, a minute or two
python main.py --resume                       continue the run in --save-dir
python main.py --evaluate log/checkpoint.pt   test metrics of a trained network
"""

import argparse
import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

import cli
import datasets
import models
import plots
import utils
from center_loss import CenterLoss
from engine import epoch as epoch_
from engine import evaluation, metrics
from engine.cuda_graph import captured
from engine.device import choose_device
from engine.ranks import Interrupted, Ranks, StopRequest
from engine.step import Step
from recipes import SCHEDULES, create_optimizers

# The columns of metrics.csv: the split and the metric of each.
TRAIN_COLUMNS = {
    f"train_{name}": ("train", name) for name in ("loss", "xent", "center", "accuracy")
}
VAL_COLUMNS = {
    f"val_{name}": ("val", name) for name in ("xent", "accuracy", "nearest_center_accuracy")
}
TEST_COLUMNS = {f"test_{name}": ("test", name) for name in ("xent", "accuracy")}
TEST_COLUMNS |= {
    name: ("test", name) for name in ("nearest_center_accuracy", "intra_distance", "inter_distance")
}


def main(args: argparse.Namespace) -> None:
    start, ranks = time.monotonic(), Ranks.of_environment()
    log = utils.Log(quiet=ranks.rank > 0)
    device = choose_device(args, log)

    log(f"Creating dataset: {args.dataset}")
    scaling = models.pretrained_scaling(args.model) if args.pretrained else args.scaling
    known = utils.load_checkpoint(args.evaluate)["data"] if args.evaluate else None
    with ranks.first_alone():
        data = datasets.create(
            args.dataset,
            args.data_root,
            args.batch_size,
            args.workers,
            device,
            image_size=args.image_size,
            scaling=scaling,
            unseen=args.unseen,
            augment=args.augment,
            erase=args.erase,
            val_share=args.val_share,
            seed=args.seed,
            trained=known,
            ranks=ranks,
        )
    log(f"Creating model: {args.model}")
    experiment = Experiment(args, data, device, log)
    run = dict(
        epoch=0,
        partial=None,
        history=[],
        centers=experiment.centers(),
        elapsed=0.0,
        log_bytes=0,
        rng=torch.get_rng_state(),
        data=data.facts(),
    )
    if args.resume or args.evaluate:
        run = utils.restore(
            args.resume or args.evaluate, run, experiment.modules, to_train=bool(args.resume)
        )
        start -= run["elapsed"]
    if args.evaluate:
        return experiment.evaluate(run["centers"].to(device), run["epoch"])

    epochs, history = experiment.epochs, run["history"]
    if experiment.is_complete(run):
        longer = (
            ""
            if args.max_iter or SCHEDULES[args.schedule].fixed_length
            else "; a larger --max-epoch goes on"
        )
        log(f"The run of {args.resume} is finished after {run['epoch']} epochs{longer}")
        if not args.plot and Path(args.resume).resolve().parent == Path(args.save_dir).resolve():
            return None

    files = utils.RunFiles(args, run, log, start) if ranks.rank == 0 else utils.NoFiles()
    pictures = plots.Plotter(log) if args.plot and ranks.rank == 0 else None
    with files, pictures or contextlib.nullcontext(), experiment.stop as stop:
        files.save(run, experiment.modules)  # a run killed in its first epoch can be resumed, too
        while run["epoch"] < epochs and not ranks.any(stop.signal):
            number = run["epoch"] + 1
            log(f"==> Epoch {number}/{epochs}")
            epoch = experiment.train(number, epoch_.Epoch(**run["partial"] or {}))
            centers = experiment.centers(epoch)
            run |= dict(
                partial=vars(epoch), centers=centers
            )  # replaced once epoch and test are complete
            if epoch.batches == experiment.last_batch(number):
                with contextlib.suppress(Interrupted):
                    splits = dict(train=epoch.results())
                    if experiment.is_tested(number):
                        splits |= experiment.test(
                            experiment.model, centers, number, "val" if data.val else "test"
                        )
                    best = (
                        data.val
                        and "val" in splits
                        and evaluation.is_best(splits["val"], history, args.save_dir)
                    )
                    history = [*history, experiment.record(number, splits)]
                    run |= dict(
                        epoch=number, partial=None, history=history, rng=torch.get_rng_state()
                    )
                    if best:
                        files.save(run, experiment.modules, "best.pt")
                    files.save_epoch(history[-1], splits, centers)
                    if pictures:
                        plots.plot_epoch(pictures, files.directory, number, splits, centers, data)
            files.save(run, experiment.modules)

        if not ranks.any(stop.signal) and not experiment.is_complete(run):
            with contextlib.suppress(Interrupted):
                history[-1] |= experiment.test_best()
                files.save(run, experiment.modules)
        stopped, undrawn = ranks.any(stop.signal), []
        if pictures and history:
            undrawn = plots.plot_run(pictures, files.directory, history, stop.is_urgent)
        if not experiment.is_complete(run) or (undrawn and stop.is_urgent()):
            raise utils.Stopped(stopped or stop.signal, run, args.save_dir)
        log(
            f"Finished. Total elapsed time (h:m:s): {timedelta(seconds=round(time.monotonic() - start))}"
        )
        if pictures:
            log(f"Pictures in {files.directory}, page {files.directory / 'report.html'}")
        if undrawn:
            raise utils.WriteError(f"{undrawn[0]}; --resume draws what is missing")


class Experiment:
    """A network with its data, losses and optimizers, and what a run does with them."""

    def __init__(
        self, args: argparse.Namespace, data: datasets.Data, device: torch.device, log: utils.Log
    ):
        self.args, self.data, self.log = args, data, log
        self.stop, self.ranks = StopRequest(), Ranks.of_environment()
        self.steps = args.max_iter or args.max_epoch * len(data.train)
        self.epochs = math.ceil(self.steps / len(data.train))
        if SCHEDULES[args.schedule].fixed_length and self.steps < 10 and not args.evaluate:
            log(
                f"--schedule {args.schedule} has only {self.steps} steps to raise and lower the rate: a smaller "
                "--batch-size or a larger --max-epoch trains better"
            )

        torch.manual_seed(args.seed)
        self.model = models.create(
            args.model,
            len(data.classes),
            data.in_channels,
            data.image_size,
            args.feat_dim,
            args.init,
            args.pretrained and not (args.resume or args.evaluate),
        )
        center_loss = CenterLoss(
            len(data.classes),
            self.model.classifier.in_features,
            use_gpu=False,
            distance=args.distance,
            radius=args.radius,
            scale=args.loss_scale,
            class_average=args.class_average,
            center_update=args.center_update,
        )
        models.INITS[args.init](center_loss.centers)
        self.model.to(device, memory_format=torch.channels_last)  # faster, in float32 as well
        center_loss.to(device)
        net = self.ranks.parallel(self.model)
        if args.compile and not args.evaluate:
            net = models.Compiled(net, len(self.ranks.share(torch.empty(args.batch_size))))
        optimizers = create_optimizers(self.model, center_loss, args)
        lr_ratio = args.lr_cent / args.lr_model if args.one_optimizer else 1.0
        self.step = Step(
            net,
            center_loss,
            optimizers,
            weight=args.weight_cent,
            lr_ratio=lr_ratio,
            label_smoothing=args.label_smoothing,
            amp=args.amp,
            ranks=self.ranks,
        )
        if args.cuda_graph:
            self.step = captured(self.step, args.batch_size, log)
        schedule = SCHEDULES[args.schedule]
        self.scheduler = schedule.create(
            optimizers["optimizer_model"], args, len(data.train), self.steps
        )
        # Their state dicts go into checkpoints.
        self.modules = dict(
            model=self.model, center_loss=center_loss, scheduler=self.scheduler, **optimizers
        )
        if data.train.augment:
            self.modules["augment"] = data.train.augment

    def is_complete(self, run: dict) -> bool:
        """Whether all epochs are done and, with validation images, the best one is tested."""
        return run["epoch"] >= self.epochs and not (
            self.data.val and run["history"][-1]["test_accuracy"] is None
        )

    def last_batch(self, number: int) -> int:
        """The batches of an epoch; --max-iter may end within the last."""
        return min(len(self.data.train), self.steps - (number - 1) * len(self.data.train))

    def is_tested(self, number: int) -> bool:
        """Whether a test follows an epoch: the last, and every --eval-freq-th or, without that flag, every tenth.

        Without that flag every epoch is tested if the test chooses the best one, or if --plot makes films and a test
        takes less than a tenth of an epoch. Images are counted, training images threefold, rather than seconds, so
        that a resumed run tests after the same epochs.
        """
        every, data = self.args.eval_freq, self.data
        if every is None:
            images = data.test.rows.size + (data.unknown.rows.size if data.unknown else 0)
            cheap = images * (1 + self.args.mirror) < 3 * data.train.rows.size / 10
            every = 1 if data.val or (self.args.plot and cheap) else 10
        return number == self.epochs or (every > 0 and number % every == 0)

    def train(self, number: int, begun: epoch_.Epoch) -> epoch_.Epoch:
        """Trains the rest of an epoch, until a signal asks to stop."""
        args, last = self.args, self.last_batch(number)
        batches = self.data.train.after(begun.batches, last)
        batches = utils.progress_bar(
            batches, f"epoch {number}", last, begun.batches, shown=self.ranks.rank == 0
        )
        keep = args.plot or args.save_features or args.weight_cent == 0
        report = functools.partial(self.report_step, number)
        epoch = epoch_.train_epoch(self.step, batches, self.scheduler, begun, keep, report)
        trained = epoch.results()
        cli.check_finite(
            {"cross entropy": trained["xent"], "center loss": trained["center"]}, number, args
        )
        cli.check_finite(
            {
                "network's weights": epoch_.state_sum(self.model),
                "centers": epoch_.state_sum(self.step.center_loss),
            },
            number,
            args,
        )
        if epoch.batches == last:
            self.notice_chance(number, trained["accuracy"])
        return epoch

    def report_step(self, number: int, progress: epoch_.Progress) -> bool:
        """Logs every --print-freq steps; returns whether a signal asks to stop."""
        batch = progress.epoch.batches
        if batch % self.args.print_freq == 0:
            xent, center, mean_xent, mean_center = progress.losses()
            cli.check_finite(
                {"cross entropy": mean_xent, "center loss": mean_center}, number, self.args
            )
            self.log(
                f"Batch {batch}/{len(self.data.train)}\t Loss {xent + center:.6f} ({mean_xent + mean_center:.6f}) "
                f"XentLoss {xent:.6f} ({mean_xent:.6f}) CenterLoss {center:.6f} ({mean_center:.6f})"
            )
        return bool(self.ranks.any(self.stop.signal))

    def notice_chance(self, number: int, accuracy: float) -> None:
        """Logs once, after 200 steps but not in epoch 1, if the training accuracy is still at chance."""
        chance = 100 / len(self.data.classes)
        first = max(2, math.ceil(200 / len(self.data.train)))
        if number == first and accuracy < chance + min(2, chance / 5):
            self.log(
                f"The training accuracy is still about {chance:.3g} %, that of guessing: --recipe images (colour "
                "images), --init xavier, another --lr-model or a lower --weight-cent may help"
            )

    def centers(self, epoch: epoch_.Epoch | None = None) -> Tensor:
        """The centers (C, D) for metrics and pictures; at λ = 0, where they are not trained, the class means."""
        centers = self.step.center_loss.centers.detach()
        if epoch and not self.args.weight_cent:
            centers = metrics.class_means(epoch.kept[0], epoch.kept[1], len(self.data.classes))
        self.ranks.check_equal("centers", centers)
        return centers

    def test(self, model: nn.Module, centers: Tensor, number: int, on: str) -> dict[str, dict]:
        """Tests the network of epoch `number` on the images of "val" or "test", and logs the metrics.

        Returns them by split, with features, labels and predictions. With "test" come the outputs for "unknown", the
        test images of classes left out of the training. Raises Interrupted if a signal asks to stop.
        """
        self.log("==> Validation" if on == "val" else "==> Test")
        if self.args.mirror:
            model = models.Mirrored(model)

        def batches(name: str) -> Iterable:
            split = getattr(self.data, name)
            watched = self.stop.watch(split, self.ranks)
            return utils.progress_bar(watched, name, len(split), shown=self.ranks.rank == 0)

        tested = epoch_.test(model, batches(on), self.args.amp, self.ranks)
        tested |= metrics.center_metrics(tested["features"], tested["labels"], centers)
        self.log(
            f"Accuracy (%): {tested['accuracy']:.2f}\t Error rate (%): {100 - tested['accuracy']:.2f}"
        )
        self.log(
            f"Nearest-center accuracy (%): {tested['nearest_center_accuracy']:.2f}\t Intra-class distance (mean): "
            f"{tested['intra_distance']:.4f}\t Inter-class distance (min): {tested['inter_distance']:.4f}"
        )
        if not self.args.evaluate:
            cli.check_finite(
                {
                    "cross entropy of the test": tested["xent"],
                    "distances from the centers": tested["intra_distance"],
                },
                number,
                self.args,
            )
        splits = {on: tested}
        if on == "test" and self.data.unknown:
            splits["unknown"] = epoch_.predict(model, batches("unknown"), self.args.amp, self.ranks)
        if on == "test" and (self.args.verify or self.args.evaluate) and self.ranks.rank == 0:
            evaluation.report(splits, centers, number, self.data, self.args, self.log)
        return splits

    def test_best(self) -> dict:
        """Tests the network of best.pt; its columns of metrics.csv."""
        model, centers, number = evaluation.load_best(self.model, self.args.save_dir)
        self.log(f"Best epoch by validation: {number}")
        return columns(self.test(model, centers, number, "test"), TEST_COLUMNS)

    def evaluate(self, centers: Tensor, number: int) -> None:
        """Tests a trained network, and writes the features of the test images for --save-features."""
        tested = self.test(self.model, centers, number, "test")["test"]
        if self.args.save_features and self.ranks.rank == 0:
            evaluation.save_features(Path(self.args.save_dir), tested, centers, self.data)

    def record(self, number: int, splits: dict[str, dict]) -> dict:
        """The epoch's row of metrics.csv."""
        row = dict(epoch=number, lr_model=self.scheduler.get_last_lr()[0])
        return row | columns(
            splits, TRAIN_COLUMNS | (VAL_COLUMNS if self.data.val else {}) | TEST_COLUMNS
        )


def columns(splits: dict[str, dict], names: dict[str, tuple[str, str]]) -> dict:
    """The value of each column of metrics.csv, None if it was not measured."""
    return {column: splits.get(split, {}).get(metric) for column, (split, metric) in names.items()}


if __name__ == "__main__":
    sys.exit(cli.run(main, description=__doc__))
