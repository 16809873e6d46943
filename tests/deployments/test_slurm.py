"""The Slurm recipe: its job script, and whole runs on a real Slurm (`make slurm`)."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefect.main  # noqa: F401  # reads Prefect's settings before a test names a server that is none
import psutil
import pytest

from deployments import slurm
from deployments.certificates import main as make_certificates
from deployments.slurm_jobs import queued_jobs
from flows.server import prefect_server
from tests.slurm_daemons import missing_programs
from tests.slurm_daemons import slurm as slurm_daemons

ROOT = Path(__file__).parents[2]
SECONDS = 240.0
JOB = ("--gpus", "0", "--cpus", "2", "--memory", "2GB", "--interface", "lo")
MODEL = ("--embedder", "tests.faulty:Faulty")


def test_the_job_starts_a_worker_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["--print", "--partition", "gpu", "--gpus", "8", "--sbatch=--account=me", "--interface", "lo"]
    assert slurm.main([*asked, "--shared", str(tmp_path)]) == 0
    script = capsys.readouterr().out
    expected = {"#SBATCH -p gpu", "#SBATCH --gres=gpu:8", "#SBATCH --account=me"}
    assert expected | {"export CUDA_DEVICE_MAX_CONNECTIONS=32"} <= set(script.splitlines())
    worker = script.strip().splitlines()[-1]
    assert " -m dask_cuda.cli tls://127.0.0.1:" in worker
    assert worker.rindex("--nthreads 3") > worker.index("--nthreads 2")  # the last one counts
    assert worker.rindex("--name $SLURM_JOB_ID") > worker.index("--name dummy-name")
    assert " --no-dashboard " in worker
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)


def test_a_node_without_gpus_has_a_worker_per_four_cores(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    call = ["--print", "--gpus", "0", "--cpus", "16", "--interface", "lo", "--shared", str(folder)]
    assert slurm.main(call) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert not [line for line in lines if "gres" in line]
    assert {"export MALLOC_ARENA_MAX=1", "export CUDA_VISIBLE_DEVICES=''"} <= set(lines)
    assert [line for line in lines if f"TLS__WORKER__KEY='{folder}/.shard-embed-tls-" in line]
    assert not list(folder.iterdir())
    worker = lines[-1]
    assert " -m distributed.cli.dask_worker tls://127.0.0.1:" in worker
    assert "--nworkers 4 " in worker
    assert "--preload tasks.worker.start" in worker
    assert slurm.main([*call, "--no-tls"]) == 0
    assert "tcp://127.0.0.1:" in (script := capsys.readouterr().out)
    assert "TLS" not in script


def test_it_needs_a_server_that_nodes_reach(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(SystemExit, match="2"):
        slurm.main(["--", "data", "--output", "out"])
    assert "set PREFECT_API_URL to a Prefect server" in capsys.readouterr().err


def test_what_is_missing_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://login:4200/api")
    assert slurm.main(["--shared", str(tmp_path / "none"), "--", "data", "--output", "out"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: --shared {tmp_path}/none: cannot write certificates there (No such file")
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.main(["--interface", "lo", "--shared", str(tmp_path), "--", "data", "--output", "out"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: sbatch is not installed here; run this command on a login node of the cluster"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "call", "said"),
    [
        (["--interface", "none0"], ["data", "--output", "out"], "'none0' is not a valid network interface"),
        (["--memory", "lots"], ["data", "--output", "out"], "Could not interpret 'lots' as a byte unit"),
        ([], ["data"], "after --: "),
        ([], ["data", "--output", "out", "--no-such-option"], "after --: "),
        ([], ["data", "--output", "out", "--batch-size", "0"], "after --: --batch-size"),
        ([], ["data", "--output", "out", "--scheduler=tcp://a:1"], "after --: leave out --scheduler"),
    ],
)
def test_a_wrong_call_submits_nothing(
    options: list[str],
    call: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://login:4200/api")
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.main(["--interface", "lo", *options, "--shared", str(tmp_path), "--", *call]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert not list(tmp_path.iterdir())


def test_numbers_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--nodes=0", "--cpus=0", "--gpus=-1", "--nodes=many"):
        with pytest.raises(SystemExit, match="2"):
            slurm.main(["--print", option])
        name, value = option.split("=")
        assert f"argument {name}: give a number from" in (line := capsys.readouterr().err)
        assert repr(value) in line


def test_certificates_are_for_their_owner_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    before = os.umask(0)
    try:
        assert make_certificates([str(folder)]) == 0
    finally:
        os.umask(before)
    assert f"export DASK_DISTRIBUTED__COMM__TLS__WORKER__KEY={folder}/tls.key" in capsys.readouterr().out.splitlines()
    check_private(folder)
    with pytest.raises(SystemExit, match="2"):
        make_certificates([str(folder)])
    assert "File exists; name a new folder inside an existing one" in capsys.readouterr().err


def check_private(folder: Path) -> None:
    """Only the owner can enter the folder and read the files."""
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"ca.crt": 0o600, "tls.crt": 0o600, "tls.key": 0o600}


class Recipe:
    """Runs `python -m deployments.slurm` in a folder of its own."""

    def __init__(self, folder: Path, dataset: Path, environment: dict[str, str]) -> None:
        self.folder, self.dataset, self.output = folder, dataset, folder / "out"
        self.environment = environment | {"PYTHONPATH": str(ROOT), "SLURM_TEST": folder.name}

    def start(self, *options: str, fault: str = "") -> subprocess.Popen[str]:
        """Start it."""
        job = [*JOB, "--shared", str(self.folder), f"--sbatch=--output={self.folder}/job-%j.out", *options]
        command = [sys.executable, "-m", "deployments.slurm", *job, "--", str(self.dataset), "--output"]
        return subprocess.Popen(
            [*command, str(self.output), *MODEL, "--json"],
            env=self.environment | {"FAULT": fault},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, *command: str) -> list[str]:
        """The words that a command of Slurm's prints."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()

    def running(self) -> list[str]:
        """The ids of the jobs that Slurm is running."""
        return self.ask("squeue", "--noheader", "--states=RUNNING", "--format=%A")

    def embedded(self) -> list[str]:
        """The shards whose vectors are written."""
        return sorted(path.stem for path in self.output.glob("layers/image_embedding/*.parquet"))

    def wait(self, ready: Callable[[], object], process: subprocess.Popen[str]) -> None:
        """Wait until something is so, while the run lasts."""
        until = time.monotonic() + SECONDS
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, self.logs()
            time.sleep(0.1)

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        """The exit status and what was printed; nothing of the run is left."""
        out, err = process.communicate(timeout=SECONDS)
        until = time.monotonic() + 20
        while self.ask("squeue", "--noheader", "--format=%A"):
            assert time.monotonic() < until
            time.sleep(0.2)
        assert not list(self.folder.glob(".shard-embed-tls-*"))
        return process.returncode, out, err

    def processes(self) -> list[psutil.Process]:
        """The run's processes, those in its jobs too."""
        mark = f"SLURM_TEST={self.folder.name}".encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(environ.parent.name)))
            except (OSError, psutil.Error):  # it has just ended
                continue
        return found

    def logs(self) -> str:
        """What the jobs printed."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("job-*.out")))


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm of one node and a Prefect server: the environment that uses both."""
    if os.getuid():
        pytest.skip("slurmd starts jobs as their owners, so it needs root")
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with prefect_server(), slurm_daemons() as environment:
            names = ("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING")
            yield environment | {name: os.environ[name] for name in names}


@pytest.fixture
def recipe(demo_dataset: Path, tmp_path: Path, daemons: dict[str, str]) -> Recipe:
    """The recipe on that Slurm."""
    return Recipe(tmp_path, demo_dataset, daemons)


def is_whole(printed: str) -> bool:
    """Whether the printed manifest accounts for every sample of the demo's dataset."""
    manifest: dict[str, Any] = json.loads(printed)
    return (manifest["samples"], manifest["embedded"], manifest["quarantined"]) == (256, 254, 2)


@pytest.mark.slurm
def test_a_slurm_that_does_not_answer_has_lost_no_job(
    daemons: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_CONF", daemons["SLURM_CONF"])
    assert queued_jobs() == set()
    (tmp_path / "slurm.conf").write_text("Nonsense=1\n")  # an unreachable controller is waited for, a minute long
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert queued_jobs() is None
    assert "squeue does not answer (" in capsys.readouterr().err


@pytest.mark.slurm
def test_a_run_on_two_jobs(recipe: Recipe) -> None:
    """Nobody else can use the ports or read the certificates; the jobs end with the run."""
    process = recipe.start("--nodes", "2", fault="slow:2")
    recipe.wait(recipe.embedded, process)
    assert len(recipe.running()) == 2
    (certificates,) = recipe.folder.glob(".shard-embed-tls-*/certificates")
    check_private(certificates)
    processes = recipe.processes()
    ports = {c.laddr.port for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"}
    assert len(ports) >= 5  # the scheduler, two nannies, two workers
    stranger = [sys.executable, str(ROOT / "tests/flows/stranger.py"), json.dumps(sorted(ports))]
    done = subprocess.run(
        [*stranger, json.dumps([p.pid for p in processes])], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    status, out, err = recipe.finish(process)
    assert status == 0, (err, recipe.logs())
    assert is_whole(out)


@pytest.mark.slurm
def test_a_cancelled_job_is_replaced(recipe: Recipe) -> None:
    process = recipe.start("--nodes", "1", fault="slow:3")
    recipe.wait(recipe.embedded, process)
    (first,) = recipe.running()
    recipe.ask("scancel", first)
    recipe.wait(lambda: set(recipe.running()) - {first}, process)
    status, out, err = recipe.finish(process)
    assert status == 0, (err, recipe.logs())
    assert err.startswith("submitted 1 Slurm job; waiting for the first worker (squeue --me shows the queue)\n")
    assert f"Slurm job {first} has ended before the run; submitting another" in err
    assert is_whole(out)


@pytest.mark.slurm
def test_a_stopped_run_cancels_its_jobs_and_goes_on(recipe: Recipe) -> None:
    """Its last line names the command of the recipe, not the scheduler that is gone."""
    process = recipe.start("--nodes", "2", fault="hangs:00003")
    recipe.wait(recipe.embedded, process)
    process.send_signal(signal.SIGTERM)
    status, _, err = recipe.finish(process)
    assert status == 143, (err, recipe.logs())
    last = err.strip().splitlines()[-1]
    assert "this goes on: python -m deployments.slurm --gpus 0 " in last
    assert " -- " in last
    assert "--scheduler" not in last
    assert "00003" not in recipe.embedded()
    status, out, err = recipe.finish(recipe.start("--nodes", "2"))
    assert status == 0, (err, recipe.logs())
    assert is_whole(out)
    assert json.loads(out)["shards_cached"] >= 1


@pytest.mark.slurm
def test_a_refused_job_ends_in_one_line(recipe: Recipe) -> None:
    status, _, err = recipe.finish(recipe.start("--partition", "none"))
    assert status == 2
    assert err == "error: Slurm refuses the job (invalid partition specified: none); --print shows it\n"


@pytest.mark.slurm
def test_jobs_that_cannot_work_are_not_submitted_for_ever(recipe: Recipe) -> None:
    status, _, err = recipe.finish(recipe.start("--nodes", "5", "--cpus", "1", "--prologue", "exit 1"))
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: 5 Slurm jobs in a row ended before a worker of theirs reached the scheduler; see")
    assert not recipe.output.exists()
