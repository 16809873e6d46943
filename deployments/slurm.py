"""`python -m deployments.slurm --partition gpu --nodes 4 -- DATASET --output OUT …`: a run on a Slurm cluster.

Start it where you can submit jobs, and leave it running: it is the run's client and Dask's scheduler. Each job is a
node with one Dask worker per GPU, or with one per four cores if it has none (`--gpus 0`). Jobs that end before the
run are replaced. Whatever follows `--` is the command line of `flows.embed`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deployments.certificates import as_variables, tls_settings, write_certificates
from embedders.errors import InputError, one_line
from tasks.own_cluster import CPU_ENVIRONMENT, GPU_ENVIRONMENT
from tasks.worker import start
from tasks.worker_count import CORES_PER_WORKER, TASKS_PER_GPU_WORKER, TASKS_PER_WORKER

NO_WEB_PAGES = {"distributed.scheduler.http.routes": "[]", "distributed.worker.http.routes": "[]"}
"""Dask's pages show logs and code to everyone on the network."""
COMMAND = ("python", "-m", "deployments.slurm")


def cluster(args: argparse.Namespace, settings: dict[str, str]) -> Any:
    """Return a SLURMCluster: a scheduler in this process, and the script of a job. It submits none itself.

    Args:
        args: The options of the command line; see `parser`.
        settings: Dask's settings for workers.

    Raises:
        InputError: dask-jobqueue is not installed, or --interface or --memory is wrong.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise InputError("dask-jobqueue is missing: pip install dask-jobqueue") from error
    logging.getLogger("distributed").setLevel(logging.ERROR)  # silence_logs misses Prefect's handlers
    gpus = [f"--gres=gpu:{args.gpus}"] if args.gpus else []
    try:
        return SLURMCluster(
            queue=args.partition,
            cores=args.cpus,
            processes=args.gpus or max(1, args.cpus // CORES_PER_WORKER),
            memory=args.memory,
            walltime=args.time,
            interface=args.interface,
            protocol="tls" if args.tls else None,
            scheduler_options={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            job_extra_directives=[*gpus, *args.sbatch],
            job_script_prologue=[*exports(args, settings), *args.prologue],
            worker_command="dask_cuda.cli" if args.gpus else "distributed.cli.dask_worker",
            worker_extra_args=worker_arguments(args.gpus),
        )
    except (ValueError, RuntimeError) as error:
        why = one_line(error).removeprefix("Cluster failed to start: ")
        raise InputError(f"the jobs cannot be prepared ({why}); correct --interface or --memory") from error


def exports(args: argparse.Namespace, settings: dict[str, str]) -> list[str]:
    """Return the shell lines that set a worker's environment; what else the jobs need comes through `sbatch`."""
    environment = GPU_ENVIRONMENT if args.gpus else CPU_ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    others = (".client.", ".scheduler.")
    environment |= as_variables({name: value for name, value in settings.items() if not any(o in name for o in others)})
    if "PREFECT_API_URL" in os.environ:
        environment["PREFECT_API_URL"] = os.environ["PREFECT_API_URL"]
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def worker_arguments(gpus: int) -> list[str]:
    """Return what a worker's command line needs beside what dask-jobqueue gives it; the last of two values counts.

    A mapped tar counts as a worker's memory though the system can drop it at any time, so there is no limit.
    """
    options = {"--name": "$SLURM_JOB_ID", "--memory-limit": "0"}
    if gpus:
        options |= {"--nthreads": str(TASKS_PER_GPU_WORKER), "--device-memory-limit": "0"}
    else:
        options |= {"--nthreads": str(TASKS_PER_WORKER), "--preload": start.__name__}
    return ["--no-dashboard", *(word for option in options.items() for word in option)]


def count(least: int) -> Callable[[str], int]:
    """Return what reads a number that may not be less than some other."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"give a number from {least}, not {text!r}")
        return int(text)

    return read


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog=" ".join(COMMAND), description=(__doc__ or "").splitlines()[0])
    made.add_argument("--partition", help="Slurm partition of the nodes")
    made.add_argument("--nodes", type=count(1), default=1, help="number of jobs, one per node")
    made.add_argument("--gpus", type=count(0), default=1, help="GPUs per node; 0 for workers on processor cores")
    made.add_argument("--cpus", type=count(1), default=16, help="processor cores per node")
    made.add_argument("--memory", default="64GB", help="memory per node")
    made.add_argument("--time", default="24:00:00", help="wall clock limit of a job; a new job follows one that ends")
    made.add_argument("--interface", help="network interface that nodes share, such as ib0")
    made.add_argument("--sbatch", action="append", default=[], metavar="DIRECTIVE", help="such as --account=me")
    made.add_argument(
        "--prologue", action="append", default=[], metavar="LINE", help="shell line to run before the worker"
    )
    made.add_argument(
        "--shared", type=Path, default=Path(), metavar="FOLDER", help="folder that all nodes see; default: this one"
    )
    made.add_argument(
        "--no-tls",
        dest="tls",
        action="store_false",
        help="let anyone on the network send code to scheduler and workers",
    )
    made.add_argument("--print", action="store_true", help="print the job script instead of submitting it")
    made.add_argument("embed", nargs="*", help="after --: the command line of flows.embed")
    return made


@contextlib.contextmanager
def dask_settings(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Use TLS with certificates made for this run, and no web pages, within the block.

    Yields:
        The settings, for the workers. The certificates are in a folder of mode 700 on the shared disk, which is removed
        at the end.

    Raises:
        InputError: The shared folder cannot be written to.
    """
    import dask

    with contextlib.ExitStack() as stack:
        settings = dict(NO_WEB_PAGES)
        if args.tls:
            try:
                made = tempfile.TemporaryDirectory(prefix=".shard-embed-tls-", dir=args.shared.absolute())
                folder = Path(stack.enter_context(made), "certificates")
                write_certificates(folder)
            except OSError as error:
                raise InputError(
                    f"--shared {args.shared}: cannot write certificates there ({error.strerror}); name a folder on the "
                    "shared disk"
                ) from error
            settings |= tls_settings(folder)
        values = {name: [] if value == "[]" else value for name, value in settings.items()}
        stack.enter_context(dask.config.set(values))
        yield settings


def check_call(words: Sequence[str]) -> None:
    """Raise InputError if flows.embed does not understand its command line: nobody should queue to learn that."""
    from cyclopts import CycloptsError

    from flows.cli import app
    from flows.errors import explain

    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise InputError(f"after --: {explain(error)}") from error
    if any(word.partition("=")[0] == "--scheduler" for word in words):
        raise InputError("after --: leave out --scheduler; this command brings its own")


def run(args: argparse.Namespace, launcher: tuple[str, ...]) -> int:
    """Start the jobs, run the flow on them, end them; return the exit status of `flows.embed`.

    Args:
        args: The options of the command line.
        launcher: The words of this command up to `--`, for the command that finishes an unfinished run.
    """
    if not args.print:
        check_call(args.embed)
    with dask_settings(args) as settings, cluster(args, settings) as dask_cluster:
        script = dask_cluster.job_script()
        if args.print:
            print(script)
            return 0
        from deployments.slurm_jobs import JoinedJobs, WorkerJobs
        from flows.config import started_by
        from flows.embed import main as embed

        joined = JoinedJobs()
        dask_cluster.scheduler.add_plugin(joined)
        with WorkerJobs(script, args.nodes, joined) as jobs, started_by(launcher):
            jobs.wait_for_a_worker()
            return embed([*args.embed, "--scheduler", dask_cluster.scheduler_address])


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status, which is that of `flows.embed`."""
    from flows.interrupt import Terminated, ending_in_time

    args = parser().parse_args(arguments)
    if not args.print and "PREFECT_API_URL" not in os.environ:
        parser().error("set PREFECT_API_URL to a Prefect server that the nodes reach, such as http://login:4200/api")
    words = list(arguments)
    try:
        with ending_in_time():
            return run(args, (*COMMAND, *words[: len(words) - len(args.embed)]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        print("stopped; the jobs are cancelled", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
