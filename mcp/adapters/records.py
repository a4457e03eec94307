"""An agent's durable memory in SQLite: on disk when a call returns, checked when it is opened, begun anew when it is damaged."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import attrs

from mcp.model.errors import AdapterError, MalformedMessage
from mcp.model.messages import OperationRecord
from mcp.model.ports import Intent
from mcp.model.spec import ServiceSpec

log = logging.getLogger(__name__)

T = TypeVar("T")
SpecToText = Callable[[ServiceSpec], str]
TextToSpec = Callable[[str], ServiceSpec]

ANSWERS_KEPT_S = 24 * 3600.0
ANSWERS_KEPT = 1000
"""How long, and how many, recorded answers to orders are kept: the same order again gets the same answer."""

LOCKED_OUT_S = 2.0
"""How long opening waits for another agent to let go of the file."""

SMALLEST_PAGE_BYTES = 512
"""No SQLite file is smaller, but for an empty one."""

_MIGRATIONS = (
    # Each ends at the version that is its place in this list; a release only ever adds to it. Every row ends with a sum
    # of its values, for SQLite itself does not notice a bit that flips within one.
    """
    create table intents (
        service text, is_candidate integer, op text, generation integer, spec text, spec_hash text, desired text,
        ready integer, sum text not null, primary key (service, is_candidate)
    ) strict;
    create table ports (
        service text, component text, route text, generation integer, port integer, sum text not null,
        primary key (service, component, route, generation)
    ) strict;
    create table answers (
        key text primary key, op text, service text, kind text, generation integer, outcome text, detail text,
        ended_at text, ended_s real, reply blob, sum text not null
    ) strict;
    create table generations (service text primary key, highest integer, sum text not null) strict;
    create table facts (name text primary key, value integer, sum text not null) strict;
    """,
)
_TABLES = ("intents", "ports", "answers", "generations", "facts")

_SURROUNDINGS = frozenset(
    {
        sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY,
    }
)  # fmt: skip
"""Errors that are the disk's or another process's; any other at opening is the file's own."""


class _DamagedError(Exception):
    """What is in the file cannot be what we wrote."""


class SqliteRecords:
    """Implements Records (mcp/model/ports.py) in one file; one thread does all the waiting for the disk."""

    def __init__(
        self,
        path: str | Path,
        *,
        to_text: SpecToText,
        from_text: TextToSpec,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.rebuilt_reason = ""
        """Why the file had to be begun anew; "" when it was not."""
        self._path = Path(path)
        self._to_text = to_text
        self._from_text = from_text
        self._wall_s = wall_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._db: sqlite3.Connection | None = None

    # ------------------------------------------------------------------ opening

    async def open(self) -> None:
        """Open the file, or begin one; a damaged one is kept beside it.

        Raises:
            AdapterError: the folder cannot be used (code disk_full, records_locked or records_failed).
        """
        try:
            self._db = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        except (sqlite3.Error, OSError) as error:
            raise self._failed(error) from error

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._connect()
        except _DamagedError as error:
            self._set_aside(str(error))
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        size = self._path.stat().st_size if self._path.exists() else 0
        if 0 < size < SMALLEST_PAGE_BYTES:  # SQLite would take it for a new file
            raise _DamagedError(f"only {size} bytes are left")
        db = sqlite3.connect(self._path, timeout=LOCKED_OUT_S, isolation_level=None, check_same_thread=False)
        try:
            # Nobody else may write while we do; it also needs no shared memory file, so a full disk can still be read.
            db.execute("pragma locking_mode = exclusive")
            db.execute("pragma journal_mode = wal")
            db.execute("pragma synchronous = full")
            self._migrate(db)
            _check(db)
        except sqlite3.Error as error:
            db.close()
            if self._is_damage(error):
                raise _DamagedError(str(error)) from error
            raise
        except UnicodeError as error:  # the name of something in the file, in an error about it
            db.close()
            raise _DamagedError("not text where text should be") from error
        except _DamagedError:
            db.close()
            raise
        return db

    def _migrate(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("pragma user_version").fetchone()
        if version > len(_MIGRATIONS) or version < 0:
            raise _DamagedError(f"they are of another agent: version {version}, this one writes {len(_MIGRATIONS)}")
        if version == 0 and db.execute("select count(*) from sqlite_schema").fetchone() != (0,):
            raise _DamagedError("there are tables and no version")
        if version == 0 and not self.rebuilt_reason:
            self.rebuilt_reason = "there were no records"
        if version < len(_MIGRATIONS):
            scripts = "".join(_MIGRATIONS[version:])
            db.executescript(f"begin; {scripts} pragma user_version = {len(_MIGRATIONS)}; commit;")

    def _is_damage(self, error: sqlite3.Error) -> bool:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_READONLY:
            # Also what SQLite says of a file whose head claims a format newer than its own.
            return os.access(self._path, os.W_OK) and os.access(self._path.parent, os.W_OK)
        return code not in _SURROUNDINGS

    def _set_aside(self, why: str) -> None:
        kept = self._path.with_name(f"{self._path.name}.damaged-{int(self._wall_s())}")
        while kept.exists():
            kept = kept.with_name(kept.name + "x")
        self._path.rename(kept)
        with suppress(FileNotFoundError):
            self._path.with_name(self._path.name + "-wal").rename(f"{kept}-wal")
        self.rebuilt_reason = f"the records were damaged ({why}); they are kept as {kept.name}"
        log.error("records damaged, begun anew", extra={"reason": self.rebuilt_reason})

    async def close(self) -> None:
        """Close the file."""
        db, self._db = self._db, None
        if db is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, db.close)
        self._thread.shutdown(wait=False)

    # ------------------------------------------------------------ the one thread

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        db = self._db
        if db is None:
            raise AdapterError("the agent's records are not open", code="records_failed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, db)
        except (sqlite3.Error, OSError, OverflowError, UnicodeError) as error:
            raise self._failed(error) from error

    async def _read(self, query: str, *values: object) -> list[Any]:
        return await self._run(lambda db: db.execute(query, values).fetchall())

    async def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        def transaction(db: sqlite3.Connection) -> None:
            db.execute("begin immediate")
            try:
                work(db)
                db.execute("commit")
            except Exception:  # whatever it was: an open transaction would spoil every later one
                with suppress(sqlite3.Error):  # the first error is the one to tell
                    db.execute("rollback")
                raise

        await self._run(transaction)

    def _failed(self, error: Exception) -> AdapterError:
        code, text = getattr(error, "sqlite_errorcode", 0) & 0xFF, str(error)
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) or getattr(error, "errno", 0) == 28:
            return AdapterError(
                f"cannot write the agent's records ({self._path}): {text}; nothing was accepted",
                code="disk_full",
                retryable=True,
                hint="Free disk space on the node; running services are untouched.",
            )
        if code == sqlite3.SQLITE_BUSY:
            return AdapterError(
                f"cannot use the agent's records ({self._path}): another agent has them open",
                code="records_locked",
                retryable=True,
                hint="Only one agent may run with one state folder: `systemctl status mcp-agent`.",
            )
        return AdapterError(
            f"cannot use the agent's records ({self._path}): {text}; nothing was accepted", code="records_failed"
        )

    # ------------------------------------------------------------------ intents

    async def intents(self) -> list[Intent]:
        """Return all intents; one whose spec cannot be read any more is left out and told in the log."""
        found = []
        for service, is_candidate, op, generation, text, spec_hash, desired, ready, _ in await self._read(
            "select * from intents order by service, generation"
        ):
            try:
                spec = self._from_text(text)
            except MalformedMessage as error:
                log.warning("record left out: unreadable spec", extra={"service": service, "reason": error.reason})
                continue
            found.append(
                Intent(
                    service=service,
                    op=op,
                    generation=generation,
                    spec=spec,
                    spec_hash=spec_hash,
                    desired=desired,
                    is_candidate=bool(is_candidate),
                    ready=bool(ready),
                )
            )
        return found

    async def accept(self, intent: Intent, ports: Mapping[tuple[str, str], int] | None = None) -> None:
        """Write an intent in place of the one of its kind, with its ports."""
        spec = self._to_text(intent.spec)

        def work(db: sqlite3.Connection) -> None:
            for (component, route), port in (ports or {}).items():
                _put(db, "ports", intent.service, component, route, intent.generation, port)
            _put(
                db, "intents", intent.service, int(intent.is_candidate), intent.op, intent.generation, spec,
                intent.spec_hash, intent.desired, int(intent.ready),
            )  # fmt: skip
            if intent.generation > _highest(db, intent.service):
                _put(db, "generations", intent.service, intent.generation)

        await self._write(work)

    async def commit(self, service: str, generation: int) -> None:
        """Make the candidate of that generation the committed intent; done already is fine."""

        def work(db: sqlite3.Connection) -> None:
            candidate = db.execute(
                "select * from intents where service = ? and is_candidate = 1 and generation = ?", (service, generation)
            ).fetchone()
            if candidate is not None:
                db.execute("delete from intents where service = ? and is_candidate = 1", (service,))
                _put(db, "intents", service, 0, *candidate[2:-1])
            db.execute("delete from ports where service = ? and generation < ?", (service, generation))

        await self._write(work)

    async def forget(self, service: str, generation: int, *, candidate_only: bool = False) -> None:
        """Drop a service's intents up to a generation, and the ports of generations that nobody means any more."""

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "delete from intents where service = ? and generation <= ? and is_candidate >= ?",
                (service, generation, int(candidate_only)),
            )
            db.execute(
                "delete from ports where service = ?1 and generation <= ?2"
                " and generation not in (select generation from intents where service = ?1)",
                (service, generation),
            )

        await self._write(work)

    # -------------------------------------------------------------------- ports

    async def ports_of(self, service: str, generation: int) -> dict[tuple[str, str], int]:
        """Return the host ports of a generation."""
        rows = await self._read(
            "select component, route, port from ports where service = ? and generation = ?", service, generation
        )
        return {(component, route): port for component, route, port in rows}

    async def ports(self) -> set[int]:
        """Return every remembered host port."""
        return {port for (port,) in await self._read("select port from ports")}

    # ------------------------------------------------------------------ answers

    async def finish(self, record: OperationRecord, reply: bytes) -> None:
        """Remember the end of an order under "op/kind"; old answers go."""
        now_s = float(self._wall_s())

        def work(db: sqlite3.Connection) -> None:
            _put(
                db, "answers", f"{record.op}/{record.kind}", record.op, record.service, record.kind, record.generation,
                record.outcome, record.detail, record.ended_at, now_s, bytes(reply),
            )  # fmt: skip
            db.execute("delete from answers where ended_s < ?", (now_s - ANSWERS_KEPT_S,))
            db.execute(
                "delete from answers where key in"
                " (select key from answers order by ended_s desc, rowid desc limit -1 offset ?)",
                (ANSWERS_KEPT,),
            )

        await self._write(work)

    async def finished(self, key: str) -> bytes | None:
        """Return the recorded answer of an order ("op/kind")."""
        oldest_s = self._wall_s() - ANSWERS_KEPT_S
        rows = await self._read("select reply from answers where key = ? and ended_s >= ?", key, oldest_s)
        return bytes(rows[0][0]) if rows else None

    async def operations(self, limit: int = 50) -> list[OperationRecord]:
        """Return the youngest ends of orders."""
        rows = await self._read(
            "select op, service, kind, generation, outcome, detail, ended_at from answers"
            " order by ended_s desc, rowid desc limit ?",
            limit,
        )
        names = [field.name for field in attrs.fields(OperationRecord)]
        return [OperationRecord(**dict(zip(names, row, strict=True))) for row in rows]

    # -------------------------------------------------------------------- facts

    async def highest_generation(self, service: str) -> int:
        """Return the highest generation ever accepted."""
        return await self._run(lambda db: _highest(db, service))

    async def highest_epoch(self) -> int:
        """Return the highest epoch ever obeyed."""
        return await self._run(_epoch)

    async def raise_epoch(self, epoch: int) -> None:
        """Remember an epoch; lower ones are ignored."""
        if epoch > await self.highest_epoch():
            await self._write(lambda db: _put(db, "facts", "epoch", max(epoch, _epoch(db))))


def _put(db: sqlite3.Connection, table: str, *values: object) -> None:
    marks = ", ".join("?" * (len(values) + 1))
    db.execute(f"insert or replace into {table} values ({marks})", (*values, _sum(values)))  # noqa: S608 - table is ours


def _highest(db: sqlite3.Connection, service: str) -> int:
    row = db.execute("select highest from generations where service = ?", (service,)).fetchone()
    return int(row[0]) if row else 0


def _epoch(db: sqlite3.Connection) -> int:
    row = db.execute("select value from facts where name = 'epoch'").fetchone()
    return int(row[0]) if row else 0


def _sum(values: Iterable[object]) -> str:
    return hashlib.blake2b(repr(tuple(values)).encode(), digest_size=8).hexdigest()


def _check(db: sqlite3.Connection) -> None:
    """Look at every page and every row.

    Raises:
        _DamagedError: with what is wrong first.
    """
    (verdict,) = db.execute("pragma integrity_check(1)").fetchone()
    if verdict != "ok":
        raise _DamagedError(verdict)
    for table in _TABLES:
        rows = db.execute(f"select * from {table}").fetchall()  # noqa: S608 - table is ours
        if any(_sum(row[:-1]) != row[-1] for row in rows):
            raise _DamagedError(f"a row of {table} is not as it was written")
