from __future__ import annotations

import hashlib
import json
import math
import threading
from datetime import datetime

import numpy as np
import pytest
import torch
from hypothesis import given
from test_parcel import tensors

from shoal.deploy import audit
from shoal.deploy.audit import AUDIT, AuditLog, norm, summary
from shoal.deploy.parcel import raw
from shoal.errors import StorageError
from shoal.processes.tensors import CODES


@given(tensors())
def test_the_norm_is_the_definition_of_one(tensor):
    found = norm(tensor)
    if tensor.dtype.startswith("float8"):
        assert found is None
        return
    array = torch.frombuffer(bytearray(tensor.data), dtype=torch.uint8) if len(tensor.data) else torch.empty(0)
    if tensor.dtype == "bool":
        wide = np.frombuffer(tensor.data, bool).astype(np.float64)
    elif len(tensor.data):
        wide = array.view(getattr(torch, tensor.dtype)).double().numpy()
    else:
        wide = np.zeros(0)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = math.sqrt(np.sum(wide * wide)) if np.isfinite(np.sum(wide * wide)) else None
    assert found == wanted or math.isclose(found, wanted, rel_tol=1e-12)


def test_large_arrays_are_read_in_pieces(monkeypatch):
    array = np.linspace(-1, 1, 1001)
    whole = norm(raw(array))
    monkeypatch.setattr(audit, "PIECE", 10)
    assert math.isclose(norm(raw(array)), whole, rel_tol=1e-12)
    assert math.isclose(whole, np.linalg.norm(array), rel_tol=1e-12)
    assert math.isclose(norm(raw(torch.tensor([3.0, 4.0], dtype=torch.bfloat16))), 5.0)


def test_no_value_is_in_the_summary():
    array = np.array([[1.5, 2.5]], np.float32)
    assert summary({"b": raw(array), "a": raw(np.zeros((), np.int64))}) == {
        "bytes": 16,
        "arrays": {
            "a": {"dtype": "int64", "shape": [], "norm": 0.0, "sha256": hashlib.sha256(bytes(8)).hexdigest()},
            "b": {
                "dtype": "float32",
                "shape": [1, 2],
                "norm": math.sqrt(8.5),
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            },
        },
    }
    assert all(json.dumps(summary({"a": raw(torch.zeros(2).to(getattr(torch, kind)))})) for kind in CODES)


def test_lines_that_are_written_at_once_are_whole(tmp_path):
    log = AuditLog(tmp_path)
    threads = [threading.Thread(target=lambda n=n: [log.write({"n": n, "i": i}) for i in range(50)]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    told = [json.loads(line) for line in (tmp_path / AUDIT).read_text().splitlines()]
    assert sorted((line["n"], line["i"]) for line in told) == [(n, i) for n in range(8) for i in range(50)]
    assert all(datetime.fromisoformat(line["time"]).tzinfo is not None for line in told)


def test_a_record_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(StorageError, match="audit.jsonl could not be written"):
        AuditLog(tmp_path / "gone").write({})
