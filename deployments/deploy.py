"""`python -m deployments.deploy`: put what prefect.yaml and datasets.yaml declare on the configured Prefect server.

It creates the work pool and its queues if they are missing, the deployments that are missing, and the automations.
What is there stays as somebody has set it in Prefect's UI: schedules, parameters, limits. --redeploy replaces it by
what is declared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from deployments import automations
from deployments.declared import DATASETS, DECLARED, Declared, declared
from embedders.errors import InputError
from embedders.fingerprint import digest
from flows.server import check_server
from tasks.wording import counted

POOL = "shard-embed"
QUEUES = {"gpus": 1, "sensors": None}
"""The work pool's queues, and how many runs of each go on at a time; None for any number. Of `gpus` it is one, so that
no two deployments share the GPUs by accident."""


def deploy(datasets: Path = DATASETS, redeploy: bool = False) -> None:
    """Put the deployments on the server, and print what became of each.

    Args:
        datasets: A datasets.yaml.
        redeploy: Replace those that are there.

    Raises:
        InputError: What is declared is wrong, or the server does not take it.
    """
    everything = declared(datasets=datasets)
    with get_client(sync_client=True) as client:
        _make_pool(client)
        there = {one.name: _version(client, one.name) for one in everything}
    missing = [one for one in everything if redeploy or there[one.name] is None]
    for one in everything:
        if one not in missing and there[one.name] != _declared_version(one):
            print(
                f"{one.name}: kept as it is; it was not declared like this, --redeploy takes over what is declared now"
            )
    if missing:
        _run_prefect_deploy(missing)
    print(f"{counted(len(missing), 'deployment')} made, {len(everything) - len(missing)} there before")


def _make_pool(client: SyncPrefectClient) -> None:
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    for name, limit in QUEUES.items():
        try:
            client.read_work_queue_by_name(name, work_pool_name=POOL)
        except ObjectNotFound:
            client.create_work_queue(name, concurrency_limit=limit, work_pool_name=POOL)


def _version(client: SyncPrefectClient, name: str) -> str | None:
    """Return the version of a deployment on the server; None if it is not there."""
    try:
        return client.read_deployment_by_name(name).version or ""
    except ObjectNotFound:
        return None


def _declared_version(one: Declared) -> str:
    return digest(dict(one.entry))[:12]


def _run_prefect_deploy(chosen: Sequence[Declared]) -> None:
    whole = yaml.safe_load(DECLARED.read_text())
    del whole["definitions"]
    whole["deployments"] = [{**one.entry, "version": _declared_version(one)} for one in chosen]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(whole, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"prefect deploy: {' '.join((done.stdout + done.stderr).split())}")


def main(arguments: Sequence[str]) -> int:
    """Deploy, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.deploy", description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=Path, default=DATASETS, help="more datasets, in the form of datasets.yaml")
    parser.add_argument("--redeploy", action="store_true", help="replace what was set in Prefect's UI")
    parser.add_argument("--notify", metavar="URL", help="post failed runs there as JSON")
    args = parser.parse_args(arguments)
    try:
        check_server()
        deploy(args.datasets, args.redeploy)
        automations.make(args.notify)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
