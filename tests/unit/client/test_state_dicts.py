from __future__ import annotations

import pytest
import torch

from shoal.client.state_dicts import plain_names, refuse_parts
from shoal.errors import ConfigurationError


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["a", "b.c"], ["a", "b.c"]),
        (["module.a", "module.b"], ["a", "b"]),
        (["_orig_mod.a"], ["a"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["_orig_mod.module.a"], ["a"]),
        (["module.a", "head.b"], ["module.a", "head.b"]),
        (["a.module.b"], ["a.module.b"]),
        ([], []),
    ],
)
def test_a_wrapper_around_the_whole_is_taken_off(names, plain):
    assert plain_names(names) == dict(zip(plain, names, strict=True))


def test_what_is_divided_among_ranks_is_refused():
    parts = type("DTensor", (), {})()
    refuse_parts({"a": torch.ones(2)}, "gather it")
    with pytest.raises(ConfigurationError, match=r"b is divided among the ranks \(FSDP\): gather it"):
        refuse_parts({"a": torch.ones(2), "b": parts}, "gather it")
