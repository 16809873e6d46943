"""Where a timm model's weights come from and what identifies them, resolved once, before anything is started.

One `Weights` value stands for every source: timm's own names, `hf-hub:` and `local-dir:` names, a checkpoint file,
or random weights from a fixed seed.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedders.errors import InputError

CHECKPOINT_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin"})
RANDOM = "random, seed 0"
WAYS_OUT = "give --checkpoint FILE, a local-dir:FOLDER model name, or --no-pretrained for random weights"


@dataclass(frozen=True)
class Weights:
    """A model's architecture, timm's configuration of its weights, and what identifies the weights' content."""

    architecture: str
    pretrained_cfg: dict[str, Any]
    identity: str
    """`sha256:…` of the file, the hub's etag of it, or RANDOM."""

    @property
    def may_project(self) -> bool:
        """Whether the head is as wide as a projection of this architecture, and no labels are named for it.

        It is one for timm's own tags. Of other people's weights the head itself must be looked at too.
        """
        cfg = self.pretrained_cfg
        return cfg.get("num_classes") in projection_widths(self.architecture) and not cfg.get("label_names")


def resolve_weights(model_name: str, pretrained: bool, checkpoint: str | None) -> Weights:
    """Find the weights, downloading them to timm's cache where they come from a hub.

    Raises:
        InputError: Unknown model, or weights that are neither on this machine nor can be downloaded.
    """
    architecture, cfg = _configuration(model_name)
    if checkpoint is not None:
        return Weights(architecture, cfg, _checkpoint_identity(checkpoint))
    if not pretrained:
        return Weights(architecture, cfg, RANDOM)
    return Weights(architecture, cfg, _pretrained_identity(model_name, cfg))


def _configuration(model_name: str) -> tuple[str, dict[str, Any]]:
    """Return a model's architecture and pretrained configuration; nothing but a config.json is fetched."""
    import timm
    from timm.models import load_model_config_from_hf, parse_model_name

    if model_name.startswith("local-dir:"):
        return _local_configuration(Path(model_name.removeprefix("local-dir:")))
    if model_name.startswith("hf-hub:") or model_name.startswith("hf_hub:"):
        try:
            cfg, architecture, _ = load_model_config_from_hf(parse_model_name(model_name)[1])
        except Exception as error:  # the hub's client raises a dozen kinds
            raise InputError(f"cannot read {model_name!r} from the hub ({_first_line(error)}); {WAYS_OUT}") from error
        return architecture, cfg
    if not timm.is_model(model_name):
        raise InputError(f"no timm model is named {model_name!r}; {_closest(model_name)}")
    try:
        found = timm.get_pretrained_cfg(model_name, allow_unregistered=False)
    except RuntimeError as error:
        raise InputError(f"timm has no pretrained tag {model_name!r}; {_closest(model_name)}") from error
    assert found is not None, "only allow_unregistered=True gives None"
    return timm.models.split_model_name_tag(model_name)[0], found.to_dict()


def _local_configuration(folder: Path) -> tuple[str, dict[str, Any]]:
    from timm.models._hub import load_model_config_from_path

    try:
        cfg, architecture, _ = load_model_config_from_path(folder)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise InputError(f"local-dir:{folder} is no timm model folder: {_first_line(error)}") from error
    return architecture, cfg


def _closest(model_name: str) -> str:
    import timm

    close = _same_model(model_name)
    if not close:
        names = timm.list_models(pretrained=True) if "." in model_name else timm.list_models()
        close = difflib.get_close_matches(model_name, names, n=3, cutoff=0.5) or difflib.get_close_matches(
            model_name.partition(".")[0].lower(), timm.list_models(), n=3, cutoff=0.3
        )
    return (
        f"the closest names are {', '.join(close)}"
        if close
        else "list them with: python -c 'import timm; print(timm.list_models())'"
    )


_OPEN_CLIP_SIZES = {
    "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant", "bigg": "gigantic",
}  # fmt: skip


def _same_model(model_name: str) -> list[str]:
    """Return timm's names of a model called as OpenAI and open_clip call theirs: ViT-L-14, ViT-B/32, RN50x4."""
    import timm

    name = model_name.lower()
    if vit := re.match(r"(?:open_?clip[-_/])?vit-(s|b|l|h|g|bigg)[-/](\d+)(-quickgelu)?(?:[-@]?(336|378))?", name):
        size, patch, quick, side = vit.groups()
        start = f"vit_{_OPEN_CLIP_SIZES[size]}_patch{patch}_clip_{'quickgelu_' if quick else ''}{side or ''}"
    elif resnet := re.match(r"rn(50|101)(x\d+)?", name):
        start = f"resnet{resnet[1]}{resnet[2] or ''}_clip"
    else:
        return []
    found = [tag for tag in timm.list_models(pretrained=True) if tag.startswith(start) and projects(tag)]
    return sorted(found, key=lambda tag: (not tag.endswith(".openai"), tag))[:3]


LABEL_COUNTS = frozenset({1000, 11221, 11821, 19168, 21841, 21842, 21843, 115217})
"""How many classes the label sets of timm's classifiers have: a head of such a width gives logits."""


def projects(tag: str) -> bool:
    """Return whether the head of a pretrained tag of timm is a projection into a shared space, not a classifier."""
    import timm

    cfg = timm.get_pretrained_cfg(tag)
    if cfg is None or not cfg.num_classes or cfg.num_classes in LABEL_COUNTS:
        return False
    return any(word in f"{tag}.{cfg.hf_hub_id or ''}".lower() for word in ("clip", "_pe_core"))


@functools.cache
def projection_widths(architecture: str) -> frozenset[int]:
    """The dimensions into which timm's pretrained tags of an architecture project."""
    import timm

    tags = timm.list_models(f"{architecture}.*", pretrained=True)
    cfgs = [timm.get_pretrained_cfg(tag) for tag in tags if projects(tag)]
    return frozenset(cfg.num_classes for cfg in cfgs if cfg is not None)


def _checkpoint_identity(checkpoint: str) -> str:
    path = Path(checkpoint)
    if not path.is_file():
        raise InputError(f"no checkpoint file {checkpoint!r}; give a .safetensors or .pth file")
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise InputError(f"checkpoint {checkpoint!r} ends in none of {', '.join(sorted(CHECKPOINT_SUFFIXES))}")
    return content_hash(path)


def content_hash(path: Path) -> str:
    """Return `sha256:` and the hash of a file's bytes; about a second per gigabyte."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _pretrained_identity(model_name: str, cfg: dict[str, Any]) -> str:
    from timm.models._builder import _resolve_pretrained_source

    source, location = _resolve_pretrained_source(cfg)
    if not source:
        raise InputError(f"timm has no pretrained weights for {model_name!r}; {WAYS_OUT}")
    if source == "local-dir":
        files = sorted(p for p in Path(location).iterdir() if p.suffix in CHECKPOINT_SUFFIXES)
        if not files:
            raise InputError(f"{model_name}: no weights in the folder; save a model.safetensors there")
        return "+".join(content_hash(path) for path in files)
    try:
        return _hub_identity(location) if source == "hf-hub" else _url_identity(location)
    except Exception as error:  # the hub's client raises a dozen kinds; all mean that the weights are not to be had
        raise InputError(
            f"the weights of {model_name!r} are not on this machine and cannot be downloaded "
            f"({_first_line(error)}); {WAYS_OUT}"
        ) from error


def _hub_identity(location: Any) -> str:
    """Return the hub's etag of the weights file, which is its sha256; the file is in the local cache afterwards."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives, hf_split

    hub_id, name = location if isinstance(location, tuple) else (location, HF_WEIGHTS_NAME)
    repo, revision = hf_split(hub_id)
    candidates = [name] if name.endswith(".safetensors") else [*_get_safe_alternatives(name), name]
    for candidate in candidates:
        try:
            with _hub_said_nothing():
                path = hf_hub_download(repo, candidate, revision=revision)
        except LocalEntryNotFoundError:  # no network: the next name would fare no better
            raise
        except EntryNotFoundError:
            if candidate == candidates[-1]:
                raise
            continue
        return f"{candidate}:{Path(path).resolve().name}"
    raise AssertionError("unreachable: the last candidate returns or raises")


@contextlib.contextmanager
def _hub_said_nothing() -> Iterator[None]:
    """Without the hub client's line for each of its retries: the error that ends them says it all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def cached_hub() -> Iterator[None]:
    """Let the hub's client answer from this machine's cache only: what is not there fails at once."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # asked at every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_of_hub(model_name: str) -> bool:
    """Return whether a model's own weights are in a hub; the hub is not asked.

    Raises:
        InputError: timm has no such model.
    """
    from timm.models._builder import _resolve_pretrained_source

    if model_name.startswith(("hf-hub:", "hf_hub:")):
        return True
    return bool(_resolve_pretrained_source(_configuration(model_name)[1])[0] == "hf-hub")


def _url_identity(url: str) -> str:
    from timm.models._hub import download_cached_file

    return content_hash(Path(download_cached_file(url, progress=False)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
