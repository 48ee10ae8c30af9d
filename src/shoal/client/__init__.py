"""What a user's own training script imports to join a federation.

::

    import shoal.client

    for task in shoal.client.tasks():  # on every rank; ends on all of them together
        task.load(net)
        ...                                    # DDP, FSDP, anything
        task.reply(params=net.state_dict(), examples=n, metrics={"loss": loss})
"""

from shoal.client.imperative import init, is_running, receive, send
from shoal.client.loop import config, tasks
from shoal.client.task import Task

__all__ = ["Task", "config", "init", "is_running", "receive", "send", "tasks"]
