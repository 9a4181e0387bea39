"""Flags have the names and defaults that are promised, a mistake is one line, and what ends a run has its status."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PYTHON

import cli
import main
import recipes

MAIN = Path(main.__file__)


@pytest.mark.parametrize(
    "converter, good, bad",
    [
        (cli.number(int, 1), ["1", "12"], ["0", "-3", "1.5", "x", "", "nan", "1e3"]),
        (cli.number(int, 0, 10), ["0", "10"], ["11", "-1"]),
        (cli.number(float, 0), ["0", "1e-3", "200"], ["-1e-9", "nan", "inf", "-inf", "x"]),
        (cli.number(float, 0, above=True), ["1e-9"], ["0", "-1", "0.0"]),
        (cli.number(float, 1e-9, or_zero=True), ["0", "0.0", "1e-9", "2"], ["1e-10", "-1", "nan"]),
        (cli.number(float, 0, 1), ["0", "0.9", "1"], ["1.1", "-0.1"]),
    ],
)
def test_number_takes_what_is_in_its_range(converter, good, bad):
    assert [converter(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="^must be .*, got") as error:
            converter(text)
        assert str(error.value).endswith(f"got {text}")


def test_gpu_index_answers_a_list_with_the_torchrun_command():
    assert cli.gpu_index("3") == "3"
    with pytest.raises(argparse.ArgumentTypeError) as error:
        cli.gpu_index("0, 2")
    assert "CUDA_VISIBLE_DEVICES=0,2 torchrun --standalone --nproc_per_node=2 main.py" in str(
        error.value
    )
    for text in ("-1", "a", "0,", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="index"):
            cli.gpu_index(text)


def test_recipes_set_defaults_and_flags_win():
    args = cli.parse_args(["--recipe", "wen2016", "--lr-model", "0.5"])
    assert (args.weight_cent, args.center_update, args.lr_model, args.max_iter) == (
        0.01,
        "paper",
        0.5,
        10000,
    )
    assert cli.parse_args([]).lr_model == 0.001
    for flags, limits in {
        "": (100, 10000),
        "--max-epoch 3": (3, 0),
        "--max-epoch 100": (100, 0),
        "--max-iter 5": (100, 5),
        "--max-epoch 3 --max-iter 5": (3, 5),
    }.items():
        args = cli.parse_args(["--recipe", "wen2016", *flags.split()])
        assert (args.max_epoch, args.max_iter) == limits
    parser = cli.build_parser()
    for recipe in recipes.RECIPES.values():
        assert recipe.keys() <= vars(parser.parse_args([])).keys()


def test_flags_have_zhou2018s_names_and_defaults():
    expected = dict(
        dataset="mnist",
        batch_size=128,
        lr_model=0.001,
        lr_cent=0.5,
        weight_cent=1,
        max_epoch=100,
        stepsize=20,
        gamma=0.5,
        model="cnn",
        eval_freq=None,
        print_freq=50,
        gpu="0",
        seed=1,
        use_cpu=False,
        save_dir="log",
        plot=False,
    )
    args = vars(cli.parse_args([]))
    assert {name: args[name] for name in expected} == expected
    assert cli.parse_args(["-d", "digits", "-j", "3"]).workers == 3


def test_digits_are_not_mirrored_in_the_test():
    assert cli.parse_args(["--recipe", "images", "--dataset", "folder"]).mirror
    assert not cli.parse_args(["--recipe", "images", "--dataset", "mnist"]).mirror


def test_a_recipe_leaves_bfloat16_to_the_hardware_and_a_run_keeps_it(run, monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(device, "multiplies_bfloat16", lambda gpu, fast=fast: fast)
        given = [
            cli.parse_args(["--recipe", "fast", *flags]).amp
            for flags in ([], ["--amp"], ["--no-amp"])
        ]
        assert given == [fast, True, False] and cli.parse_args([]).amp is False
    assert "--no-amp is faster" not in run("--recipe", "fast", "--model", "cnn")[1]
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda gpu: True)
    assert (
        cli.parse_args(["--resume"]).amp is False
        and json.loads(Path("log/args.json").read_text())["amp"] is False
    )
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda gpu: False)
    assert run("--amp", "--max-iter", "1")[1].count("--no-amp is faster") == 1


def test_a_terminal_without_greek_gets_the_help():
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([PYTHON, main.__file__, "-h"], capture_output=True, env=ascii_alone)
    assert (
        done.returncode == 0 and b"weight of the center loss" in done.stdout and done.stderr == b""
    )
    assert b"epochs (default: 100)" in done.stdout


BAD_FLAGS = [
    ["--batch-size", "0"],
    ["--batch-size", "1.5"],
    ["--lr-model", "0"],
    ["--lr-model", "nan"],
    ["--lr-cent", "-1"],
    ["--weight-cent", "-0.1"],
    ["--weight-cent", "inf"],
    ["--max-epoch", "0"],
    ["--max-iter", "-1"],
    ["--stepsize", "-1"],
    ["--gamma", "0"],
    ["--eval-freq", "-1"],
    ["--print-freq", "0"],
    ["--workers", "-1"],
    ["-j", "two"],
    ["--seed", "-1"],
    ["--momentum", "1.5"],
    ["--momentum-cent", "-1"],
    ["--weight-decay", "-1"],
    ["--radius", "-1"],
    ["--loss-scale", "0"],
    ["--feat-dim", "0"],
    ["--image-size", "7"],
    ["--milestones", "0"],
    ["--gpu", "0,1"],
    ["--gpu", "-1"],
    ["--gpu", "cuda"],
    ["--dataset", "imagenet"],
    ["--model", "vgg"],
    ["--recipe", "none"],
    ["--distance", "cosine"],
    ["--schedule", "none"],
    ["--center-update", "none"],
    ["--optimizer", "lion"],
    ["--init", "zeros"],
    ["--scaling", "none"],
    ["--unknown"],
    ["--one-optimizer", "--optimizer", "adamw"],
    ["--evaluate", "nowhere.pt"],
    ["--resume", "nowhere.pt"],
    ["--resume"],
    ["--data-root", "nowhere"],
    ["--save-dir", "/dev/null"],
    ["--save-dir", "/dev/null/below"],
    ["--model", "bn-deep"],
    ["--data-root", "/dev/null"],
    ["--batch-size", ""],
    ["--max-epoch", "1e3"],
    ["--lr-cent", "nan"],
    ["--weight-decay", "inf"],
    ["--gamma", "-0.5"],
    ["--momentum", "nan"],
    ["--loss-scale", "inf"],
    ["--milestones"],
    ["--milestones", "5", "x"],
    ["--gpu", "0.5"],
    ["--seed", "99999999999999999999"],
    ["--image-size", "1025"],
    ["--seed", "1.0"],
    ["--lr-model"],
    ["--evaluate"],
    ["--evaluate", "."],
    ["--resume", "."],
    ["--plot=yes"],
    ["--max-iter", "-5"],
    ["7"],
    ["--evaluate", ""],
    ["--batch-size", "99999999999999999999"],
    ["--feat-dim", "1000001"],
    ["--gamma", "1e300"],
    ["--val-share", "1.5"],
    ["--val-share", "-0.1"],
    ["--val-share", "0.99"],
    ["--predict", "."],
    ["--predict"],
    ["--pretrained"],
    ["--pretrained", "--model", "resnet18", "--init", "xavier"],
    ["--model", "inception_v3"],
    ["--model", "resnet18-small", "--pretrained"],
    ["--model", "fasterrcnn_resnet50_fpn"],
    ["--weight-cent", "1e-44"],
    ["--lr-model", "1e-320"],
    ["--one-optimizer", "--lr-model", "1e-20", "--weight-cent", "1e-20"],
    ["--unseen"],
    ["--unseen", ""],
    ["--erase", "1.5"],
    ["--label-smoothing", "-0.1"],
]


def test_every_flag_that_takes_a_value_has_a_wrong_one_in_the_table():
    tried = {flags[0] for flags in BAD_FLAGS}
    for action in cli.build_parser()._actions:
        if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
            assert tried & set(action.option_strings), action.option_strings


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_a_mistake_is_one_line_status_2_and_writes_nothing(flags, run):
    status, _, err = run(*flags)
    assert status == 2
    assert err.startswith("main.py: error: ") and err.count("\n") == 1
    assert os.listdir() == []


def test_a_save_dir_that_may_not_be_written_is_one_line(run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    status, _, err = run("--save-dir", "deep/log")
    assert status == 2 and err.startswith(
        "main.py: error: --save-dir must be writable, got deep/log"
    )
    assert err.count("\n") == 1 and os.listdir() == []


@pytest.mark.parametrize("allocate", [lambda *_: torch.empty(10**15), lambda *_: bytearray(10**17)])
def test_running_out_of_memory_is_told_in_a_line(allocate, run, monkeypatch):
    monkeypatch.setattr(main, "Experiment", allocate)
    status, _, err = run()
    assert status == 1 and err.startswith("main.py: error: out of memory") and err.count("\n") == 1


def test_a_run_whose_streams_are_closed_goes_on_and_its_log_tells(run, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    status = run("--max-epoch", "1")[0]
    assert status == 0 and Path("log/log_folder.txt").read_text().splitlines()[-1].startswith(
        "Finished."
    )
    assert run("--lr-model", "0")[0] == 2


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    """Else what C libraries print would stand in a checkpoint."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            os.closerange(0, 3)
            cli._open_closed_streams()
            os._exit(os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY) > 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_help_mistakes_and_the_loss_alone_load_nothing_heavy_but_torch():
    code = """
import contextlib, io, sys, torch
torchs = set(sys.modules)
def loaded(): return {name.partition(".")[0] for name in set(sys.modules) - torchs} - sys.stdlib_module_names
from center_loss import CenterLoss
print(*loaded())
import main
for flags in (["-h"], ["--batch-size", "0"], ["--resume", "nowhere.pt"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main.cli.run(main.main, flags)
print(*loaded())
print(*({"torch._dynamo", "torch._inductor", "torch.onnx"} & (set(sys.modules) - torchs)))
"""
    done = subprocess.run(
        [PYTHON, "-c", code], cwd=MAIN.parent, capture_output=True, text=True, timeout=120
    )
    loss, program, of_torch = (set(line.split()) for line in done.stdout.splitlines())
    assert loss == {"center_loss"} and not of_torch
    own = {path.stem for path in MAIN.parent.glob("*.py")}
    assert program <= own | {"torch", "tqdm", "numpy"}
