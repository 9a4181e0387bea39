"""Flags have the names and defaults that are promised; a mistake is one line and status 2."""

import argparse
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import PYTHON, program

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
        monkeypatch.setattr(cli, "multiplies_bfloat16", lambda gpu, fast=fast: fast)
        flags = ([], ["--amp"], ["--no-amp"])
        given = [cli.parse_args(["--recipe", "fast", *each]).amp for each in flags]
        assert given == [fast, True, False] and cli.parse_args([]).amp is False
    assert "--no-amp is faster" not in run("--recipe", "fast", "--model", "cnn")[1]
    monkeypatch.setattr(cli, "multiplies_bfloat16", lambda gpu: True)
    assert cli.parse_args(["--resume"]).amp is False
    monkeypatch.setattr(recipes, "multiplies_bfloat16", lambda gpu: False)
    assert run("--amp", "--max-iter", "1")[1].count("--no-amp is faster") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_without_greek_gets_help_and_lines(encoding, run, monkeypatch):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, stream)
    assert program(["-h"]) == 0
    assert program(["--weight-cent", "λ"]) == 2
    sys.stdout.flush()
    sys.stderr.flush()
    shown = sys.stdout.buffer.getvalue()
    assert b"weight of the center loss" in shown and b"(default: 100)" in shown
    assert sys.stderr.buffer.getvalue().endswith(b"got ?\n")


def test_a_run_in_a_thread_works_without_signals(run):
    """As notebooks and servers start it."""
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(run("--max-epoch", "1")[0]))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_a_system_without_sigterm_handlers_trains(run, monkeypatch):
    original = signal.signal

    def handle(number, handler):
        if number == signal.SIGTERM:
            raise ValueError("signal number out of range")
        return original(number, handler)

    monkeypatch.setattr(signal, "signal", handle)
    assert run("--max-epoch", "1")[::2] == (0, "")


def test_paths_begin_at_home_where_they_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = cli.parse_args(["--save-dir=~/runs/a", "--data-root=~/data"])
    assert (args.save_dir, args.data_root) == (f"{tmp_path}/runs/a", f"{tmp_path}/data")


PLACES = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost")


@pytest.mark.parametrize(
    "changed",
    [dict(RANK="x"), dict(RANK=""), dict(LOCAL_RANK=None), dict(MASTER_ADDR=None), dict()],
)
def test_an_environment_that_is_torchruns_by_half_is_one_line(changed, run, monkeypatch):
    """The last lacks MASTER_PORT."""
    for name, value in (PLACES | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    status, out, err = run()
    assert (status, out) == (2, "") and err.count("\n") == 1
    name = next(iter(changed), "MASTER_PORT")
    assert err.startswith(f"main.py: error: {name} must be ")


def test_a_port_in_use_is_one_line(run, monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        for name, value in (PLACES | dict(MASTER_PORT=port)).items():
            monkeypatch.setenv(name, value)
        status, _, err = run()
    assert (status, err.count("\n")) == (1, 1) and port in err


BAD_FLAGS = """
--batch-size 0
--batch-size 1.5
--batch-size 99999999999999999999
--lr-model 0
--lr-model nan
--lr-model 1e39
--lr-model 1e-320
--lr-model
--lr-cent -1
--lr-cent 1e39
--weight-cent -0.1
--weight-cent inf
--weight-cent 1e-44
--max-epoch 0
--max-epoch 1e3
--max-iter -1
--stepsize -1
--gamma 0
--gamma 1e300
--eval-freq -1
--print-freq 0
-j two
--workers -1
--seed -1
--seed 99999999999999999999
--momentum 1.5
--momentum nan
--momentum-cent -1
--weight-decay -1
--weight-decay 1e39
--radius -1
--radius 1e39
--loss-scale 0
--loss-scale inf
--feat-dim 0
--feat-dim 1000001
--image-size 7
--image-size 1025
--image-size 8 8 8
--milestones
--milestones 0
--milestones 5 x
--gpu 0,1
--gpu -1
--gpu cuda
--dataset imagenet
--model vgg
--model inception_v3
--model fasterrcnn_resnet50_fpn
--model bn-deep
--recipe none
--distance cosine
--schedule none
--center-update none
--optimizer lion
--init zeros
--scaling none
--unknown
--plot=yes
7
--one-optimizer --optimizer adamw
--one-optimizer --lr-model 1e-20 --weight-cent 1e-20
--pretrained
--pretrained --model resnet18 --init xavier
--val-share 1.5
--val-share 0.99
--unseen
--erase 1.5
--label-smoothing -0.1
--mirror left
--mirror concat
--pairs pairs.txt
--evaluate nowhere.pt
--evaluate .
--evaluate=
--resume nowhere.pt
--resume
--resume=
--data-root nowhere
--data-root /dev/null
--data-root=
--save-dir /dev/null/below
--save-dir=
""".split("\n")[1:-1]


def test_every_flag_that_takes_a_value_has_a_wrong_one_in_the_table():
    tried = {flags.split()[0].partition("=")[0] for flags in BAD_FLAGS}
    for action in cli.build_parser()._actions:
        if action.nargs != 0:
            assert tried & set(action.option_strings), action.option_strings


@pytest.mark.parametrize("flags", [*BAD_FLAGS, f"--max-epoch 1{'0' * 400}"])
def test_a_mistake_is_one_line_status_2_and_writes_nothing(flags, run):
    status, _, err = run(*flags.split())
    assert status == 2
    assert err.startswith("main.py: error: ") and err.count("\n") == 1
    assert os.listdir() == []


def test_tensorboard_without_its_package_is_refused_before_any_work(run, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    status, out, err = run("--tensorboard")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "pip install tensorboard" in err
    assert os.listdir() == []


@pytest.mark.parametrize("target", ["/dev/full", "pipe"])
def test_an_output_that_is_full_or_closed_is_one_line(target, run, monkeypatch):
    if target == "pipe":
        end, output = os.pipe()
        os.close(end)
        reason = "Broken pipe"
    elif os.path.exists(target):
        output = os.open(target, os.O_WRONLY)
        reason = "No space left on device"
    else:
        pytest.skip("there is no /dev/full")
    stream = io.TextIOWrapper(io.FileIO(output, "w"), write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    status, _, err = run("--max-epoch", "1")
    assert (status, err) == (1, f"main.py: error: cannot write to the standard output: {reason}\n")


def test_advice_comes_once_where_the_training_accuracy_is_that_of_guessing():
    said = [epoch for epoch in range(1, 9) if cli.advice(10.5, epoch, 10, 50)]
    assert said == [4] and not cli.advice(15.0, 4, 10, 50)


def test_help_mistakes_and_the_loss_alone_load_nothing_heavy_but_torch():
    code = """
import contextlib, io, sys, torch
torchs = set(sys.modules)
def loaded():
    names = {name.partition(".")[0] for name in set(sys.modules) - torchs}
    return names - sys.stdlib_module_names
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
    own = {path.stem for path in MAIN.parent.glob("*.py")} | {"engine", "plots", "tools"}
    assert program <= own | {"torch", "tqdm", "numpy", "PIL"}
