"""Keys, certificates and the files they lie in."""

from __future__ import annotations

import errno
import os
import ssl
from pathlib import Path

import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.bus import tls
from mcp.bus.files import PRIVATE, read_private, write_whole
from mcp.bus.keys import is_public_key, key_of, new_key, raw_seed, read_key, seed_of, sign, write_key
from mcp.model.errors import AdapterError

NOW_S = 1_800_000_000.0
DAY_S = 86400.0


@given(st.binary(min_size=32, max_size=32))
def test_a_seed_is_what_the_nkeys_library_makes_of_the_same_bytes(raw: bytes) -> None:
    seed = seed_of(raw)
    assert seed.encode() == nkeys.encode_seed(raw, nkeys.PREFIX_BYTE_USER)
    assert key_of(seed).public_key.encode() == nkeys.from_seed(bytearray(seed.encode())).public_key
    assert raw_seed(seed) == raw


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=100))
def test_a_signature_is_what_the_nkeys_library_makes_of_the_same_seed(raw: bytes, data: bytes) -> None:
    seed = seed_of(raw)
    assert sign(seed, data) == nkeys.from_seed(bytearray(seed.encode())).sign(data)


def test_two_new_keys_differ_and_the_seed_is_not_shown() -> None:
    one, other = new_key(), new_key()
    assert one.seed != other.seed
    assert one.seed not in repr(one)
    assert is_public_key(one.public_key)


@given(st.integers(0, 55), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"))
def test_a_public_key_with_a_wrong_character_is_none(position: int, character: str) -> None:
    key = key_of(seed_of(b"k" * 32)).public_key
    changed = key[:position] + character + key[position + 1 :]
    assert is_public_key(changed) == (changed == key)


@given(st.text(max_size=70))
def test_no_text_makes_the_key_check_fail_in_another_way(text: str) -> None:
    is_public_key(text)
    with pytest.raises(ValueError, match="not"):
        raw_seed(text)


def test_a_seed_of_another_kind_of_key_is_refused() -> None:
    account = nkeys.encode_seed(b"k" * 32, nkeys.PREFIX_BYTE_ACCOUNT).decode()
    with pytest.raises(ValueError, match="user key"):
        key_of(account)


def test_a_key_file_is_for_its_owner_only_and_comes_back(tmp_path: Path) -> None:
    key = new_key()
    write_key(tmp_path / "agent.nkey", key)
    assert (tmp_path / "agent.nkey").stat().st_mode & 0o777 == PRIVATE
    assert read_key(tmp_path / "agent.nkey") == key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_key_file_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "agent.nkey"
    write_key(path, new_key())
    path.chmod(mode)
    with pytest.raises(AdapterError, match=f"others can read it \\(mode {mode:04o}\\)") as caught:
        read_key(path)
    assert caught.value.hint.endswith(f"chmod 600 {path}")


def test_a_key_file_that_is_missing_or_holds_no_seed_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"agent\.nkey: no such file"):
        read_key(tmp_path / "agent.nkey")
    write_whole(tmp_path / "agent.nkey", "SUNSHINE\n", PRIVATE)
    with pytest.raises(AdapterError, match=r"agent\.nkey: not a seed") as caught:
        read_key(tmp_path / "agent.nkey")
    assert "SUNSHINE" not in str(caught.value)


def test_a_private_file_is_never_readable_by_others_even_under_an_open_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_whole(tmp_path / "secret", "x", PRIVATE)
    finally:
        os.umask(before)
    assert read_private(tmp_path / "secret") == "x"


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    target = tmp_path / "config"
    target.mkdir()
    with pytest.raises(AdapterError, match="cannot write"):
        write_whole(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["config"]


def test_the_authority_vouches_for_its_own_certificate_only() -> None:
    ours, theirs = tls.new_authority("rift", NOW_S), tls.new_authority("rift", NOW_S)
    certificate = tls.new_server_certificate(ours, NOW_S)
    assert tls.is_issued_by(certificate.pem, ours.pem)
    assert not tls.is_issued_by(certificate.pem, theirs.pem)
    assert ours.key_pem not in repr(ours)


def test_a_renewed_certificate_is_another_one_of_the_same_authority() -> None:
    authority = tls.new_authority("rift", NOW_S)
    first, second = (tls.new_server_certificate(authority, NOW_S) for _ in range(2))
    assert tls.fingerprint(first.pem) != tls.fingerprint(second.pem)
    assert tls.fingerprint(first.pem) == tls.fingerprint(first.text())


def test_a_certificate_is_due_when_a_third_of_its_life_is_left() -> None:
    pem = tls.new_server_certificate(tls.new_authority("rift", NOW_S), NOW_S).pem
    third_s = tls.SERVER_DAYS * DAY_S / 3
    assert not tls.is_renewal_due(pem, NOW_S + 2 * third_s - DAY_S)
    assert tls.is_renewal_due(pem, NOW_S + 2 * third_s + DAY_S)


def test_python_takes_the_authority_for_its_strictest_checks() -> None:
    context = ssl.create_default_context(cadata=tls.new_authority("rift", NOW_S).pem)
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    assert context.cert_store_stats()["x509_ca"] >= 1


def test_a_read_only_folder_is_an_error_of_ours_even_when_the_clean_up_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only file system answers EROFS to the removal of what is not there."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(AdapterError, match="read-only file system"):
        write_whole(tmp_path / "unit", "text")
