"""What lies in schemas/ is what the messages say, and what a peer once sent is still read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp.bus import schemas
from mcp.bus.codec import decode, from_plain, open_frame, to_plain
from mcp.bus.schemas import FOLDER, frames_in, golden, samples, schema
from mcp.model.catalogue import CATALOGUE, Declared
from mcp.model.errors import MalformedMessage

KINDS = sorted(CATALOGUE)


def page(kind: str) -> str:
    return (FOLDER / "frames" / f"{kind}.json").read_text(encoding="utf-8")


def test_what_lies_in_schemas_is_what_the_messages_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", schemas.__name__, "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_message_has_a_schema_and_golden_frames_and_nothing_else_lies_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CATALOGUE)
    assert {path.stem for path in (FOLDER / "frames").glob("*.json")} == set(CATALOGUE)
    assert all(list(frames_in(page(kind))) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_frame_is_still_the_message_that_it_was(kind: str) -> None:
    for frame, message in frames_in(page(kind)):
        letter = open_frame(frame)
        assert letter.kind == kind
        assert letter.message == from_plain(CATALOGUE[kind].cls, message)
        assert says_all_of(to_plain(letter.message), message)


def says_all_of(told: Any, message: Any) -> bool:
    """Say whether everything of an old message is in what is read from it today; fields may have come since."""
    if isinstance(message, dict):
        return all(key in told and says_all_of(told[key], value) for key, value in message.items())
    if isinstance(message, list):
        return len(told) == len(message) and all(map(says_all_of, told, message))
    return type(told) is type(message) and bool(told == message)


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_frame_fits_its_schema(kind: str) -> None:
    made = schema(CATALOGUE[kind])
    jsonschema.Draft202012Validator.check_schema(made)
    for frame, message in frames_in(page(kind)):
        jsonschema.validate(msgpack.unpackb(frame.body), made)
        jsonschema.validate(message, made)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_schema_takes_what_the_codec_takes_and_nothing_else(kind: str, data: st.DataObject) -> None:
    entry = CATALOGUE[kind]
    plain = json.loads(json.dumps(to_plain(decode(kind, next(samples(entry)).body))))
    places = list(each_place(plain))
    if not places:
        return
    holder, key = data.draw(st.sampled_from(places))
    wrong = data.draw(st.sampled_from([None, "text", 5, -1, 2.5, True, [], {}, [None], {"a": None}, "DROP"]))
    if wrong == "DROP" and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = wrong
    assert is_taken_by_codec(entry, plain) == jsonschema.Draft202012Validator(schema(entry)).is_valid(plain)


def each_place(plain: Any) -> Any:
    """Yield every place of a plain value where something can be put, as (holder, key)."""
    inside = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, value in inside:
        yield plain, key
        yield from each_place(value)


def is_taken_by_codec(entry: Declared, plain: Any) -> bool:
    try:
        from_plain(entry.cls, plain)
    except MalformedMessage:
        return False
    return True


def test_a_message_that_gains_a_field_keeps_its_old_frames() -> None:
    entry = CATALOGUE["done"]
    known = golden(entry)
    assert golden(entry, known) == known
    old = json.loads(known)
    del old["frames"][0]  # as if the message had had no more than it must have
    grown = json.loads(golden(entry, json.dumps(old)))
    assert grown["frames"][1:] == old["frames"]
    assert len(grown["frames"]) == len(old["frames"]) + 1


def test_the_order_of_fields_makes_no_new_frame() -> None:
    entry = CATALOGUE["done"]
    known = json.loads(golden(entry))
    turned = dict(reversed(msgpack.unpackb(bytes.fromhex(known["frames"][0]["body"])).items()))
    known["frames"][0]["body"] = msgpack.packb(turned).hex()
    assert len(json.loads(golden(entry, json.dumps(known)))["frames"]) == len(known["frames"])


def test_stale_and_strange_files_are_named_and_writing_mends_the_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schemas.main([str(tmp_path), "--check"]) == 1
    assert schemas.main([str(tmp_path), "--write"]) == 0
    assert schemas.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "probe.json").write_text("{}\n")
    (tmp_path / "frames" / "no_such_message.json").write_text('{"frames": []}\n')
    capsys.readouterr()
    assert schemas.main([str(tmp_path), "--check"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{tmp_path / 'probe.json'} is stale: python -m mcp.bus.schemas writes it anew",
        f"{tmp_path / 'frames' / 'no_such_message.json'} belongs to no message: remove it",
    ]


def test_a_schema_tells_what_a_reader_needs() -> None:
    made = schema(CATALOGUE["run_workload"])
    assert made["$id"] == "run_workload/1"
    assert made["x-subject"] == "mcp.work.<node>.run_workload"
    assert made["x-reply"] == "workload_running"
    assert made["description"].startswith("Start a generation of a service beside the one that runs")
    assert made["required"] == ["service", "generation", "spec", "spec_hash"]
    assert "ServiceSpec" in made["$defs"]
    beat = schema(CATALOGUE["heartbeat"])
    assert beat["properties"]["epoch"]["description"].startswith("The newest master epoch")
