from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

from shoal.deploy.nvflare_executor import read_order
from shoal.deploy.nvflare_job import CLASSES, ORDER, write_job
from shoal.deploy.nvflare_project import allowing
from shoal.errors import ConfigurationError

ORDER_TEXT = json.dumps({"experiment": "digits", "name": "FedAvg", "settings": {"x": "{1}"}, "run_dir": ""})


def validated(folder):
    valid, error, meta = JobMetaValidator().validate(folder.name, zip_directory_to_bytes("", str(folder)))
    assert valid, error
    return meta


@pytest.mark.parametrize("sites", [(), ("a", "b")])
@pytest.mark.parametrize("own_code", [True, False])
def test_nvflare_takes_the_job(tmp_path, sites, own_code):
    write_job(tmp_path / "job", order=ORDER_TEXT, name="run-1", sites=sites, min_clients=2, own_code=own_code)
    meta = validated(tmp_path / "job")
    assert meta["name"] == "run-1"
    assert meta["min_clients"] == 2
    assert meta["deploy_map"] == {"app": ["server", "a", "b"] if sites else ["@ALL"]}
    assert bool(meta.get("byoc")) == own_code


def test_the_order_is_kept_as_it_is(tmp_path):
    write_job(tmp_path / "job", order=ORDER_TEXT, name="run-1")
    config = tmp_path / "job" / "app" / "config"
    assert json.loads((config / ORDER).read_text()) == json.loads(ORDER_TEXT)
    server = json.loads((config / "config_fed_server.json").read_text())
    assert server["workflows"][0]["args"]["order"] == ORDER


def test_it_brings_files_and_folders(tmp_path):
    (tmp_path / "code" / "__pycache__").mkdir(parents=True)
    (tmp_path / "code" / "model.py").write_text("A = 1")
    (tmp_path / "code" / "__pycache__" / "model.pyc").write_text("")
    files = {"model.py": tmp_path / "code" / "model.py", "deep/package": tmp_path / "code"}
    write_job(tmp_path / "job", order=ORDER_TEXT, name="run", files=files, own_code=False)
    custom = tmp_path / "job" / "app" / "custom"
    assert {str(path.relative_to(custom)) for path in custom.rglob("*.py*")} == {"model.py", "deep/package/model.py"}
    assert validated(tmp_path / "job")["byoc"]


def workspace(tmp_path):
    """Returns what the executor asks of NVFlare's workspace, with one job's files in it."""

    class Workspace:
        def get_root_dir(self):
            return str(tmp_path / "job")

        def get_app_config_dir(self, job):
            return str(tmp_path / "job" / "app" / "config")

        def get_app_custom_dir(self, job):
            return str(tmp_path / "job" / "app" / "custom")

    return Workspace()


def test_an_experiment_that_the_job_brings_is_found_there(tmp_path):
    (tmp_path / "mine.py").write_text("")
    order = json.dumps({"experiment": "mine.py", "name": "mine"})
    write_job(tmp_path / "job", order=order, name="run", files={"mine.py": tmp_path / "mine.py"})
    found = read_order(workspace(tmp_path), "1", ORDER)["experiment"]
    assert found == str(tmp_path / "job" / "app" / "custom" / "mine.py")
    with pytest.raises(ConfigurationError, match="no order"):
        read_order(workspace(tmp_path), "1", "other.json")


def test_code_that_a_job_brings_beside_its_code_is_not_run(tmp_path):
    """NVFlare asks for the right to bring code where a job has a folder of it, and other files come with any job."""
    hidden = tmp_path / "job" / "app" / "config" / "x.py"
    for number, said in enumerate(["../config/x.py", str(hidden), "digits", "/srv/mine.py"]):
        shutil.rmtree(tmp_path / "job", ignore_errors=True)
        write_job(tmp_path / "job", order=json.dumps({"experiment": said, "name": "mine"}), name="run", own_code=False)
        hidden.write_text("")
        if number < 2:
            with pytest.raises(ConfigurationError, match="no code that this job has brought"):
                read_order(workspace(tmp_path), "1", ORDER)
        else:
            assert read_order(workspace(tmp_path), "1", ORDER)["experiment"] == said


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"name": "a b"}, "cannot be a name"),
        ({"sites": ["a", "../b"]}, "cannot be a name"),
        ({"sites": ["a", "server"]}, "NVFlare's own"),
        ({"sites": ["a", "a"]}, "must differ"),
        ({"min_clients": 0}, "min_clients"),
        ({"sites": ["a"], "min_clients": 2}, "min_clients"),
        ({"files": {"../x.py": __file__}}, "inside"),
        ({"files": {"/x.py": __file__}}, "inside"),
        ({"files": {"x.py": "/does/not/exist"}}, "cannot be read"),
        ({"order": "[]"}, "JSON object"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changed, text):
    changed = {**changed, "files": {name: Path(path) for name, path in changed.get("files", {}).items()}}
    with pytest.raises(ConfigurationError, match=text):
        write_job(tmp_path / "job", **{"order": ORDER_TEXT, "name": "run", **changed})


def test_it_overwrites_nothing(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "precious").touch()
    with pytest.raises(ConfigurationError, match="not empty"):
        write_job(tmp_path / "job", order=ORDER_TEXT, name="run")


def test_what_is_allowed_is_what_nvflare_compares_with():
    allowed = allowing({"class_allow_list": ["nvflare.x.Y"], "format_version": 2})
    assert allowed["format_version"] == 2
    assert allowed["class_allow_list"] == ["nvflare.x.Y", *CLASSES]
    assert allowing(allowed) == allowed
    found, _, _ = ComponentPathAuthorizer()._get_policy_from_resources(allowed)
    assert set(CLASSES) <= set(found)
