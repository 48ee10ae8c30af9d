"""The user's Keras callbacks, called by shoal's loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.learners.keras_backend import keras

WRITERS = tuple(
    getattr(keras.callbacks, name)
    for name in ("CSVLogger", "ModelCheckpoint", "ProgbarLogger", "RemoteMonitor", "TensorBoard")
)
"""Those that write or speak, which one process is enough for."""

KINDS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": "True".__eq__,
    "function": lambda name: getattr(keras.ops, name),  # such as "less", which says whether lower is better
}
"""What makes of its text an attribute that is kept, by the name of its type."""


class Calls:
    """Copies of callbacks, in one training.

    Args:
        callbacks: As the user gave them.
        model: The model in training.
        leads: Whether this process is the one that writes.
        epochs: How many there will be.
        steps: Of an epoch.
    """

    def __init__(self, callbacks: Sequence[Any], model: Any, *, leads: bool, epochs: int, steps: int) -> None:
        self._given = bool(callbacks)
        self._own = {
            str(place): copy.deepcopy(each)
            for place, each in enumerate(callbacks)
            if leads or not isinstance(each, WRITERS)
        }
        self._model = model
        self._list = None
        if self._own:
            told = {"epochs": epochs, "steps": steps, "verbose": 0}
            own = list(self._own.values())
            self._list = keras.callbacks.CallbackList(own, add_history=False, model=model, **told)

    def __bool__(self) -> bool:
        """Tells whether there is any, in this process or another."""
        return self._given

    def begin(self) -> None:
        """Before all."""
        if self._list is not None:
            self._model.stop_training = False
            self._list.on_train_begin()

    def begin_epoch(self, epoch: int) -> None:
        """Before an epoch, counted from 0."""
        if self._list is not None:
            self._list.on_epoch_begin(epoch)

    def begin_step(self, step: int) -> None:
        """Before a step of an epoch, counted from 0."""
        if self._list is not None:
            self._list.on_train_batch_begin(step)

    def end_step(self, step: int, logs: dict[str, float]) -> None:
        """After it."""
        if self._list is not None:
            self._list.on_train_batch_end(step, logs)

    def end_epoch(self, epoch: int, logs: dict[str, float]) -> None:
        """After an epoch."""
        if self._list is not None:
            self._list.on_epoch_end(epoch, logs)

    def end(self, logs: dict[str, float]) -> None:
        """After all."""
        if self._list is not None:
            self._list.on_train_end(logs)

    @property
    def stopping(self) -> bool:
        """Whether a callback wants the training to stop."""
        return self._list is not None and bool(self._model.stop_training)

    def state(self) -> dict[str, Any]:
        """Returns what of each callback JSON can hold, which has no infinity."""
        return {"callbacks": {place: kept(each) for place, each in self._own.items()}, "stopping": self.stopping}

    def restore(self, told: Mapping[str, Any]) -> None:
        """Undoes :meth:`state`; further callbacks begin anew."""
        for place, each in self._own.items():
            for name, (kind, text) in told["callbacks"].get(place, {}).items():
                setattr(each, name, KINDS[kind](text))
        if self._own:
            self._model.stop_training = told["stopping"]


def kept(callback: Any) -> dict[str, tuple[str, str]]:
    """Returns a callback's numbers, words and functions of Keras's, each by its kind and as text."""
    held = {}
    for name, value in vars(callback).items():
        known = getattr(value, "__name__", "")
        if callable(value) and getattr(keras.ops, known, None) is value:
            held[name] = "function", known
            continue
        plain = value.item() if getattr(value, "shape", None) == () else value  # a scalar of numpy's
        if type(plain).__name__ in KINDS and not callable(plain):
            held[name] = type(plain).__name__, str(plain)
    return held
