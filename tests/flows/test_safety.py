"""What a hostile dataset or a shared network could do, and does not."""

from __future__ import annotations

import ast
import datetime
import ipaddress
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flows.embed import main
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
TINY = ("--model-name", "test_vit.r160_in1k", "--no-pretrained", "--device", "cpu")
EVIL = ["../../evil/0.jpg", "/tmp/shard-embed-evil/1.jpg", "a/../../../2.jpg", "good.jpg"]


def certificates(folder: Path) -> dict[str, str]:
    """A certificate authority, a key it has signed, and Dask's settings for both, as environment variables."""

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def certificate(of: str, key: Any, issuer_key: Any, authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return (
            x509.CertificateBuilder(name("authority"), name(of), key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(loopback, critical=False)
            .sign(issuer_key, hashes.SHA256())
        )

    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    folder.mkdir()
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(certificate("authority", authority, authority, True).public_bytes(pem))
    (folder / "cert.pem").write_bytes(certificate("dask", key, authority, False).public_bytes(pem))
    unencrypted = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *unencrypted))
    variables = {"DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(folder / "ca.pem")}
    for role in ("CLIENT", "SCHEDULER", "WORKER"):
        variables[f"DASK_DISTRIBUTED__COMM__TLS__{role}__CERT"] = str(folder / "cert.pem")
        variables[f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY"] = str(folder / "key.pem")
    return variables | {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true"}


@pytest.fixture
def secured(tmp_path: Path, server: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A Dask scheduler with one worker that speak TLS only: its address, and a client's environment."""
    environment = certificates(tmp_path / "tls")
    address = f"tls://127.0.0.1:{(port := free_port())}"
    scheduler = ["scheduler", "--host", address, "--port", str(port), "--no-dashboard"]
    worker = ["worker", address, "--host", "tls://127.0.0.1", "--nthreads", "2", "--no-nanny", "--no-dashboard"]
    commands = [[sys.executable, "-m", "dask", *arguments] for arguments in (scheduler, worker)]
    processes = []
    try:
        for command in commands:
            with (tmp_path / "dask.log").open("ab") as log:
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log)
                )
        yield address, environment
    finally:
        for process in reversed(processes):  # a worker whose scheduler goes first may wait for it
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def hostile(folder: Path, demo_dataset: Path) -> Path:
    """A dataset whose members are named to land elsewhere, and one damaged shard."""
    folder.mkdir()
    with tarfile.open(demo_dataset / "00003.tar") as source, tarfile.open(folder / "0.tar", "w") as tar:
        photographs = [member for member in source if member.name.endswith(".jpg")]
        for name, member in zip(EVIL, photographs, strict=False):
            data = source.extractfile(member)
            member.name = name
            tar.addfile(member, data)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (folder / "1.tar").write_bytes(b"damaged" * 1000)
    return folder


def test_a_hostile_dataset_over_tls(
    secured: tuple[str, dict[str, str]],
    demo_dataset: Path,
    tmp_path: Path,
    command: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing lands outside the output, the damaged shard fails by name, and no error is kept as a pickle."""
    address, environment = secured
    dataset = hostile(tmp_path / "data", demo_dataset)
    deadline = time.monotonic() + 60
    while b"Starting established connection" not in (tmp_path / "dask.log").read_bytes():
        assert time.monotonic() < deadline, (tmp_path / "dask.log").read_text()
        time.sleep(0.2)
    of_other_tests = {*Path(os.environ["PREFECT_HOME"]).glob("storage/*")}
    done = command(dataset, "--output", tmp_path / "out", *TINY, "--json", "--scheduler", address, **environment)
    assert done.status == 1, done.stderr
    assert "failed: 1: 1.tar" in done.stderr
    table = pq.read_table(tmp_path / "out/metadata/0.parquet")
    assert sorted(table["key"].to_pylist()) == sorted(name.removesuffix(".jpg") for name in EVIL)
    assert not Path("/tmp/shard-embed-evil").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out", "tls", "dask.log"}
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert written == {
        "layers/image_embedding/0.parquet",
        "metadata/0.parquet",
        "index/0.idx",
        "manifest.json",
        "README.md",
        "report.html",
        "quarantine/image_embedding/0.parquet",  # the link
        "schema.parquet",
    }
    for result in {*Path(os.environ["PREFECT_HOME"]).glob("storage/*")} - of_other_tests:
        json.loads(result.read_bytes())
    # Without certificates, and with those of somebody else, it is one line.
    call = [str(dataset), "--output", str(tmp_path / "other"), *TINY, "--scheduler", address]
    assert main(call) == 2
    assert "DASK_DISTRIBUTED__COMM__TLS__CA_FILE" in capsys.readouterr().err
    strangers = certificates(tmp_path / "strangers")
    prefix = "DASK_DISTRIBUTED__COMM__TLS__"
    settings = {k.removeprefix(prefix): v for k, v in strangers.items() if k.startswith(prefix)}
    with dask.config.set(
        {f"distributed.comm.tls.{k.lower().replace('__', '.').replace('_', '-')}": v for k, v in settings.items()}
    ):
        assert main(call) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "certificates" in line


def test_a_scheduler_that_does_not_answer_is_one_line(
    demo_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    assert main([str(demo_dataset), "--output", str(tmp_path / "out"), *TINY, "--scheduler", address]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert address in line
    assert "cannot connect" in line


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a program, with the text of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_unpickled_or_extracted() -> None:
    """By reading the program: no pickle of data, torch.load of weights only, no member written by its own name."""
    for path in (path for folder in ("flows", "tasks", "embedders") for path in (ROOT / folder).rglob("*.py")):
        for name, call in calls(ast.parse(path.read_text())):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            last = name.rpartition(".")[2]
            assert last not in {"extract", "extractall", "unpack_archive"}, (path, name)
            assert name not in {"eval", "exec"}, path
            assert not (last in {"load", "loads", "Unpickler"} and "pickle" in name), (path, name)
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", path
            assert keywords.get("allow_pickle", "False") == "False", path
