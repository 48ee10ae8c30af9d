"""FedAvg against FedProx on skewed digits, and a page that compares them."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import shoal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--run-dir", type=Path, default=Path("runs"))
    arguments = parser.parse_args()

    train, test = shoal.data.digits()
    clients = shoal.data.partition(train, shoal.data.Dirichlet(clients=50, alpha=0.1), seed=0)
    learner = shoal.TorchLearner(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        batch_size=10,
        epochs=5,
    )
    runs = []
    for algorithm in (shoal.FedAvg(), shoal.FedProx(mu=0.1)):
        name = type(algorithm).__name__
        result = shoal.federate(
            learner,
            clients,
            algorithm=algorithm,
            rounds=arguments.rounds,
            cohort=10,
            evaluate=test,
            name=name,
            run_dir=arguments.run_dir / name,
            callbacks=[shoal.Progress()],
        )
        runs.append(result.run_dir)
    print(shoal.write_report(runs, arguments.run_dir / "compared.html"))


if __name__ == "__main__":
    main()
