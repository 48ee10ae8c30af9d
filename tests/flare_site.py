"""A script in the way of those for NVFlare's Client API, as a site of two ranks, in the forms that are about."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist

import shoal.client.nvflare_api as flare


def rank_0_alone(rank):
    """Only rank 0 speaks, and tells the other what to do."""
    while True:
        model = flare.receive() if rank == 0 and flare.is_running() else None
        go = torch.tensor([float(model is not None)])
        dist.broadcast(go, 0)
        if not go:
            return
        weights = torch.zeros(5) if model is None else torch.as_tensor(model.params["w"]).clone()
        dist.broadcast(weights, 0)
        answer(rank, weights, model)


def all_ask(rank):
    """All ask whether to go on, and rank 0 alone receives and sends."""
    while flare.is_running():
        weights = torch.zeros(5)
        model = None
        if rank == 0:
            model = flare.receive()
            weights = torch.as_tensor(model.params["w"]).clone()
        dist.broadcast(weights, 0)
        answer(rank, weights, model)


def all_receive(rank):
    """All do everything."""
    while flare.is_running():
        model = flare.receive()
        assert model is not None
        weights = torch.as_tensor(model.params["w"]).clone()
        answer(rank, weights, model, everybody=True)


def until_none(rank):
    """All receive until there is nothing more."""
    while (model := flare.receive()) is not None:
        weights = torch.as_tensor(model.params["w"]).clone()
        answer(rank, weights, model, everybody=True)


def answer(rank, weights, model, everybody=False):
    """Is the training: each rank adds a half of its own."""
    share = torch.full((5,), 0.5)
    dist.all_reduce(share)
    after = weights + share
    if rank == 0 or everybody:
        print(f"round {model.current_round} of {model.total_rounds} at {flare.get_site_name()}", flush=True)
        flare.log("extra", 2.0, flare.AnalyticsDataType.SCALAR)
        sent = flare.FLModel(
            params={"w": after.numpy()}, metrics={"loss": 1.0}, meta={"NUM_STEPS_CURRENT_ROUND": 3 + rank}
        )
        flare.send(sent)
        assert sent.params is None


def main(form):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    flare.init(rank=rank)
    {"rank_0_alone": rank_0_alone, "all_ask": all_ask, "all_receive": all_receive, "until_none": until_none}[form](rank)
    if rank == 0 or form != "rank_0_alone":  # a rank that never asked has tasks that it was not told of
        assert not flare.is_running()
        assert flare.receive() is None
    dist.destroy_process_group()
    print("the end", np.__name__, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
