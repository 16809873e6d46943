"""`python -m deployments.slurm --partition gpu --nodes 4 -- DATASET --output OUT …`: a run on GPUs of a Slurm cluster.

Start it where you can submit jobs, and leave it running: it is the run's client and Dask's scheduler. Each job is a
node with one Dask worker per GPU, started by dask-cuda. Whatever follows `--` is the command line of `flows.embed`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from tasks.own_cluster import GPU_ENVIRONMENT
from tasks.worker_count import TASKS_PER_GPU_WORKER


def cluster(args: argparse.Namespace) -> Any:
    """Return a SLURMCluster that has submitted no job yet.

    Args:
        args: The options of the command line; see `main`.

    Raises:
        SystemExit: dask-jobqueue is not installed.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise SystemExit("error: dask-jobqueue is missing: pip install dask-jobqueue") from error
    environment = dict(GPU_ENVIRONMENT)
    if "PREFECT_API_URL" in os.environ:
        environment["PREFECT_API_URL"] = os.environ["PREFECT_API_URL"]
    exported = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    arguments = {"--nthreads": str(TASKS_PER_GPU_WORKER), "--memory-limit": "0", "--device-memory-limit": "0"}
    return SLURMCluster(
        queue=args.partition,
        cores=args.cpus,
        processes=1,
        memory=args.memory,
        walltime=args.time,
        interface=args.interface,
        job_extra_directives=[f"--gres=gpu:{args.gpus}", *args.sbatch],
        job_script_prologue=[*exported, *args.prologue],
        worker_command="dask_cuda.cli",
        # A mapped tar counts as a worker's memory though the system can drop it at any time.
        worker_extra_args=[word for option in arguments.items() for word in option],
    )


def main(arguments: Sequence[str]) -> int:
    """Start the jobs, run the flow on them, end them; return the exit status of `flows.embed`."""
    parser = argparse.ArgumentParser(prog="python -m deployments.slurm", description=__doc__.splitlines()[0])
    parser.add_argument("--partition", help="Slurm partition with the GPUs")
    parser.add_argument("--nodes", type=int, default=1, help="number of jobs, one per node")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs per node")
    parser.add_argument("--cpus", type=int, default=16, help="processor cores per node")
    parser.add_argument("--memory", default="64GB", help="memory per node")
    parser.add_argument("--time", default="24:00:00", help="wall clock limit of a job")
    parser.add_argument("--interface", help="network interface that nodes share, such as ib0")
    parser.add_argument("--sbatch", action="append", default=[], metavar="DIRECTIVE", help="such as --account=me")
    parser.add_argument(
        "--prologue", action="append", default=[], metavar="LINE", help="shell line to run before the worker"
    )
    parser.add_argument("--print", action="store_true", help="print the job script instead of submitting it")
    parser.add_argument("embed", nargs="*", help="after --: the command line of flows.embed")
    args = parser.parse_args(arguments)
    if not args.print and "PREFECT_API_URL" not in os.environ:
        parser.error("set PREFECT_API_URL to a Prefect server that the nodes reach, such as http://login:4200/api")
    from flows.embed import main as embed

    with cluster(args) as jobs:
        if args.print:
            print(jobs.job_script())
            return 0
        jobs.scale(jobs=args.nodes)
        jobs.wait_for_workers(1)
        return embed([*args.embed, "--scheduler", jobs.scheduler_address])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
