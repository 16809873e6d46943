"""A cheap flow that starts a deployment when a dataset has shards without embeddings."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.runtime import flow_run
from pydantic import Field

from flows.new_shards import new_shards
from flows.parameters_of_output import is_in_place, manifest_of, parameters_of
from flows.run_labels import PROJECT
from tasks.wording import counted

EVENT = "shard-embed.new-shards"


@flow(name="new-shards", persist_result=False)
def start_for_new_shards(
    dataset: str,
    output: str,
    deployment: str = "embed/on-demand",
    parameters: dict[str, Any] | None = None,
    attempts: Annotated[int, Field(ge=1)] = 3,
) -> int:
    """Start a deployment if the dataset has shards that are not embedded yet.

    This only lists folders. A set of new shards starts one run, however often it is seen, and another one if that run
    failed or crashed. A shard that is still being written changes the set, so it is seen again.

    Args:
        dataset: Folder or fsspec URL with the .tar shards.
        output: Folder or fsspec URL of the output.
        deployment: FLOW/DEPLOYMENT to start.
        parameters: Its parameters besides dataset and output, such as {"model": {"model_name": "resnet50"}}. By default
            those that the output's manifest names; the deployment's own if there is no manifest yet.
        attempts: Runs for one set of shards before the sensor gives up on it.

    Returns:
        How many shards are new.

    Raises:
        InputError: The dataset cannot be listed, or the output's manifest does not say how to embed new shards.
    """
    logger, manifest = get_run_logger(), manifest_of(output, dataset)
    in_place = ((parameters or {}).get("table") or {}).get("in_place", manifest is not None and is_in_place(manifest))
    new = new_shards(dataset, output, merged=not in_place)
    if not new:
        logger.info("no new shards in %s", dataset)
        return 0
    if parameters is None:
        parameters = {} if manifest is None else parameters_of(manifest)
    given = {**parameters, "dataset": dataset, "output": output}
    said = f"{counted(len(new), 'new shard')}, {new[0].name} to {new[-1].name}"
    seen = digest_of({tar.name: tar.fingerprint for tar in new}, deployment, given)
    before = list(runs_before(seen, attempts))
    if why := reason_not_to_start(before, attempts):
        logger.info("%s: %s", said, why)
        return len(new)
    attempt = f"{seen} {len(before)}"
    if run := _start(deployment, given, f"{said} (by {flow_run.name})", attempt):
        logger.info("%s: started %s as %s", said, deployment, run)
        emit_event(
            EVENT,
            resource={"prefect.resource.id": f"shard-embed.dataset.{dataset}", "prefect.resource.name": dataset},
            payload={"shards": len(new), "first": new[0].name, "last": new[-1].name, "attempt": len(before) + 1},
            id=UUID(bytes=hashlib.sha256(attempt.encode()).digest()[:16]),
        )
    else:
        logger.info("%s: already started", said)
    return len(new)


def _start(deployment: str, parameters: dict[str, Any], name: str, attempt: str) -> str:
    """Start a deployment and return the run's id; empty if another sensor was faster.

    Args:
        deployment: FLOW/DEPLOYMENT.
        parameters: Its parameters.
        name: The run's name.
        attempt: What the server knows the run by: it answers with the run of the first call.
    """
    run: Any = run_deployment(
        deployment, parameters=parameters, flow_run_name=name, idempotency_key=attempt, tags=[PROJECT], timeout=0
    )
    return str(run.id) if run.name == name else ""


def digest_of(shards: Mapping[str, str], deployment: str, parameters: Mapping[str, Any]) -> str:
    """Return a text that is the same as long as the same run would be started.

    Args:
        shards: The fingerprint of each new shard's tar, by name.
        deployment: What would be started.
        parameters: With which parameters.
    """
    whole = json.dumps([shards, deployment, parameters], sort_keys=True, default=str)
    return f"{PROJECT} {hashlib.sha256(whole.encode()).hexdigest()}"


def runs_before(seen: str, attempts: int) -> Iterator[FlowRun]:
    """Yield the runs that were started for a set of shards, the first one first.

    Args:
        seen: The set, from `digest_of`.
        attempts: How many there are at most.
    """
    with get_client(sync_client=True) as client:
        for attempt in range(attempts):
            key = FlowRunFilterIdempotencyKey(any_=[f"{seen} {attempt}"])
            found = client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=key))
            if not found:
                return
            yield found[0]


def reason_not_to_start(before: list[FlowRun], attempts: int) -> str:
    """Return why no run is started for a set of shards, for the log; "" if one is.

    Args:
        before: The runs that were started for it.
        attempts: How many there may be.
    """
    if not before:
        return ""
    last = before[-1]
    state = last.state
    if state is None or not state.is_final():
        return f"run {last.name!r} is on them ({state.name if state is not None else 'not started'})"
    if state.is_completed():
        return f"run {last.name!r} has completed without them; look at its log and its parameters"
    if state.is_cancelled():
        return f"run {last.name!r} was cancelled; start it again by hand, with Retry in its menu"
    if len(before) >= attempts:
        return f"{len(before)} runs failed, the last one with: {state.message}; mend this and press Retry"
    return ""
