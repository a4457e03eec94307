"""The machine an agent runs on, as its kernel tells it."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path

from mcp.model.messages import Resources

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}


class LinuxHost:
    """Implements Host (mcp/model/ports.py); `folder` is where the disk is measured."""

    def __init__(self, folder: str, *, arch: str = "") -> None:
        self._folder = folder
        machine = platform.machine()
        self.arch = arch or _ARCHITECTURES.get(machine, machine)
        self.boot_id = _read("/proc/sys/kernel/random/boot_id").strip()

    def resources(self) -> Resources:
        """Return what the kernel says now."""
        memory = {}
        for line in _read("/proc/meminfo").splitlines():
            name, _, rest = line.partition(":")
            memory[name] = int(rest.split()[0]) * 1024
        disk = os.statvfs(self._folder)
        return Resources(
            cpu_cores=float(len(os.sched_getaffinity(0))),
            cpu_load=round(os.getloadavg()[0], 2),
            memory_bytes=memory.get("MemTotal", 0),
            memory_free_bytes=memory.get("MemAvailable", 0),
            disk_bytes=disk.f_blocks * disk.f_frsize,
            disk_free_bytes=disk.f_bavail * disk.f_frsize,
        )

    def is_port_free(self, address: str, port: int) -> bool:
        """Say whether a listener could be opened there now."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
        return True

    def real_path(self, path: str) -> str:
        """Resolve symlinks, as the mount would."""
        return os.path.realpath(path)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
