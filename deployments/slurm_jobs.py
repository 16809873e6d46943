"""The Slurm jobs whose workers a run uses: submitted, replaced when they end too early, cancelled with the run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from embedders.errors import InputError
from tasks.wording import counted

CHECK_SECONDS = 10.0
"""How often Slurm is asked which jobs it still has."""
SQUEUE_SECONDS = 30.0
"""How long the answer may take; the end of a run may have to wait for it."""
JOBS_IN_VAIN = 5
"""Jobs in a row that may end before a worker of theirs has reached the scheduler. Whatever is wrong with them is then
wrong with all, and no more are submitted."""


class JoinedJobs(SchedulerPlugin):
    """Notes which jobs' workers have reached the scheduler: a worker's name begins with the id of its job."""

    name = "joined-jobs"

    def __init__(self) -> None:
        """Begin with none."""
        self.jobs: set[str] = set()
        self.any = threading.Event()

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Note the job of a worker that joins; Dask calls this."""
        self.jobs.add(str(scheduler.workers[worker].name).partition("-")[0])
        self.any.set()


class WorkerJobs:
    """The jobs of a run, as many as wanted for as long as the block lasts.

    Jobs end before the run does: at their time limit, by preemption, by `scancel`, or with their node. Each is
    replaced by a new one.

    Example:
        >>> with WorkerJobs(script, wanted=4, joined=joined) as jobs:
        ...     jobs.wait_for_a_worker()
        ...     run_the_flow()
    """

    def __init__(self, script: str, wanted: int, joined: JoinedJobs) -> None:
        """Take what to submit.

        Args:
            script: The job script; its workers' names begin with `$SLURM_JOB_ID`.
            wanted: How many jobs to keep in the queue or running.
            joined: A plugin of the scheduler that the workers connect to.
        """
        self._script, self._wanted, self._joined = script, wanted, joined
        self._jobs: set[str] = set()
        self._in_vain: list[str] = []
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="slurm-jobs", daemon=True)

    def __enter__(self) -> WorkerJobs:
        """Submit the jobs.

        Raises:
            InputError: Slurm refuses them; the message says why.
        """
        try:
            for _ in range(self._wanted):
                self._jobs.add(submit(self._script))
        except BaseException:
            cancel(self._jobs)
            raise
        self._keeper.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Cancel the jobs."""
        self._stopping.set()
        self._keeper.join()
        cancel(self._jobs)

    def wait_for_a_worker(self) -> None:
        """Wait until a worker has reached the scheduler, however long the queue is.

        Raises:
            InputError: The jobs end before any of their workers does.
        """
        submitted = f"submitted {counted(self._wanted, 'Slurm job')}"
        print(f"{submitted}; waiting for the first worker (squeue --me shows the queue)", file=sys.stderr)
        while not self._joined.any.wait(1):
            if self.useless:
                raise InputError(self.useless)

    @property
    def useless(self) -> str:
        """Say why no more jobs are submitted; empty while they are."""
        if len(self._in_vain) < JOBS_IN_VAIN:
            return ""
        return (
            f"{len(self._in_vain)} Slurm jobs in a row ended before a worker of theirs reached the scheduler; see the "
            f"output of the last (slurm-{self._in_vain[-1]}.out unless --sbatch=--output names another file), then "
            "correct --prologue, --time or --interface"
        )

    def _keep(self) -> None:
        while not self.useless and not self._stopping.wait(CHECK_SECONDS):
            self._replace_ended()
        if self.useless and self._joined.any.is_set():
            print(f"{self.useless}; no more jobs are submitted", file=sys.stderr)

    def _replace_ended(self) -> None:
        """Submit a new job for each that Slurm no longer has."""
        queued = queued_jobs()
        if queued is None:
            return
        for job in sorted(self._jobs - queued, key=int):
            self._jobs.remove(job)
            self._in_vain = [] if job in self._joined.jobs else [*self._in_vain, job]
            print(f"Slurm job {job} has ended before the run; submitting another", file=sys.stderr)
        while len(self._jobs) < self._wanted and not self.useless:
            try:
                self._jobs.add(submit(self._script))
            except InputError as error:  # a limit, or a controller that restarts: the next check tries again
                print(error, file=sys.stderr)
                return


def submit(script: str) -> str:
    """Submit a job and return its id.

    Args:
        script: The text of the job script.

    Raises:
        InputError: Slurm refuses it, or is not here.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError("sbatch is not installed here; run this command on a login node of the cluster") from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[0] if done.stderr.strip() else f"status {done.returncode}"
        raise InputError(f"Slurm refuses the job ({reason.removeprefix('sbatch: error: ')}); --print shows it")
    return done.stdout.strip().partition(";")[0]


def queued_jobs() -> set[str] | None:
    """Return the ids of this user's jobs that are pending, running or ending; None if Slurm does not answer."""
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%A"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        why = " ".join((error.stderr or "").split()) if isinstance(error, subprocess.CalledProcessError) else "too slow"
        print(f"squeue does not answer ({why}); trying again", file=sys.stderr)
        return None
    return set(done.stdout.split())


def cancel(jobs: set[str]) -> None:
    """Cancel some jobs; those that have ended are no error."""
    if jobs:
        subprocess.run(["scancel", *sorted(jobs)], capture_output=True)
