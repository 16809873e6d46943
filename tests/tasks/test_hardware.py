"""The cores that a process may use, within the limits of its cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks import hardware, worker_count
from tasks.hardware import available_cores, cpu_quotas


def write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def test_version_2_has_limits_at_every_level(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/7/cgroup": "0::/user.slice/job/step\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "1600000 100000\n",
            "sys/fs/cgroup/user.slice/job/cpu.max": "350000 100000\n",
            "sys/fs/cgroup/user.slice/job/step/cpu.max": "max 100000\n",
        },
    )
    folder = f"{root}/sys/fs/cgroup/user.slice"
    assert cpu_quotas(7, root) == {folder: 16.0, f"{folder}/job": 3.5}


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_version_1_in_a_container_has_its_limit_at_the_root(tmp_path: Path, mount: str) -> None:
    root = write(
        tmp_path,
        {
            "proc/7/cgroup": "9:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us": "250000\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_period_us": "100000\n",
        },
    )
    assert cpu_quotas(7, root) == {f"{root}/sys/fs/cgroup/{mount}": 2.5}


def test_no_limit_and_no_process_are_no_limits(tmp_path: Path) -> None:
    unlimited = {
        "proc/7/cgroup": "4:cpu:/\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert cpu_quotas(7, write(tmp_path, unlimited)) == cpu_quotas(8, str(tmp_path)) == {}


def test_workers_and_their_threads_keep_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(hardware, "cpu_quotas", lambda: {"/a": 16.5, "/": 40.0})
    assert available_cores() == 16
    assert worker_count.choose_workers("cpu", None, 1000) == 4
    assert worker_count.choose_threads(4) == 4
    monkeypatch.setattr(hardware, "cpu_quotas", lambda: {"/": 0.5})
    assert available_cores() == 1
