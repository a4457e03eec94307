"""The tap pairs answers with what they answer."""

from __future__ import annotations

import msgpack

from mcp.cli.tap import Pairs, as_text


def test_an_answer_names_the_order_and_how_long_it_took() -> None:
    pairs = Pairs()
    order = pairs.line(
        "mcp.work.orion.pull_images",
        msgpack.packb({"service": "web"}),
        {"Mcp-Kind": "pull_images/1", "Mcp-Op": "op1"},
        1.0,
    )
    assert (order["kind"], order["op"], order["body"]) == ("pull_images", "op1", {"service": "web"})
    headers = {"Mcp-Kind": "images_pulled/1", "Mcp-Op": "op1", "Mcp-Frame": "final"}
    answer = pairs.line("mcp.node.orion.reply.op1-1", msgpack.packb({}), headers, 1.25)
    assert (answer["answers"], answer["took_s"]) == ("pull_images", 0.25)
    assert "<- pull_images 250.0 ms" in as_text(answer)


def test_an_answer_to_nothing_is_shown_as_it_is() -> None:
    line = Pairs().line("mcp.node.orion.reply.x-1", b"\xc1", {"Mcp-Kind": "done/1"}, 1.0)
    assert "answers" not in line


def test_a_line_obeys_no_escape_code() -> None:
    line = Pairs().line("mcp.x", msgpack.packb({"a": "\x1b[2J"}), {"Mcp-Op": "\x1b"}, 1.0)
    assert "\x1b" not in as_text(line)
