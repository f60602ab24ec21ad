import hashlib
import io
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

import pytest
import webdataset

from pipeline.shard.tar import ShardTar, header_of, tar_size

MEMBERS = {"000000000001.jpg": b"x" * 700, "000000000001.json": b"{}", "000000000002.png": b"", "2.json": b"y" * 512}


def written(members: dict[str, bytes]) -> tuple[bytes, ShardTar]:
    with tempfile.TemporaryFile() as file:
        with ShardTar(file) as tar:
            told = [tar.add(name, content) for name, content in members.items()]
        file.seek(0)
        whole = file.read()
    for member, content in zip(told, members.values(), strict=True):
        assert whole[member.offset :][: member.size] == content
        assert member.crc32 == zlib.crc32(content)
    return whole, tar


@pytest.mark.parametrize("size", [0, 1, 511, 512, 8**11 - 1])
@pytest.mark.parametrize("name", ["000000000001.json", "n" * 100])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime, member.uname, member.gname = size, 0o644, 0, "raydetr", "raydetr"
    assert header_of(name, size) == member.tobuf(tarfile.USTAR_FORMAT)


def test_the_bytes_are_those_of_webdataset_s_writer() -> None:
    file = io.BytesIO()
    with webdataset.TarWriter(file, encoder=False, mtime=0, user="raydetr", group="raydetr", mode=0o644) as tar:
        for name, content in MEMBERS.items():
            key, _, extension = name.partition(".")
            tar.write({"__key__": key, extension: content})
    assert written(MEMBERS)[0] == file.getvalue()


@pytest.mark.parametrize("members", [MEMBERS, {f"{number}.jpg": bytes([number]) * 300_000 for number in range(64)}])
def test_size_and_sha256_are_those_of_the_file(members: dict[str, bytes]) -> None:
    content, tar = written(members)
    assert (tar.size, tar.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert tar.size % tarfile.RECORDSIZE == 0
    assert sum(tar_size(len(member)) for member in members.values()) <= tar.size - 2 * tarfile.BLOCKSIZE


def test_gnu_tar_and_tarfile_read_it(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(written(MEMBERS)[0])
    subprocess.run(["tar", "xf", "a.tar"], cwd=tmp_path, check=True)
    assert {name: (tmp_path / name).read_bytes() for name in MEMBERS} == MEMBERS
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == list(MEMBERS)


@pytest.mark.parametrize("images", [1, 64])
def test_a_disk_that_is_full_is_told_while_or_after_members_are_added(images: int) -> None:
    def write() -> None:
        with Path("/dev/full").open("wb") as file, ShardTar(file) as tar:
            for number in range(images):
                tar.add(f"{number}.jpg", bytes(300_000))

    with pytest.raises(OSError, match="No space left"):
        write()


def test_an_exception_does_not_end_it() -> None:
    file = io.BytesIO()
    with pytest.raises(ZeroDivisionError), ShardTar(file):
        raise ZeroDivisionError
    assert file.getvalue() == b""
