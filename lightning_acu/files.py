"""Files, and folders of files, that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["require_writable", "write_whole", "write_whole_folder"]


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Make the file ``path`` by ``write``; a reader sees the old file or the whole new one, never a part.

    ``write`` gets another path, of the same name, in a temporary folder beside ``path``. What it writes there is synced
    to disk, and then takes the place of ``path`` in one step; a symbolic link at ``path`` is replaced, not followed. If
    ``write`` raises, ``path`` stays as it was and nothing is left behind.

    Args:
        path: the file to write; its folder must exist.
        write: writes a file to the path that it is given.

    Raises:
        OSError: the folder does not exist or is full, the file cannot be written, and so on.
    """
    path = Path(path)
    # A folder and not a file of tempfile: that would be readable for its owner only, also when it is in place.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary = Path(folder, path.name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_whole_folder(folder: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Make the folder ``folder`` by ``write``, or put new files into one that exists; all of them or none.

    ``write`` gets a temporary folder beside ``folder`` and writes files there, none in folders of their own. When all
    are written and synced to disk, the temporary folder becomes ``folder``; or, if that exists, each file takes the
    place of the one of its name there, in one step, and others stay. If ``write`` raises, nothing is changed.

    Args:
        folder: the folder to make or to fill; missing directories above it are created.
        write: writes files into the folder that it is given.

    Raises:
        OSError: the disk is full, a file cannot be written, ``folder`` is a file, and so on.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as outer:
        temporary = Path(outer, folder.name)  # not `outer` itself, which only its owner can read
        temporary.mkdir()
        write(temporary)
        files = sorted(temporary.iterdir())
        for path in files:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if not folder.exists():
            os.replace(temporary, folder)
            return
        for path in files:
            os.replace(path, folder / path.name)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Create ``folder`` where it does not exist, and check that files can be written there by writing one.

    Raises:
        OSError: they cannot.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    # Not an empty file: a full disk has room for those. This one is gone as soon as it is closed.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(65536))
        file.flush()
        os.fsync(file.fileno())
