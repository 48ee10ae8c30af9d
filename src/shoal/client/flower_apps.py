"""A ClientApp of Flower's, as it is, at a site of shoal's.

A site's script is then::

    import shoal.client.flower_apps
    from client_app import app  # the user's own, which knows nothing of shoal

    shoal.client.flower_apps.serve(app)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.client.loop import tasks
from shoal.client.state_dicts import arrays_by_name
from shoal.client.task import Task
from shoal.errors import ConfigurationError, MissingExtraError, SiteError
from shoal.types import Array

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, Metadata, RecordDict
    from flwr.clientapp import ClientApp
except ModuleNotFoundError as missing:
    raise MissingExtraError("flwr", purpose="call a ClientApp", extra="flower") from missing

ARRAYS, CONFIG, METRICS, WEIGHT, ROUND = "arrays", "config", "metrics", "num-examples", "server-round"
"""How Flower's own strategies call the records of a message, and two of their entries."""

PROXIMAL = "proximal-mu"
"""How Flower's FedProx calls the strength of its term, which the app is to add."""

TTL = 24 * 3600.0


def serve(
    app: ClientApp,
    model: Any = None,
    *,
    evaluate: bool = False,
    config: Mapping[str, Any] | None = None,
    node_config: Mapping[str, Any] | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> None:
    """Does a federation's tasks with a ClientApp, until the federation is over; every rank of the site calls it alike.

    For each task the app gets what Flower's own strategies send: the global model as the record ``arrays``, and the
    record ``config`` with ``server-round``. It replies with ``arrays`` and with ``metrics`` that hold
    ``num-examples``, the site's weight. Its context is one and the same for the whole federation, so what it keeps in
    ``context.state`` stays.

    Args:
        app: With functions that are registered by ``@app.train()``, and ``@app.evaluate()`` where it is to measure.
        model: Whose arrays say the order of the global model's: a module, a Keras model, or names. None where the app
            knows arrays by their names, such as by ``to_torch_state_dict()``.
        evaluate: Whether the app measures the global model, too.
        config: More entries for the record ``config``, such as ``{"lr": 0.1}``.
        node_config: More of the context's; the site's own settings are in it, and ``partition-id``, its number.
        run_config: The context's.

    Raises:
        ConfigurationError: The app is not of this kind, or replies with something else.
        SiteError: It replies with an error.
        WorkerError: The server, or another rank, is gone.
    """
    if vars(app).get("_call") is not None:
        raise ConfigurationError(
            "this ClientApp is made of a client_fn, whose messages are of Flower's older kind: register its functions "
            "with @app.train() and @app.evaluate()"
        )
    names = _names(model)
    context: Any = None
    for task in tasks(None if isinstance(model, Sequence) else model, evaluate=evaluate):
        if context is None:
            context = _context(task, node_config or {}, run_config or {})
        message = _message(task, names, config or {})
        context.run_id = message.metadata.run_id
        _reply(task, app(message, context), names)


def _names(model: Any) -> Sequence[str] | None:
    """Returns the names of a model's arrays in the order in which its framework gives them out."""
    if model is None:
        return None
    if isinstance(model, Sequence):
        return [str(name) for name in model]
    if hasattr(model, "weights") and not hasattr(model, "state_dict"):
        return [variable.path for variable in model.weights]
    return list(arrays_by_name(model))


def _context(task: Task, node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> Any:
    own = {"partition-id": task.client, **_scalars(task.config), **node_config}
    return Context(run_id=1, node_id=task.client + 1, node_config=own, state=RecordDict(), run_config=dict(run_config))


def _message(task: Task, names: Sequence[str] | None, config: Mapping[str, Any]) -> Any:
    if task.objective.correction:
        raise ConfigurationError(
            "this federation's algorithm adds a linear term to the loss, of which a ClientApp of Flower's knows "
            "nothing: choose another algorithm, such as fedavg"
        )
    told = {**_scalars(task.config), **config, ROUND: task.round}
    if task.objective.proximal:
        told[PROXIMAL] = task.objective.proximal
    metadata = Metadata(
        run_id=1,
        message_id=f"shoal-{task.number}",
        src_node_id=0,
        dst_node_id=task.client + 1,
        reply_to_message_id="",
        group_id=str(task.round),
        created_at=time.time(),
        ttl=TTL,
        message_type=task.kind,
    )
    content = RecordDict({ARRAYS: _record(task.params, names), CONFIG: ConfigRecord(told)})
    return Message(content=content, metadata=metadata)


def _record(params: Mapping[str, Array], names: Sequence[str] | None) -> Any:
    given = {name: params[name] for name in _ordered(params, names)}
    try:
        return ArrayRecord(
            {name: _array(array) for name, array in given.items()},
        )
    except TypeError as error:
        raise ConfigurationError(
            f"Flower's own arrays have numpy's dtypes, and the model has others: {error}; train it in float32"
        ) from error


def _array(array: Array) -> Any:
    from flwr.app import Array as FlowerArray

    plain = array.detach().cpu().numpy() if hasattr(array, "detach") else array
    return FlowerArray(plain)


def _ordered(params: Mapping[str, Array], names: Sequence[str] | None) -> Sequence[str]:
    if names is None:
        return list(params)
    if set(names) != set(params):
        strange = sorted(set(names) ^ set(params))[:3]
        raise ConfigurationError(f"the model given to serve(…) is another than the federation's: {', '.join(strange)}")
    return names


def _reply(task: Task, reply: Any, names: Sequence[str] | None) -> None:
    if reply.has_error():
        raise SiteError(f"the ClientApp replied with an error ({reply.error.code}): {reply.error.reason}")
    content = reply.content
    metrics = {name: value for record in content.metric_records.values() for name, value in record.items()}
    examples = metrics.pop(WEIGHT, None)
    if not isinstance(examples, int | float):
        raise ConfigurationError(f"the ClientApp's reply lacks {WEIGHT!r} in its MetricRecord: the site's weight")
    means = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    if task.kind == "evaluate":
        task.reply(examples=examples, metrics=means)
        return
    task.reply(params=_trained(task, content, names), examples=examples, metrics=means)


def _trained(task: Task, content: Any, names: Sequence[str] | None) -> dict[str, Array]:
    """Returns the arrays of a reply by the model's names, of the framework that the federation's model has."""
    records = content.array_records
    if ARRAYS not in records and len(records) != 1:
        raise ConfigurationError(f"the ClientApp's reply lacks its ArrayRecord {ARRAYS!r}: the model after training")
    record = records[ARRAYS] if ARRAYS in records else next(iter(records.values()))
    given = {str(name): array.numpy() for name, array in record.items()}
    expected = _ordered(task.params, names)
    if list(given) == [str(number) for number in range(len(expected))]:  # as a list of arrays comes
        given = dict(zip(expected, given.values(), strict=True))
    return {name: _like(task.params.get(name), array) for name, array in given.items()}


def _like(own: Array | None, array: Array) -> Array:
    if own is None or not hasattr(own, "detach"):
        return array
    import torch

    return torch.from_numpy(array.copy()).to(own.dtype)


def _scalars(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the kinds that Flower's records and contexts hold."""
    return {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
