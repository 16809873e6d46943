"""The first stage: where each sample of a shard lies, and whether its metadata belongs to it."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from embedders.samples import Ignored, TarIndex
from embedders.tar import map_tar, read_tar_file
from embedders.tar_index import format_index, indexed_samples, parse_index
from embedders.webdataset import OpenShard, Samples, describe, open_shard
from tasks.dataset.metadata import check_metadata
from tasks.hardware import count_gpus
from tasks.run_names import run_name
from tasks.shards import Shard, check_unchanged
from tasks.worker.side_process import aside


def index_tar(shard: Shard, path: str, *, keep: bool) -> TarIndex:
    """Return the index of a shard's tar: the one kept in the output if it is this tar's, else made from its headers.

    Args:
        shard: The shard.
        path: The tar on the local disk.
        keep: Whether indexes are kept in the output.

    Raises:
        MalformedShard: The tar is damaged.
        ShardReplaced: The tar is not the one the run began with; its index is not kept.
    """
    kept = shard.target.read_text(shard.index_file) if keep else None
    index = parse_index(kept, shard.tar_fingerprint, shard.key_dot) if kept is not None else None
    if index is None:
        index = read_tar_file(path, shard.tar, shard.key_dot)
        if keep:
            check_unchanged(shard)
            text = format_index(index, shard.tar_fingerprint, shard.key_dot)
            shard.target.write_text(shard.index_file, text)
    return index


def open_local(shard: Shard, path: str, id_col: str, *, keep: bool, image_component: str | None = None) -> OpenShard:
    """Map a shard's local tar with its index and ids."""
    return open_shard(path, id_col, index_tar(shard, path, keep=keep), image_component, shard.key_dot)


def describe_local(
    shard: Shard, path: str, id_col: str, keep: bool, image_component: str | None, strict_ids: bool = True
) -> Samples:
    """Return the samples of a shard's local tar with their images' headers, once its metadata is seen to belong to it.

    Args:
        shard: The shard.
        path: The tar on the local disk.
        id_col: The column with the ids.
        keep: Whether indexes are kept in the output.
        image_component: As `open_shard`.
        strict_ids: Whether metadata that repeats an id is refused.

    Raises:
        MalformedShard: The tar is damaged.
        InputError: The metadata cannot be joined; see `check_metadata`.
    """
    samples = describe(map_tar(path), index_tar(shard, path, keep=keep), id_col, image_component, headers=True)
    check_metadata(shard, id_col, samples.ids, unique=strict_ids)
    return samples


def index_local(shard: Shard, id_col: str) -> tuple[int, Ignored, str]:
    """Index a shard that lies on a local disk, keep the index, and check the metadata.

    Returns:
        How many samples there are, the members that are none, and why there may be more.
    """
    opened = open_local(shard, shard.source.path(shard.tar), id_col, keep=True)
    check_metadata(shard, id_col, opened.samples.ids, unique=False)
    return opened.count, opened.index.ignored, opened.index.doubt


@task(
    name="index-generation",
    task_run_name=run_name("index"),
    cache_policy=NO_CACHE,  # the index file is the cache
    persist_result=False,
)
def index_shards(shards: Sequence[Shard], id_col: str, span: str = "") -> int | State[int]:
    """Index the shards of a group that lie on a local disk, and check their metadata.

    A shard of a store is indexed when its embedding has downloaded it. One that cannot be indexed is only logged here:
    its embedding meets the same error and reports it, and the shards beside it must not wait for a task that failed.
    On a worker with a GPU a side process does it, so that the GPU need not wait for this thread.

    Args:
        shards: The group.
        id_col: The column with the ids.
        span: The group's name in Prefect's UI; by default those of its first and last shard.

    Returns:
        How many samples were found; the state is `Cached` if all shards were indexed before.

    Example:
        >>> indexed = index_shards.submit(group.shards, plan.id_col)
        >>> embed_shards.submit(*group, wait_for=[indexed])
    """
    samples, logger, beside = 0, get_run_logger(), bool(count_gpus())
    local = [shard for shard in shards if shard.source.is_local]
    cached = bool(local) and all(
        indexed_samples(s.target.read_head(s.index_file), s.tar_fingerprint, s.key_dot) is not None for s in local
    )
    for shard in local:
        try:
            found, ignored, doubt = aside(index_local, shard, id_col) if beside else index_local(shard, id_col)
            samples += found
            if ignored.total:
                logger.info("%s: %d members are no samples, such as %s", shard.tar, ignored.total, ignored.examples[0])
            if doubt:
                logger.warning("%s: samples may be missing at its end: %s", shard.tar, doubt)
        except Exception as error:
            logger.warning("%s: %s", shard.name, error)
    return Completed(name="Cached", data=samples) if cached else samples
