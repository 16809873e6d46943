"""What Prefect's UI finds a run by: the tags of runs and of their tasks, and names that tell folders apart."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence

from prefect import tags
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from tasks.storage.folder import Folder

PROJECT = "shard-embed"
"""The tag of every run, deployment and task run of this project. Automations match by it."""

logger = logging.getLogger(__name__)


def run_tags(dataset: str, models: Sequence[str]) -> tuple[str, ...]:
    """Return the tags of a run.

    Args:
        dataset: Its folder or URL; the tag has its last name.
        models: Names of the models, or classes of the embedders.

    Example:
        >>> run_tags("s3://crawl/laion", ["resnet50"])
        ('shard-embed', 'dataset:laion', 'model:resnet50')
    """
    return PROJECT, f"dataset:{last_name(dataset)}", *(f"model:{model}" for model in models)


@contextlib.contextmanager
def tagged(names: Sequence[str]) -> Iterator[None]:
    """Add tags to the flow run that this is called in, and to the task runs that start within the block."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        run = context.flow_run
        try:
            with get_client(sync_client=True) as client:
                client.update_flow_run(run.id, tags=sorted({*run.tags, *names}))
        except Exception as error:  # the work is worth more than its tags
            logger.warning("the run could not be tagged: %s", error)
    with tags(*names):
        yield


def last_name(folder: str) -> str:
    """Return the last part of a path or URL."""
    return folder.rstrip("/").rpartition("/")[2]


def name_with_hash(prefix: str, *folders: str) -> str:
    """Return a name that is unique for some folders and says which the first is.

    Args:
        prefix: What the name is of.
        folders: Folders or URLs. The name has the last part of the first one, in the lower-case letters, digits and
            dashes that Prefect accepts, and a hash of all of them.

    Example:
        >>> name_with_hash("summary", "s3://crawl/LAION 400m/")
        'summary-laion-400m-a7e68c4f'
    """
    whole = "\n".join(_absolute(folder) for folder in folders)
    said = re.sub("[^a-z0-9]+", "-", last_name(folders[0]).lower()).strip("-")
    return f"{prefix}-{said or 'dataset'}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _absolute(place: str) -> str:
    """Return one text for all ways to write a folder."""
    folder = Folder(place)
    return os.path.realpath(folder.path("")) if folder.is_local else place.rstrip("/")
