"""A ClientApp of Flower's that sends back the arrays that it was sent."""

from __future__ import annotations

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]  # flwr is not there to be checked against
def train(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
    """Returns the arrays, and a number of examples."""
    content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
