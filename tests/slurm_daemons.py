"""A real Slurm on loopback from Debian's packages: munged, slurmctld and slurmd as processes of a test.

It needs root: slurmd starts jobs as their owners, and munged runs as the user whom its package has created.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.servers import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd")
SECONDS_TO_START = 60
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
# The node claims more cores than this machine has, so that several jobs run at once.
SlurmdParameters=config_overrides
KillWait=2
MinJobAge=10
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return which of Slurm's and munge's daemons are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


@contextlib.contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """Run a Slurm of one node for the time of the block.

    Yields:
        The environment that `sbatch`, `squeue` and the like need.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/run"))
    folder.chmod(0o755)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=socket.gethostname(), folder=folder, controller_port=free_port(), node_port=free_port()
        )
    )
    for name in ("state", "spool"):
        (folder / name).mkdir()
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_start_munge(folder))
        _wait(lambda: (folder / "munge/socket").exists(), daemons, folder)
        for program in ("slurmctld", "slurmd"):
            daemons.append(_start(folder, [program, "-D"], environment))
        _wait(lambda: "idle" in _answer(["sinfo", "--noheader", "--format=%t"], environment), daemons, folder)
        yield environment
    finally:
        _answer(["scancel", "--user=root"], environment)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder)


def _path() -> str:
    """Return a PATH with the folders of daemons, which other users than root may not have."""
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _start_munge(folder: Path) -> subprocess.Popen[bytes]:
    """Start munged as its own user, with a key and a socket of its own."""
    user = pwd.getpwnam("munge")
    home = folder / "munge"
    home.mkdir(mode=0o755)
    key = home / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for path in (home, key):
        os.chown(path, user.pw_uid, user.pw_gid)
    files = {"key-file": key, "socket": home / "socket", "pid-file": home / "pid", "seed-file": home / "seed"}
    options = [f"--{name}={path}" for name, path in (files | {"log-file": home / "log"}).items()]
    command = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return _start(folder, [*command, "munged", "--foreground", *options], os.environ | {"PATH": _path()})


def _start(folder: Path, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / "daemons.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _answer(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def _wait(ready: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until `ready()` is true while all daemons live."""
    until = time.monotonic() + SECONDS_TO_START
    while not ready():
        log = (folder / "daemons.log").read_text()
        assert all(daemon.poll() is None for daemon in daemons), log
        assert time.monotonic() < until, log
        time.sleep(0.2)
