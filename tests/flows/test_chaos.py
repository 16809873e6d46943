"""Every fault that a run has to survive, really done; after it the dataset equals, row for row, an undisturbed run's.

`make chaos` prints what each cost. A sample is done twice if its vector was written, was whole, and was written
again all the same; "seconds" are from the fault to the end of the run that has the whole dataset.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..servers import free_port
from .faults import FAULTY, PLAIN, SAMPLES, SHARDS, Chaos, ForeignCluster, leftovers, manifest, twice, written

pytestmark = pytest.mark.chaos
SECONDS_TO_STOP = 10.0


@pytest.fixture(scope="session")
def dataset(demo_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of 64 photographs: the demo's, twice."""
    folder = tmp_path_factory.mktemp("chaos") / "data"
    folder.mkdir()
    for number in range(SHARDS):
        for ending in ("tar", "parquet"):
            shutil.copy2(demo_dataset / f"{number % 4:05}.{ending}", folder / f"{number:05}.{ending}")
    return folder


@pytest.fixture(scope="session")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run."""
    folder = tmp_path_factory.mktemp("reference")
    chaos = Chaos(folder, dataset, folder / "out")
    try:
        assert chaos.finish(folder / "out", *PLAIN)["embedded"] == SHARDS * SAMPLES - 4
    finally:
        chaos.close()
    return folder / "out"


@pytest.fixture
def chaos(dataset: Path, reference: Path, tmp_path: Path) -> Iterator[Chaos]:
    """Starts runs in the test's folder; none is left after it."""
    made = Chaos(tmp_path, dataset, reference)
    yield made
    made.close()


Tell = Callable[[str, int, int, int, float], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Note a line of the table: fault, times tried, samples lost, samples done twice, seconds to recover."""

    def note(fault: str, tried: int, lost: int, twice: int, seconds: float) -> None:
        request.config.stash[CHAOS_TABLE].append((fault, tried, lost, twice, seconds))
        assert (lost, twice) == (0, 0)

    from tests.conftest import CHAOS_TABLE

    return note


def test_a_worker_killed(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    seconds = lost = again = 0.0
    for number in range(3):
        output = tmp_path / f"out{number}"
        run = chaos.start(output, *FAULTY, FAULT="slow:0.3")
        run.wait_for_shards(1 + number)
        before, fault = written(output), time.monotonic()
        os.kill(run.workers()[number % 2], signal.SIGKILL)
        assert run.wait() == 0, run.said
        seconds = max(seconds, time.monotonic() - fault)
        lost, again = lost + chaos.lost(output), again + twice(before, output)
        run.wait_until_gone()
    tell("a worker killed (SIGKILL) in the middle of a shard", 3, int(lost), int(again), seconds)


def test_a_shard_that_kills_its_worker_again_and_again(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    run = chaos.start(tmp_path / "out", *FAULTY, FAULT="dies:00003")
    assert run.wait() == 1, run.said
    account = manifest(tmp_path / "out")
    assert list(account["failures"]) == ["00003"]
    assert "worker died" in account["failures"]["00003"]
    assert (account["shards_failed"], account["samples"]) == (1, (SHARDS - 1) * SAMPLES)
    assert account["finish_with"] in run.said
    before, fault = written(tmp_path / "out"), time.monotonic()
    assert chaos.finish(tmp_path / "out")["shards_cached"] == SHARDS - 1
    seconds = time.monotonic() - fault
    tell(
        "the same worker killed again and again by one shard",
        1,
        chaos.lost(tmp_path / "out"),
        twice(before, tmp_path / "out"),
        seconds,
    )


def test_a_shard_that_hangs(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    run = chaos.start(tmp_path / "out", *FAULTY, "--shard-timeout", "3", FAULT="hangs:00005")
    assert run.wait() == 1, run.said
    account = manifest(tmp_path / "out")
    assert list(account["failures"]) == ["00005"]
    assert "hangs" in account["failures"]["00005"]
    assert "--shard-timeout 3" in account["finish_with"]
    before, fault = written(tmp_path / "out"), time.monotonic()
    assert chaos.finish(tmp_path / "out")["shards_cached"] == SHARDS - 1
    seconds = time.monotonic() - fault
    tell("a shard that hangs in C code", 1, chaos.lost(tmp_path / "out"), twice(before, tmp_path / "out"), seconds)


def test_the_whole_process_killed_at_random_moments(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    moments, wanted = random.Random(4), 20
    begun = time.monotonic()
    run = chaos.start(tmp_path / "measured", *FAULTY, FAULT="slow:0.3")
    assert run.wait() == 0
    whole = time.monotonic() - begun
    lost = again = tried = outputs = 0
    seconds = 0.0
    while tried < wanted:
        output = tmp_path / f"out{outputs}"
        outputs += 1
        while tried < wanted:
            before = written(output)
            run = chaos.start(output, *FAULTY, FAULT="slow:0.3")
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(moments.uniform(0.1, whole))
            if run.process.poll() is not None:
                assert run.process.returncode == 0, run.said
                break
            run.process.kill()  # the one process: its children have to notice by themselves
            fault = time.monotonic()
            tried += 1
            run.process.wait()
            run.wait_until_gone()
            again += twice(before, output)
        before = written(output)
        chaos.finish(output)
        seconds = max(seconds, time.monotonic() - fault)
        lost, again = lost + chaos.lost(output), again + twice(before, output)
    tell("the whole process killed (SIGKILL) at random moments", tried, lost, again, seconds)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_stop(chaos: Chaos, tmp_path: Path, tell: Tell, number: signal.Signals, status: int) -> None:
    output, seconds, again, tried = tmp_path / "out", 0.0, 0, 3
    for attempt in range(tried):
        before = written(output)
        run = chaos.start(output, *FAULTY, FAULT="slow:3")  # shards are left for the last attempt, too
        if attempt == 0:
            run.wait_for_server()
        else:
            run.wait_for_shards(len(before) + 1)
        told = time.monotonic()
        if number == signal.SIGINT:
            run.signal_group(number)
        else:
            run.process.send_signal(number)
        assert run.wait(SECONDS_TO_STOP) == status, run.said
        run.wait_until_gone(max(0.1, SECONDS_TO_STOP - (time.monotonic() - told)))
        assert "Traceback" not in run.said
        assert run.said.splitlines()[-1].startswith("stopped"), run.said
        assert leftovers(output) == []
        again += twice(before, output)
    before, fault = written(output), time.monotonic()
    chaos.finish(output)
    seconds = time.monotonic() - fault
    tell(f"{number.name}", tried, chaos.lost(output), again + twice(before, output), seconds)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_disk_full(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    with small_disk(tmp_path / "disk", "140k") as disk:
        output = disk / "out"
        run = chaos.start(output, *FAULTY)
        assert run.wait() == 1, run.said
        assert "No space left on device" in run.said
        assert leftovers(output) == []
        before, fault = written(output), time.monotonic()
        assert 0 < len(before) < SHARDS
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert chaos.finish(output)["shards_cached"] == len(before)
        seconds = time.monotonic() - fault
        tell("the disk full", 1, chaos.lost(output), twice(before, output), seconds)


def test_an_output_that_is_read_only(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    with small_disk(tmp_path / "disk", "100m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run = chaos.start(disk / "out", *FAULTY)
        assert run.wait() == 2
        assert "cannot be written to" in run.said
        assert len(run.said.splitlines()) == 1
        fault = time.monotonic()
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        chaos.finish(disk / "out")
        tell("a read-only output", 1, chaos.lost(disk / "out"), 0, time.monotonic() - fault)


def test_a_tar_replaced_while_the_run_goes_on(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    data = tmp_path / "data"
    shutil.copytree(chaos.dataset, data)
    last = data / f"{SHARDS - 1:05}.tar"
    shutil.move(last, tmp_path / "right.tar")
    other_images(tmp_path / "right.tar", data / "00000.tar", last)
    chaos.dataset = data
    run = chaos.start(tmp_path / "out", *FAULTY, FAULT="slow:1")
    run.wait_for_shards(1)
    fault = time.monotonic()
    shutil.move(tmp_path / "right.tar", last)
    assert run.wait() == 1, run.said
    assert list(manifest(tmp_path / "out")["failures"]) == [last.stem]
    assert "replaced" in run.said
    before = written(tmp_path / "out")
    assert last.stem + ".parquet" not in before
    chaos.finish(tmp_path / "out")
    seconds = time.monotonic() - fault
    tell(
        "a tar replaced while the run goes on",
        1,
        chaos.lost(tmp_path / "out"),
        twice(before, tmp_path / "out"),
        seconds,
    )


def other_images(tar: Path, of: Path, to: Path) -> None:
    """A tar with the names of one and, turned round, the images of another."""
    with tarfile.open(tar) as named, tarfile.open(of) as pictured, tarfile.open(to, "w") as made:
        images = [pictured.extractfile(m).read() for m in pictured if m.name.endswith(".jpg")][::-1]  # type: ignore[union-attr]
        for member in named.getmembers():
            data = named.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".jpg") and images:
                data = images.pop()

            member.size = len(data)
            made.addfile(member, io.BytesIO(data))


def test_the_local_prefect_server_killed(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    run = chaos.start(output, *FAULTY, FAULT="slow:1")
    run.wait_for_shards(1)
    (server,) = run.children("local_server")
    before, fault = written(output), time.monotonic()
    os.kill(server, signal.SIGKILL)
    assert run.wait() == 0, run.said
    seconds = time.monotonic() - fault
    run.wait_until_gone()
    tell("the local Prefect server killed", 1, chaos.lost(output), twice(before, output), seconds)


def test_two_runs_at_once(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    first = chaos.start(output, *FAULTY, FAULT="slow:0.5")
    first.wait_for_shards(1)
    before, fault = written(output), time.monotonic()
    second = chaos.start(output, *FAULTY)
    assert second.wait() == 2
    assert f"process {first.process.pid} on" in second.said
    assert len(second.said.splitlines()) == 1
    assert first.wait() == 0, first.said
    tell("two runs over one output at once", 1, chaos.lost(output), twice(before, output), time.monotonic() - fault)


def damage_deleted(output: Path) -> None:
    (output / "layers/image_embedding/00000.parquet").unlink()


def damage_truncated(output: Path) -> None:
    path = output / "layers/image_embedding/00001.parquet"
    path.write_bytes(path.read_bytes()[:-200])


def damage_flipped_footer(output: Path) -> None:
    flip(output / "layers/image_embedding/00002.parquet", -60)


def damage_flipped_page(output: Path) -> None:
    flip(output / "layers/image_embedding/00003.parquet", 9000)


def damage_foreign(output: Path) -> None:
    shutil.copy(output / "quarantine/image_embedding/00000.parquet", output / "layers/image_embedding/00004.parquet")


def damage_swapped(output: Path) -> None:
    one, two = output / "layers/image_embedding/00005.parquet", output / "layers/image_embedding/00006.parquet"
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)


def damage_quarantine(output: Path) -> None:
    (output / "quarantine/image_embedding/00000.parquet").write_bytes(b"PAR1")


def damage_index(output: Path) -> None:
    path = output / "index/00007.idx"
    path.write_text(path.read_text().replace("v1.2 64", "v1.2 63", 1))


DAMAGES = {
    damage_deleted: ["00000"],
    damage_truncated: ["00001"],
    damage_flipped_footer: ["00002"],
    damage_flipped_page: ["00003"],
    damage_foreign: ["00004"],
    damage_swapped: ["00005", "00006"],
    damage_quarantine: ["00000"],
    damage_index: [],  # is made again, and agrees then
}


def flip(path: Path, at: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_outputs_damaged_between_runs(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    lost = again = 0
    seconds = 0.0
    for damage, shards in DAMAGES.items():
        output = tmp_path / damage.__name__
        shutil.copytree(chaos.reference, output)
        damage(output)
        shutil.rmtree(output / "metadata")
        untouched = {name: stamp for name, stamp in written(output).items() if name.partition(".")[0] not in shards}
        damaged = {name: stamp for name, stamp in written(output).items() if name.partition(".")[0] in shards}
        fault = time.monotonic()
        chaos.finish(output, *PLAIN)  # as the reference was made
        seconds = max(seconds, time.monotonic() - fault)
        assert twice(damaged, output) == SAMPLES * len(damaged), damage.__name__
        lost, again = lost + chaos.lost(output), again + twice(untouched, output)
    tell("outputs deleted, cut, bit-flipped, foreign, swapped", len(DAMAGES), lost, again, seconds)


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[ForeignCluster]:
    """A scheduler without workers."""
    cluster = ForeignCluster(tmp_path)
    cluster.start_scheduler()
    yield cluster
    cluster.close()


def on(foreign: ForeignCluster, *options: str) -> tuple[str, ...]:
    """The options of a run on a cluster that is there."""
    return (*FAULTY[:4], "--scheduler", foreign.address, *options)


def test_workers_killed_until_none_is_left(chaos: Chaos, foreign: ForeignCluster, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    foreign.environment["FAULT"] = "slow:1"
    first, second = foreign.start_worker(), foreign.start_worker()
    foreign.wait_for_workers(2)
    run = chaos.start(output, *on(foreign))
    run.wait_for_shards(1)
    first.kill()
    run.wait_for_shards(2)
    before, fault = written(output), time.monotonic()
    second.kill()
    run.wait_until(lambda: "all workers are gone" in run.said, 30)
    foreign.environment.clear()
    foreign.start_worker()
    foreign.start_worker()
    assert run.wait() == 0, run.said
    assert "joined; going on" in run.said
    seconds = time.monotonic() - fault
    tell("workers killed until none is left, then new ones", 2, chaos.lost(output), twice(before, output), seconds)


def test_the_last_worker_gone_for_good(chaos: Chaos, foreign: ForeignCluster, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    foreign.environment["FAULT"] = "slow:1"
    worker = foreign.start_worker()
    foreign.wait_for_workers(1)
    run = chaos.start(output, *on(foreign, "--worker-timeout", "5"))
    run.wait_for_shards(2)
    before = written(output)
    worker.kill()
    fault = time.monotonic()
    assert run.wait(60) == 1, run.said
    assert "all workers were gone for 5 s" in run.said
    assert "Traceback" not in run.said
    assert manifest(output)["embedded"] > 0
    run.wait_until_gone()
    chaos.finish(output)
    seconds = time.monotonic() - fault
    tell("the last worker gone for good", 1, chaos.lost(output), twice(before, output), seconds)


def test_the_scheduler_killed(chaos: Chaos, foreign: ForeignCluster, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    foreign.environment["FAULT"] = "slow:1"
    foreign.start_worker()
    foreign.wait_for_workers(1)
    run = chaos.start(output, *on(foreign))
    run.wait_for_shards(2)
    before = written(output)
    assert foreign.scheduler is not None
    foreign.scheduler.kill()
    fault = time.monotonic()
    assert run.wait(75) == 1, run.said
    assert time.monotonic() - fault < 60
    assert "the Dask scheduler is gone" in run.said
    assert "Traceback" not in run.said
    run.wait_until_gone()
    foreign.close()
    chaos.finish(output)
    seconds = time.monotonic() - fault
    tell("the Dask scheduler killed", 1, chaos.lost(output), twice(before, output), seconds)


def test_a_worker_frozen_for_two_minutes(chaos: Chaos, foreign: ForeignCluster, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    foreign.environment["FAULT"] = "slow:1"
    frozen, _ = foreign.start_worker(), foreign.start_worker()
    foreign.wait_for_workers(2)
    run = chaos.start(output, *on(foreign))
    run.wait_for_shards(2)
    before, fault = written(output), time.monotonic()
    os.kill(frozen.pid, signal.SIGSTOP)
    time.sleep(120)
    os.kill(frozen.pid, signal.SIGCONT)
    assert run.wait() == 0, run.said
    seconds = time.monotonic() - fault
    tell("a worker frozen (SIGSTOP) for two minutes", 1, chaos.lost(output), twice(before, output), seconds)


HERE, THERE, NAMESPACE = "10.231.77.1", "10.231.77.2", "shard-embed-chaos"


@pytest.fixture
def network() -> Iterator[str]:
    """A network namespace that a pair of virtual cables joins to this one; the name of the cable's end here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and iproute2")
    commands = [
        f"ip netns add {NAMESPACE}",
        f"ip link add chaos0 type veth peer name chaos1 netns {NAMESPACE}",
        f"ip addr add {HERE}/24 dev chaos0",
        "ip link set chaos0 up",
        f"ip -n {NAMESPACE} addr add {THERE}/24 dev chaos1",
        f"ip -n {NAMESPACE} link set chaos1 up",
        f"ip -n {NAMESPACE} link set lo up",
    ]
    try:
        for command in commands:
            made = subprocess.run(command.split(), capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {command}: {made.stderr.strip()}")
        yield "chaos0"
    finally:
        subprocess.run(["ip", "link", "del", "chaos0"], capture_output=True)
        subprocess.run(["ip", "netns", "del", NAMESPACE], capture_output=True)


@pytest.fixture
def prefect_there(network: str, tmp_path: Path) -> Iterator[str]:
    """A Prefect server that the namespace reaches; its API's URL."""
    port = free_port()
    url, home = f"http://{HERE}:{port}/api", tmp_path / "server"
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HERE, "--port", str(port)]
    with (tmp_path / "prefect.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
                break
            assert time.monotonic() < until, (tmp_path / "prefect.log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def test_a_network_cut_and_healed(chaos: Chaos, network: str, prefect_there: str, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    cluster = ForeignCluster(tmp_path, HERE, {"FAULT": "slow:1", "PREFECT_API_URL": prefect_there})
    try:
        cluster.start_scheduler()
        cluster.start_worker("ip", "netns", "exec", NAMESPACE)
        cluster.start_worker()
        cluster.wait_for_workers(2)
        run = chaos.start(output, *on(cluster), PREFECT_API_URL=prefect_there)
        run.wait_for_shards(2)
        before, fault = written(output), time.monotonic()
        subprocess.run(["ip", "link", "set", network, "down"], check=True)
        time.sleep(45)
        subprocess.run(["ip", "link", "set", network, "up"], check=True)
        assert run.wait() == 0, run.said
        seconds = time.monotonic() - fault
        tell("the network of a worker cut for 45 s", 1, chaos.lost(output), twice(before, output), seconds)
    finally:
        cluster.close()
