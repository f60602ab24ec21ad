"""Hosts on one machine: each has its own network, name, memory files and disk, and they share nothing.

A host is a network namespace on a bridge. Its processes see the installed software, and in place of a folder of this
machine and of Ray's temporary one they see their own. See `NEEDS`.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

MISSING = [name for name in ("ip", "mount", "nsenter", "unshare") if shutil.which(name) is None]
CAN_HAVE_HOSTS = os.geteuid() == 0 and not MISSING
"""Whether this machine can have them; `NEEDS` says what for."""
NEEDS = "root, and ip, mount, nsenter, unshare (Debian: iproute2, mount, util-linux)"

BOOT = """
mkdir -p /tmp/ray
mount --make-rprivate /
mount --bind "$1/ray" /tmp/ray
mount -t tmpfs tmpfs /dev/shm
hostname "$2"
ip addr add "$3/24" dev eth0
ip link set eth0 up
ip link set lo up
mount --bind "$1/disk" "$4"
echo up
exec sleep infinity
"""


class Host:
    """One of them.

    Args:
        name: its hostname.
        address: of its network interface.
        folder: of this machine, for what it has of its own.
        seen: folder that its processes see as their disk.
    """

    def __init__(self, name: str, address: str, folder: Path, seen: Path) -> None:
        self.name, self.address, self._disk, self._seen = name, address, folder / "disk", seen
        for path in (self._disk, folder / "ray"):
            path.mkdir(parents=True)
        boot = ["unshare", "--mount", "--uts", "sh", "-ec", BOOT, "sh", str(folder), name, address, str(seen)]
        self._running = subprocess.Popen(["ip", "netns", "exec", name, *boot], stdout=subprocess.PIPE, text=True)
        assert self._running.stdout is not None
        assert self._running.stdout.readline() == "up\n"

    def command(self, words: list[str], folder: Path) -> list[str]:
        """A command as it is run on this host, in a folder."""
        enter = [
            "nsenter",
            f"--target={self._running.pid}",
            "--mount",
            "--uts",
            "--net",
            "sh",
            "-c",
            'cd "$0"; exec "$@"',
        ]
        return [*enter, str(folder), *words]

    def outside(self, path: Path) -> Path:
        """Where this machine sees a path of its disk."""
        return self._disk / path.relative_to(self._seen)

    def set_link(self, state: str) -> None:
        """Cut its cable (`down`), or plug it in (`up`)."""
        _ip("link", "set", f"{self.name}-br", state)

    def kill(self) -> None:
        """Take its power: every process of it is gone at once."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in map(int, found.stdout.split()):
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        self._running.wait(timeout=60)


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[tuple[str, list[Host]]]:
    """Some hosts in the block, which see `folder` empty, and the address at which they reach this machine."""
    number = os.getpid() % 250
    bridge, network = f"rd{number}", f"10.77.{number}"
    names = [f"{bridge}h{index}" for index in range(count)]
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "delete", bridge)
        _ip("addr", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        made = []
        for index, name in enumerate(names):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _ip("link", "add", f"{name}-br", "type", "veth", "peer", "name", "eth0", "netns", name)
            stack.callback(_ip, "link", "delete", f"{name}-br")
            _ip("link", "set", f"{name}-br", "master", bridge, "up")
            made.append(Host(name, f"{network}.{index + 2}", folder / f".host-{index}", folder))
            stack.callback(made[-1].kill)
        yield f"{network}.1", made


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
