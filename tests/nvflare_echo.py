"""A controller and an executor of NVFlare that echo, to look at the wire alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

from shoal.deploy.parcel import Parcel, raw
from shoal.errors import EngineError
from shoal.nvflare import ShoalController, ShoalExecutor


class EchoController(ShoalController):
    """Sends numbers to all clients in turns, and writes what came and how long it took."""

    def run_order(self, wire, text, folder, callbacks):
        order = json.loads(text)
        folder.mkdir(parents=True)
        lines = []
        say = callbacks[0]._print
        until = time.monotonic() + 60
        while len(wire.present()) < order["clients"]:
            if time.monotonic() > until:
                raise EngineError(f"only {wire.present()} are there")
            time.sleep(0.2)
        if order.get("fail"):
            raise EngineError("this run was to fail")
        for turn in range(order["turns"]):
            begun = time.monotonic()
            array = np.arange(order["size"], dtype=np.float32) + turn
            parcel = Parcel(meta={"turn": turn, **order.get("meta", {})}, tensors={"w": raw(array)})
            of = {ticket: name for name, ticket in wire.send(sorted(wire.present()), parcel).items()}
            answers = {}
            while of.keys() - answers.keys():
                for ticket, answer in wire.receive(5):
                    if isinstance(answer, Exception):
                        raise answer
                    total = float(np.frombuffer(answer.tensors["w"].data, np.float32).astype(np.float64).sum())
                    answers[ticket] = [dict(answer.meta), total]
                    del answer
            seconds = time.monotonic() - begun
            say(f"turn {turn} took {seconds:.3f} s")
            lines.append({"turn": turn, "seconds": seconds, "answers": {of[t]: told for t, told in answers.items()}})
        (folder / "turns.json").write_text(json.dumps(lines))


class EchoExecutor(ShoalExecutor):
    """Answers by itself what it was sent, times two."""

    def _folder(self, fl_ctx, abort_signal):
        return Path()

    def forward(self, parcel, folder, within):
        if parcel.meta.get("sleep"):
            time.sleep(parcel.meta["sleep"])
        if parcel.meta.get("fail"):
            raise EngineError("this site was to fail")
        array = np.frombuffer(parcel.tensors["w"].data, np.float32) * 2
        return Parcel(meta={"turn": parcel.meta["turn"], "process": os.getpid()}, tensors={"w": raw(array)})
