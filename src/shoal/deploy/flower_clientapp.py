"""Flower's process for one message at a site, without the code of the app that the message belongs to."""

from __future__ import annotations

from typing import Any

from shoal.errors import ConfigurationError, EngineError

REPLACED = ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn")
"""The functions of Flower's by which an app's code gets to a site, and to run."""


def replace(runtime: Any, client_app: Any) -> None:
    """Has Flower's process run a ClientApp that is here in the place of the one that came with a message.

    Args:
        runtime: Flower's module.
        client_app: To run.

    Raises:
        EngineError: Flower does this in another way: nothing is run.
    """
    if missing := [name for name in REPLACED if not hasattr(runtime, name)]:
        raise EngineError(f"this version of Flower has no {missing[0]}, which would have to be replaced: use flwr 1.41")

    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigurationError("this site installs nothing that an app asks for")

    runtime.install_from_fab = lambda *_, **__: None
    runtime.install_app_dependencies = refuse
    runtime.get_load_client_app_fn = lambda *_, **__: lambda *_, **__: client_app
