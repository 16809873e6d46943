"""Say what is kept of a deployment's run that was cancelled or has crashed, since its flow can no longer say so."""

from __future__ import annotations

from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.logging.loggers import flow_run_logger

from flows.new_shards import new_shards
from flows.run_labels import name_with_hash
from tasks.storage.folder import Folder
from tasks.wording import counted


def note_what_is_kept(flow: Any, flow_run: Any, state: Any) -> None:
    """Write to the run's log, and to an artifact, how many shards are done: a hook for cancelled and crashed runs.

    Args:
        flow: Prefect's flow.
        flow_run: The run that has ended.
        state: Its state, such as Cancelling or Crashed.
    """
    dataset, output = flow_run.parameters.get("dataset"), flow_run.parameters.get("output")
    if flow_run.deployment_id is None or not (dataset and output):
        return  # who called the flow in a process of its own learns it there
    shards, left = len(Folder(dataset).list(".tar")), len(new_shards(dataset, output, merged=False))
    what = "Cancelled" if state.is_cancelling() or state.is_cancelled() else "Crashed"
    kept = f"{shards - left:,} of {counted(shards, 'shard')} embedded and kept"
    flow_run_logger(flow_run, flow).info("%s: %s; Retry does only the rest", what.lower(), kept)
    page = f"## {what}\n\n{kept[0].upper()}{kept[1:]} in `{output}`. Retry, or another run, does only the rest."
    with get_client(sync_client=True) as client:
        client.create_artifact(
            ArtifactCreate(
                key=name_with_hash("stopped", dataset, output), type="markdown", data=page, flow_run_id=flow_run.id
            )
        )
