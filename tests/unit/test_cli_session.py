"""A command's way onto the bus: what is tried again, and what is not."""

from __future__ import annotations

import ssl

import pytest

from mcp.bus.nats_bus import BusAddress, Credential, NatsTransport
from mcp.cli import session
from mcp.cli.output import Output
from mcp.cli.session import Session
from mcp.cli.settings import Settings
from mcp.config.cli import CliConfig
from mcp.config.reading import BusAccess
from mcp.model.errors import BusUnreachable, McpError, NotPermitted


class Flaky(Session):
    """Meets these errors, one at each attempt, and is connected then."""

    def __init__(self, *errors: McpError) -> None:
        access = BusAccess(address="127.0.0.1", port=1, ca_pem="PEM", tls_name="mcp-bus", key_file="")
        settings = Settings()
        super().__init__(settings, CliConfig(bus=access, operator="kyle", seed="S"), Output(settings))
        self.errors = list(errors)
        self.attempts = 0

    async def _attempt(self) -> NatsTransport:
        self.attempts += 1
        if self.errors:
            raise self.errors.pop(0)
        address = BusAddress(host="127.0.0.1", port=1)
        return NatsTransport(address, Credential(role="operator", name="kyle", seed="S"), forever=False, name="test")


def caused(cause: Exception) -> BusUnreachable:
    """An attempt that failed for this reason."""
    error = BusUnreachable("cannot connect")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error", [NotPermitted("refused", subject=""), caused(ConnectionResetError()), caused(EOFError())]
)
async def test_who_is_cut_off_by_a_reload_of_the_bus_tries_once_more(
    error: McpError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that joins at that moment is no reason for a command to fail."""
    monkeypatch.setattr(session, "AGAIN_S", 0.0)
    flaky = Flaky(error)
    await flaky._connected()
    assert flaky.attempts == 2


@pytest.mark.parametrize("cause", [ConnectionRefusedError(), ssl.SSLCertVerificationError()])
async def test_a_bus_that_is_not_there_is_not_asked_twice(cause: Exception) -> None:
    """An operator hears of it at once."""
    flaky = Flaky(caused(cause))
    with pytest.raises(BusUnreachable) as caught:
        await flaky._connected()
    assert flaky.attempts == 1
    assert (caught.value.hint == session.HINT_OTHER) == isinstance(cause, ssl.CertificateError)
