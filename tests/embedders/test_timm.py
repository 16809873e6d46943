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

from embedders import TimmImageEmbedder, timm_session
from embedders.batch_size import Measured
from embedders.decision import Decision
from embedders.decoder_choice import NO_CORE_DECODES, TRIAL, exact_rate
from embedders.loader import Loader
from embedders.open_loader import open_loader
from embedders.shard_batch import encoded_images
from embedders.shared_loading import decide_together
from embedders.timm_session import TimmSession, open_loader_for
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


BATCH = 2


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decoders of the loaders that sessions open: those of a GPU, which here are all exact ones on the CPU."""
    opened: list[str] = []

    def build(*args: Any, fast: bool, **options: Any) -> tuple[Loader, str]:
        opened.append("fast" if fast else "exact")
        return open_loader(*args, fast=False, **options | {"device": "cpu"})[0], opened[-1]

    monkeypatch.setattr(timm_session, "open_loader", build)
    return opened


def on_a_gpu(
    model_rate: float, decision: Decision | None = None, batch_size: Any = "auto", **options: Any
) -> TimmSession:
    """A session as on a GPU where the model was measured, best with batches of BATCH."""
    embedder = TimmImageEmbedder(
        "test_vit", pretrained=False, num_threads_per_worker=1, batch_size=batch_size, **options
    )
    session = TimmSession(embedder, "cuda", decision=decision)
    session.measured = Measured(BATCH, model_rate)
    return session


def rows(session: TimmSession, shard: OpenShard) -> list[int]:
    return [row.sample for batch in session.batches([shard]) for row in batch.rows]


@pytest.mark.parametrize(
    ("model_rate", "decoder", "loaders"),
    [
        (NO_CORE_DECODES * 0.99, "fast", ["exact", "fast"]),
        (0.001, "exact", ["exact"]),
        (NO_CORE_DECODES * 1.01, "fast", ["fast"]),  # no core keeps up with it
        (0.0, "exact", ["exact"]),  # unknown
    ],
)
def test_a_session_decides_by_the_time_that_exact_decoding_takes(
    monkeypatch: pytest.MonkeyPatch,
    shard: OpenShard,
    built: list[str],
    model_rate: float,
    decoder: str,
    loaders: list[str],
) -> None:
    monkeypatch.setattr(timm_session, "exact_rate", lambda *args: min(exact_rate(*args), 500.0))
    session = on_a_gpu(model_rate)
    assert session.undecided
    assert session.decide(shard) == session.decide(shard) == session.decision == Decision(decoder, BATCH)
    assert rows(session, shard) == list(range(IMAGES))
    assert (session.decoder, session.batch_size) == (decoder, BATCH)
    assert built == loaders


def test_a_session_that_was_given_a_decision_measures_nothing(shard: OpenShard, built: list[str]) -> None:
    for decision, model_rate in [(Decision("exact", 3), 1e12), (Decision("fast", 5), 0.001)]:
        session = on_a_gpu(model_rate, decision)
        assert session.decide(shard) == decision
        assert rows(session, shard) == list(range(IMAGES))
        assert (session.decoder, session.batch_size) == (decision.decoder, decision.batch_size)
    assert built == ["exact", "fast"]


def test_a_session_that_is_opened_by_hand_decides_by_its_first_shard(shard: OpenShard, built: list[str]) -> None:
    session = on_a_gpu(0.001)
    for _ in range(2):  # the second time the decision stands
        assert rows(session, shard) == list(range(IMAGES))
        assert session.decision == Decision("exact", BATCH)
    assert rows(on_a_gpu(1e12), shard) == list(range(IMAGES))
    assert built == ["exact", "fast"]


class OwnBatches(TimmImageEmbedder):
    def batches(self, shards: Any, device: str) -> Any:
        raise NotImplementedError


def test_an_embedder_that_may_decode_by_itself_keeps_no_loader_of_the_trial(shard: OpenShard, built: list[str]) -> None:
    session = TimmSession(OwnBatches("test_vit", pretrained=False, num_threads_per_worker=1), "cuda")
    session.measured = Measured(BATCH, 0.001)
    assert decide_together([session], shard) == Decision("exact", BATCH)
    assert session.decoder == ""
    assert built == ["exact"]


def test_what_is_asked_for_counts_more_than_a_decision(shard: OpenShard, built: list[str]) -> None:
    session = on_a_gpu(0.001, Decision("exact", 3), batch_size=4, decode="fast")
    assert rows(session, shard) == list(range(IMAGES))
    assert (session.decoder, session.batch_size) == ("fast", 4)
    session = on_a_gpu(1e12, batch_size=4, decode="exact")
    assert session.decide(shard) is None
    assert rows(session, shard) == list(range(IMAGES))
    assert (session.decoder, session.batch_size, session.decision) == ("exact", 4, None)
    assert built == ["fast", "exact"]


def test_a_trial_takes_so_many_batches_whatever_the_shard_has(shard: OpenShard, built: list[str]) -> None:
    session = on_a_gpu(1.0)
    taken: list[int] = []

    class Counted:
        def batches(self, samples: Any) -> Any:
            for batch in session.loader.batches(samples):
                taken.append(len(batch[0].tags))
                yield batch

    images = [*encoded_images([shard])]
    assert exact_rate(Counted(), images[:3], BATCH) > 0  # type: ignore[arg-type]
    assert exact_rate(Counted(), images, BATCH) > 0  # type: ignore[arg-type]
    assert taken == [BATCH] * (2 * TRIAL)
    assert exact_rate(Counted(), [], BATCH) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize(("per_core", "fast"), [(NO_CORE_DECODES * 1.1, True), (NO_CORE_DECODES * 0.9, False)])
def test_a_model_that_no_core_keeps_up_with_needs_no_trial(
    monkeypatch: pytest.MonkeyPatch, per_core: float, fast: bool
) -> None:
    embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=2, num_threads_per_worker=3)
    asked = []

    def build(*args: Any, fast: bool, **options: Any) -> tuple[None, str]:
        asked.append(fast)
        return None, "exact"

    monkeypatch.setattr(timm_session, "open_loader", build)
    session = TimmSession(embedder, "cuda")
    session.measured = Measured(2, 3 * per_core)
    open_loader_for([session])
    assert asked == [fast]


def test_a_cpu_decodes_exactly_whatever_is_asked_for(shard: OpenShard) -> None:
    embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=4, num_threads_per_worker=1, decode="fast")
    session = TimmSession(embedder, "cpu", decision=Decision("fast", 999))
    session.measured = Measured(4, 1e12)
    assert session.decide(shard) is None
    assert sum(len(batch.rows) for batch in session.batches([shard])) == IMAGES
    assert (session.decoder, session.batch_size) == ("exact", 4)
    assert TimmSession(TimmImageEmbedder("test_vit"), "cpu", decision=Decision("fast", 999)).batch_size == 32


@pytest.mark.gpu
def test_on_a_gpu_sessions_keep_to_a_decision(shard: OpenShard) -> None:
    embedder = TimmImageEmbedder("test_vit", pretrained=False, num_threads_per_worker=1)
    first = embedder.open("cuda")
    decided = first.decide(shard)
    assert decided is not None
    assert decided.batch_size == first.batch_size
    assert rows(first, shard) == list(range(IMAGES))
    assert first.decoder == decided.decoder
    first.close()
    for decision in (decided, Decision("exact", 8), Decision("fast", 16)):
        session = embedder.open("cuda", decision=decision)
        assert rows(session, shard) == list(range(IMAGES))
        assert (session.decoder, session.batch_size) == (decision.decoder, decision.batch_size)
        session.close()


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
