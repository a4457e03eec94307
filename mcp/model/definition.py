"""Service definitions: TOML to a validated ServiceSpec and back, with file, line, key and a suggestion for every mistake."""

from __future__ import annotations

import json
import re
from typing import Any

import attrs

from mcp.model.errors import BadDefinition
from mcp.model.names import is_node_name, is_service_name
from mcp.model.spec import ComponentSpec, FixedPort, HealthSpec, RouteSpec, ServiceSpec, VolumeSpec
from mcp.model.tables import Document, Table, did_you_mean

DEFAULT_ZONE = "svc.mcp.metacircular.net"

_HOST_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESTART = re.compile(r"no|always|unless-stopped|on-failure(?::\d{1,4})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_REPOSITORY = re.compile(r"(?:[A-Za-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?")
_COMPONENT_KEYS = (
    "name", "image", "cmd", "env", "volumes", "network", "user", "restart", "ports", "memory", "cpu",
    "stop_grace", "update", "health", "routes",
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Defaults:
    """What a definition may leave to the fleet; an empty `allowed_domains` checks no public hostname here."""

    internal_zone: str = DEFAULT_ZONE
    allowed_domains: tuple[str, ...] = ()


def parse_service(text: str, *, file: str, defaults: Defaults | None = None) -> ServiceSpec:
    """Return the service that a TOML text defines.

    Raises:
        BadDefinition: with file, line, key and a suggestion; nothing of the file was used.
    """
    return _Reader(Document(text, file=file), defaults or Defaults()).service()


class _Reader:
    def __init__(self, document: Document, defaults: Defaults) -> None:
        self._document = document
        self._defaults = defaults

    def service(self) -> ServiceSpec:
        table = Table(self._document, self._document.root)
        table.only("name", "tier", "node", "active", "version", "components")
        name = self._name(table, "name", "service")
        tier = table.choice("tier", ("core", "worker"), "worker")
        node = table.get("node", str, "")
        if node and not is_node_name(node):
            raise table.error("node", f"{node!r} is no node name: lower-case letters, digits and dashes, at most 32")
        active = table.get("active", bool, True)
        version = table.get("version", str, "")
        if version and not _TAG.fullmatch(version):
            raise table.error("version", f"{version!r} cannot be an image tag")
        found = table.tables("components")
        if not found:
            raise table.error("components", "a service needs at least one component", hint="Add a [[components]] table.")
        components = tuple(self._component(each, version) for each in found)
        self._no_twins(table, components)
        return ServiceSpec(
            name=name, tier=tier, node=node, active=active, version=version, components=components  # type: ignore[arg-type]
        )

    def _name(self, table: Table, key: str, what: str) -> str:
        name = table.need(key, str)
        if not is_service_name(name):
            raise table.error(
                key, f"{name[:60]!r} is no {what} name: lower-case letters, digits and dashes, at most 40, no dash at an end"
            )
        return name

    def _no_twins(self, table: Table, components: tuple[ComponentSpec, ...]) -> None:
        names: set[str] = set()
        listeners: dict[tuple[str, int], str] = {}
        for i, component in enumerate(components):
            if component.name in names:
                raise self._document.error(f"two components are called {component.name!r}", ("components", i, "name"))
            names.add(component.name)
            for j, route in enumerate(component.routes):
                key = (route.hostname, route.port)
                if key in listeners:
                    shown = route.hostname or "the service's internal name"
                    raise self._document.error(
                        f"{shown} port {route.port} is claimed twice (also by {listeners[key]})",
                        ("components", i, "routes", j, "port"),
                        hint="Two routes may share a hostname on different ports.",
                    )
                listeners[key] = f"{component.name}.{route.name or 'unnamed route'}"

    def _component(self, table: Table, version: str) -> ComponentSpec:
        table.only(*_COMPONENT_KEYS)
        return ComponentSpec(
            name=self._name(table, "name", "component"),
            image=self._image(table, version),
            cmd=self._command(table, "cmd"),
            env=self._env(table),
            volumes=tuple(self._volume(table, i, text) for i, text in enumerate(table.strings("volumes"))),
            network=self._matching(table, "network", _NETWORK, "a network name"),
            user=self._matching(table, "user", _USER, 'a user like "1000:1000" or "app"'),
            restart=self._restart(table),
            ports=tuple(self._port(table, i, text) for i, text in enumerate(table.strings("ports"))),
            memory_bytes=table.size_bytes("memory"),
            cpu_cores=self._cpu(table),
            stop_grace_s=table.duration_s("stop_grace", 10.0),
            update=table.choice("update", ("start-first", "stop-first"), "start-first"),  # type: ignore[arg-type]
            health=self._health(table.table("health"), has_routes="routes" in table),
            routes=self._routes(table),
        )

    def _image(self, table: Table, version: str) -> str:
        image = table.need("image", str)
        repository, _, digest = image.partition("@")
        head, _, last = repository.rpartition("/")
        name, colon, tag = last.partition(":")
        if digest and not _DIGEST.fullmatch(digest):
            raise table.error("image", f"{image[:80]!r}: a digest is sha256: and 64 hex digits")
        if colon and not _TAG.fullmatch(tag):
            raise table.error("image", f"{image[:80]!r}: {tag[:40]!r} is no tag")
        if not _REPOSITORY.fullmatch(f"{head}/{name}" if head else name):
            raise table.error("image", f"{image[:80]!r} is no image name", hint='Like "registry.example:5000/web:v1".')
        if digest:
            return image
        if not colon and version:
            return f"{image}:{version}"
        if tag in ("", "latest"):
            what = "has no tag" if not tag else "is tagged latest, which may be something else tomorrow"
            raise table.error(
                "image", f"{image!r} {what}: tags are pinned",
                hint=f'Write a version, e.g. "{repository.removesuffix(":latest")}:v1", or a digest (@sha256:...).',
            )  # fmt: skip
        return image

    def _command(self, table: Table, key: str) -> tuple[str, ...]:
        words = table.strings(key)
        if any("\0" in word for word in words):
            raise table.error(key, "a word holds a NUL character")
        return words

    def _env(self, table: Table) -> dict[str, str]:
        raw = table.raw("env")
        if raw is None:
            return {}
        pairs: list[tuple[str | int, str, Any]] = []
        if isinstance(raw, dict):
            pairs = [(name, name, value) for name, value in raw.items()]
        elif isinstance(raw, list):
            for i, text in enumerate(raw):
                if type(text) is not str or "=" not in text:
                    raise self._document.error('expected "KEY=VALUE"', (*table.path, "env", i))
                name, _, value = text.partition("=")
                pairs.append((i, name, value))
        else:
            raise table.error("env", 'expected an array of "KEY=VALUE" or a table')
        made: dict[str, str] = {}
        for where, name, value in pairs:
            path = (*table.path, "env", where)
            if not _ENV_NAME.fullmatch(name):
                raise self._document.error(f"{name[:60]!r} is no name of a variable", path)
            if name in made:
                raise self._document.error(f"{name} is set twice", path)
            if type(value) is bool:
                value = "true" if value else "false"
            if type(value) not in (str, int, float):
                raise self._document.error(f"{name}: expected a string", path)
            if any(c in str(value) for c in "\0\n\r"):
                raise self._document.error(f"{name}: a value may hold no line break and no NUL", path)
            made[name] = str(value)
        return made

    def _volume(self, table: Table, i: int, text: str) -> VolumeSpec:
        parts = text.split(":")
        ok = len(parts) in (2, 3) and all(p.startswith("/") and "\0" not in p for p in parts[:2]) and parts[2:] in ([], ["ro"])
        if not ok or any(".." in p.split("/") for p in parts[:2]):
            raise self._document.error(
                f'{text[:80]!r}: expected "/host/path:/container/path" or "...:ro", both absolute, without ".."',
                (*table.path, "volumes", i),
            )
        return VolumeSpec(host_path=parts[0], container_path=parts[1], read_only=len(parts) == 3)

    def _port(self, table: Table, i: int, text: str) -> FixedPort:
        found = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[0-9.]+):)?(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?", text)
        if not found or not all(0 < int(n) < 65536 for n in found.group(2, 3)):
            raise self._document.error(
                f'{text[:60]!r}: expected "address:host:container", e.g. "127.0.0.1:28443:8443"', (*table.path, "ports", i)
            )
        return FixedPort(
            address=found[1] or "",
            host_port=int(found[2]),
            container_port=int(found[3]),
            protocol=found[4] or "tcp",  # type: ignore[arg-type]
        )

    def _matching(self, table: Table, key: str, pattern: re.Pattern[str], what: str) -> str:
        value = table.get(key, str, "")
        if value and not pattern.fullmatch(value):
            raise table.error(key, f"{value[:60]!r} is not {what}")
        return value

    def _restart(self, table: Table) -> str:
        value = table.get("restart", str, "unless-stopped")
        if not _RESTART.fullmatch(value):
            known = ("no", "always", "unless-stopped", "on-failure")
            raise table.error("restart", f"{value[:40]!r} is no restart policy", hint=did_you_mean(value, known))
        return value

    def _cpu(self, table: Table) -> float:
        value = table.get("cpu", float, 0.0)
        if "cpu" in table and not 0.01 <= value <= 1024:
            raise table.error("cpu", f"{value:g} cores is out of range")
        return value

    def _health(self, table: Table, *, has_routes: bool) -> HealthSpec:
        table.only("path", "tcp", "cmd", "interval", "timeout")
        path, tcp, cmd = table.get("path", str, ""), table.get("tcp", bool, False), self._command(table, "cmd")
        chosen = [name for name, value in (("path", path), ("tcp", tcp), ("cmd", cmd)) if value]
        if len(chosen) > 1:
            raise table.error(chosen[1], f"{' and '.join(chosen)}: give one of path, tcp and cmd")
        if path and not re.fullmatch(r"/[\x21-\x7e]*", path):
            raise table.error("path", f"{path[:60]!r} is no path of a URL: it begins with / and has no spaces")
        if (path or tcp) and not has_routes:
            raise table.error(chosen[0], f"{chosen[0]} needs a route: without one there is no port to ask", hint="Use cmd = [...].")
        return HealthSpec(
            path=path, tcp=tcp, cmd=cmd, interval_s=table.duration_s("interval", 1.0), timeout_s=table.duration_s("timeout", 30.0)
        )

    def _routes(self, table: Table) -> tuple[RouteSpec, ...]:
        routes: list[RouteSpec] = []
        for each in table.tables("routes"):
            route = self._route(each)
            if any(route.name == other.name for other in routes):
                what = f"called {route.name!r}" if route.name else "without a name"
                raise each.error("name", f"two routes of {table.get('name', str, '')} are {what}", hint="Give each a name.")
            routes.append(route)
        return tuple(routes)

    def _route(self, table: Table) -> RouteSpec:
        table.only("name", "port", "mode", "hostname", "public")
        name = table.get("name", str, "")
        if name and not is_service_name(name):
            raise table.error("name", f"{name[:60]!r} is no route name: lower-case letters, digits and dashes")
        port = table.need("port", int)
        if not 0 < port < 65536:
            raise table.error("port", f"{port} is no port: 1 to 65535")
        route = RouteSpec(
            name=name,
            port=port,
            mode=table.choice("mode", ("l4", "l7"), "l7"),  # type: ignore[arg-type]
            hostname=table.get("hostname", str, ""),
            public=table.get("public", bool, False),
        )
        self._hostname(table, route)
        return route

    def _hostname(self, table: Table, route: RouteSpec) -> None:
        name = route.hostname
        if not name:
            if route.public:
                raise table.error("public", "a public route needs a hostname", hint='E.g. hostname = "web.example.net"')
            return
        labels = name.split(".")
        if len(name) > 253 or len(labels) < 2 or not all(_HOST_LABEL.fullmatch(label) for label in labels):
            raise table.error("hostname", f"{name[:80]!r} is no host name: lower-case labels of letters, digits and dashes")
        zone, allowed = self._defaults.internal_zone, self._defaults.allowed_domains
        if route.public and is_within(name, zone):
            raise table.error("hostname", f"{name} is internal ({zone}) and cannot be public")
        if route.public and allowed and not any(is_within(name, domain) for domain in allowed):
            raise table.error("hostname", f"{name} lies in no allowed domain ({', '.join(allowed)})")


def is_within(name: str, domain: str) -> bool:
    """Say whether a host name is a domain or lies in it, by whole labels: evilexample.net is not in example.net."""
    return name == domain or name.endswith("." + domain)


# ------------------------------------------------------------------ differences


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


# ---------------------------------------------------------------------- writing


def render_service(spec: ServiceSpec) -> str:
    """Return a definition that parses to the same spec."""
    lines = [f"name = {_toml(spec.name)}", f"tier = {_toml(spec.tier)}"]
    lines += [f"node = {_toml(spec.node)}"] if spec.node else []
    lines += ["active = false"] if not spec.active else []
    lines += [f"version = {_toml(spec.version)}"] if spec.version else []
    for component in spec.components:
        lines += ["", "[[components]]", *_component_lines(component)]
    return "\n".join(lines) + "\n"


def _component_lines(component: ComponentSpec) -> list[str]:
    blank = ComponentSpec(name="", image="")
    ports = [f"{p.address + ':' if p.address else ''}{p.host_port}:{p.container_port}/{p.protocol}" for p in component.ports]
    volumes = [f"{v.host_path}:{v.container_path}{':ro' if v.read_only else ''}" for v in component.volumes]
    plain: list[tuple[str, Any, Any]] = [
        ("name", component.name, None),
        ("image", component.image, None),
        ("cmd", list(component.cmd), []),
        ("env", [f"{name}={value}" for name, value in component.env.items()], []),
        ("volumes", volumes, []),
        ("network", component.network, ""),
        ("user", component.user, ""),
        ("restart", component.restart, blank.restart),
        ("ports", ports, []),
        ("memory", component.memory_bytes, 0),
        ("cpu", component.cpu_cores, 0.0),
        ("stop_grace", component.stop_grace_s, blank.stop_grace_s),
        ("update", component.update, blank.update),
    ]
    lines = [f"{key} = {_toml(value)}" for key, value, default in plain if value != default]
    if component.health != HealthSpec():
        health = component.health
        lines += ["[components.health]"]
        lines += [f"path = {_toml(health.path)}"] if health.path else []
        lines += ["tcp = true"] if health.tcp else []
        lines += [f"cmd = {_toml(list(health.cmd))}"] if health.cmd else []
        lines += [f"interval = {_toml(health.interval_s)}", f"timeout = {_toml(health.timeout_s)}"]
    for route in component.routes:
        lines += ["[[components.routes]]"]
        lines += [f"name = {_toml(route.name)}"] if route.name else []
        lines += [f"port = {route.port}", f"mode = {_toml(route.mode)}"]
        lines += [f"hostname = {_toml(route.hostname)}"] if route.hostname else []
        lines += ["public = true"] if route.public else []
    return lines


def _toml(value: Any) -> str:
    """JSON's strings, numbers and arrays are TOML's too, but for DEL, which TOML wants escaped."""
    return json.dumps(value).replace("\x7f", "\\u007f")



__all__ = ["BadDefinition", "Defaults", "differences", "is_within", "parse_service", "render_service"]
