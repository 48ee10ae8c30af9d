"""Steps a second of a Keras learner beside those of Keras's own ``fit``, by turns, with one model and one kind of data.

    python benchmarks/keras_fit.py --devices 1 2 --turns 7

One process a row, because TensorFlow's logical devices are those of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="devices of the CPU")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="in a turn")
    parser.add_argument("--row", action="store_true", help="measure one case in this process, and print it as JSON")
    given = parser.parse_args()
    if given.row:
        print(json.dumps(row(given.devices[0], given.turns, given.steps)))
        return
    print("| devices | shoal, steps/s | Keras's fit, steps/s | ratio: median (min–max) |")
    print("|---|---|---|---|")
    for devices in given.devices:
        words = ["--devices", devices, "--turns", given.turns, "--steps", given.steps]
        command = [sys.executable, __file__, "--row", *map(str, words)]
        quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=quiet)
        ours, theirs = json.loads(done.stdout.splitlines()[-1])
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(f"| {devices} | {statistics.median(ours):.0f} | {statistics.median(theirs):.0f} | {span} |", flush=True)


def row(devices: int, turns: int, steps: int) -> tuple[list[float], list[float]]:
    """Returns the steps a second of each turn, shoal's and Keras's."""
    import numpy as np

    import shoal
    from shoal.learners.keras_backend import keras

    strategy = "single" if devices == 1 else "mirrored"
    count = steps * BATCH * devices
    rng = np.random.default_rng(0)
    data = shoal.data.ArrayDataset(
        rng.normal(size=(count, 28, 28, 1)).astype(np.float32), rng.integers(10, size=count), classes=10
    )
    learner = shoal.KerasLearner(
        make, batch_size=BATCH, devices=shoal.Devices(strategy, count=devices, accelerator="cpu")
    )
    broadcast = shoal.Broadcast(round=1, model=learner.init(0))
    with learner.resident.strategy.scope():
        model = make()
    keras.utils.disable_interactive_logging()

    def ours() -> float:
        learner.fit(broadcast, data, rng)
        return time.perf_counter()

    def theirs() -> float:
        ends: list[float] = []  # of the epoch: fit itself may wait on for a thread of tf.data
        noting = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
        model.fit(data.inputs, data.targets(), batch_size=BATCH * devices, verbose=0, callbacks=[noting])
        return ends[0]

    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):  # the first one compiles
        for train, rates in zip((ours, theirs), found, strict=True):
            before = time.perf_counter()
            ended = train()
            if turn:
                rates.append(steps / (ended - before))
    return found


def make() -> object:
    """Returns a compiled small CNN."""
    from shoal.learners.keras_backend import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, metrics=["accuracy"])
    return model


if __name__ == "__main__":
    main()
