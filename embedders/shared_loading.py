"""Embed with several models in one pass: read and decode each image once, and preprocess it for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from embedders.base import ImageEmbedder
from embedders.decision import Decision
from embedders.session import Session
from embedders.shard_batch import ShardBatch, encoded_images, shard_batch
from embedders.timm import TimmImageEmbedder
from embedders.timm_session import TimmSession, decide_first, decide_for, open_loader_for, reopen_loader_for
from embedders.webdataset import OpenShard


def can_share(one: ImageEmbedder, other: ImageEmbedder) -> bool:
    """Return whether two embedders can take their images from one decoding.

    They can if both use our own loaders, with the same loader, decoder, image component, orientation, pixel limit and
    colours. Their preprocessing may differ. An embedder that overrides `batches` or `load_dataset_shard` cannot.

    Raises:
        InputError: Weights cannot be had, or DALI is asked for and cannot follow a model's transform.
    """
    return (
        _uses_our_loaders(one) and _uses_our_loaders(other) and _timm(one).decode_options == _timm(other).decode_options
    )


def open_together(
    embedders: Sequence[ImageEmbedder],
    device: str,
    images: int = 0,
    cores: int = 0,
    decision: Decision | None = None,
) -> list[Session]:
    """Open embedders on one worker, each ready for the batches that `batches_for` gives.

    Args:
        embedders: One or more; of several, each must be able to share with each.
        device: "cuda" or "cpu".
        images: How many images this worker will probably see; 0 if unknown.
        cores: How many processor cores it has for itself; 0 for all that the process may use.
        decision: The decoder and the batch size that the run has decided on; None if nobody has yet.

    Returns:
        A session per embedder, in their order. On a GPU their models are recorded for the smallest of the batch sizes
        that suit each. Close all of them together.

    Raises:
        ValueError: The embedders cannot share.
        InputError: As `ImageEmbedder.open` raises it.

    Example:
        >>> sessions = open_together([TimmImageEmbedder("resnet50"), TimmImageEmbedder("vit_base_patch16_224")], "cuda")
        >>> for batches in batches_for(sessions, [open_shard("00000.tar")]):
        ...     vectors = [session.model(batch.images) for session, batch in zip(sessions, batches, strict=True)]
    """
    if len(embedders) == 1:
        return [embedders[0].open(device, images, cores, decision)]
    if not all(can_share(embedders[0], other) for other in embedders):
        raise ValueError("these embedders do not decode images in the same way; open them one by one")
    sessions = [TimmSession(_timm(embedder), device, images, cores, decision) for embedder in embedders]
    if device.startswith("cuda"):
        for session in sessions:
            session.place()
        together = min(session.batch_size for session in sessions)
        for session in sessions:
            session.batch_limit = together
    for session in sessions:
        _ = session.model
    open_loader_for(sessions)
    return list(sessions)


def decide_together(sessions: Sequence[Session], shard: OpenShard) -> Decision | None:
    """Decide what has to be measured, by the images of a shard, for sessions that were opened together.

    Args:
        sessions: What `open_together` gave. They keep to what they decide.
        shard: A shard, opened. Nothing is written of it.

    Returns:
        The decision, for the sessions of the run's other workers; None where nothing has to be measured.
    """
    if len(sessions) == 1:
        session = sessions[0]
        decision = session.decide(shard)
        if isinstance(session, TimmSession) and not _uses_our_loaders(session.embedder):
            session.close_loader()  # the embedder may decode by itself
        return decision
    return decide_for(_timm_sessions(sessions), shard)


def take_decision(sessions: Sequence[Session], decision: Decision) -> bool:
    """Give sessions that were opened together, without a decision, what their run has decided meanwhile.

    Args:
        sessions: What `open_together` gave.
        decision: What another worker has decided.

    Returns:
        Whether they can keep to it: their models are ready for batches of one size. If not, they are as they were.
    """
    ours = [session for session in sessions if isinstance(session, TimmSession)]
    if len(ours) < len(sessions) or any(session.batch_size != decision.batch_size for session in ours):
        return False
    for session in ours:
        session.decision = decision
    if ours[0].decoder not in ("", decision.decoder):
        reopen_loader_for(ours)
    return True


def use_cores(sessions: Sequence[Session], cores: int) -> None:
    """Give sessions that were opened together another number of cores, between two streams of shards."""
    ours = [session for session in sessions if isinstance(session, TimmSession)]
    before = [session.num_threads for session in ours]
    for session in sessions:
        session.cores = cores
    if [session.num_threads for session in ours] != before:
        reopen_loader_for(ours)


def batches_for(sessions: Sequence[Session], shards: Iterable[OpenShard]) -> Iterator[tuple[ShardBatch, ...]]:
    """Yield the batches of a stream of shards for sessions that were opened together.

    Args:
        sessions: What `open_together` gave.
        shards: The shards, opened.

    Yields:
        One batch per session, of the same samples. Each sample is a row or a rejection of each batch, as if its session
        were alone: an image that is too thin for one resize may be a row for another. So the batches of a tuple can
        differ in their rows and in the order of these. Sessions with the same preprocessing and input dtype get one
        and the same batch.
    """
    if len(sessions) == 1:
        for batch in sessions[0].batches(shards):
            yield (batch,)
        return
    ours = _timm_sessions(sessions)
    shards = decide_first(ours, shards)
    for loaded in ours[0].loader.batches(encoded_images(shards)):
        batches = [shard_batch(batch) for batch in loaded]
        yield tuple(batches[session.input_number] for session in ours)


def _timm_sessions(sessions: Sequence[Session]) -> list[TimmSession]:
    """Return sessions as what they are, if they share a loader."""
    ours = [session for session in sessions if isinstance(session, TimmSession)]
    if len(ours) < len(sessions) or len({id(session.loader) for session in ours}) != 1:
        raise ValueError("these sessions were not opened together; see open_together")
    return ours


def _uses_our_loaders(embedder: ImageEmbedder) -> bool:
    kind = type(embedder)
    return (
        isinstance(embedder, TimmImageEmbedder)
        and kind.batches is TimmImageEmbedder.batches
        and kind.load_dataset_shard is TimmImageEmbedder.load_dataset_shard
    )


def _timm(embedder: ImageEmbedder) -> TimmImageEmbedder:
    assert isinstance(embedder, TimmImageEmbedder), "asked of embedders that use our loaders"
    return embedder
