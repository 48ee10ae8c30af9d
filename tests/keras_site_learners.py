"""A job whose sites train a Keras learner, and which a test may disturb: its arguments are a strategy and settings."""

from __future__ import annotations

import json
import os
import signal
import sys

import shoal
from keras_reference import clients
from keras_training_file import made
from process_table import children
from shoal.devices import Devices


class Killer(shoal.Callback):
    """Ends one rank of the first site after a round."""

    def __init__(self, round):
        self.round = round
        self.killed = 0

    def on_round_end(self, record):
        if record["round"] == self.round:
            launcher = min(children(os.getpid()))
            self.killed = max(children(launcher))
            os.kill(self.killed, signal.SIGKILL)


def main(strategy, kill=0):
    """Runs three rounds of two sites, with batches of four on all devices together."""
    count = 1 if strategy == "single" else 2
    devices = Devices(strategy, count=count, accelerator="cpu")
    learner = shoal.KerasLearner(made, batch_size=4 // count, epochs=2)
    data = [clients()[0], clients()[2]]
    sites = [
        shoal.Site(f"site-{number}", devices=devices, data=one, evaluate=one) for number, one in enumerate(data, 1)
    ]
    killer = Killer(kill)
    job = shoal.Job(
        "keras", learner=learner, sites=sites, rounds=3, algorithm=shoal.FedProx(mu=0.1), evaluate=clients()[1],
        on_failure="restart",
    )  # fmt: skip
    result = job.run(callbacks=[killer])
    told = {
        "params": {name: array.tolist() for name, array in result.params.items()},
        "history": [record["train_loss"] for record in result.history],
        "measured": [record["accuracy"] for record in result.history],
        "killed": killer.killed,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
