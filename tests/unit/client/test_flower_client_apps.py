"""ClientApps of Flower's, as they are, in the place of a site's script."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import shoal
from shoal.errors import ConfigurationError, SiteError
from shoal.processes.tensors import TensorFile
from shoal.types import LocalObjective, ModelState

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import shoal.client.flower_apps as apps
from shoal.client.task import Task


class Link:
    """In the place of a link: keeps what is replied."""

    rank = 0

    def __init__(self):
        self.told = []

    def reply(self, told, fd):
        tree = None
        if fd is not None:
            with TensorFile(os.dup(fd)) as file:
                tree = {name: torch.as_tensor(file.read(name)) for name in file.entries}
        self.told.append(SimpleNamespace(examples=told["examples"], metrics=told["metrics"], tree=tree))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def task_of(module, link, **fields):
    """Returns a task as the server makes it, with the arrays by role and not in the module's order."""
    state = module.state_dict()
    trained = {name: state[name] for name, _ in module.named_parameters()}
    constants = {"1.num_batches_tracked": state["1.num_batches_tracked"]}
    buffers = {name: array for name, array in state.items() if name not in {**trained, **constants}}
    whole = ModelState(params=dict(reversed(trained.items())), buffers=buffers, constants=constants)
    told = {"kind": "train", "round": 2, "rounds": 3, "site": "a", "client": 4, "number": 7, "config": {"lr": 0.5}}
    return Task(**{**told, "model": whole, "_link": link, **fields})


def serve(monkeypatch, app, *tasks, **options):
    monkeypatch.setattr(apps, "tasks", lambda model, evaluate: iter(tasks))
    apps.serve(app, **options)


def reply(message, arrays, **metrics):
    return Message(
        RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 5, **metrics})}), reply_to=message
    )


def test_an_app_that_goes_by_names(monkeypatch):
    app, model, link, seen = ClientApp(), net(), Link(), []

    @app.train()
    def train(message, context):
        own = net()
        own.load_state_dict(message.content["arrays"].to_torch_state_dict())
        seen.append((dict(message.content["config"]), dict(context.node_config), message.metadata.message_type))
        with torch.no_grad():
            own[0].weight += message.content["config"]["lr"]
        return reply(message, ArrayRecord(own.state_dict()), loss=0.25)

    serve(monkeypatch, app, task_of(model, link, objective=LocalObjective(proximal=0.1)))
    [told] = link.told
    assert told.examples == 5
    assert told.metrics == {"loss": 0.25}
    torch.testing.assert_close(told.tree["0.weight"], model.state_dict()["0.weight"] + 0.5)
    assert told.tree.keys() == model.state_dict().keys() - {"1.num_batches_tracked"}
    assert seen == [({"lr": 0.5, "server-round": 2, "proximal-mu": 0.1}, {"partition-id": 4, "lr": 0.5}, "train")]


def test_an_app_that_goes_by_the_models_order(monkeypatch):
    app, model, link = ClientApp(), net(), Link()

    @app.train()
    def train(message, context):
        arrays = message.content["arrays"].to_numpy_ndarrays()
        assert [array.shape for array in arrays] == [tuple(array.shape) for array in net().state_dict().values()]
        return reply(message, ArrayRecord([np.asarray(array + 1) for array in arrays]))

    serve(monkeypatch, app, task_of(model, link), model=model)
    for name, array in link.told[0].tree.items():
        torch.testing.assert_close(array, model.state_dict()[name] + 1)


def test_what_an_app_keeps_in_its_context_stays(monkeypatch):
    app, model, link = ClientApp(), net(), Link()

    @app.train()
    def train(message, context):
        count = context.state["n"]["calls"] + 1 if "n" in context.state else 1
        context.state["n"] = MetricRecord({"calls": count})
        return reply(message, message.content["arrays"], calls=count)

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 3, "accuracy": 0.5})}), reply_to=message)

    serve(monkeypatch, app, task_of(model, link), task_of(model, link, kind="evaluate"), task_of(model, link))
    assert [told.metrics for told in link.told] == [{"calls": 1}, {"accuracy": 0.5}, {"calls": 2}]
    assert link.told[1].tree is None


def test_what_goes_wrong_is_told(monkeypatch):
    model, link = net(), Link()

    def run(body, **fields):
        app = ClientApp()
        app.train()(body)
        serve(monkeypatch, app, task_of(model, link, **fields))

    with pytest.raises(ConfigurationError, match="num-examples"):
        run(lambda message, context: Message(RecordDict({"arrays": ArrayRecord()}), reply_to=message))
    with pytest.raises(ConfigurationError, match="lacks its ArrayRecord"):
        run(lambda message, context: Message(RecordDict({"m": MetricRecord({"num-examples": 1})}), reply_to=message))
    with pytest.raises(SiteError, match="no data"):
        run(lambda message, context: Message(Error(2, "no data"), reply_to=message))
    with pytest.raises(ConfigurationError, match="linear term"):
        run(lambda message, context: None, objective=LocalObjective(correction={"w": torch.zeros(1)}))
    with pytest.raises(ConfigurationError, match="float32"):
        run(lambda message, context: None, model=ModelState(params={"w": torch.zeros(1, dtype=torch.bfloat16)}))
    with pytest.raises(ConfigurationError, match="client_fn"):
        apps.serve(ClientApp(client_fn=lambda context: None))


CLIENT = """
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    state = message.content["arrays"].to_torch_state_dict()
    examples = context.node_config["examples"]
    state = {name: 0.5 * array + examples for name, array in state.items()}
    metrics = MetricRecord({"num-examples": examples, "loss": 1.0 / message.content["config"]["server-round"]})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)
"""

SCRIPT = """
import shoal.client.flower_apps
from client_app import app

shoal.client.flower_apps.serve(app)
"""


@pytest.mark.slow
def test_a_federation_of_client_apps(tmp_path):
    (tmp_path / "client_app.py").write_text(CLIENT)
    (tmp_path / "site.py").write_text(SCRIPT)
    sites = [shoal.Site(f"site-{number}", config={"examples": number}) for number in (1, 3)]
    job = shoal.Job(
        "flower", script=tmp_path / "site.py", model={"w": torch.zeros(4)}, sites=sites, rounds=2, accelerator="cpu"
    )
    result = job.run()
    expected = torch.zeros(4)
    for _ in range(2):
        expected = (1 * (0.5 * expected + 1) + 3 * (0.5 * expected + 3)) / 4
    torch.testing.assert_close(result.params["w"], expected)
    assert [record["train_loss"] for record in result.history] == [1.0, 0.5]


@pytest.mark.slow
def test_a_script_by_itself_gets_one_task(tmp_path: Path):
    (tmp_path / "client_app.py").write_text(CLIENT.replace('context.node_config["examples"]', "2"))
    script = "import torch" + SCRIPT.replace("serve(app)", "serve(app, {'w': torch.zeros(4)})")
    (tmp_path / "site.py").write_text(script)
    done = subprocess.run([sys.executable, "site.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "2 examples: loss 1" in done.stdout, done.stderr
