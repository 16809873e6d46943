"""Where weights come from, what is said when they do not, and what a model's fingerprint depends on."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from embedders import TimmImageEmbedder
from embedders.errors import InputError
from embedders.weights import RANDOM, resolve_weights

MODEL = "tf_efficientnet_lite0"


def vectors(embedder: TimmImageEmbedder) -> np.ndarray:
    images = torch.linspace(-1, 1, 2 * 3 * 160 * 160).reshape(2, 3, 160, 160)
    with torch.inference_mode():
        return np.asarray(embedder.load_embedding_model("cpu")(images))


def embedder_of(file: Path, model: str = MODEL, **options: Any) -> TimmImageEmbedder:
    return TimmImageEmbedder(model, checkpoint=file, **options)


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("vit_bas_patch16_224", "vit_base_patch16_224"),
        ("resnet50.a1_in2k", r"resnet50\.a1_in1k"),
        ("vit_base_patch16_224.openia", r"vit_base_patch16_"),
        ("ViT-L-14", r"vit_large_patch14_clip_224\.openai"),
        ("ViT-B/32", r"vit_base_patch32_clip_224\.openai"),
        ("ViT-L-14-336-quickgelu", r"vit_large_patch14_clip_"),
        ("RN50x4", r"resnet50x4_clip\.openai"),
        ("ResNet50", r"resnet50"),
    ],
)
def test_an_unknown_name_is_told_its_closest(name: str, closest: str) -> None:
    with pytest.raises(InputError, match=f"{name}.*the closest names are .*{closest}"):
        resolve_weights(name, True, None)


@pytest.mark.parametrize("name", ["", "qqqqqqqqqqqqqqqqqqqq", ".", "x.y.z", "local-dir:", "resnet50.", "../resnet50"])
def test_a_name_that_is_like_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_weights(name, False, None)
    assert "\n" not in str(caught.value)


def test_a_known_tag_keeps_its_configuration() -> None:
    weights = resolve_weights("test_vit.r160_in1k", False, None)
    assert (weights.architecture, weights.identity) == ("test_vit", RANDOM)
    assert weights.pretrained_cfg["tag"] == "r160_in1k"


@pytest.mark.parametrize("name", ["missing.safetensors", "folder.pth", "weights.onnx"])
def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"checkpoint .*\.safetensors"):
        embedder_of(tmp_path / name).check()


@pytest.mark.parametrize(
    "model",
    ["resnet18", "tf_efficientnet_lite1", "test_vit"],
)
def test_a_checkpoint_of_another_architecture_is_refused_in_one_line(checkpoint: Path, model: str) -> None:
    with pytest.raises(InputError, match=f"does not fit '{model}'") as caught:
        embedder_of(checkpoint, model).load_embedding_model("cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.bin"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x04K\x01."])
def test_a_checkpoint_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        embedder_of(tmp_path / name).load_embedding_model("cpu")
    assert "\n" not in str(caught.value)


class Touch:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, save: Any) -> None:
    save({"state_dict": {"weight": Touch(tmp_path / "ran")}}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth"):
        embedder_of(tmp_path / "weights.pth").load_embedding_model("cpu")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_gives_timms_own_features(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = timm.create_model(MODEL).eval()
    model.load_state_dict(load_file(checkpoint))
    model.reset_classifier(0)
    images = torch.linspace(-1, 1, 2 * 3 * 160 * 160).reshape(2, 3, 160, 160)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model(images), dim=-1).numpy()
    np.testing.assert_allclose(vectors(embedder_of(checkpoint)), expected, atol=1e-5)
    torch.save({"state_dict": load_file(checkpoint)}, tmp_path / "same.pth")
    np.testing.assert_allclose(vectors(embedder_of(tmp_path / "same.pth")), expected, atol=1e-5)


def test_a_local_folder_is_a_model(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    torch.manual_seed(7)
    model = timm.create_model("test_vit.r160_in1k", pretrained=False)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    embedder = TimmImageEmbedder(f"local-dir:{tmp_path}")
    assert embedder.weights.architecture == "test_vit"
    assert embedder.weights.identity.startswith("sha256:")
    assert not np.allclose(vectors(embedder), vectors(TimmImageEmbedder("test_vit", pretrained=False)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights in the folder"):
        TimmImageEmbedder(f"local-dir:{tmp_path}").check()


def test_the_head_is_kept_exactly_where_it_projects() -> None:
    """Over every pretrained tag of timm: no projection is wider than 1280, no label set but ImageNet's is narrower."""
    tags = timm.list_pretrained()
    kept = {tag for tag in tags if TimmImageEmbedder(tag, pretrained=False).keeps_head}
    classes = {tag: resolve_weights(tag, False, None).pretrained_cfg["num_classes"] for tag in tags}
    assert len(tags) > 1500
    assert kept == {tag for tag, count in classes.items() if 0 < count <= 1280 and count != 1000}
    assert all("clip" in tag or "pe_core" in tag.lower() for tag in kept)


@pytest.mark.parametrize(
    ("classes", "bias", "labels", "dimensions"),
    [
        (512, 0.0, None, 512),  # a projection, as timm saves CLIP's
        (37, 0.1, None, 256),
        (512, 0.1, None, 256),  # as many classes as CLIP has dimensions
        (512, 0.0, [f"class {n}" for n in range(512)], 256),
    ],
)
def test_a_fine_tuned_clip_gives_features_not_logits(
    tmp_path: Path, classes: int, bias: float, labels: list[str] | None, dimensions: int
) -> None:
    from timm.models import save_for_hf

    model: Any = timm.create_model("vit_xsmall_patch16_clip_224", pretrained=False, num_classes=classes)
    torch.nn.init.constant_(model.head.bias, bias)
    save_for_hf(model, str(tmp_path), model_config={"label_names": labels} if labels else None, safe_serialization=True)
    embedder = TimmImageEmbedder(f"local-dir:{tmp_path}")
    with torch.inference_mode():
        assert embedder.load_embedding_model("cpu")(torch.zeros(1, 3, 224, 224)).shape == (1, dimensions)


def test_random_weights_are_the_same_everywhere() -> None:
    first = vectors(TimmImageEmbedder("test_vit", pretrained=False))
    torch.rand(9)
    np.testing.assert_array_equal(vectors(TimmImageEmbedder("test_vit", pretrained=False)), first)
    assert np.isfinite(first).all()


def fingerprint(file: Path, model: str = MODEL, **options: Any) -> dict[str, Any]:
    return embedder_of(file, model, **options).fingerprint()


def test_the_fingerprint_ignores_how_fast_it_runs(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint, tmp_path / "renamed.safetensors")
    assert fingerprint(checkpoint) == fingerprint(
        tmp_path / "renamed.safetensors",
        batch_size=7,
        num_threads_per_worker=3,
        image_embedding_column="other",
        use_index_files=False,
        loader="reference",
        decode="exact",
    )


def test_the_fingerprint_follows_what_vectors_depend_on(checkpoint: Path, tmp_path: Path) -> None:
    state = load_file(checkpoint)
    name = next(iter(state))
    save_file(state | {name: state[name] + 1e-6}, tmp_path / "changed.safetensors")
    prints = [
        fingerprint(checkpoint),
        fingerprint(tmp_path / "changed.safetensors"),
        fingerprint(checkpoint, "tf_efficientnet_lite0.in1k"),
        fingerprint(checkpoint, "efficientnet_lite0"),
        fingerprint(checkpoint, normalize_embeddings=False),
        fingerprint(checkpoint, autocast=False),
        TimmImageEmbedder(MODEL, pretrained=False).fingerprint(),
    ]
    assert len({str(value) for value in prints}) == len(prints)


def test_an_embedder_survives_pickling(checkpoint: Path) -> None:
    embedder = embedder_of(checkpoint, batch_size=7)
    embedder.check()
    copy = pickle.loads(pickle.dumps(embedder))
    assert copy.fingerprint() == embedder.fingerprint()
    assert copy.batch_size == 7


def test_a_worker_refuses_other_weights_than_planned(checkpoint: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(checkpoint, tmp_path / "weights.safetensors"))
    planned = embedder_of(file)
    planned.check()
    sent = pickle.dumps(planned)
    pickle.loads(sent).load_embedding_model("cpu")
    state = load_file(file)
    name = next(iter(state))
    save_file(state | {name: state[name] + 1e-6}, file)
    with pytest.raises(InputError, match=r"are not those that the run was planned with \(sha256:"):
        pickle.loads(sent).load_embedding_model("cpu")
