"""Trains a small network with softmax and center loss and plots its features (Wen et al., 2016).

python main.py --gpu 0 --plot                 MNIST, on the GPU where there is one
python main.py --recipe digits --plot         no download, no GPU, 15 seconds
python main.py --resume                       continue the run in --save-dir
python main.py --evaluate log/checkpoint.pt   test metrics of a trained network

Where λ, both losses and both optimizers meet, one update at a time: engine/step.py.
"""
# ruff: noqa: E402  (what Ctrl-C does comes before the imports, which take seconds)

import os
import signal
import sys


def end_at_once(*_) -> None:
    """Ctrl-C while modules and data are loaded: no library's handler may swallow it."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"main.py: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, end_at_once)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait leave busy cores to others

import argparse
import contextlib
import copy
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import cli
import datasets
import models
import plots
import recipes
import utils
from engine import epoch
from engine.ranks import Interrupted, Ranks, StopRequest
from engine.state import State, from_checkpoint, new_row, to_checkpoint
from engine.step import Step
from tools import evaluate
from tools.run_files import NoFiles, RunFiles, is_moved


@dataclass
class Experiment:
    """What was built for a run."""

    args: argparse.Namespace
    log: utils.Log
    files: RunFiles | NoFiles
    pictures: plots.Plotter | None
    ranks: Ranks
    stop: StopRequest
    data: datasets.Data
    model: nn.Module
    step: Step
    scheduler: LRScheduler
    modules: dict  # whose state dicts go into checkpoints
    steps: int  # of the whole run
    epochs: int

    def is_tested(self, number: int) -> bool:
        """Whether a test follows an epoch: the last one, and others."""
        every = recipes.epochs_per_test(self.args, self.data)
        return number == self.epochs or (every > 0 and number % every == 0)

    def is_complete(self, state: State) -> bool:
        """Whether all epochs are done and, with validation images, the best one is tested."""
        return state.epoch >= self.epochs and (state.best_tested or not self.data.val)

    def checkpoint(self, state: State) -> dict:
        return to_checkpoint(state, self.modules) | dict(data=self.data.facts())

    def watch(self, batches: Iterable, what: str, total: int) -> Iterable:
        """The batches, with a progress bar; Interrupted if a signal asks to stop."""
        return utils.progress_bar(self.stop.watch(batches), what, total, shown=not self.log.quiet)


def main(args: argparse.Namespace, saved: dict | None = None) -> None:
    """`saved`: the checkpoint to resume or evaluate."""
    start = time.monotonic()
    if args.pairs:
        return evaluate.test_pairs(args)
    with utils.reading(args.resume or args.evaluate):
        run = build(args, saved)
        state = restore(run, saved)
    start -= state.elapsed
    if args.evaluate:
        test(run, run.model, state.centers, state.epoch, "test")
        return run.files.write_rest()
    if run.is_complete(state) and not (args.plot or is_moved(args)):
        return run.log(f"The run of {args.resume} is finished after {state.epoch} epochs")

    with (
        run.files.opened(state, start) as files,
        run.pictures or contextlib.nullcontext(),
        run.stop,
    ):
        files.save(run.checkpoint(state))  # a run killed in its first epoch can be resumed, too
        with contextlib.suppress(Interrupted):
            while state.epoch < run.epochs:
                train_and_test(run, state)
            if not run.is_complete(state):
                state.add_best(test_best(run))
                files.save(run.checkpoint(state))
        undrawn = []
        if run.pictures and state.history:
            undrawn = plots.plot_run(run.pictures, files.directory, state.history, run.stop.urgent)
        number = run.stop.requested()
        if not run.is_complete(state) or (undrawn and run.stop.urgent()):
            raise utils.Stopped(number, state.epoch, args.save_dir)
        run.log(f"Finished. Total elapsed time (h:m:s): {utils.passed(start)}")
        files.finish(undrawn)


def train_and_test(run: Experiment, state: State) -> None:
    """An epoch: train, test, record, save, plot."""
    start = time.monotonic()
    number = state.epoch + 1
    run.log(f"==> Epoch {number}/{run.epochs}")
    splits, centers = train(run, number)
    if run.is_tested(number):
        splits |= test(run, run.model, centers, number, "val" if run.data.val else "test")
    is_best = "val" in splits and state.is_best(splits["val"])
    rate = run.scheduler.get_last_lr()[0]
    state.add_epoch(new_row(number, rate, splits, validates=bool(run.data.val)), centers)
    run.log(f"Epoch {number} took {time.monotonic() - start:.1f} s")
    run.files.save_epoch(state.history[-1], splits, centers)
    if run.pictures:
        plots.plot_epoch(run.pictures, run.files.directory, number, splits, centers, run.data)
    if is_best:
        run.files.save(run.checkpoint(state), "best.pt")
    run.files.save(run.checkpoint(state))  # last: an epoch that is killed before is done again


def build(args: argparse.Namespace, saved: dict | None) -> Experiment:
    """Everything that a run needs, in order: device, data, network, losses, optimizers."""
    ranks = Ranks.of_environment()
    first = ranks.rank == 0
    log = utils.Log(quiet=not first)
    files = RunFiles(args, log) if first else NoFiles()
    pictures = plots.Plotter(log) if first and args.plot and not args.evaluate else None
    device = recipes.prepare_device(args, log)
    log(f"Creating dataset: {args.dataset}")
    with ranks.first_alone():
        data = recipes.create_data(args, device, ranks, saved)
    log(*data.lines())

    log(f"Creating model: {args.model}")
    torch.manual_seed(args.seed)
    shape = (len(data.classes), data.in_channels, data.image_size, args.feat_dim)
    model = models.create(args.model, *shape, args.init, pretrained=args.pretrained and not saved)
    center_loss = recipes.create_center_loss(len(data.classes), model.classifier.in_features, args)
    model.to(device, memory_format=torch.channels_last)  # faster, in float32 as well
    center_loss.to(device)
    optimizers = recipes.create_optimizers(model, center_loss, args)
    step = recipes.create_step(model, center_loss, optimizers, args, ranks, log)
    per_epoch = len(data.train or data.test or data.unknown)  # to evaluate, nothing is trained
    steps = args.max_iter or args.max_epoch * per_epoch
    scheduler = recipes.create_scheduler(optimizers, args, per_epoch, steps, log)
    modules = dict(model=model, center_loss=center_loss, scheduler=scheduler, **optimizers)
    if data.train and data.train.augment:
        modules["augment"] = data.train.augment
    writes = (args, log, files, pictures, ranks, StopRequest(ranks))
    trains = (data, model, step, scheduler, modules, steps, math.ceil(steps / per_epoch))
    return Experiment(*writes, *trains)


def restore(run: Experiment, saved: dict | None) -> State:
    """The state at the start, or that of a checkpoint, whose modules are loaded, too."""
    if not saved:
        return State(run.step.center_loss.centers.detach(), torch.get_rng_state())
    path = run.args.resume or run.args.evaluate
    utils.check_data(path, saved["data"], run.data.facts(), to_train=bool(run.args.resume))
    return from_checkpoint(saved, run.modules, run.step.device)


def train(run: Experiment, number: int) -> tuple[dict[str, dict], Tensor]:
    """An epoch, or what --max-iter leaves of it: its results, as split "train", and the centers."""
    args = run.args
    per_epoch = len(run.data.train)
    steps = min(per_epoch, run.steps - (number - 1) * per_epoch)
    batches = run.watch(itertools.islice(run.data.train, steps), f"epoch {number}", steps)

    def report(progress: epoch.Progress) -> None:
        if progress.batches % args.print_freq == 0:
            run.log(progress.line(per_epoch))
            utils.check_finite(progress.means(), number, args)

    keep = args.plot or args.save_features or args.weight_cent == 0
    trained = epoch.train_epoch(run.step, batches, run.scheduler, keep, report)
    utils.check_finite(trained | epoch.state_sums(run.step), number, args)
    run.log(*cli.advice(trained["accuracy"], number, len(run.data.classes), per_epoch))
    return dict(train=trained), epoch.current_centers(run.step, trained)


def test(
    run: Experiment, model: nn.Module, centers: Tensor, number: int, on: str
) -> dict[str, dict]:
    """Tests the network of epoch `number` on "val" or "test"; returns what was tested, by split.

    With "test" come the outputs for "unknown", the test images of classes that were not trained.
    """
    args = run.args
    run.log("==> Validation" if on == "val" else "==> Test")
    if args.mirror:
        model = models.Mirrored(model)
    splits = {}
    for name in ("test", "unknown") if on == "test" else ("val",):
        batches = getattr(run.data, name)
        if batches:
            batches = run.watch(batches, name, len(batches))
            splits[name] = epoch.predict(model, batches, args.amp, run.ranks)
    if on in splits:
        splits[on] |= epoch.measure(splits[on], centers)
        run.log(*epoch.lines(splits[on]))
        if not args.evaluate:
            utils.check_finite(splits[on], number, args)
    reports = args.verify or args.evaluate or "test" not in splits
    if on == "test" and reports and run.ranks.rank == 0:
        evaluate.report(args, run.data, splits, centers, number, run.files)
    return splits


def test_best(run: Experiment) -> dict[str, dict]:
    """Tests the network of best.pt, the best epoch by validation."""
    run.ranks.wait()  # for rank 0, which writes it
    saved = utils.load_checkpoint(Path(run.args.save_dir, "best.pt"))
    model = copy.deepcopy(run.model)
    model.load_state_dict(saved["model"])
    run.log(f"Best epoch by validation: {saved['epoch']}")
    return test(run, model, saved["centers"].to(run.step.device), saved["epoch"], "test")


if __name__ == "__main__":
    sys.exit(cli.run(main, description=__doc__))
