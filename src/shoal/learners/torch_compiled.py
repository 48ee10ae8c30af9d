"""A module's forward pass through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shoal.errors import ConfigurationError


def compiled(module: nn.Module) -> Callable[[Any], Any]:
    """Returns what calls a module as one compiled graph; the module and the names of its arrays stay as they are.

    The graph is made at the first call, and holds for batches of any size but 1, which has one of its own.

    Raises:
        ConfigurationError: On a call: the forward pass is not one graph, or there is nothing to compile it with.
    """
    run = torch.compile(module, fullgraph=True, dynamic=True)

    def call(inputs: Any) -> Any:
        import torch._dynamo.exc as exceptions

        try:
            return run(inputs)
        except (exceptions.TorchDynamoException, exceptions.FailOnRecompileLimitHit) as error:
            raise ConfigurationError(
                f"TorchLearner(compile=True): torch cannot compile {type(module).__name__}: {_reason(error)}; "
                "change the model, install the compiler that is missing, or leave compile out"
            ) from error

    return call


def _reason(error: BaseException) -> str:
    """Returns what a compiler's many lines say."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line of some is only which backend raised.
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1]).rstrip(".")
