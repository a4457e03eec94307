"""What Records promises, in memory and in SQLite; and what SQLite does on the bad days of a disk."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from mcp.adapters.fake import FakeClock, FakeRecords
from mcp.adapters.records import ANSWERS_KEPT, SqliteRecords
from mcp.model.errors import AdapterError, MalformedMessage
from mcp.model.messages import OperationRecord
from mcp.model.ports import Intent, Records
from mcp.model.spec import ComponentSpec, ServiceSpec
from tests.helpers import eventually

DAY_S = 24 * 3600.0


def spec(name: str, image: str = "web:v1") -> ServiceSpec:
    return ServiceSpec(name=name, components=(ComponentSpec(name=name, image=image),))


def intent(service: str = "web", generation: int = 1, **changes: Any) -> Intent:
    made = Intent(
        service=service, op=f"op{generation}", generation=generation, spec=spec(service), spec_hash="abc", desired="running"
    )  # fmt: skip
    return attrs.evolve(made, **changes)


def candidate(service: str = "web", generation: int = 1, **changes: Any) -> Intent:
    return intent(service, generation, is_candidate=True, **changes)


def ended(op: str, kind: str = "run_workload", **changes: Any) -> OperationRecord:
    record = OperationRecord(
        op=op, service="web", kind=kind, generation=1, outcome="done", ended_at="2026-01-01T00:00:00Z"
    )  # fmt: skip
    return attrs.evolve(record, **changes)


def to_text(spec: ServiceSpec) -> str:
    return f"{spec.name} {spec.components[0].image}"


def from_text(text: str) -> ServiceSpec:
    name, _, image = text.partition(" ")
    if not image:
        raise MalformedMessage("no spec")
    return spec(name, image)


def sqlite_records(path: Path, clock: FakeClock | None = None) -> SqliteRecords:
    return SqliteRecords(path, to_text=to_text, from_text=from_text, wall_s=(clock or FakeClock()).wall_s)


@attrs.define
class Kept:
    """Records under test, with a clock and a way to restart the agent that has them."""

    records: Records
    clock: FakeClock
    reopen: Callable[[], Awaitable[Records]]


@pytest.fixture(params=["memory", "sqlite"])
async def kept(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kept]:
    clock = FakeClock()
    if request.param == "memory":
        memory = FakeRecords(clock)

        async def again() -> Records:
            memory.reopen()
            return memory

        yield Kept(records=memory, clock=clock, reopen=again)
        return
    opened = [sqlite_records(tmp_path / "state" / "records.db", clock)]
    await opened[0].open()

    async def reopen() -> Records:
        await opened[-1].close()
        opened.append(sqlite_records(tmp_path / "state" / "records.db", clock))
        await opened[-1].open()
        return opened[-1]

    yield Kept(records=opened[0], clock=clock, reopen=reopen)
    await opened[-1].close()


# --------------------------------------------------------------------- promises


async def test_new_records_say_that_there_were_none_and_old_ones_do_not(kept: Kept) -> None:
    assert kept.records.rebuilt_reason == "there were no records"
    assert await kept.records.intents() == []
    assert (await kept.reopen()).rebuilt_reason == ""


async def test_what_was_accepted_is_there_after_a_restart(kept: Kept) -> None:
    own, new = intent(ready=True), candidate(generation=2, desired="stopped")
    await kept.records.accept(own, {("web", ""): 10001})
    await kept.records.accept(new, {("web", ""): 10002, ("web", "admin"): 10003})
    await kept.records.raise_epoch(7)
    await kept.records.finish(ended("op1"), b"\x00reply\xff")
    records = await kept.reopen()
    assert await records.intents() == [own, new]
    assert await records.ports_of("web", 2) == {("web", ""): 10002, ("web", "admin"): 10003}
    assert await records.ports() == {10001, 10002, 10003}
    assert (await records.highest_epoch(), await records.highest_generation("web")) == (7, 2)
    assert await records.finished("op1/run_workload") == b"\x00reply\xff"
    assert await records.operations() == [ended("op1")]


async def test_an_intent_replaces_the_one_of_its_kind(kept: Kept) -> None:
    await kept.records.accept(candidate(generation=1))
    await kept.records.accept(candidate(generation=1, ready=True))
    assert await kept.records.intents() == [candidate(generation=1, ready=True)]


async def test_a_candidate_becomes_the_services_own_and_older_ports_go(kept: Kept) -> None:
    await kept.records.accept(intent(generation=1), {("web", ""): 10001})
    await kept.records.accept(candidate(generation=2), {("web", ""): 10002})
    await kept.records.accept(intent("db", 1), {("db", ""): 10009})
    for _ in range(2):
        await kept.records.commit("web", 2)
        assert await kept.records.intents() == [intent("db", 1), intent(generation=2)]
        assert await kept.records.ports() == {10002, 10009}


async def test_committing_a_generation_that_is_no_candidate_changes_no_intent(kept: Kept) -> None:
    await kept.records.accept(intent(generation=1))
    await kept.records.accept(candidate(generation=3))
    await kept.records.commit("web", 2)
    assert await kept.records.intents() == [intent(generation=1), candidate(generation=3)]


async def test_a_forgotten_candidate_leaves_the_services_own_and_its_ports(kept: Kept) -> None:
    await kept.records.accept(intent(generation=1), {("web", ""): 10001})
    await kept.records.accept(candidate(generation=2), {("web", ""): 10002})
    await kept.records.forget("web", 2, candidate_only=True)
    assert await kept.records.intents() == [intent(generation=1)]
    assert await kept.records.ports() == {10001}


async def test_a_forgotten_service_leaves_only_its_highest_generation(kept: Kept) -> None:
    await kept.records.accept(intent(generation=1), {("web", ""): 10001})
    await kept.records.accept(candidate(generation=2), {("web", ""): 10002})
    await kept.records.accept(intent("db", 5))
    await kept.records.forget("web", 2)
    assert await kept.records.intents() == [intent("db", 5)]
    assert await kept.records.ports() == set()
    assert await kept.records.highest_generation("web") == 2


async def test_forgetting_spares_what_is_newer(kept: Kept) -> None:
    await kept.records.accept(intent(generation=1), {("web", ""): 10001})
    await kept.records.accept(candidate(generation=3), {("web", ""): 10003})
    await kept.records.forget("web", 2)
    assert await kept.records.intents() == [candidate(generation=3)]
    assert await kept.records.ports() == {10003}


async def test_generations_and_epochs_never_fall(kept: Kept) -> None:
    for number in (3, 5, 4):
        await kept.records.accept(candidate(generation=number))
        await kept.records.raise_epoch(number)
    assert await kept.records.highest_generation("web") == 5
    assert await kept.records.highest_epoch() == 5
    assert await kept.records.highest_generation("nothing") == 0


async def test_an_answer_is_given_again_for_a_day(kept: Kept) -> None:
    await kept.records.finish(ended("op1"), b"first")
    await kept.records.finish(ended("op1", "commit_workload"), b"second")
    await kept.clock.advance(DAY_S - 1)
    assert await kept.records.finished("op1/run_workload") == b"first"
    assert await kept.records.finished("op1/commit_workload") == b"second"
    assert await kept.records.finished("op2/run_workload") is None
    await kept.clock.advance(2)
    assert await kept.records.finished("op1/run_workload") is None
    await kept.records.finish(ended("op2"), b"third")
    assert await kept.records.operations() == [ended("op2")]


async def test_an_answer_that_is_given_twice_is_kept_once(kept: Kept) -> None:
    await kept.records.finish(ended("op1"), b"first")
    await kept.records.finish(ended("op2"), b"other")
    await kept.records.finish(ended("op1", outcome="failed"), b"second")
    assert await kept.records.finished("op1/run_workload") == b"second"
    assert await kept.records.operations() == [ended("op1", outcome="failed"), ended("op2")]
    assert await kept.records.operations(1) == [ended("op1", outcome="failed")]


@pytest.mark.timeout(120)
async def test_no_more_than_a_thousand_answers_are_kept(kept: Kept) -> None:
    for number in range(ANSWERS_KEPT + 5):
        await kept.records.finish(ended(f"op{number}"), b"x")
    assert len(await kept.records.operations(5000)) == ANSWERS_KEPT
    assert await kept.records.finished("op4/run_workload") is None
    assert await kept.records.finished("op5/run_workload") == b"x"


async def test_many_calls_at_once_are_all_kept(kept: Kept) -> None:
    await asyncio.gather(
        *(kept.records.accept(intent(f"s{n}"), {("web", ""): 10000 + n}) for n in range(50)),
        *(kept.records.finish(ended(f"op{n}"), b"x") for n in range(50)),
        *(kept.records.raise_epoch(n) for n in range(50)),
    )
    records = await kept.reopen()
    assert len(await records.intents()) == len(await records.operations()) == len(await records.ports()) == 50
    assert await records.highest_epoch() == 49


# ------------------------------------------------------------------- the real file


async def full_file(path: Path, services: int = 3) -> None:
    """Write records with something of everything."""
    records = sqlite_records(path)
    await records.open()
    for number in range(services):
        await records.accept(intent(f"s{number}"), {("web", ""): 10001 + number})
        await records.accept(candidate(f"s{number}", 2))
        await records.finish(ended(f"op{number}"), b"reply")
    await records.raise_epoch(3)
    await records.close()


async def contents(path: Path) -> tuple[str, list[Any]]:
    """Open records and return why they were rebuilt and everything in them."""
    records = sqlite_records(path)
    await records.open()
    try:
        everything = [
            await records.intents(),
            await records.ports(),
            await records.operations(),
            await records.highest_epoch(),
        ]
        everything += [await records.finished(f"op{n}/run_workload") for n in range(3)]
        everything += [await records.highest_generation(f"s{n}") for n in range(3)]
        return records.rebuilt_reason, everything
    finally:
        await records.close()


async def test_everything_that_is_written_is_synced_before_the_call_returns(tmp_path: Path) -> None:
    records = sqlite_records(tmp_path / "records.db")
    await records.open()
    assert await records._read("pragma synchronous") == [(2,)]
    assert await records._read("pragma journal_mode") == [("wal",)]
    await records.close()


@pytest.mark.timeout(120)
async def test_a_file_cut_anywhere_is_kept_aside_and_begun_anew(tmp_path: Path) -> None:
    await full_file(tmp_path / "whole.db")
    whole = (tmp_path / "whole.db").read_bytes()
    chance = random.Random(1)
    for length in sorted(
        {1, 15, 16, 99, 100, 4095, 4096, 4097, len(whole) - 1, *chance.sample(range(2, len(whole)), 50)}
    ):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "records.db").write_bytes(whole[:length])
        reason, everything = await contents(folder / "records.db")
        assert "the records were damaged" in reason, length
        assert everything[0] == []
        [aside] = folder.glob("records.db.damaged-*")
        assert aside.read_bytes() == whole[:length]
        assert aside.name in reason


async def test_an_empty_file_is_no_records(tmp_path: Path) -> None:
    (tmp_path / "records.db").write_bytes(b"")
    assert (await contents(tmp_path / "records.db"))[0] == "there were no records"


@pytest.mark.timeout(300)
async def test_no_flipped_bit_is_believed(tmp_path: Path) -> None:
    await full_file(tmp_path / "whole.db")
    whole = (tmp_path / "whole.db").read_bytes()
    _, before = await contents(tmp_path / "whole.db")
    chance = random.Random(2)
    # All of the file's head, and a sample of the rest: every place once takes minutes.
    flips = [*range(100), *chance.sample(range(100, len(whole)), 400)]
    found = 0
    for at in flips:
        data = bytearray(whole)
        data[at] ^= 1 << chance.randrange(8)
        path = tmp_path / f"flip-{at}.db"
        path.write_bytes(data)
        reason, after = await contents(path)
        if "the records were damaged" in reason:
            found += 1
        else:
            assert (reason, after) == ("", before), f"byte {at}"
        for rest in tmp_path.glob(f"flip-{at}.db*"):
            rest.unlink()
    assert found > 20


async def test_a_row_that_was_changed_from_outside_is_not_believed(tmp_path: Path) -> None:
    await full_file(tmp_path / "records.db")
    with sqlite3.connect(tmp_path / "records.db") as db:
        db.execute("update intents set spec = 's1 evil:v1' where service = 's1'")
    db.close()
    reason, everything = await contents(tmp_path / "records.db")
    assert "a row of intents is not as it was written" in reason
    assert everything[0] == []


async def test_a_file_of_a_newer_agent_is_kept_aside_and_the_agent_starts(tmp_path: Path) -> None:
    await full_file(tmp_path / "records.db")
    with sqlite3.connect(tmp_path / "records.db") as db:
        db.execute("pragma user_version = 9")
    db.close()
    reason, _ = await contents(tmp_path / "records.db")
    assert "another agent: version 9, this one writes 1" in reason


async def test_damage_twice_in_a_second_is_kept_twice(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "records.db").write_bytes(b"this is no database, and long enough to be looked at" * 40)
        assert "damaged" in (await contents(tmp_path / "records.db"))[0]
    assert len(list(tmp_path.glob("records.db.damaged-*"))) == 2


async def test_a_spec_that_cannot_be_read_any_more_is_left_out(tmp_path: Path) -> None:
    def unreadable(spec: ServiceSpec) -> str:
        return spec.name if spec.name == "s1" else to_text(spec)

    records = SqliteRecords(tmp_path / "records.db", to_text=unreadable, from_text=from_text)
    await records.open()
    await records.accept(intent("s1"))
    await records.accept(intent("s2"))
    assert await records.intents() == [intent("s2")]
    await records.close()


async def test_a_value_that_cannot_be_stored_spoils_nothing_else(tmp_path: Path) -> None:
    records = sqlite_records(tmp_path / "records.db")
    await records.open()
    for bad in (intent(generation=1 << 70), intent(op="\ud800")):
        with pytest.raises(AdapterError) as caught:
            await records.accept(bad, {("web", ""): 10001})
        assert caught.value.code == "records_failed"
    await records.accept(intent("s2"))
    assert await records.intents() == [intent("s2")]
    assert await records.ports() == set()
    await records.close()


@pytest.mark.timeout(90)
async def test_two_agents_cannot_have_one_file(tmp_path: Path) -> None:
    first, second = sqlite_records(tmp_path / "records.db"), sqlite_records(tmp_path / "records.db")
    await first.open()
    with pytest.raises(AdapterError) as caught:
        await second.open()
    assert caught.value.code == "records_locked"
    assert second.rebuilt_reason == ""
    await second.close()
    await first.accept(intent())
    await first.close()
    assert (await contents(tmp_path / "records.db"))[1][0] == [intent()]


async def test_records_that_are_closed_say_so(tmp_path: Path) -> None:
    records = sqlite_records(tmp_path / "records.db")
    with pytest.raises(AdapterError, match="not open"):
        await records.intents()
    await records.close()


async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    records = sqlite_records(tmp_path / "file" / "records.db")
    with pytest.raises(AdapterError, match="file/records"):
        await records.open()
    await records.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.contract.test_records import intent, sqlite_records

async def main():
    records = sqlite_records(Path(sys.argv[1]))
    await records.open()
    for generation in range(1, 1_000_000):
        await records.accept(intent(generation=generation), {("web", ""): generation, ("web", "admin"): generation})
        print(generation, flush=True)

asyncio.run(main())
"""


def write_and_be_killed(path: Path, after: int) -> int:
    """Have a process write until it has said so many times that something is kept; return the last that it said."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(after)]
        writer.kill()
        said += writer.stdout.readlines()
    return int([line for line in said if line.endswith("\n")][-1])


@pytest.mark.timeout(180)
async def test_a_writer_that_is_killed_loses_nothing_that_it_was_told_is_kept(tmp_path: Path) -> None:
    chance = random.Random(3)
    for life in range(6):
        path = tmp_path / f"records-{life}.db"
        last = write_and_be_killed(path, after=chance.randrange(1, 60))
        records = sqlite_records(path)
        await records.open()
        assert records.rebuilt_reason == ""
        [found] = await records.intents()
        assert found.generation in (last, last + 1)
        assert await records.ports_of("web", found.generation) == {
            ("web", ""): found.generation,
            ("web", "admin"): found.generation,
        }
        await records.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a file system of 256 KiB takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode()}")
    yield folder
    eventually("it is unmounted", lambda: subprocess.run(["umount", folder], check=False).returncode == 0)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(b"x" * 512) == 512:
            pass


async def accept_until_full(records: SqliteRecords, accepted: list[str]) -> None:
    for number in range(1000):
        big = intent(f"s{number}", spec=spec(f"s{number}", "x" * 4000))
        await records.accept(big, {("web", ""): 11000 + number})
        accepted.append(big.service)


async def test_a_full_disk_refuses_what_is_new_and_keeps_what_was_there(small_disk: Path) -> None:
    records = sqlite_records(small_disk / "records.db")
    await records.open()
    await records.accept(intent("first"), {("web", ""): 10001})
    (small_disk / "ballast").write_bytes(b"x" * 60_000)
    accepted = ["first"]
    with pytest.raises(AdapterError) as caught:
        await accept_until_full(records, accepted)
    assert (caught.value.code, caught.value.retryable) == ("disk_full", True)
    assert "nothing was accepted" in caught.value.reason
    assert sorted(found.service for found in await records.intents()) == sorted(accepted)
    assert len(await records.ports()) == len(accepted)
    await records.close()

    again = sqlite_records(small_disk / "records.db")
    await again.open()
    assert again.rebuilt_reason == ""
    assert sorted(found.service for found in await again.intents()) == sorted(accepted)
    (small_disk / "ballast").unlink()
    await again.accept(intent("last"))
    assert "last" in [found.service for found in await again.intents()]
    await again.close()


async def test_an_agent_whose_disk_is_full_starts_and_knows_what_it_knew(small_disk: Path) -> None:
    await full_file(small_disk / "records.db")
    fill(small_disk)
    reason, everything = await contents(small_disk / "records.db")
    assert reason == ""
    assert len(everything[0]) == 6
