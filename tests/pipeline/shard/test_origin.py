"""Images in a folder, a store and archives: the same answers."""

import io
import os
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.data.images import BadImageError
from pipeline.errors import UserError
from pipeline.shard import origin
from pipeline.shard.origin import Images, open_images
from pipeline.store import Place, StorePath

FILES = {"a.jpg": b"first", "below/b.png": os.urandom(3000), "c d.jpg": b""}
KINDS = ["folder", "store", "zip", "zip with a top", "deflated zip", "tar", "zip in a store", "tar in a store"]


def write(kind: str, folder: Path, store: StorePath) -> Place:
    """The files as they are kept by a kind."""
    for name, content in FILES.items():
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if kind == "store":
            (store / name).write_bytes(content)
    if kind == "store":
        return store
    if kind == "folder":
        return folder / "images"
    if "tar" in kind:
        packed = folder / "images.tar"
        with tarfile.open(packed, "w") as tar:
            tar.add(folder / "images", "images")
    else:
        packed = folder / "images.zip"
        method = zipfile.ZIP_DEFLATED if "deflated" in kind else zipfile.ZIP_STORED
        with zipfile.ZipFile(packed, "w", method) as archive:
            for name in FILES:
                archive.write(folder / "images" / name, f"images/{name}" if "top" in kind else name)
    if "store" not in kind:
        return packed
    (store / packed.name).upload(packed)
    return store / packed.name


@pytest.fixture(params=KINDS)
def images(request: pytest.FixtureRequest, tmp_path: Path, s3_folder: StorePath) -> Images:
    return open_images(write(request.param, tmp_path, s3_folder))


class TestAll:
    def test_sizes_and_contents(self, images: Images) -> None:
        assert images.sizes([*FILES, "missing.jpg"]) == {
            **{name: len(content) for name, content in FILES.items()},
            "missing.jpg": None,
        }
        for name, content in FILES.items():
            assert images.read(name) == content
        assert images.read("./below/../a.jpg") == b"first"

    def test_what_is_missing(self, images: Images) -> None:
        with pytest.raises(FileNotFoundError):
            images.read("missing.jpg")

    def test_names_that_lead_out(self, images: Images) -> None:
        assert images.outside(FILES) is None
        for name in ("../x.jpg", "/etc/passwd", "below/../../x.jpg", ".."):
            assert images.outside(["a.jpg", name]) == name

    def test_messages_name_the_file(self, images: Images) -> None:
        assert images.where("a.jpg") == f"{images}/a.jpg"

    def test_more_than_an_image_has(self, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.data.images.MOST_BYTES", 2000)
        monkeypatch.setattr(origin, "MOST_BYTES", 2000)
        assert images.sizes(["below/b.png"]) == {"below/b.png": None}
        with pytest.raises(BadImageError, match="3000 bytes, more than"):
            images.read("below/b.png")


class TestArchives:
    def test_links_devices_and_odd_names_reach_nothing(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("null", tarfile.CHRTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "/etc/passwd"
                tar.addfile(member)
            for name in ("../out.jpg", "/abs.jpg"):
                member = tarfile.TarInfo(name)
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
        images = open_images(tmp_path / "x.tar")
        assert images.sizes(["link", "hard", "null"]) == {"link": None, "hard": None, "null": None}
        assert images.outside(["../out.jpg"]) == "../out.jpg"
        assert sorted(os.listdir(tmp_path)) == ["x.tar"]

    def test_a_zip_bomb_is_refused_by_its_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(origin, "MOST_BYTES", 10**6)
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.jpg", bytes(10**7))
        images = open_images(tmp_path / "x.zip")
        assert images.sizes(["bomb.jpg"]) == {"bomb.jpg": None}
        with pytest.raises(BadImageError, match="more than the"):
            images.read("bomb.jpg")

    def test_a_zip_that_lies_about_a_size(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jpg", bytes(10**6))
        content = (tmp_path / "x.zip").read_bytes()
        (tmp_path / "x.zip").write_bytes(content.replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little")))
        with pytest.raises(BadImageError, match="its archive does not give it"):
            open_images(tmp_path / "x.zip").read("a.jpg")

    @pytest.mark.parametrize("name", ["x.zip", "x.tar"])
    def test_every_cut_is_told(self, tmp_path: Path, name: str) -> None:
        whole = write(name[2:], tmp_path, StorePath("s3://none"))
        content = Path(str(whole)).read_bytes()
        for length in range(0, len(content) - 1024, 331):
            (tmp_path / name).write_bytes(content[:length])
            os.utime(tmp_path / name, (length, length))
            with suppress(UserError, BadImageError):
                images = open_images(tmp_path / name)
                read = {entry: images.read(entry) for entry, size in images.sizes(FILES).items() if size is not None}
                assert all(FILES[entry] == found for entry, found in read.items())

    def test_a_locked_zip_and_a_packed_tar(self, tmp_path: Path) -> None:
        (tmp_path / "x.tar.gz").write_bytes(b"")
        with pytest.raises(UserError, match="cannot be read in place; unpack it"):
            open_images(tmp_path / "x.tar.gz")
        with pytest.raises(UserError, match="no such archive"):
            open_images(tmp_path / "y.zip")
        with pytest.raises(UserError, match="no such folder of images"):
            open_images(tmp_path / "y")

    def test_one_that_was_replaced_is_opened_anew(self, tmp_path: Path) -> None:
        for number, content in enumerate((b"old", b"newer")):
            with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
                archive.writestr("a.jpg", content)
            os.utime(tmp_path / "x.zip", (number, number))
            assert open_images(tmp_path / "x.zip").read("a.jpg") == content
