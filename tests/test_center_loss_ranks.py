"""Two ranks compute what one process computes on the joined batch."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from oracles import (
    VARIANTS,
    assert_equal,
    batch,
    build,
    each_variant,
    name,
    run,
)
from torch import nn

IGNORED = 0  # of this class, most splits have one sample on each rank


SPLITS = [(4, 4), (5, 3), (8, 0), (0, 8), (0, 0)]
# Class 4 is always missing on one rank, class 3 on both.


DDP_SPLITS = [(4, 4), (5, 3)]


def split_batch(split, dtype=torch.float64):
    features, labels, centers = batch(dtype)
    total = sum(split)
    return features[:total], labels[:total], centers


def ddp_steps(features, labels, centers, variant, ranks=1, slice_=slice(None)):
    """Parameters after three steps of a network with center loss, as one of so many ranks."""
    torch.manual_seed(0)
    network = nn.Linear(3, 3).double()
    wrapped = nn.parallel.DistributedDataParallel(network) if ranks > 1 else network
    loss = build(centers, **variant)
    optimizers = [
        torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in (network, loss)
    ]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (0.3 * ranks * loss(wrapped(features[slice_]), labels[slice_])).backward()
        loss.rescale_center_grad(0.3 * ranks)
        for optimizer in optimizers:
            optimizer.step()
    return [parameter.detach() for parameter in (*network.parameters(), loss.centers)]


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for split in SPLITS:
        features, labels, centers = split_batch(split)
        own = slice(0, split[0]) if rank == 0 else slice(split[0], None)
        for variant in VARIANTS:
            loss = build(centers, ignore_index=IGNORED, **variant)
            results[split, name(variant)] = run(loss, features[own], labels[own], weight=0.3)
            loss.update_centers(features[own], labels[own], alpha=0.3)
            results["updated", split, name(variant)] = loss.centers.detach()
        if split in DDP_SPLITS:
            for variant in VARIANTS:
                steps = ddp_steps(features, labels, centers, variant, 2, own)
                results["ddp", split, name(variant)] = steps
    features, labels, centers = batch()
    shares = [
        [slice(0, 3), slice(3, 5)],
        [slice(5, 8)],
    ]  # two batches on one rank, one on the other
    loss = build(centers)
    loss.start_from((features[part], labels[part]) for part in shares[rank])
    results["started"] = loss.centers.detach()
    half = batch(torch.bfloat16)
    results["bfloat16"] = run(
        build(half[2].float()), half[0][4 * rank :][:4], half[1][4 * rank :][:4]
    )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two gloo processes compute, everything in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@each_variant
def test_two_ranks_give_what_one_process_gives_on_the_joined_batch(ranks, variant, split):
    first, second = (results[split, name(variant)] for results in ranks)
    features, labels, centers = split_batch(split)
    loss = build(centers, ignore_index=IGNORED, **variant)
    value, grad_x, grad_c = run(loss, features, labels, weight=0.3)
    assert_equal(
        (first[0], torch.cat([first[1], second[1]]), first[2]),
        (value, grad_x, grad_c),
        1e-13,
        1e-15,
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])  # to the bit
    loss.update_centers(features, labels, alpha=0.3)
    for results in ranks:
        torch.testing.assert_close(
            results["updated", split, name(variant)], loss.centers.detach(), rtol=1e-13, atol=0
        )


@pytest.mark.parametrize("split", DDP_SPLITS, ids=str)
@each_variant
def test_distributed_data_parallel_takes_the_steps_of_one_process(ranks, variant, split):
    first, second = (results["ddp", split, name(variant)] for results in ranks)
    assert_equal(first, ddp_steps(*split_batch(split), variant), rtol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_ranks_with_bfloat16_features(ranks):
    features, labels, centers = batch(torch.bfloat16)
    value, grad_x, grad_c = run(build(centers.float()), features, labels)
    first, second = (results["bfloat16"] for results in ranks)
    joined = torch.cat([first[1], second[1]])
    assert joined.dtype == torch.bfloat16
    assert_equal((first[0], joined, first[2]), (value, grad_x, grad_c), 1e-6, 1e-7)


def test_two_ranks_start_from_the_means_over_both(ranks):
    features, labels, centers = batch()
    loss = build(centers)
    loss.start_from([(features, labels)])
    first, second = (results["started"] for results in ranks)
    torch.testing.assert_close(first, loss.centers.detach(), rtol=1e-13, atol=1e-15)
    assert torch.equal(first, second) and torch.equal(first[3], centers[3])
