"""A real SLURM of two nodes on this machine: its own munge and slurmctld, and a slurmd for each node, on loopback."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.servers import free_port
from lightning_glue.utils import processes

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
_CONF = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=60
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=4 State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here; empty where there can be one."""
    absent = [name for name in DAEMONS if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


class Slurm:
    """``folder``: for its files, new and short: a socket's path has at most 107 characters."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, list[subprocess.Popen[bytes]]()
        # MASTER_ADDR: a real cluster resolves its nodes' names.
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
        host = socket.gethostname().partition(".")[0]
        ports = [free_port() for _ in range(3)]
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, host=host, ports=ports))
        folder.chmod(0o711)  # munged insists
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(mode=0o700)
        (folder / "munge").mkdir(mode=0o711)
        (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge" / "key").chmod(0o400)

    def start(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}={munge / name}" for name in ("socket", "key-file", "log-file", "pid-file", "seed-file")]
        files[1] = f"--key-file={munge / 'key'}"
        self._start("munged", "--foreground", "--force", *files)
        self._wait_for((munge / "socket").exists)
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        self._wait_for(lambda: "2" in self.command("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.split())

    def _start(self, name: str, *arguments: str) -> None:
        """A daemon that ends with this process."""
        command = [sys.executable, processes.__file__, str(os.getpid()), shutil.which(name) or name, *arguments]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and all(daemon.poll() is None for daemon in self.daemons):
            if ready():
                return
            time.sleep(0.2)
        logs = [f"{log.name}:\n{log.read_text()[-1000:]}" for log in self.folder.glob("*.log")]
        self.stop()
        raise TimeoutError("\n".join(logs))

    def command(self, *command: str, folder: Path | None = None, timeout: float = 400) -> subprocess.CompletedProcess:
        """A command of SLURM."""
        return subprocess.run(
            command, cwd=folder or self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
