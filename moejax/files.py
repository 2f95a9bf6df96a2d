"""Files are written so that a full disk, a kill or a read-only folder never destroys existing content."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name in the same folder, then rename it: a full disk or a kill leaves the old file, or none.

    A pipe or a device, or a file in a folder that takes no new file, is written directly.
    """
    if file.exists() and not (file.is_file() and os.access(file.parent, os.W_OK)):
        write(file)
        return
    if file.exists() and not os.access(file, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
    # the whole path: pandas takes a path that begins with "file:" for a URL
    unfinished = file.absolute().with_name(f".{file.name}.{os.getpid()}")
    try:
        write(unfinished)
        unfinished.replace(file.resolve())
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_for_results(folder: Path, option: str) -> Iterator[Path]:
    """A folder to write files into; they move to `folder` together if the block ends without an error; else none does.

    An error about `folder` comes at once, not after hours of work.

    Args:
        folder: made if it does not exist, and left as it was if the block ends in an error.
        option: the option that named it, for the message.

    Raises:
        OSError: the folder cannot be made or written; the message is one line.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    except OSError as error:
        raise type(error)(f"{option} {folder}: cannot be written: {error.strerror}") from None
    try:
        yield scratch
        for file in sorted(scratch.iterdir()):
            file.replace(folder / file.name)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    shutil.rmtree(scratch, ignore_errors=True)
