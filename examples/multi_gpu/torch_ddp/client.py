"""A site's own training of a CNN, with DistributedDataParallel on all devices of the site. job.py has each site run it.

By itself it trains on all of the data: `python client.py`, or `torchrun --nproc_per_node=2 client.py --local_epochs 5`.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset

import shoal.client
from data import site_images
from model import Net

Batches = DataLoader[tuple[Tensor, ...]]


def main() -> None:
    args = arguments()
    device = join()
    train, test, told = site_images(
        args.data_dir, part=args.part, parts=args.parts, alpha=args.alpha, most=args.images, seed=args.seed
    )
    say(told)
    sampler = DistributedSampler(train, seed=args.seed)  # by global rank
    train_batches = DataLoader(train, args.batch_size, sampler=sampler)
    test_batches = DataLoader(Subset(test, range(dist.get_rank(), len(test), dist.get_world_size())), 500)
    torch.manual_seed(args.seed)
    model = DistributedDataParallel(Net().to(device))  # once: it stays from round to round
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)

    for task in shoal.client.tasks(evaluate=True):
        task.load(model)
        if task.kind == "evaluate":  # the global model, after a round
            task.reply(examples=len(test), metrics=measure(model.module, test_batches, device))
            continue
        # Momentum begins anew in each round: what is left of it points on from where this site ended, but the round
        # begins at the average of all sites. Without a state a site is also the same after a restart or a resume.
        optimizer.state.clear()
        for epoch in range((task.round - 1) * args.local_epochs, task.round * args.local_epochs):
            sampler.set_epoch(epoch)
            loss = train_epoch(task, model, optimizer, train_batches, device)
            say(f"epoch {epoch + 1}: loss {loss:.4f}")
        own = measure(model.module, test_batches, device)
        task.reply(params=model.state_dict(), examples=len(train), metrics=own | {"loss": loss})
    dist.destroy_process_group()


def train_epoch(
    task: shoal.client.Task, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, device: torch.device
) -> float:
    """Trains for one pass; returns the mean loss over all ranks."""
    model.train()
    sums = torch.zeros(2, device=device)
    for images, labels in batches:
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        task.apply(loss, model).backward()  # with the proximal term of FedProx, say
        optimizer.step()
        sums += torch.stack([loss.detach() * len(labels), loss.new_tensor(len(labels))])
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


@torch.inference_mode()
def measure(model: nn.Module, batches: Batches, device: torch.device) -> dict[str, float]:
    """Returns loss and accuracy over the test images of all ranks."""
    model.eval()
    sums = torch.zeros(3, device=device)
    for images, labels in batches:
        scores, wanted = model(images.to(device)), labels.to(device)
        right = (scores.argmax(1) == wanted).sum()
        sums += torch.stack([F.cross_entropy(scores, wanted, reduction="sum"), right, right.new_tensor(len(labels))])
    dist.all_reduce(sums)
    return {"loss": float(sums[0] / sums[2]), "accuracy": float(sums[1] / sums[2])}


def join() -> torch.device:
    """Meets the other ranks, if a launcher has started any; returns this one's device."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda" if backend == "nccl" else "cpu")


def say(line: str) -> None:
    """Prints a line, from one rank of the site."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, help="where CIFAR-10 or Fashion-MNIST lies")
    add("--images", type=int, help="use only so many training images, of all sites together")
    add("--part", type=int, default=0, help="which site's part of the images to take")
    add("--parts", type=int, default=1, help="how many sites share them")
    add("--alpha", type=float, help="skew the sites' labels by Dirichlet(alpha)")
    add("--batch_size", type=int, default=32, help="of each device")
    add("--lr", type=float, default=0.02)
    add("--local_epochs", type=int, default=1, help="passes over the site's images in a round")
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
