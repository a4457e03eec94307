"""Fixtures of the contracts that more than one module asks for."""

from __future__ import annotations

from tests.contract.bus_fixtures import bus, nats_server

__all__ = ["bus", "nats_server"]
