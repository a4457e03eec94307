"""The nkeys of everything that may connect: made, written down for their owner only, and checked.

An nkey is an Ed25519 key in base32 with a prefix and a CRC-16: a public user key begins with U, a seed with SU
(https://github.com/nats-io/nkeys). libsodium is loaded when a key is really made, derived or used, not before.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from pathlib import Path
from typing import Any

import attrs

from mcp.bus.files import PRIVATE, read_private, write_whole
from mcp.model.errors import AdapterError
from mcp.model.values import frozen

SEED_BYTES = 32
SIGNATURE_BYTES = 64
_USER = 20 << 3
_SEED = 18 << 3


@frozen
class KeyPair:
    """A user's key: the seed is the secret, the public key is what the bus is told."""

    seed: str = attrs.field(repr=False)
    public_key: str


def new_key() -> KeyPair:
    """Make a user key from the system's randomness."""
    return key_of(seed_of(secrets.token_bytes(SEED_BYTES)))


def seed_of(raw: bytes) -> str:
    """Encode 32 secret bytes as a user's seed ("SU...", 58 characters)."""
    if len(raw) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(raw)}")
    return _with_checksum(bytes((_SEED | _USER >> 5, (_USER & 31) << 3)) + raw)


def raw_seed(seed: str) -> bytes:
    """Return the 32 secret bytes of a user's seed.

    Raises:
        ValueError: it is no user's seed; the text says what is wrong and never contains the seed.
    """
    data = _checked(seed, "seed")
    kind = (data[0] & 7) << 5 | data[1] >> 3
    if data[0] & 0xF8 != _SEED or kind != _USER or len(data) != SEED_BYTES + 2:
        raise ValueError("not the seed of a user key (SU...)")
    return data[2:]


def key_of(seed: str) -> KeyPair:
    """Derive the key that belongs to a seed.

    Raises:
        ValueError: it is no user's seed.
    """
    public, _ = _halves(raw_seed(seed))
    return KeyPair(seed, _with_checksum(bytes((_USER,)) + public))


def sign(seed: str, data: bytes) -> bytes:
    """Return the signature of some data, 64 bytes, by the key that belongs to a seed.

    Raises:
        ValueError: it is no user's seed.
    """
    _, secret = _halves(raw_seed(seed))
    ffi, sodium = _libsodium()
    signed = ffi.new("unsigned char[]", SIGNATURE_BYTES + len(data))
    sodium.crypto_sign(signed, ffi.NULL, data, len(data), secret)
    return bytes(ffi.buffer(signed, SIGNATURE_BYTES))


def _halves(raw: bytes) -> tuple[bytes, bytes]:
    """Return the public and the secret key, as libsodium has them, of 32 secret bytes."""
    ffi, sodium = _libsodium()
    public, secret = ffi.new("unsigned char[32]"), ffi.new("unsigned char[64]")
    sodium.crypto_sign_seed_keypair(public, secret, raw)
    return bytes(ffi.buffer(public)), bytes(ffi.buffer(secret))


def _libsodium() -> Any:
    """Return PyNaCl's way to call C, and the library. Its public modules, of which two functions are used, take 0.9 MiB more."""
    from nacl._sodium import ffi, lib  # type: ignore[import-not-found]

    return ffi, lib


def is_public_key(text: str) -> bool:
    """Say whether this is a user's public key, checksum included."""
    try:
        data = _checked(text, "public key")
    except ValueError:
        return False
    return data[0] == _USER and len(data) == SEED_BYTES + 1


def _with_checksum(data: bytes) -> str:
    # crc_hqx is the CRC-16 that nkeys uses (polynomial 0x1021, start 0), stored little-endian.
    checksum = binascii.crc_hqx(data, 0).to_bytes(2, "little")
    return base64.b32encode(data + checksum).decode().rstrip("=")


def _checked(text: str, what: str) -> bytes:
    """Return the bytes before the checksum."""
    try:
        data = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not a {what}: not base32") from error
    if len(data) < SEED_BYTES + 3 or binascii.crc_hqx(data[:-2], 0).to_bytes(2, "little") != data[-2:]:
        raise ValueError(f"not a {what}: its checksum does not fit")
    if base64.b32encode(data).decode().rstrip("=") != text:
        raise ValueError(f"not a {what}: not in its one spelling")
    return data[:-2]


def write_key(path: Path, key: KeyPair) -> None:
    """Write a key file: one line, the seed, readable by its owner only.

    Raises:
        AdapterError: the file is as it was.
    """
    write_whole(path, key.seed + "\n", PRIVATE)


def read_key(path: Path) -> KeyPair:
    """Read a key file.

    Raises:
        AdapterError: code file; key_file when others can read it, or when it holds no seed.
    """
    try:
        return key_of(read_private(path).strip())
    except ValueError as error:
        raise AdapterError(f"cannot use {path}: {error}", code="key_file") from error
