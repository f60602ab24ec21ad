"""Finding the pictures that a command is given, and reading them ahead."""

import errno
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.predict.pictures import AHEAD, find_pictures, read_ahead
from pipeline.store import StorePath
from tests.builders import write_coco, write_image
from tests.stores import web_server


def found_of(*images: object, root: Path | StorePath | None = None, out: Path | None = None) -> list[tuple[int, str]]:
    """The ids and names of the pictures, each of which can be read."""
    pictures = find_pictures([str(given) for given in images], root, out)
    for picture in pictures:
        assert picture.pixels().ndim == 3
    return [(picture.id, picture.name) for picture in pictures]


class TestOfThisMachine:
    def test_files_and_folders_with_what_is_below(self, tmp_path: Path) -> None:
        inside = [write_image(tmp_path / "in" / name) for name in ("a.jpg", "deep/b.png")]
        (tmp_path / "in" / "notes.txt").write_text("not a picture")
        beside = write_image(tmp_path / "a.png")
        assert found_of(tmp_path / "in", beside) == [(1, str(inside[0])), (2, str(inside[1])), (3, str(beside))]

    def test_what_was_drawn_before_is_left_out(self, tmp_path: Path) -> None:
        image, out = write_image(tmp_path / "a.jpg"), tmp_path / "drawn"
        write_image(out / "a.png")
        assert found_of(tmp_path, out=out) == [(1, str(image))]
        assert len(found_of(tmp_path)) == 2

    def test_patterns(self, tmp_path: Path) -> None:
        paths = [str(write_image(tmp_path / name)) for name in ("a.jpg", "deep/b.JPG", "deep/[c].png")]
        (tmp_path / "deep" / "notes.txt").write_text("not a picture")
        assert found_of(tmp_path / "*.jpg") == [(1, paths[0])]
        assert found_of(tmp_path / "**" / "*") == [(1, paths[0]), (2, paths[2]), (3, paths[1])]
        assert found_of(paths[2]) == [(1, paths[2])]  # a name, not a pattern

    def test_the_images_of_a_coco_file(self, tmp_path: Path) -> None:
        """With their own ids, whatever stands beside them, from a folder or an archive."""
        files = write_coco(tmp_path, (4, 2))
        images = [(number, str(files.images / f"{number:012d}.jpg")) for number in (4, 2)]
        beside = str(write_image(tmp_path / "a.png"))
        assert found_of(beside, files.annotations, beside, root=files.images) == [(1, beside), *images, (3, beside)]
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for path in files.images.iterdir():
                archive.write(path, f"images/{path.name}")
        assert [number for number, _ in found_of(files.annotations, root=tmp_path / "images.zip")] == [4, 2]
        files.annotations.rename(files.images / "listed.json")
        assert found_of(files.images / "listed.json") == images

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            pytest.param("none.jpg", "none.jpg: no such picture", id="missing"),
            pytest.param("none.json", "none.json: no such picture", id="missing COCO file"),
            pytest.param("empty", "empty: no picture in this folder", id="empty folder"),
            pytest.param("*.png", r"\*\.png: no picture has a name of this pattern", id="pattern"),
            pytest.param("list.json", r"list\.json: not COCO: the top is a list", id="another JSON"),
            pytest.param("text.json", r"text\.json: the COCO file is not JSON", id="no JSON"),
            pytest.param("nameless.json", r"nameless\.json: not COCO: images\[1\] has no `file_name`", id="no name"),
            pytest.param("same.json", "the image id 2 is that of .*a.jpg and of .*b.jpg; .* one COCO file", id="twice"),
            pytest.param("none.json.gz", "none.json.gz: no such picture", id="missing packed"),
        ],
    )
    def test_nothing_there(self, name: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.json").write_text("text")
        write_json(tmp_path / "list.json", [1])
        write_json(tmp_path / "nameless.json", {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2}]})
        write_json(tmp_path / "same.json", {"images": [{"id": 2, "file_name": f"{name}.jpg"} for name in "ab"]})
        with pytest.raises(UserError, match=message):
            find_pictures([str(tmp_path / name)])

    def test_folders_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One below is told with the pictures that cannot be used; as root reads all, scandir refuses."""
        good = write_image(tmp_path / "a.jpg")
        write_image(tmp_path / "deep" / "b.jpg")
        scan = os.scandir

        def refuse(path: str) -> object:
            if Path(path).name == "deep":
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert [picture.path for picture in find_pictures([str(tmp_path)])] == [good, tmp_path / "deep"]
        with pytest.raises(UserError, match=r"deep: this folder cannot be read: Permission denied"):
            find_pictures([str(tmp_path / "deep")])

    @pytest.mark.parametrize("name", ["x" * 300 + ".jpg", "x" * 300 + ".json"])
    def test_a_name_that_no_disk_takes(self, name: str) -> None:
        with pytest.raises(UserError, match=r"cannot be read \(File name too long\)|no such picture"):
            find_pictures([name])

    def test_an_empty_name(self) -> None:
        with pytest.raises(UserError, match="a name of the pictures is empty"):
            find_pictures([""])

    def test_no_folder_of_the_images(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none: no such folder of images; .* --images-in"):
            find_pictures([str(write_coco(tmp_path, (4,)).annotations)], tmp_path / "none")

    def test_an_address_of_nothing(self) -> None:
        with pytest.raises(UserError, match=r"ftp://host/a.jpg: a picture's address must be a path or an address"):
            find_pictures(["ftp://host/a.jpg"])


class TestOfAStore:
    def test_a_picture_a_folder_and_a_coco_file(self, s3_folder: StorePath, tmp_path: Path) -> None:
        files = write_coco(tmp_path, (4, 2))
        for path in files.images.iterdir():
            (s3_folder / "images" / path.name).upload(path)
        (s3_folder / "val.json").upload(files.annotations)
        (s3_folder / "notes.txt").write_bytes(b"not a picture")
        two, four = (f"{s3_folder}/images/{number:012d}.jpg" for number in (2, 4))
        assert found_of(four) == [(1, four)]
        assert found_of(s3_folder) == [(1, two), (2, four)]
        assert found_of(s3_folder / "val.json", root=s3_folder / "images") == [(4, four), (2, two)]
        with pytest.raises(UserError, match=r"none: no picture in this folder of the store"):
            find_pictures([f"{s3_folder}/none"])
        with pytest.raises(UserError, match=r"none\.json: cannot read the COCO file"):
            find_pictures([f"{s3_folder}/none.json"])
        (s3_folder / "odd.json").write_bytes(b'{"images": [{"id": 1, "file_name": "/a.jpg"}]}')
        (odd,) = find_pictures([f"{s3_folder}/odd.json"])
        with pytest.raises(UserError, match=r"/a\.jpg: an absolute name, which no folder of a store has"):
            odd.pixels()

    def test_a_web_server(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, (4, 2))
        files.annotations.rename(files.images / "listed.json")
        with web_server(files.images) as address:
            name = f"{address}/{4:012d}.jpg"
            assert found_of(f"{name}?token=1") == [(1, name)]  # the token is not shown
            assert found_of(f"{address}/listed.json") == [(4, name), (2, f"{address}/{2:012d}.jpg")]
            listed = [(4, name), (2, f"{address}/{2:012d}.jpg")]
            assert found_of(f"{address}/listed.json?token=1") == listed  # which its pictures take, too
            with pytest.raises(UserError, match=r"none\.json: cannot read the COCO file: no such file$"):
                find_pictures([f"{address}/none.json?token=1"])
            (missing,) = find_pictures([f"{address}/none.jpg"])
            with pytest.raises(UserError, match=r"none\.jpg: no such picture"):
                missing.pixels()


def test_reading_ahead_keeps_the_order_and_tells_what_is_wrong(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{index}.png", 10 + index, 8) for index in range(2 * AHEAD)]
    paths[3].write_text("text")
    pictures = find_pictures([str(path) for path in paths])
    with ThreadPoolExecutor(AHEAD) as pool:
        read = list(read_ahead(pool, pictures))
    assert [picture for picture, _ in read] == pictures
    for index, (_, pixels) in enumerate(read):
        if index == 3:
            assert str(pixels).startswith(f"{paths[3]}: these bytes are not")
        else:
            assert not isinstance(pixels, UserError)
            assert pixels.shape == (8, 10 + index, 3)
