from __future__ import annotations

import fcntl
import gzip
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shoal.data import cifar10, digits, fashion_mnist
from shoal.data.catalogue.download import fetch
from shoal.data.catalogue.fashion_mnist import DEBIAN, FILES, read_idx
from shoal.errors import ConfigurationError, DataError, MissingDataError, MissingExtraError

CONTENT = bytes(range(256)) * 40
MD5 = hashlib.md5(CONTENT).hexdigest()


@contextmanager
def serving(*, content=CONTENT, cut_after=None, ranges=True, status=200):
    """A server on the loopback; it notes the ranges it was asked for and may cut its first answer short."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            asked.append(wanted)
            if status != 200:
                self.send_error(status)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and ranges else 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = cut_after if cut_after is not None and len(asked) == 1 else len(content)
            self.wfile.write(content[start:end])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file.bin", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_file_is_fetched_once(tmp_path):
    with serving() as (url, asked):
        for _ in range(2):
            assert fetch(url, tmp_path / "new" / "file.bin", md5=MD5).read_bytes() == CONTENT
    assert asked == [None]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.bin"]


def test_several_at_once_fetch_it_once(tmp_path):
    with serving() as (url, asked), ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(fetch, url, tmp_path / "file.bin", md5=MD5, timeout=5) for _ in range(4)]
        assert [wait.result(timeout=20).read_bytes() for wait in waits] == [CONTENT] * 4
    assert asked == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_nobody_waits_for_ever_for_another_that_fetches_it(tmp_path):
    with (tmp_path / "file.bin.part.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is at it, and has made no progress for 0.4 seconds"):
            fetch("http://127.0.0.1:9/file.bin", tmp_path / "file.bin", md5=MD5, timeout=0.2)


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_transfer_goes_on_where_it_ended(tmp_path, ranges):
    with serving(cut_after=3000, ranges=ranges) as (url, asked):
        with pytest.raises(DataError, match=r"file.bin cannot be downloaded \(.*\); put it into "):
            fetch(url, tmp_path / "file.bin", md5=MD5, timeout=5)
        assert not (tmp_path / "file.bin").exists()
        assert len((tmp_path / "file.bin.part").read_bytes()) == 3000
        assert fetch(url, tmp_path / "file.bin", md5=MD5, timeout=5).read_bytes() == CONTENT
    assert asked == [None, "bytes=3000-"]


def test_a_part_that_is_whole_is_not_fetched_again(tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    with serving() as (url, _):
        assert fetch(url, tmp_path / "file.bin", md5=MD5, timeout=5).read_bytes() == CONTENT


def test_another_file_than_the_published_one_is_removed(tmp_path):
    with serving() as (url, _), pytest.raises(DataError, match=f"with MD5 {MD5}, not 0000; it was removed"):
        fetch(url, tmp_path / "file.bin", md5="0000")
    assert list(tmp_path.iterdir()) == []


def test_a_zip_archive_without_a_published_checksum_is_tried_itself(tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("numbers.txt", "1 2 3 " * 100)
    whole = packed.getvalue()
    with serving(content=whole) as (url, _):
        assert fetch(url, tmp_path / "file.zip", md5=None, timeout=5).read_bytes() == whole
    (tmp_path / "file.zip").unlink()
    for wrong, fault in (
        (whole.replace(b"1 2 3 1", b"1 2 3 7"), "whose numbers.txt is damaged"),
        (whole[:-30], "that is no whole zip archive"),
    ):
        with serving(content=wrong) as (url, _), pytest.raises(DataError, match=f"gave a file {fault}.*was removed"):
            fetch(url, tmp_path / "file.zip", md5=None, timeout=5)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_had_says_what_to_put_where(tmp_path):
    with serving(status=404) as (url, _), pytest.raises(DataError, match=f"Not Found.*; put it into {tmp_path}"):
        fetch(url, tmp_path / "file.bin", md5=MD5)
    with pytest.raises(DataError, match=f"refused.*; put it into {tmp_path}"):
        fetch(url, tmp_path / "file.bin", md5=MD5, timeout=5)  # nobody listens there any more
    assert list(tmp_path.iterdir()) == []


def test_digits_are_split_by_class_and_seed():
    train, test = digits(seed=1)
    assert len(train) + len(test) == 1797
    assert train.inputs.shape[1:] == (1, 8, 8)
    assert (train.inputs.dtype, train.targets().dtype) == (np.float32, np.int64)
    assert (train.inputs.min(), train.inputs.max()) == (0, 1)
    share = np.bincount(test.targets()) / (np.bincount(test.targets()) + np.bincount(train.targets()))
    assert np.abs(share - 0.2).max() < 0.01
    assert np.array_equal(digits(seed=1)[1].inputs, test.inputs)
    assert not np.array_equal(digits(seed=2)[1].inputs[:300], test.inputs[:300])
    with pytest.raises(ConfigurationError, match="test_fraction must be in"):
        digits(test_fraction=1.0)


def test_digits_without_scikit_learn_give_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'shoal\[demo\]'"):
        digits()


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4) for size in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_fashion(folder: Path, *, zipped: bool) -> None:
    rng = np.random.default_rng(0)
    for name in FILES:
        array = rng.integers(256, size=(6, 28, 28)) if "images" in name else rng.integers(10, size=6)
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_is_read_from_its_original_files(tmp_path, zipped):
    write_fashion(tmp_path, zipped=zipped)
    train, _ = fashion_mnist(data_dir=tmp_path)
    rng = np.random.default_rng(0)
    assert np.array_equal(train.inputs[:, 0], rng.integers(256, size=(6, 28, 28)))
    assert train.targets().tolist() == rng.integers(10, size=6).tolist()
    assert (train.inputs.dtype, train.targets().dtype, train.classes) == (np.uint8, np.int64, 10)
    assert train.inputs.flags.writeable  # else they would not stay on a GPU


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"is damaged: 15 bytes for an array of shape \(4, 2, 2\)"),
        (lambda raw: raw[:9], "is no IDX file of unsigned bytes with 3 dimensions"),
        (lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "is no IDX file of unsigned bytes"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
        (lambda raw: b"\x1f\x8b" + raw, "cannot be read"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, damage, message):
    raw = damage(idx(np.arange(16).reshape(4, 2, 2)))
    path = tmp_path / ("images.gz" if raw[:2] == b"\x1f\x8b" else "images")
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f"{path.name} {message}"):
        read_idx(path, dimensions=3)


def test_a_missing_fashion_mnist_file_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.data.catalogue.fashion_mnist.SOURCE", "http://127.0.0.1:9")
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte.gz cannot be downloaded .* Debian package dataset-fashion"
    ):
        fashion_mnist(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("load", "file"), [(fashion_mnist, "train-images-idx3-ubyte.gz"), (cifar10, "cifar-10-python.tar.gz")]
)
def test_nothing_is_downloaded_against_the_users_will(tmp_path, monkeypatch, load, file):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("it asked the network"))
    with pytest.raises(MissingDataError, match=f"there is no .*{tmp_path}.*put .* there") as refused:
        load(data_dir=tmp_path, download=False)
    assert file in str(refused.value)
    (write_fashion(tmp_path, zipped=True) if load is fashion_mnist else write_cifar(tmp_path, packed=True))
    train, _ = load(data_dir=tmp_path, download=False)
    assert len(train)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist():
    train, test = fashion_mnist()
    assert (train.inputs.shape, test.inputs.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert np.bincount(train.targets()).tolist() == [6000] * 10
    train.check()


def cifar_batch(seed):
    rng = np.random.default_rng(seed)
    return {
        b"batch_label": b"a batch",
        b"labels": rng.integers(10, size=4).tolist(),
        b"data": rng.integers(256, size=(4, 3072), dtype=np.uint8),
        b"filenames": [b"x.png"] * 4,
    }


def write_cifar(folder: Path, *, packed: bool, change=lambda name, raw: raw) -> None:
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files = {name: change(name, pickle.dumps(cifar_batch(seed), protocol=2)) for seed, name in enumerate(names)}
    if not packed:
        (folder / "cifar-10-batches-py").mkdir()
        for name, raw in files.items():
            (folder / "cifar-10-batches-py" / name).write_bytes(raw)
        return
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_is_read_from_its_original_format(tmp_path, packed):
    write_cifar(tmp_path, packed=packed)
    train, test = cifar10(data_dir=tmp_path)
    assert (train.inputs.shape, test.inputs.shape) == ((20, 3, 32, 32), (4, 3, 32, 32))
    assert np.array_equal(train.inputs[4:8].reshape(4, -1), cifar_batch(1)[b"data"])
    assert test.targets().tolist() == cifar_batch(5)[b"labels"]


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/shoal-test-payload-ran"),))


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    evil = pickle.dumps({b"data": Payload(), b"labels": []}, protocol=2)
    write_cifar(tmp_path, packed=True, change=lambda name, raw: evil if name == "data_batch_3" else raw)
    with pytest.raises(DataError, match=r"CIFAR-10's data_batch_3 is damaged: .* has no place among arrays"):
        cifar10(data_dir=tmp_path)
    assert not Path("/tmp/shoal-test-payload-ran").exists()


def test_damaged_cifar_archives_are_named(tmp_path):
    write_cifar(tmp_path, packed=True)
    archive = tmp_path / "cifar-10-python.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cifar-10-python.tar.gz cannot be read"):
        cifar10(data_dir=tmp_path)
    archive.unlink()
    write_cifar(tmp_path, packed=False, change=lambda name, raw: raw[:50] if name == "test_batch" else raw)
    with pytest.raises(DataError, match="CIFAR-10's test_batch is damaged"):
        cifar10(data_dir=tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").unlink()
    with pytest.raises(DataError, match="data_batch_2 cannot be read: No such file"):
        cifar10(data_dir=tmp_path)
