"""A cheap flow that starts a deployment when a dataset has shards without embeddings."""

import hashlib
from collections.abc import Sequence
from typing import Any

from prefect import flow, get_run_logger
from prefect.deployments import run_deployment
from prefect.events import emit_event

from tasks.storage.folder import FileInfo, Folder

EVENT = "shard-embed.new-shards"


@flow(name="new-shards", persist_result=False)
def start_for_new_shards(
    dataset: str,
    output: str,
    deployment: str = "embed/on-demand",
    parameters: dict[str, Any] | None = None,
) -> int:
    """Start a deployment if the dataset has shards that are not embedded yet.

    This only lists two folders. A set of new shards starts one run, however often it is seen. A shard that is still
    being written changes the set, so it is seen again.

    Args:
        dataset: Folder or fsspec URL with the .tar shards.
        output: Folder or fsspec URL of the output.
        deployment: FLOW/DEPLOYMENT to start.
        parameters: Its parameters besides dataset and output, such as {"model": {"model_name": "resnet50"}}.

    Returns:
        How many shards are new.
    """
    new = new_shards(dataset, output)
    logger = get_run_logger()
    if not new:
        logger.info("no new shards in %s", dataset)
        return 0
    versions = "\n".join(f"{tar.name} {tar.fingerprint}" for tar in new)
    seen = hashlib.sha256(versions.encode()).hexdigest()
    emit_event(
        EVENT,
        resource={"prefect.resource.id": f"shard-embed.dataset.{dataset}", "prefect.resource.name": dataset},
        payload={"shards": len(new), "first": new[0].name, "last": new[-1].name},
    )
    run: Any = run_deployment(
        deployment,
        parameters={"dataset": dataset, "output": output, **(parameters or {})},
        idempotency_key=f"{output} {seen}",
        timeout=0,
    )
    logger.info("%d new shards, %s to %s: %s", len(new), new[0].name, new[-1].name, run.name)
    return len(new)


def new_shards(dataset: str, output: str) -> Sequence[FileInfo]:
    """Return the tars of a dataset that some layer of an output has no file of.

    Args:
        dataset: Folder or fsspec URL with the .tar shards.
        output: Folder or fsspec URL of the output.

    Raises:
        InputError: The dataset cannot be listed.
    """
    layers = Folder(Folder(output).place("layers"))
    done: dict[str, set[str]] = {}
    for file in layers.list(".parquet"):
        layer, _, name = file.name.partition("/")
        done.setdefault(layer, set()).add(name.removesuffix(".parquet"))
    everywhere = set.intersection(*done.values()) if done else set()
    return [tar for tar in Folder(dataset).list(".tar") if tar.name.removesuffix(".tar") not in everywhere]
