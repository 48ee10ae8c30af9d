from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare")

from shoal.deploy.nvflare_executor import FOLDER, FOLDER_FILE, ShoalExecutor


def context(folder):
    """Returns what NVFlare tells an executor, of a client whose folder ``local`` this is."""
    workspace = SimpleNamespace(get_site_config_dir=lambda: str(folder))
    return SimpleNamespace(get_engine=lambda: SimpleNamespace(get_workspace=lambda: workspace))


@pytest.mark.parametrize(
    ("variable", "file", "argument", "found"),
    [
        ("/variable", "/file", "/argument", "/variable"),
        ("", "/file\n", "/argument", "/file"),
        ("", "/file", "", "/file"),
        ("", None, "/argument", "/argument"),
        ("", None, "", None),
    ],
)
def test_the_client_says_which_site_is_its_own_before_the_job_does(
    tmp_path, monkeypatch, variable, file, argument, found
):
    monkeypatch.setenv(FOLDER, variable)
    if file is not None:
        (tmp_path / FOLDER_FILE).write_text(file)
    given = ShoalExecutor(argument)._folder_given(context(tmp_path))
    assert given == (None if found is None else Path(found))
