"""What a run starts from: everything that can be found out, or found wrong, before anything is started or written."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from embedders.base import ImageEmbedder
from embedders.errors import InputError, MalformedShard
from embedders.quarantine import Reason
from embedders.recipe import Recipe, recipes_of
from embedders.samples import chosen_extensions
from embedders.webdataset import OpenShard, twice
from flows.config import EmbedConfig
from flows.progress import Progress
from tasks.dataset.even_files import missing_parts
from tasks.dataset.metadata import check_json_members, check_metadata
from tasks.dataset.schema import held_schema
from tasks.existing_cluster import check_scheduler
from tasks.hardware import choose_device
from tasks.index import open_local
from tasks.layers import ID
from tasks.manifest import Manifest
from tasks.own_cluster import OwnCluster
from tasks.plan import Plan, plan_in_one_schema
from tasks.records import PART
from tasks.shards import Shard, find_shards, with_content_fingerprints
from tasks.storage.folder import FileInfo, Folder, in_bulk
from tasks.worker.shared_engine import embedders_of
from tasks.worker_count import choose_workers

CHECKED_TARS = 8
CHECKED_METADATA = 64
BYTES_AN_IMAGE = 60_000
"""What a sample of a web crawl weighs in its tar."""


@dataclass(frozen=True)
class Work:
    """What a run starts from.

    Attributes:
        device: "cuda", "cpu" or "auto".
        plan: What is done and what is left to do.
        images: About how many there are to embed.
        started: When the run began, by the monotonic clock.
        given: Whether an embedder was given as an object, which no command line can.
    """

    device: str
    plan: Plan
    images: int
    started: float
    given: bool = False

    @property
    def embedders(self) -> tuple[ImageEmbedder, ...]:
        """Return the embedders of this run."""
        return tuple(embedders_of(self.plan.recipes).values())

    @property
    def notices(self) -> tuple[str, ...]:
        """Return lines that a person should read before the run."""
        return tuple(embedder.notice for embedder in self.embedders if embedder.notice)

    def workers(self, config: EmbedConfig) -> int:
        """How many worker processes a cluster of our own has for it."""
        return choose_workers(self.device, config.workers, len(self.plan.to_embed) or len(self.plan.to_merge))

    @property
    def anything(self) -> bool:
        """Whether a shard is left to embed or to merge, or a file to be made of merged ones."""
        return bool(self.plan.to_embed or self.plan.to_merge or missing_parts(self.plan))


@dataclass
class RunProgress:
    """How far a run has come, for whoever has to tell if it is stopped: its done shards, and its account at the end."""

    embedded: int
    manifest: Manifest | None = None


def prepare(config: EmbedConfig, embedders: Sequence[ImageEmbedder] = (), device: str | None = None) -> Work:
    """Find everything that can be found wrong before anything is started or written.

    Args:
        config: The run's parameters.
        embedders: By default those that the parameters describe.
        device: What workers compute on, "cuda", "cpu" or "auto"; by default what the parameters say of this machine.

    Raises:
        InputError: Says what is wrong and what to do.
    """
    started = time.monotonic()
    target = Folder(config.output)
    shards = find_shards(config.dataset, config.output, config.key_dot)
    target.check_writable()
    if config.scheduler:
        check_scheduler(config.scheduler)
    if config.fingerprint == "content":
        shards = with_content_fingerprints(shards)
    device = device or ("auto" if config.scheduler else choose_device(config.device))
    given, embedders = bool(embedders), tuple(embedders) or config.build_embedders()
    if device == "cpu" and any(getattr(embedder, "precision", None) == "float8" for embedder in embedders):
        raise InputError("--precision float8 needs a GPU, and there is none here; give float16 or leave it out")
    recipes = tuple(recipe for embedder in embedders for recipe in recipes_of(embedder))
    check_names(recipes, config.id_col)
    held = functools.partial(held_schema, config.output)
    try:
        plan = plan_in_one_schema(
            shards,
            recipes,
            config.merge_options(),
            held,
            overwrite=config.overwrite,
            verify=config.verify,
            part=config.run_part,
        )
    except OSError as error:
        target.refuse(error)
    if plan.to_embed:
        for embedder in embedders:
            embedder.check()
    components = dict.fromkeys(embedder.image_component for embedder in embedders)
    return Work(device, plan, _check_inputs(plan, config, components), started, given)


def check_names(recipes: Sequence[Recipe], id_col: str) -> None:
    """Refuse names of layers and their columns that cannot be used.

    Raises:
        InputError: Two have one name, one has the name of the ids' column, or one cannot be a folder's name.
    """
    names = [name for recipe in recipes for name in recipe.columns]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two columns would be called {name!r}; give each model an --image-embedding-column of its own"
            )
        if name in (ID, PART, id_col):  # layer files hold ids as "id" and the numbers of several rows as "part"
            raise InputError(f"a new column cannot be called {name!r}: another column has that name; give it another")
    for layer in (recipe.layer for recipe in recipes):
        if not layer or layer.startswith(".") or "/" in layer or "\0" in layer:
            raise InputError(
                f"{layer!r} cannot be the name of a folder, and so of a layer; give another --image-embedding-column"
            )


def _check_inputs(plan: Plan, config: EmbedConfig, components: Collection[str | None]) -> int:
    """Look at the metadata of some shards and the tars of a few: a mistake in the call shows in the first ones.

    Returns:
        About how many images all shards hold, if they are like those looked at.

    Raises:
        InputError: The metadata do not fit, or no sample of these tars has an image by --image-component.
    """
    found = [_open_first(plan, config, component) for component in components]
    opened = found[0]
    images, of_bytes = sum(tar.count for tar in opened.values()), sum(shard.tar_bytes for shard in opened)

    def check(shard: Shard) -> None:
        ids = opened[shard].samples.ids if shard in opened else None
        with contextlib.suppress(OSError):  # a store's trouble is not the metadata's: the shard's task tries again
            check_metadata(shard, config.id_col, ids, unique=config.strict_ids)

    damaged = {shard for shard in _first_local(plan) if shard not in opened}
    in_bulk(check, [shard for shard in plan.to_embed[:CHECKED_METADATA] if shard not in damaged])
    for component, tars in zip(components, found, strict=True):
        _check_images(list(tars.values()), component)
    bytes_an_image = of_bytes / images if images else BYTES_AN_IMAGE
    return int(sum(shard.tar_bytes for shard in plan.to_embed) / bytes_an_image)


def _first_local(plan: Plan) -> list[Shard]:
    """Return the first shards whose tars can be looked at."""
    return [shard for shard in plan.to_embed[:CHECKED_TARS] if shard.source.is_local]


def _open_first(plan: Plan, config: EmbedConfig, image_component: str | None) -> dict[Shard, OpenShard]:
    """Return the first tars, without damaged ones: these fail by name and the others go on."""
    opened: dict[Shard, OpenShard] = {}
    names = {*plan.options.names, *(name for recipe in plan.recipes for name in recipe.columns)}
    for shard in _first_local(plan):
        with contextlib.suppress(MalformedShard, OSError):
            path = shard.source.path(shard.tar)
            tar = open_local(shard, path, config.id_col, keep=False, image_component=image_component)
            if shard.metadata is None:
                check_json_members(shard, config.id_col, names)
            opened[shard] = tar
    return opened


def _check_images(opened: Sequence[OpenShard], image_component: str | None) -> None:
    """Prove that some sample of the first tars has an image to embed; single ones without go to quarantine.

    Raises:
        InputError: Every sample has several images and none is chosen, or none has the chosen one.
    """
    if not any(tar.count for tar in opened) or any(tar.samples.places.any() for tar in opened):
        return
    if any(image for tar in opened for image in tar.images):
        return
    unusable = [(tar, i, *why) for tar in opened for i, why in tar.unusable.items()]
    several = [reason is Reason.AMBIGUOUS_IMAGE and not twice(tar.index.samples[i]) for tar, i, reason, _ in unusable]
    if all(several):
        tar, i, _, detail = unusable[0]
        raise InputError(f"{tar.path}: sample {tar.index.samples[i].key}: {detail}")
    if image_component is not None and not any(several):
        names = " or ".join(f".{extension}" for extension in chosen_extensions(image_component))
        raise InputError(f"{opened[0].path}: no sample has a {names}; give another --image-component")


def count_shards(config: EmbedConfig) -> int:
    """How many tars of a local dataset a run does."""
    return len(_own_tars(config))


def _own_tars(config: EmbedConfig) -> Sequence[FileInfo]:
    tars = Folder(config.dataset).list(".tar")
    return tars if config.run_part is None else config.run_part.of(tars)


def surely_unfinished(config: EmbedConfig, columns: Sequence[str]) -> bool:
    """Return whether the listing of local folders already shows that there is something to do.

    Args:
        config: The run's parameters.
        columns: The names of the layers, as far as they are known.
    """
    try:
        source, target = Folder(config.dataset), Folder(config.output)
        if not (source.is_local and target.is_local):
            return False
        tars = {file.name.removesuffix(".tar") for file in _own_tars(config)}
        layers = Folder(target.place("layers"))
        done = [{f.name.removesuffix(".parquet") for f in Folder(layers.place(c)).list(".parquet")} for c in columns]
        return bool(done) and not all(tars <= names for names in done)
    except (InputError, OSError):
        return False  # planning will say what is wrong


class HandedOver(NamedTuple):
    """What a flow that is called by this program starts from."""

    work: Work
    progress: Progress
    run_progress: RunProgress
    cluster: OwnCluster | None
    """None where the cluster is there already, or none is needed."""


_handed_over: ContextVar[HandedOver | None] = ContextVar("handed_over", default=None)


@contextlib.contextmanager
def handed_over(value: HandedOver) -> Iterator[None]:
    """Let the flow that is called in this block receive what it starts from.

    An embedder object and a terminal are no parameters that Prefect could store, and planning twice costs time.
    """
    token = _handed_over.set(value)
    try:
        yield
    finally:
        _handed_over.reset(token)


def received() -> HandedOver | None:
    """What was handed over to the flow that runs, if anything was."""
    return _handed_over.get()
