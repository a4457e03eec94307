"""Service definitions: TOML to a validated ServiceSpec and back, with file, line, key and a suggestion for every mistake.

What may stand in a file is declared in the schemas below, and explained in docs/service-definition.md.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from mcp.model.errors import BadDefinition
from mcp.model.names import DEFAULT_ZONE, is_domain, is_node_name, is_service_name, port_variable
from mcp.model.spec import ComponentSpec, FixedPort, HealthSpec, RouteSpec, ServiceSpec, VolumeSpec
from mcp.model.tables import (
    Document,
    Key,
    Schema,
    Table,
    choice,
    duration,
    flag,
    matching,
    number,
    port,
    shown,
    size,
    strings,
)
from mcp.model.values import frozen

if TYPE_CHECKING:
    from mcp.model.toml_lines import Path

T = TypeVar("T")

MIB = 1024**2
DAY_S = 86_400.0

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESTART = re.compile(r"no|always|unless-stopped|on-failure(?::[0-9]{1,4})?")
_URL_PATH = re.compile(r"/[\x21-\x7e]*")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?")
_FIXED_PORT = re.compile(r"(?:(\[[0-9a-fA-F:.]+\]|[0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# The grammar of image names is the one of the OCI distribution specification, as engines enforce it.
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"(?:(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?/)?{_PART}(?:/{_PART})*")
_MAX_REPOSITORY = 255

SET_BY_THE_AGENT = ("MCP_SERVICE", "MCP_COMPONENT", "MCP_NODE")
"""Variables that tell a container where it is; a definition may not claim otherwise."""


@frozen(kw_only=True)
class Defaults:
    """What a definition may leave to the fleet; an empty `allowed_domains` checks no public hostname here."""

    internal_zone: str = DEFAULT_ZONE
    allowed_domains: tuple[str, ...] = ()


@frozen(kw_only=True)
class Parsed:
    """A definition, and what in it works but was probably not meant."""

    spec: ServiceSpec
    warnings: tuple[str, ...] = ()


def parse_service(text: str, *, file: str, defaults: Defaults | None = None) -> ServiceSpec:
    """Return the service that a TOML text defines.

    Raises:
        BadDefinition: with file, line, key and a suggestion; nothing of the file was used.
    """
    return parse_with_warnings(text, file=file, defaults=defaults).spec


def parse_with_warnings(text: str, *, file: str, defaults: Defaults | None = None) -> Parsed:
    """Return the service that a TOML text defines, with warnings for the operator.

    Raises:
        BadDefinition: as `parse_service`.
    """
    document = Document(text, file=file)
    if not document.root:
        raise BadDefinition("defines nothing", file=file, hint='It needs a name = "..." and a [[components]] table.')
    spec = ServiceSpec(**document.read(SERVICE))
    _check_whole(document, spec, defaults or Defaults())
    document.check()
    return Parsed(spec=spec, warnings=tuple(_warnings(document, spec, file)))


# ----------------------------------------------------------------- single values


def is_host_name(name: str) -> bool:
    """Say whether this is a DNS name of two labels or more."""
    return "." in name and is_domain(name)


def is_within(name: str, domain: str) -> bool:
    """Say whether a host name is a domain or lies in it, by whole labels: evilexample.net is not in example.net."""
    return name == domain or name.endswith("." + domain)


def _name(what: str) -> Callable[[Table, str], str]:
    def read(table: Table, key: str) -> str:
        name = table.value(key, str)
        if is_service_name(name):
            return name
        hint = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
        raise table.error(
            key,
            f"{name[:60]!r} is no name for a {what}: lower-case letters, digits and dashes, at most 40, no dash at an end",
            hint=f'Like "{hint}".' if hint else "",
        )

    return read


def _version(table: Table, key: str) -> str:
    version = matching(_TAG.fullmatch, "an image tag", or_empty=True)(table, key)
    if version == "latest":
        raise table.error(key, "latest may be something else tomorrow: versions are pinned", hint='Like "v1.2.0".')
    return version


def _image(table: Table, key: str) -> str:
    image = table.value(key, str)
    name, tag, digest = split_image(image)
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise table.error(key, f"{image[:80]!r}: a digest is sha256: and 64 hex digits")
    if tag is not None and not _TAG.fullmatch(tag):
        raise table.error(key, f"{image[:80]!r}: {tag[:40]!r} is no tag")
    if not _REPOSITORY.fullmatch(name) or len(name) > _MAX_REPOSITORY:
        raise table.error(key, f"{image[:80]!r} is no image name", hint='Like "registry.example:5000/web:v1".')
    version = _service_version(table)
    if digest is None and tag is None and version:
        return f"{image}:{version}"
    if digest is None and tag in (None, "latest"):
        why = "has no tag" if tag is None else "is tagged latest, which may be something else tomorrow"
        hint = f'Write a version, e.g. "{name}:v1", or a digest, "{name}@sha256:...".'
        raise table.error(key, f"{image[:80]!r} {why}: images are pinned", hint=hint)
    return image


def _service_version(table: Table) -> str:
    """Return the tag for components that give none; "" where there is none, or a bad one (which is told elsewhere)."""
    version = table.document.root.get("version")
    return version if isinstance(version, str) and _TAG.fullmatch(version) and version != "latest" else ""


def split_image(image: str) -> tuple[str, str | None, str | None]:
    """Return an image's repository, tag and digest; the port of a registry is no tag."""
    name, at, digest = image.partition("@")
    head, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    return f"{head}{slash}{last}", tag if colon else None, digest if at else None


def _env(table: Table, key: str) -> dict[str, str]:
    raw = table.values[key]
    if isinstance(raw, dict):
        pairs = [(name, name, _env_text(table, name, value)) for name, value in raw.items()]
    elif isinstance(raw, list):
        pairs = [_env_pair(table, i, text) for i, text in enumerate(raw)]
    else:
        raise table.error(key, f'expected an array of "KEY=VALUE" or a table, got {shown(raw)}')
    made: dict[str, str] = {}
    for where, name, value in pairs:
        if not _ENV_NAME.fullmatch(name):
            raise table.error(where, f"{name[:60]!r} is no name of a variable", within=key)
        if name in SET_BY_THE_AGENT:
            raise table.error(where, f"{name} is set by the agent, for every container", within=key)
        if name in made:
            raise table.error(where, f"{name} is set twice", within=key)
        if any(c in value for c in "\0\n\r"):
            raise table.error(where, f"{name} holds a line break or NUL", within=key, hint="Mount a file instead.")
        made[name] = value
    return made


def _env_pair(table: Table, i: int, text: object) -> tuple[int, str, str]:
    if type(text) is not str or "=" not in text:
        # Not the text itself: it may be a secret whose name was forgotten.
        raise table.error(i, 'expected "KEY=VALUE"', within="env")
    name, _, value = text.partition("=")
    return i, name, value


def _env_text(table: Table, name: str, value: object) -> str:
    if type(value) is str:
        return value
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int and value.bit_length() <= 64:
        return str(value)
    # A number like 1.10 would lose its last digit, and a date its form.
    hint = "Write it in quotes." if not isinstance(value, dict | list) else ""
    raise table.error(name, "expected a string, a whole number, true or false", within="env", hint=hint)


def _each(parse: Callable[[str], T | None], expected: str) -> Callable[[Table, str], tuple[T, ...]]:
    """Make a reader of an array of strings that have a form of their own."""

    def read(table: Table, key: str) -> tuple[T, ...]:
        made: list[T] = []
        for i, text in enumerate(table.strings(key)):
            one = parse(text)
            if one is None:
                raise table.error(i, f"{text[:80]!r}: expected {expected}", within=key)
            if one in made:
                raise table.error(i, f"{text[:80]!r} is there twice", within=key)
            made.append(one)
        return tuple(made)

    return read


def _volume(text: str) -> VolumeSpec | None:
    host, _, rest = text.partition(":")
    container, _, flags = rest.partition(":")
    is_plain = all(p.startswith("/") and ".." not in p.split("/") and not _CONTROL.search(p) for p in (host, container))
    if not is_plain or rest not in (container, f"{container}:ro") or not container.strip("/"):
        return None
    return VolumeSpec(host_path=host, container_path=container, read_only=flags == "ro")


def _fixed_port(text: str) -> FixedPort | None:
    found = _FIXED_PORT.fullmatch(text)
    if not found or not all(0 < int(n) < 65536 for n in found.group(2, 3)):
        return None
    address = found[1] or ""
    try:
        ipaddress.ip_address(address.strip("[]") or "127.0.0.1")
    except ValueError:
        return None
    protocol: Any = found[4] or "tcp"
    return FixedPort(address=address, host_port=int(found[2]), container_port=int(found[3]), protocol=protocol)


def _restart(table: Table, key: str) -> str:
    value = table.value(key, str)
    if _RESTART.fullmatch(value):
        return value
    return choice("no", "always", "unless-stopped", "on-failure", "on-failure:N")(table, key)


# ------------------------------------------------------------------------ tables


def _health(table: Table, key: str) -> HealthSpec:
    return _made(HealthSpec, table.table(key), HEALTH, HealthSpec())


def _routes(table: Table, key: str) -> tuple[RouteSpec, ...]:
    return tuple(_made(RouteSpec, each, ROUTE, RouteSpec(port=1)) for each in table.tables(key))


def _components(table: Table, key: str) -> tuple[ComponentSpec, ...]:
    found = table.tables(key)
    if not found:
        raise table.error(key, "a service needs at least one component", hint="Add a [[components]] table.")
    return tuple(map(_component, found))


def _component(table: Table) -> ComponentSpec:
    values = table.read(COMPONENT)
    if values is not None and "image" not in values:
        if version := _service_version(table):
            values["image"] = f"{values['name']}:{version}"
        else:
            table.document.note(table.error("image", "'image' is missing", hint='Like image = "web:v1".'))
            values = None
    return ComponentSpec(name="", image="") if values is None else ComponentSpec(**values)


def _made(cls: Callable[..., T], table: Table, schema: Schema, instead: T) -> T:
    """Return what a table describes; `instead` when that cannot be said, which the document knows."""
    values = table.read(schema)
    return instead if values is None else cls(**values)


HEALTH = Schema(
    "in [components.health]",
    (
        Key(
            "path", matching(_URL_PATH.fullmatch, "a path of a URL: it begins with / and has no spaces", or_empty=True)
        ),
        Key("tcp", flag),
        Key("cmd", strings),
        Key("interval", duration(0.01, DAY_S), to="interval_s"),
        Key("timeout", duration(0.01, DAY_S), to="timeout_s"),
    ),
)

ROUTE = Schema(
    "in [[components.routes]]",
    (
        Key(
            "name",
            matching(
                is_service_name, "a route's name: lower-case letters, digits and dashes, at most 40", or_empty=True
            ),
        ),
        Key("port", port, required="port = 8443"),
        Key("mode", choice("l4", "l7")),
        Key(
            "hostname",
            matching(
                is_host_name, "a host name: two or more lower-case labels of letters, digits and dashes", or_empty=True
            ),
        ),
        Key("public", flag),
    ),
)

COMPONENT = Schema(
    "in [[components]]",
    (
        Key("name", _name("component"), required='name = "web"'),
        Key("image", _image),
        Key("cmd", strings),
        Key("env", _env),
        Key("volumes", _each(_volume, '"/host/path:/container/path" or "...:ro", both absolute and without ".."')),
        Key("network", matching(_NETWORK.fullmatch, "a network's name", or_empty=True)),
        Key("user", matching(_USER.fullmatch, 'a user like "1000:1000" or "app"', or_empty=True)),
        Key("restart", _restart),
        Key("ports", _each(_fixed_port, '"address:host:container" or "host:container", "/udp" may follow')),
        Key("memory", size(6 * MIB, 2**50), to="memory_bytes"),  # engines refuse less than 6 MiB
        Key("cpu", number(0.01, 1024, "cores"), to="cpu_cores"),
        Key("stop_grace", duration(0, DAY_S), to="stop_grace_s"),
        Key("update", choice("start-first", "stop-first")),
        Key("health", _health, inner=HEALTH),
        Key("routes", _routes, inner=ROUTE),
    ),
)

SERVICE = Schema(
    "above the first [[components]]",
    (
        Key("name", _name("service"), required='name = "web"'),
        Key("tier", choice("core", "worker")),
        Key(
            "node",
            matching(is_node_name, "a node's name: lower-case letters, digits and dashes, at most 32", or_empty=True),
        ),
        Key("active", flag),
        Key("version", _version),
        Key("components", _components, required="[[components]]", inner=COMPONENT),
    ),
)

SCHEMAS = {"": SERVICE, "components": COMPONENT, "components.health": HEALTH, "components.routes": ROUTE}
"""Everything that may stand in a definition, by the header of its table."""


# ------------------------------------------------------- what only the whole shows


def _check_whole(document: Document, spec: ServiceSpec, defaults: Defaults) -> None:
    """Note what is wrong although each value may stand for itself."""
    _note_twins(document, "two components are called {}", ((c.name, (*here, "name")) for here, c in _numbered(spec)))
    for here, component in _numbered(spec):
        _check_routes(document, component, here, defaults)
        mounts = ((v.container_path.rstrip("/"), (*here, "volumes", i)) for i, v in enumerate(component.volumes))
        _note_twins(document, f"two volumes of {component.name} are mounted at {{}}", mounts)
        _check_health(document, component, (*here, "health"))
    _check_listeners(document, spec, defaults)
    _check_fixed_ports(document, spec)


def _numbered(spec: ServiceSpec) -> Iterator[tuple[Path, ComponentSpec]]:
    return ((("components", i), component) for i, component in enumerate(spec.components))


def _note_twins(document: Document, text: str, found: Iterable[tuple[str, Path]]) -> None:
    seen: set[str] = set()
    for name, path in found:
        if name in seen:
            document.note(document.error(text.format(repr(name)), path))
        seen.add(name)


def _check_routes(document: Document, component: ComponentSpec, here: Path, defaults: Defaults) -> None:
    named = [(route.name, (*here, "routes", i, "name")) for i, route in enumerate(component.routes)]
    _note_twins(document, f"two routes of {component.name} are called {{}}", ((n, path) for n, path in named if n))
    for _, path in [each for each in named if not each[0]][1:]:
        nameless = document.error(f"two routes of {component.name} are without a name", path, hint="Give each a name.")
        document.note(nameless)
    for i, route in enumerate(component.routes):
        if route.public:
            _check_public(document, route, (*here, "routes", i), defaults)


def _check_public(document: Document, route: RouteSpec, here: Path, defaults: Defaults) -> None:
    name, allowed = route.hostname, defaults.allowed_domains
    if not name:
        hint = 'Like hostname = "web.example.net".'
        document.note(document.error("a public route needs a hostname", (*here, "public"), hint=hint))
    elif is_within(name, defaults.internal_zone):
        reason = f"{name} is an internal name (in {defaults.internal_zone}) and cannot be public"
        document.note(document.error(reason, (*here, "hostname")))
    elif allowed and not any(is_within(name, domain) for domain in allowed):
        reason = f"{name} is in no allowed domain (allowed: {', '.join(allowed)})"
        document.note(document.error(reason, (*here, "hostname")))


def _check_health(document: Document, component: ComponentSpec, here: Path) -> None:
    health = component.health
    ways = [way for way in ("path", "tcp", "cmd") if getattr(health, way)]
    if len(ways) > 1:
        document.note(document.error(f"{' and '.join(ways)}: only one of path, tcp and cmd", (*here, ways[1])))
    has_port = component.routes or any(fixed.protocol == "tcp" for fixed in component.ports)
    if not has_port and ways and ways[0] != "cmd":
        reason = f"{ways[0]} needs a port to ask, and {component.name} has neither a route nor a fixed one"
        document.note(document.error(reason, (*here, ways[0]), hint="Add a route, or use cmd = [...]."))


def _check_listeners(document: Document, spec: ServiceSpec, defaults: Defaults) -> None:
    taken: dict[tuple[str, int], str] = {}
    for here, component in _numbered(spec):
        for i, route in enumerate(component.routes):
            # What has no hostname of its own answers to the service's internal name.
            listener = (route.hostname or f"{spec.name}.{defaults.internal_zone}", route.port)
            if listener in taken:
                reason = f"{listener[0]} port {route.port} is claimed twice, also by {taken[listener]}"
                hint = "Routes may share a hostname on different ports."
                document.note(document.error(reason, (*here, "routes", i, "port"), hint=hint))
            taken.setdefault(listener, f"route {route.name} of {component.name}" if route.name else component.name)


def _check_fixed_ports(document: Document, spec: ServiceSpec) -> None:
    taken: list[tuple[FixedPort, str]] = []
    for here, component in _numbered(spec):
        for i, fixed in enumerate(component.ports):
            for other, owner in taken:
                if _collide(fixed, other):
                    reason = f"host port {fixed.host_port}/{fixed.protocol} is claimed twice, also by {owner}"
                    document.note(document.error(reason, (*here, "ports", i)))
            taken.append((fixed, component.name))


def _collide(one: FixedPort, other: FixedPort) -> bool:
    everywhere = ("0.0.0.0", "[::]")  # noqa: S104 - nothing is bound here
    same_port = (one.host_port, one.protocol) == (other.host_port, other.protocol)
    return same_port and (one.address == other.address or one.address in everywhere or other.address in everywhere)


def _warnings(document: Document, spec: ServiceSpec, file: str) -> Iterator[str]:
    """Yield what works and was probably not meant."""
    stem = file.rpartition("/")[2].removesuffix(".toml")
    if file.endswith(".toml") and stem != spec.name:
        yield f"{file} defines {spec.name}: `mcp deploy {spec.name}` looks for {spec.name}.toml"
    if spec.node and spec.tier == "core":
        yield f"{file}: node = {spec.node!r} overrides tier = 'core'"
    for (_, i), component in _numbered(spec):
        written = document.root["components"][i]
        if "image" not in written:
            yield f"{file}: {component.name} gives no image: {component.image} is used"
        if component.ports and written.get("update") == "start-first":
            yield f"{file}: {component.name} has fixed ports, so the old copy is stopped first all the same"
        for name in component.env.keys() & {port_variable(route.name) for route in component.routes}:
            yield f"{file}: {component.name} is told its port in {name}: the value in env is not used"
    public = [route.hostname for component in spec.components for route in component.routes if route.public]
    for name in sorted({name for name in public if public.count(name) > 1}):
        yield f"{file}: {name} is public more than once, and an edge has one port 443 for it"


# ------------------------------------------------------------------- differences


def differences(old: ServiceSpec, new: ServiceSpec) -> tuple[str, ...]:
    """Say what is different, a line each; values of variables may be secret and are never shown."""
    lines: list[str] = []
    _compare(attrs.asdict(old), attrs.asdict(new), "", lines)
    return tuple(lines)


def _compare(old: Any, new: Any, path: str, lines: list[str]) -> None:
    if old == new:
        return
    if path.endswith(".env"):
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                how = "added" if name not in old else "removed" if name not in new else "changed"
                lines.append(f"{path}.{name}: {how}")
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            _compare(old[key], new.get(key), f"{path}.{key}" if path else key, lines)
    elif isinstance(old, tuple | list) and old and isinstance(old[0], dict) and len(old) == len(new):
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            _compare(before, after, f"{path}[{i}]", lines)
    else:
        lines.append(f"{path}: {_brief(old)} -> {_brief(new)}")


def _brief(value: Any) -> str:
    if isinstance(value, tuple | list) and value and isinstance(value[0], dict):
        return ", ".join(str(item.get("name") or item.get("port") or item.get("host_path") or "?") for item in value)
    if isinstance(value, tuple | list):
        return json.dumps(list(value))
    return json.dumps(value) if value in ("", None) or isinstance(value, bool) else str(value)


# ----------------------------------------------------------------------- writing


def render_service(spec: ServiceSpec) -> str:
    """Return a definition that parses to the same spec."""
    lines = [f"name = {_toml(spec.name)}", f"tier = {_toml(spec.tier)}"]
    lines += [f"node = {_toml(spec.node)}"] if spec.node else []
    lines += ["active = false"] if not spec.active else []
    lines += [f"version = {_toml(spec.version)}"] if spec.version else []
    for component in spec.components:
        lines += _table_lines("[[components]]", _component_values(component))
        if component.health != HealthSpec():
            lines += _table_lines("[components.health]", _health_values(component.health))
        for route in component.routes:
            lines += _table_lines("[[components.routes]]", _without_defaults(RouteSpec(port=0), route))
    return "\n".join(lines) + "\n"


def _component_values(component: ComponentSpec) -> dict[str, Any]:
    written = {
        "env": [f"{name}={value}" for name, value in component.env.items()],
        "volumes": [f"{v.host_path}:{v.container_path}{':ro' if v.read_only else ''}" for v in component.volumes],
        "ports": [_port_text(fixed) for fixed in component.ports],
        "memory_bytes": _size_text(component.memory_bytes),
        "stop_grace_s": _duration_text(component.stop_grace_s),
    }
    values = _without_defaults(ComponentSpec(name="", image=""), component)
    return {_written_as(COMPONENT, field): written.get(field, value) for field, value in values.items()}


def _health_values(health: HealthSpec) -> dict[str, Any]:
    written = {"interval_s": _duration_text(health.interval_s), "timeout_s": _duration_text(health.timeout_s)}
    values = _without_defaults(HealthSpec(), health)
    return {_written_as(HEALTH, field): written.get(field, value) for field, value in values.items()}


def _without_defaults(blank: Any, value: Any) -> dict[str, Any]:
    fields = {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    return {n: v for n, v in fields.items() if v != getattr(blank, n) and n not in ("health", "routes")}


def _written_as(schema: Schema, field: str) -> str:
    return next(key.name for key in schema.keys if field in (key.to, key.name))


def _table_lines(header: str, values: Mapping[str, Any]) -> list[str]:
    return ["", header, *(f"{key} = {_toml(value)}" for key, value in values.items())]


def _port_text(fixed: FixedPort) -> str:
    address = f"{fixed.address}:" if fixed.address else ""
    return f"{address}{fixed.host_port}:{fixed.container_port}{'/udp' if fixed.protocol == 'udp' else ''}"


def _size_text(size_bytes: int) -> str | int:
    return f"{size_bytes // MIB}M" if size_bytes % MIB == 0 else size_bytes


def _duration_text(seconds: float) -> str | float:
    return f"{int(seconds)}s" if seconds == int(seconds) else seconds


def _toml(value: Any) -> str:
    """JSON's strings, numbers, truths and arrays are TOML's too, but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
