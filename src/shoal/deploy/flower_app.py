"""A federation as an app of Flower's: a folder that ``flwr run`` takes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from shoal.deploy.flower_server import FILES, NONCE, ORDER
from shoal.deploy.flower_tools import toml_string
from shoal.errors import ConfigurationError
from shoal.runs.files import is_taken, storing, write_atomic
from shoal.version import __version__

SUFFIXES = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
"""What Flower carries; it leaves other files out without a word."""

LARGEST = 8_000_000
"""Bytes of all files together; Flower carries 10 MiB, compressed."""

DEEPEST = 8
"""Folders in folders; Flower carries 10, of which the app has one."""

LEFT_OUT = re.compile(r"test_.*\.py|.*_test\.py|pyproject\.toml|.*\.egg")
"""The names of files that Flower leaves out all the same."""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")

PUBLISHER = "shoal"

CLIENT = '''"""The app at every site: it brings messages to the process that `shoal site` runs there."""

import shoal.flower

app = shoal.flower.client_app
'''

SERVER = '''"""The app at the server: shoal's federation, over Flower's messages."""

from pathlib import Path

import shoal.flower

app = shoal.flower.make_server_app(Path(__file__).parent)
'''


def write_app(folder: Path, *, order: str, name: str, files: Mapping[str, Path]) -> None:
    """Writes a complete app of Flower's into a new folder.

    Args:
        folder: Must not exist, or be empty.
        order: What to run, as JSON; an experiment that is a relative path is one of the files.
        name: What Flower calls the app; other characters than letters, digits and '-' become '-'.
        files: What the experiment needs at the server, by the relative path it has there: files, or folders of files.

    Raises:
        ConfigurationError: The folder has something in it, or Flower does not carry one of the files.
        StorageError: The folder cannot be written.
    """
    if is_taken(folder):
        raise ConfigurationError(f"{folder} is there already: export to a new folder")
    carried = _carried(files)
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for relative, source in carried.items():
            target = folder / FILES / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    write_atomic(folder / "client_app.py", CLIENT)
    write_atomic(folder / "server_app.py", SERVER)
    # Last, because a folder without it is no app.
    write_atomic(folder / "pyproject.toml", _pyproject(order, app_name(name)))


def app_name(name: str) -> str:
    """Returns a name as Flower allows it.

    Raises:
        ConfigurationError: Nothing of it is.
    """
    plain = re.sub(r"[^A-Za-z0-9-]+", "-", name).lstrip("-0123456789").rstrip("-")[:32]
    if not NAME.fullmatch(plain):
        raise ConfigurationError(f"{name!r} cannot be the name of an app: it needs letters, such as 'digits-run'")
    return plain


def _carried(files: Mapping[str, Path]) -> dict[str, Path]:
    """Returns all files by their relative paths.

    Raises:
        ConfigurationError: Flower would leave one out, or refuse them all.
    """
    found: dict[str, Path] = {}
    for relative, source in files.items():
        place = PurePosixPath(relative)
        if place.is_absolute() or ".." in place.parts:
            raise ConfigurationError(f"{relative} must be a path in the app, not one that leads out of it")
        if not source.is_dir():
            found[relative] = source
            continue
        for path in sorted(source.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[str(place / path.relative_to(source).as_posix())] = path
    for relative, source in found.items():
        _check(PurePosixPath(relative), source)
    total = sum(source.stat().st_size for source in found.values())
    if total > LARGEST:
        raise ConfigurationError(
            f"the experiment's files have {total / 1e6:.1f} MB, and Flower carries 8; {_instead()}"
        )
    return found


def _check(relative: PurePosixPath, source: Path) -> None:
    if not source.is_file():
        raise ConfigurationError(f"{source} is no file: an app cannot carry it")
    if relative.suffix not in SUFFIXES:
        kinds = " ".join(SUFFIXES)
        raise ConfigurationError(f"Flower does not carry {relative}: only files that end in {kinds}; {_instead()}")
    if LEFT_OUT.fullmatch(relative.name):
        raise ConfigurationError(f"Flower leaves out files that are called like {relative}: name it differently")
    if len(relative.parts) > DEEPEST:
        raise ConfigurationError(f"{relative} lies deeper than the {DEEPEST} folders that Flower carries; {_instead()}")


def _instead() -> str:
    return "put the folder on the machine of the SuperLink and say its path there with --at"


def _pyproject(order: str, name: str) -> str:
    rows = [
        "[project]",
        f"name = {toml_string(name)}",
        'version = "1.0.0"',
        "description = \"A federation of shoal's, over Flower's messages.\"",
        'license = "LicenseRef-Private"',
        'requires-python = ">=3.11"',
        f'dependencies = ["shoal[flower]=={__version__}"]',
        "",
        "[tool.flwr.app]",
        f'publisher = "{PUBLISHER}"',
        "",
        "[tool.flwr.app.components]",
        'serverapp = "server_app:app"',
        'clientapp = "client_app:app"',
        "",
        "[tool.flwr.app.config]",
        f"{ORDER} = {toml_string(order)}",
        f'{NONCE} = ""',
    ]
    return "\n".join(rows) + "\n"
