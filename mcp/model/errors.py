"""Every error of ours, drawn at the top; each text says what could not be done, to what, and why.

McpError                          .code .hint
├── BadDefinition                 .file .line .key    a service file or a configuration file is wrong
├── MalformedMessage              .path               bytes that are not what they claim to be
├── BusError
│   ├── BusUnreachable                                no connection to the bus: nothing was started
│   ├── NobodyListens                                 nobody is subscribed: nothing was done
│   ├── NoAnswer                                      sent, and silence since: it may have been done
│   └── NotPermitted              .subject            the bus refused it: nothing was done
├── Refused                                           the other side said no, and why
├── AdapterError                  .retryable          an engine, a file, a remote host failed us
└── NoNodeFits                    .reasons            one reason per node
"""

from __future__ import annotations

from collections.abc import Mapping


class McpError(Exception):
    """The root: `str(error)` is the reason, `hint` the next thing to do (may be empty).

    `code` is what scripts match on (`error.code` of the CLI's JSON).
    """

    code = "error"

    def __init__(self, reason: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        if code:
            self.code = code


class BadDefinition(McpError):
    """A service definition or configuration file is wrong; nothing of it was used.

    With several mistakes in it, `mistakes` has each of them, and the text shows the first few.
    """

    code = "bad_definition"
    mistakes: tuple[BadDefinition, ...] = ()

    def __init__(self, reason: str, *, file: str, line: int = 0, key: str = "", hint: str = "") -> None:
        where = f"{file}:{line}" if line else file
        super().__init__(f"{where}: {f'{key}: ' if key else ''}{reason}", hint=hint)
        self.file = file
        self.line = line
        self.key = key


class MalformedMessage(McpError):
    """Bytes from the bus that are not the message they claim to be."""

    code = "malformed_message"

    def __init__(self, reason: str, *, path: str = "$") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class BusError(McpError):
    """Something between us and the other side of the bus."""

    code = "bus"


class BusUnreachable(BusError):
    """There is no connection to the bus; nothing was started."""

    code = "bus_unreachable"


class NobodyListens(BusError):
    """Nobody is subscribed to the subject; nothing was done."""

    code = "nobody_listens"


class NoAnswer(BusError):
    """The request was sent and nothing came back; it may have been done."""

    code = "no_answer"


class NotPermitted(BusError):
    """The bus refused the publish or the subscription."""

    code = "not_permitted"

    def __init__(self, reason: str, *, subject: str, hint: str = "") -> None:
        super().__init__(reason, hint=hint)
        self.subject = subject


class Refused(McpError):
    """The other side understood and said no; nothing was changed unless the reason says so."""

    code = "refused"

    def __init__(self, code: str, reason: str, *, hint: str = "") -> None:
        super().__init__(reason, hint=hint, code=code)


class AdapterError(McpError):
    """An engine, a file or a remote host failed; `retryable` says whether the same call may succeed later."""

    code = "adapter"

    def __init__(self, reason: str, *, retryable: bool = False, hint: str = "", code: str = "") -> None:
        super().__init__(reason, hint=hint, code=code)
        self.retryable = retryable


class NoNodeFits(McpError):
    """No node may take the service; `reasons` has one line per node."""

    code = "no_node_fits"

    def __init__(self, service: str, reasons: Mapping[str, str], *, hint: str = "") -> None:
        width = max((len(node) for node in reasons), default=0)
        lines = [f"cannot place {service}: no node fits"]
        lines += [f"  {node:<{width}}  {reason}" for node, reason in reasons.items()]
        super().__init__("\n".join(lines), hint=hint)
        self.service = service
        self.reasons = dict(reasons)
