"""The parameters of a run, and the command line that asks for it."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from pydantic import ValidationError

from flows.cli import app
from flows.config import GROUPS, SWITCHED_OFF, EmbedConfig, started_by


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataset": "/data/my photos; rm -rf", "output": "s3://bucket/it's"},
        {"pretrained": False, "autocast": False, "normalize_embeddings": False, "use_index_files": False},
        {"batch_size": 7, "on_error": "null", "precision": "bfloat16", "shard_timeout": 1.5, "verify": True},
        {"fingerprint": "content", "image_component": "left.jpg", "workers": 3, "overwrite": True},
        {"key_dot": "last", "max_quarantined": "2.5%"},
    ],
)
def test_the_command_of_a_run_asks_for_that_run(options: dict[str, Any]) -> None:
    config = EmbedConfig(**{"dataset": "/data", "output": "/out", **options})
    python, module, name, *arguments = shlex.split(config.command())
    assert (python, module, name) == ("python", "-m", "flows.embed")
    _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    groups = [bound.arguments[name] for name in GROUPS if name in bound.arguments]
    asked = EmbedConfig.of(bound.arguments["dataset"], bound.arguments["output"], *groups)
    assert asked == config
    assert EmbedConfig.of(config.dataset, config.output, *config.groups().values()) == config


def test_a_recipe_that_brings_a_scheduler_is_named_instead() -> None:
    """What finishes the run is the recipe's command; the address of its scheduler is of no use any more."""
    config = EmbedConfig(dataset="/data", output="/out", scheduler="tls://10.0.0.1:1", batch_size=7)
    with started_by(("python", "-m", "deployments.slurm", "--sbatch=--comment=a b", "--")):
        said = config.command()
    assert said == "python -m deployments.slurm '--sbatch=--comment=a b' -- /data --output /out --batch-size 7"
    assert "--scheduler tls://10.0.0.1:1" in config.command()


def test_a_limit_of_the_quarantine_is_a_share() -> None:
    def limit(text: str | None) -> float | None:
        return EmbedConfig(dataset="/data", output="/out", max_quarantined=text).quarantine_limit

    assert [limit(text) for text in ("5%", "0%", "100%", "2.5%", None)] == [0.05, 0, 1, 0.025, None]
    for wrong in ("5", "-1%", "101%", "0.05", "%", ""):
        with pytest.raises(ValidationError, match="a percentage such as 5%"):
            limit(wrong)


@pytest.mark.parametrize("name", [name for name in EmbedConfig.model_fields if name not in {"dataset", "output"}])
def test_a_default_that_is_said_is_the_default(name: str) -> None:
    unsaid = EmbedConfig(dataset="/data", output="/out")
    said = EmbedConfig(dataset="/data", output="/out", **{name: EmbedConfig.model_fields[name].default})
    assert said.merge_options() == unsaid.merge_options()
    assert said.strict_ids == unsaid.strict_ids
    assert said.command() == unsaid.command()


def test_every_switch_that_is_on_has_words_for_being_put_off() -> None:
    on = [name for name, field in EmbedConfig.model_fields.items() if field.default is True]
    assert sorted(SWITCHED_OFF) == sorted(f"--no-{name.replace('_', '-')}" for name in on)
