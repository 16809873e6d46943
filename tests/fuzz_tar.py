"""Fuzz the index builder and the sample reader, guided by coverage: `make fuzz`.

Every input must end in an index whose samples can all be read, or in one MalformedShard, within seconds and a bound
of memory. What does not is written to tests/crashes/, which tests/embedders/test_fuzz.py replays.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

CRASHES = Path(__file__).parent / "crashes"
BLOCK = 512
SECONDS_AN_INPUT = 5
MEMORY_MB = 1024
MAX_BYTES = 1 << 15


def check(data: bytes) -> None:
    """Index a tar and read every sample of it, as a worker does."""
    from embedders.errors import MalformedShard  # imported late, by code that is traced
    from embedders.tar import read_tar
    from embedders.tar_index import format_index, parse_index
    from embedders.webdataset import describe, open_shard

    handle = os.memfd_create("tar")
    try:
        os.write(handle, data)
        shard = open_shard(f"/proc/self/fd/{handle}", "id")
        assert read_tar(data) == read_tar(bytearray(data)) == shard.index
        by_last = read_tar(data, key_dot="last")
        assert by_last == read_tar(bytearray(data), key_dot="last")
        assert parse_index(format_index(by_last, "f", "last"), "f", "last") == by_last
        described = describe(shard.data, shard.index, "id", headers=True)
        assert (tuple(described.ids.to_pylist()), described.unusable) == (shard.ids, shard.unusable)
        assert described.headers is not None
        assert len(described.headers) == len(shard.ids)
        names = [component.name for sample in shard.index.samples for component in sample.components]
        assert len(shard.ids) == len(shard.index.samples) <= len(data) // BLOCK
        for sample in shard.index.samples:
            for component in sample.components:
                assert len(shard.bytes_of(component)) == component.size
        for i, sample_id in enumerate(shard.ids):
            sample_id.encode()  # Parquet holds UTF-8 only
            assert shard.member_of(i) in names
        assert all(detail for _, detail in shard.unusable.values())
        parsed = parse_index(format_index(shard.index, "f"), "f")
        assert parsed == shard.index
    except MalformedShard as error:
        assert "\n" not in str(error)  # noqa: PT017
    finally:
        os.close(handle)


def signed(data: bytes) -> bytes:
    """The same bytes with right checksums wherever a reader would look for a header: chance does not find one."""
    raw, at = bytearray(data), 0
    while at + BLOCK <= len(raw) and any(raw[at : at + BLOCK]):
        header = raw[at : at + BLOCK]
        header[148:156] = b" " * 8
        raw[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        field = bytes(header[124:136])
        try:
            size = (
                int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.split(b"\0")[0].strip() or b"0", 8)
            )
        except ValueError:
            break
        if header[156] in b"123456":
            size = 0
        at += BLOCK + -(-max(0, size) // BLOCK) * BLOCK
    return bytes(raw)


def seeds() -> list[bytes]:
    """Small tars of every format."""
    from PIL import Image

    def encoded(kind: str) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (3, 2)).save(out, kind)
        return out.getvalue()

    members = {
        "0.jpg": encoded("JPEG"),
        "0.json": json.dumps({"id": 12, "caption": "é"}).encode(),
        "a/b.c/1.seg.png": encoded("PNG"),
        "README": b"x",
        "n" * 120 + "/2.webp": encoded("WEBP"),
        "3.gif": encoded("GIF"),
        "4.tif": encoded("TIFF"),
        "5.bmp": encoded("BMP"),
        "日本.jpg": b"",
    }
    found = []
    for style in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=style) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name if style != tarfile.USTAR_FORMAT else name[-90:])
                info.size = len(data)
                info.pax_headers = {"comment": "x", "size": str(len(data))}
                tar.addfile(info, io.BytesIO(data))
            for name, kind, target in (
                ("3.jpg", tarfile.SYMTYPE, "0.jpg"),
                ("5.jpg", tarfile.LNKTYPE, "n" * 99),
                ("./6.jpg", tarfile.SYMTYPE, "3.jpg"),
            ):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = kind, target
                tar.addfile(link)
            end = tar.offset
        found.append(out.getvalue()[:end] + bytes(2 * BLOCK))
    v7 = bytearray(found[0])
    v7[257:265] = bytes(8)
    huge = bytearray(found[1])
    huge[124:136] = b"\x80" + (6).to_bytes(11, "big")
    return [signed(data) for data in (*found, bytes(v7), bytes(huge))]


def main() -> None:
    """Run until a crash, or as long as libFuzzer's options say."""
    import atheris

    with atheris.instrument_imports(include=["embedders"]):
        import embedders.webdataset  # noqa: F401

    def one(data: bytes) -> None:
        # The first byte says whether the headers are signed; else the checksums are part of what is tried.
        check(signed(data[1:]) if data[:1] != b"\0" else data[1:])

    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(seeds()):
            Path(corpus, str(i)).write_bytes(b"\1" + seed)
        CRASHES.mkdir(exist_ok=True)
        bounds = [f"-timeout={SECONDS_AN_INPUT}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={MAX_BYTES}"]
        atheris.Setup([sys.argv[0], corpus, *bounds, f"-artifact_prefix={CRASHES}/", *sys.argv[1:]], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
