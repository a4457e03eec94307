"""An agent's durable memory in SQLite: on disk when a call returns, checked when it is opened, rebuilt when it is damaged."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import attrs

from mcp.model.errors import AdapterError, MalformedMessage
from mcp.model.messages import OperationRecord
from mcp.model.ports import Intent
from mcp.model.spec import ServiceSpec

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA_VERSION = 1
ANSWERS_KEPT_S = 24 * 3600.0
ANSWERS_KEPT = 1000
"""How long, and how many, recorded answers to orders are kept: the same order again gets the same answer."""

_SCHEMA = """
create table intents (
    service text not null, is_candidate integer not null, op text not null, generation integer not null,
    spec text not null, spec_hash text not null, desired text not null, ready integer not null,
    primary key (service, is_candidate)
) strict;
create table ports (
    service text not null, component text not null, route text not null, generation integer not null, port integer not null,
    primary key (service, component, route, generation)
) strict;
create table answers (
    key text primary key, op text not null, service text not null, kind text not null, generation integer not null,
    outcome text not null, detail text not null, ended_at text not null, ended_s real not null, reply blob not null
) strict;
create table generations (service text primary key, highest integer not null) strict;
create table facts (name text primary key, value integer not null) strict;
"""


SpecToText = Callable[[ServiceSpec], str]
TextToSpec = Callable[[str], ServiceSpec]


class SqliteRecords:
    """Implements Records (mcp/model/ports.py) in one file; one thread does all the waiting for the disk."""

    def __init__(self, path: str | Path, *, to_text: SpecToText, from_text: TextToSpec, wall_s: Callable[[], float] = time.time) -> None:
        self._path = Path(path)
        self._to_text = to_text
        self._from_text = from_text
        self._wall_s = wall_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="records")
        self._db: sqlite3.Connection | None = None
        self.rebuilt_reason = ""
        """Why the file had to be begun anew; "" when it was not."""

    # ------------------------------------------------------------------ opening

    async def open(self) -> None:
        """Open the file, or begin one; a damaged one is kept beside it.

        Raises:
            AdapterError: the folder cannot be written.
        """
        await self._run(self._open, None)

    def _open(self, _: None) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self._path.exists()
            self._db = self._connect()
            if is_new:
                self.rebuilt_reason = "there were no records"
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self._set_aside(str(error))

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("pragma journal_mode = wal")
            db.execute("pragma synchronous = full")
            (verdict,) = db.execute("pragma quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            (version,) = db.execute("pragma user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise sqlite3.OperationalError(f"the records are of a newer agent (schema {version}, ours is {SCHEMA_VERSION})")
            if version == 0:
                db.executescript(f"begin; {_SCHEMA} pragma user_version = {SCHEMA_VERSION}; commit;")
            db.execute("select count(*) from intents, ports, answers, generations, facts").fetchone()
        except sqlite3.Error as error:
            db.close()
            if "no such table" in str(error) or "no such column" in str(error):
                raise sqlite3.DatabaseError(str(error)) from error
            raise
        return db

    def _set_aside(self, why: str) -> None:
        kept = self._path.with_name(f"{self._path.name}.damaged-{int(self._wall_s())}")
        self._path.rename(kept)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(f"{kept}{suffix}")
        self.rebuilt_reason = f"the records were damaged ({why}) and are kept as {kept.name}"
        log.error("records damaged, begun anew: %s", self.rebuilt_reason)
        self._db = self._connect()

    async def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            await self._run(lambda db: db.close())
            self._db = None
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[sqlite3.Connection], T], db: sqlite3.Connection | None | str = "") -> T:
        target = self._db if db == "" else db
        if db == "" and target is None:
            raise AdapterError("the agent's records are not open", code="records_failed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, target)  # type: ignore[arg-type]
        except (sqlite3.Error, OSError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> AdapterError:
        text = str(error)
        if "disk is full" in text or "disk I/O error" in text or getattr(error, "errno", 0) == 28:
            return AdapterError(
                f"cannot write the agent's records ({self._path}): {text}; nothing was accepted",
                code="disk_full",
                retryable=True,
                hint="Free disk space on the node; running services are untouched.",
            )
        return AdapterError(f"the agent's records failed ({self._path}): {text}; nothing was accepted", code="records_failed")

    async def _write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("begin immediate")
            try:
                for statement, values in statements:
                    db.execute(statement, values)
                db.execute("commit")
            except sqlite3.Error:
                with suppress(sqlite3.Error):  # the first error is the one to tell
                    db.execute("rollback")
                raise

        await self._run(work)

    # ------------------------------------------------------------------ intents

    async def intents(self) -> list[Intent]:
        """Return all intents; one whose spec cannot be read any more is left out and told in the log."""
        rows = await self._run(lambda db: db.execute(
            "select service, op, generation, spec, spec_hash, desired, is_candidate, ready from intents order by service, generation"
        ).fetchall())
        found = []
        for service, op, generation, text, digest, desired, is_candidate, ready in rows:
            try:
                spec = self._from_text(text)
            except MalformedMessage as error:
                log.error("the record of %s cannot be read: %s", service, error.reason)
                continue
            found.append(Intent(
                service=service, op=op, generation=generation, spec=spec, spec_hash=digest, desired=desired,
                is_candidate=bool(is_candidate), ready=bool(ready),
            ))
        return found

    async def accept(self, intent: Intent, ports: Mapping[tuple[str, str], int] | None = None) -> None:
        """Write an intent in place of the one of its kind, with its ports."""
        await self._write(
            *(
                (
                    "insert or replace into ports values (?, ?, ?, ?, ?)",
                    (intent.service, component, route, intent.generation, port),
                )
                for (component, route), port in (ports or {}).items()
            ),
            (
                "insert or replace into intents values (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    intent.service, int(intent.is_candidate), intent.op, intent.generation, self._to_text(intent.spec),
                    intent.spec_hash, intent.desired, int(intent.ready),
                ),
            ),
            (
                "insert into generations values (?, ?) on conflict (service) do update set highest = max(highest, excluded.highest)",
                (intent.service, intent.generation),
            ),
        )  # fmt: skip

    async def commit(self, service: str, generation: int) -> None:
        """Make the candidate of that generation the committed intent; done already is fine."""
        await self._write(
            (
                "delete from intents where service = ?1 and is_candidate = 0 and exists"
                " (select 1 from intents where service = ?1 and is_candidate = 1 and generation = ?2)",
                (service, generation),
            ),
            (
                "update intents set is_candidate = 0 where service = ? and is_candidate = 1 and generation = ?",
                (service, generation),
            ),
            ("delete from ports where service = ? and generation < ?", (service, generation)),
        )

    async def forget(self, service: str, generation: int, *, candidate_only: bool = False) -> None:
        """Drop a service's intents up to a generation, and their ports."""
        if candidate_only:
            await self._write(
                ("delete from intents where service = ? and is_candidate = 1 and generation <= ?", (service, generation)),
                (
                    "delete from ports where service = ?1 and generation <= ?2 and generation not in"
                    " (select generation from intents where service = ?1)",
                    (service, generation),
                ),
            )
        else:
            await self._write(
                ("delete from intents where service = ? and generation <= ?", (service, generation)),
                ("delete from ports where service = ? and generation <= ?", (service, generation)),
            )

    # -------------------------------------------------------------------- ports

    async def ports_of(self, service: str, generation: int) -> dict[tuple[str, str], int]:
        """Return the host ports of a generation."""
        rows = await self._run(lambda db: db.execute(
            "select component, route, port from ports where service = ? and generation = ?", (service, generation)
        ).fetchall())
        return {(component, route): port for component, route, port in rows}

    async def ports(self) -> set[int]:
        """Return every remembered host port."""
        return {row[0] for row in await self._run(lambda db: db.execute("select port from ports").fetchall())}

    # ------------------------------------------------------------------ answers

    async def finish(self, record: OperationRecord, reply: bytes) -> None:
        """Remember the end of an order; old answers go."""
        now_s = self._wall_s()
        await self._write(
            (
                "insert or replace into answers values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    f"{record.op}/{record.kind}", record.op, record.service, record.kind, record.generation,
                    record.outcome, record.detail, record.ended_at, now_s, reply,
                ),
            ),
            ("delete from answers where ended_s < ?", (now_s - ANSWERS_KEPT_S,)),
            (
                "delete from answers where key in (select key from answers order by ended_s desc limit -1 offset ?)",
                (ANSWERS_KEPT,),
            ),
        )  # fmt: skip

    async def finished(self, key: str) -> bytes | None:
        """Return the recorded answer of an order ("op/kind")."""
        row = await self._run(lambda db: db.execute(
            "select reply from answers where key = ? and ended_s >= ?", (key, self._wall_s() - ANSWERS_KEPT_S)
        ).fetchone())
        return bytes(row[0]) if row else None

    async def operations(self, limit: int = 50) -> list[OperationRecord]:
        """Return the youngest ends of orders."""
        rows = await self._run(lambda db: db.execute(
            "select op, service, kind, generation, outcome, detail, ended_at from answers order by ended_s desc limit ?", (limit,)
        ).fetchall())
        names = [field.name for field in attrs.fields(OperationRecord)]
        return [OperationRecord(**dict(zip(names, row, strict=True))) for row in rows]

    # -------------------------------------------------------------------- facts

    async def highest_generation(self, service: str) -> int:
        """Return the highest generation ever accepted."""
        row = await self._run(lambda db: db.execute("select highest from generations where service = ?", (service,)).fetchone())
        return int(row[0]) if row else 0

    async def highest_epoch(self) -> int:
        """Return the highest epoch ever obeyed."""
        row = await self._run(lambda db: db.execute("select value from facts where name = 'epoch'").fetchone())
        return int(row[0]) if row else 0

    async def raise_epoch(self, epoch: int) -> None:
        """Remember an epoch; lower ones are ignored."""
        await self._write((
            "insert into facts values ('epoch', ?) on conflict (name) do update set value = max(value, excluded.value)", (epoch,)
        ))



