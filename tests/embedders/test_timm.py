"""How TimmImageEmbedder chooses its decoder, and what it computes in."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from embedders import TimmImageEmbedder, decoder_choice
from embedders.batch_size import Measured
from embedders.decoder_choice import NO_CORE_DECODES, TRIAL
from embedders.loader import Loader
from embedders.open_loader import open_loader
from embedders.timm_session import TimmSession
from embedders.webdataset import OpenShard, open_shard

IMAGES = 2 * (2 * TRIAL) + 3


@pytest.fixture
def shard(tmp_path: Path) -> OpenShard:
    """Images of several sizes."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for n in range(IMAGES):
            out = io.BytesIO()
            Image.effect_mandelbrot((64 + n, 96), (-2, -1, 1, 1), 50).convert("RGB").save(out, "JPEG")
            info = tarfile.TarInfo(f"{n:02}.jpg")
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))
    return open_shard(tmp_path / "0.tar")


def undecided(embedder: TimmImageEmbedder, model_rate: float) -> TimmSession:
    """A session on the CPU whose loader is to choose its decoder, as one on a GPU is."""
    session = TimmSession(embedder, "cpu")
    session.measured = Measured(session.batch_size, model_rate)
    session.loader.undecided = True
    return session


@pytest.mark.parametrize(("model_rate", "then"), [(1e12, "fast"), (0.001, "exact")])
def test_auto_decides_by_what_the_first_batches_show(
    monkeypatch: pytest.MonkeyPatch, shard: OpenShard, model_rate: float, then: str
) -> None:
    """The choice that is made on a GPU, by the time the exact loader takes; here the fast one is another exact one."""
    embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=2, num_threads_per_worker=1)
    built: list[str] = []

    def build(*args: Any, fast: bool, **options: Any) -> tuple[Loader, str]:
        built.append("fast" if fast else "exact")
        return open_loader(*args, fast=False, **options)[0], built[-1]

    monkeypatch.setattr(decoder_choice, "open_loader", build)
    session = undecided(embedder, model_rate)
    for _ in range(2):  # the second time the choice stands
        rows = [row.sample for batch in session.batches([shard]) for row in batch.rows]
        assert rows == list(range(IMAGES))
        assert session.decoder == then
    assert built == (["exact", "fast"] if then == "fast" else ["exact"])


@pytest.mark.parametrize(("per_core", "fast"), [(NO_CORE_DECODES * 1.1, True), (NO_CORE_DECODES * 0.9, False)])
def test_a_model_that_no_core_keeps_up_with_needs_no_trial(
    monkeypatch: pytest.MonkeyPatch, per_core: float, fast: bool
) -> None:
    embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=2, num_threads_per_worker=3)
    asked = []

    def build(*args: Any, fast: bool, **options: Any) -> tuple[None, str]:
        asked.append(fast)
        return None, "exact"

    monkeypatch.setattr(decoder_choice, "open_loader", build)
    session = TimmSession(embedder, "cuda")
    session.measured = Measured(2, 3 * per_core)
    assert session.loader.decoder == "exact"
    assert asked == [fast]


def test_a_cpu_decodes_exactly_whatever_is_asked_for(shard: OpenShard) -> None:
    embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=4, num_threads_per_worker=1, decode="fast")
    session = TimmSession(embedder, "cpu")
    session.measured = Measured(4, 1e12)
    assert sum(len(batch.rows) for batch in session.batches([shard])) == IMAGES
    assert session.decoder == "exact"


def test_too_few_images_decide_nothing(shard: OpenShard) -> None:
    embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=IMAGES, num_threads_per_worker=1)
    session = undecided(embedder, 1e12)
    rows = [row.sample for batch in session.batches([shard]) for row in batch.rows]
    assert rows == list(range(IMAGES))
    assert (session.decoder, session.loader.undecided) == ("exact", True)


def test_precision_is_what_is_asked_for_and_part_of_the_fingerprint(shard: OpenShard) -> None:
    vectors, prints = {}, []
    for precision in ("auto", "float32", "bfloat16"):
        embedder = TimmImageEmbedder(
            "test_vit", pretrained=False, batch_size=8, num_threads_per_worker=1, precision=precision
        )
        model = embedder.load_embedding_model("cpu")
        with torch.inference_mode():
            vectors[precision] = torch.cat([model(batch.images) for batch in embedder.batches([shard], "cpu")])
        prints.append(embedder.fingerprint()["precision"])
    assert prints == ["float16 on a GPU", "float32", "bfloat16"]
    assert torch.equal(vectors["auto"], vectors["float32"])
    agreement = (vectors["float32"] * vectors["bfloat16"]).sum(dim=-1)
    assert vectors["bfloat16"].dtype == torch.float32
    assert 0.98 < agreement.min() < 0.99999


def test_nan_in_float16_says_what_helps() -> None:
    def said(**options: Any) -> list[str]:
        embedder = TimmImageEmbedder("test_vit", pretrained=False, **options)
        return [embedder.not_finite(device).partition("; ")[2].partition(" helps")[0] for device in ("cuda", "cpu")]

    assert said() == ["--no-autocast", ""]
    assert said(autocast=False) == ["", ""]
    assert said(precision="float16") == ["--precision float32"] * 2


IN_LITTLE_MEMORY = """
import resource, sys
import nvidia.dali, timm, torch
from pathlib import Path
from embedders import TimmImageEmbedder
from embedders.engine import Engine
from embedders.webdataset import open_shard
from tests.layers import embedded_shards

embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=100_000, num_threads_per_worker=1)
embedder.check()
used = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)
session = embedder.open("cpu")
(embedded,) = embedded_shards(Engine([session]).embed([open_shard(sys.argv[1])]))
print(len(embedded.ids), session.batch_size < 100_000)
"""


def test_a_batch_too_large_for_a_cpus_memory_becomes_smaller_ones(shard: OpenShard) -> None:
    run = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY, shard.path], capture_output=True, text=True)
    assert run.stdout == f"{IMAGES} True\n", run.stderr
