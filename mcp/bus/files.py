"""Files that are whole or not there, and private files that nobody else may read."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from mcp.model.errors import AdapterError

PRIVATE = 0o600
PUBLIC = 0o644


def write_whole(path: Path, text: str, mode: int = PUBLIC) -> None:
    """Put a file on disk so that a crash leaves the old one or the new one, never half of it.

    Raises:
        AdapterError: the file is as it was; code disk_full or file.
    """
    draft = write_draft(path, text, mode)
    publish(draft, path)


def write_draft(path: Path, text: str, mode: int = PUBLIC) -> Path:
    """Write and sync a file beside its final place, for a look at it before `publish`; return where it lies."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The mode is given at creation: a key must not be readable even for the moment before a chmod.
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            os.fchmod(handle, mode)  # the umask may have taken bits away
            _write_all(handle, text.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        _drop(draft)
        raise _file_error("write", path, error) from error
    return draft


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def publish(draft: Path, path: Path) -> None:
    """Move a draft to its final name, durably."""
    try:
        draft.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        _drop(draft)
        raise _file_error("write", path, error) from error


def point_link(link: Path, target: Path) -> None:
    """Have a symbolic link lead somewhere, without a moment in which there is none.

    Raises:
        AdapterError: it leads where it did.
    """
    draft = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    try:
        draft.symlink_to(target)
        draft.replace(link)
    except OSError as error:
        _drop(draft)
        raise _file_error("write", link, error) from error


def _drop(draft: Path) -> None:
    with suppress(
        OSError
    ):  # a read-only file system refuses this too, even for what is not there; the first error counts
        draft.unlink()


def remove(path: Path) -> None:
    """Remove a file, durably; absent already is fine."""
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise _file_error("remove", path, error) from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder last."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_private_folder(path: Path) -> None:
    """Have a folder that only its owner may enter."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise _file_error("make", path, error) from error


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        AdapterError: code file, with the path and the reason.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _file_error("read", path, error) from error
    except UnicodeDecodeError as error:
        raise AdapterError(f"cannot read {path}: it is not text", code="file") from error


def read_private(path: Path) -> str:
    """Return the text of a file with a secret in it.

    Raises:
        AdapterError: code file; or code key_file when others can read the file, with the command that mends it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise _file_error("read", path, error) from error
    if mode & 0o077:
        raise AdapterError(
            f"cannot use {path}: others can read it (mode {mode:04o})",
            code="key_file",
            hint=f"Take their rights away: chmod 600 {path}",
        )
    return read_text(path)


def _file_error(doing: str, path: Path, error: OSError) -> AdapterError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return AdapterError(
        f"cannot {doing} {path}: {(error.strerror or str(error)).lower()}", code="disk_full" if full else "file"
    )
