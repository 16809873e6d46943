"""What a shard's files are a pure function of, as one hash each: change an input, and the file is made again."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tasks.shards import Shard

FORMAT = 1
"""Version of what embeddings files hold; part of every key, so a change makes them again."""


def digest(value: Any) -> str:
    """32 hexadecimal digits that identify a plain JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def embedding_key(shard: Shard, embedder: str, id_col: str) -> str:
    """What a shard's embeddings are a pure function of: the tar's content and the embedder's digest.

    The name is in it too: two tars of one size and time are told apart, and so are their outputs if they are swapped.
    """
    parts = {"shard": shard.name, "tar": shard.tar_fingerprint, "embedder": embedder, "id": id_col}
    if shard.key_dot != "first":
        parts["key_dot"] = shard.key_dot
    return digest(parts | {"format": FORMAT})


def merge_key(shard: Shard, embedding: str, options: dict[str, Any]) -> str:
    """What a merged file is a pure function of: the embeddings, the metadata's content, how they are joined."""
    parts = {"embeddings": embedding, "metadata": shard.metadata_fingerprint, "options": options}
    return digest(parts | {"format": FORMAT})
