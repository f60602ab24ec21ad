"""The pictures that a command is given: files, folders, patterns and COCO files, of this machine or of a store."""

import glob
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from pipeline.data.images import PICTURES, BadImageError, Pixels, read_image_file
from pipeline.errors import UserError, shown
from pipeline.predict.detector import read_picture
from pipeline.shard.document import check_document, image_id, read_document, text
from pipeline.shard.origin import open_images, read_stored
from pipeline.store import WEB, Place, StorePath, place

AHEAD = 8
"""Pictures that are read and decoded at once, before they are asked for."""
DOCUMENTS = (".json", ".json.gz")
NEEDS = {"images": {"id": image_id, "file_name": text}}
"""What is asked of a COCO file."""


@dataclass(frozen=True)
class Picture:
    """A picture that was found.

    `id` is what results call it: of its COCO file, else the next whole number that none has. `path` is its file, if it
    is one of this machine.
    """

    name: str
    read: Callable[[], bytes]
    id: int = -1
    path: Path | None = None

    @property
    def stem(self) -> str:
        """The last part of its name without the extension."""
        return PurePosixPath(self.name).stem

    def pixels(self) -> Pixels:
        """RGB [height, width, 3], turned as its EXIF says.

        Raises:
            UserError: naming it, where it is missing, cannot be read, or is no picture.
        """
        try:
            return read_picture(self.read())
        except (OSError, BadImageError, UserError) as error:
            reason = "no such picture" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None)
            name, told = shown(self.name, 400), str(reason or error)
            raise UserError(told if told.startswith(name) else f"{name}: {told}") from error


def find_pictures(images: Sequence[str], root: Place | None = None, out: Path | None = None) -> list[Picture]:
    """The pictures that are meant by files, folders, patterns such as `new/**/*.jpg`, and COCO files (.json, .json.gz).

    Each may be an address in a store, but patterns. A web server lists no folder.

    Args:
        images: all of these.
        root: folder or archive that the names in COCO files begin in; each file's own folder when None.
        out: folder whose pictures are not those of a folder that it lies in.

    Raises:
        UserError: there is no such file, it may not be looked at, no picture is in a folder or of a pattern, a JSON
            file is not COCO's, or two pictures have one id.
    """
    found: list[Picture] = []
    for given in images:
        if not given:
            raise UserError("a name of the pictures is empty; give a file, a folder or a pattern")
        try:
            found += _meant(place(given), root, out)
        except ValueError as error:
            raise UserError(f"{shown(given, 400)}: a picture's address {error}") from None
        except OSError as error:
            raise UserError(f"{shown(error.filename or given, 400)}: cannot be read ({error.strerror})") from error
    return _numbered(found)


def read_ahead(pool: ThreadPoolExecutor, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Pixels | UserError]]:
    """Each picture with its pixels, or why it has none, in order; the next are read and decoded in the meantime."""
    running = deque((picture, pool.submit(picture.pixels)) for picture in pictures[:AHEAD])
    for index in range(len(pictures)):
        picture, read = running.popleft()
        error = read.exception()
        if error is not None and not isinstance(error, UserError):
            raise error
        running += [(later, pool.submit(later.pixels)) for later in pictures[index + AHEAD : index + AHEAD + 1]]
        yield picture, error or read.result()


def _meant(given: Place, root: Place | None, out: Path | None) -> list[Picture]:
    """The pictures of one of them."""
    if given.name.lower().endswith(DOCUMENTS) and not (isinstance(given, Path) and not given.is_file()):
        return _listed(given, root or given.parent)
    if isinstance(given, StorePath):
        return _stored(given)
    if given.is_dir():
        return [_file(path) for path in _inside(given, out)]
    if given.is_file():
        return [_file(given)]
    if not glob.has_magic(str(given)):
        raise UserError(f"{shown(given, 400)}: no such picture or folder")
    paths = [Path(name) for name in sorted(glob.glob(str(given), recursive=True)) if name.lower().endswith(PICTURES)]
    if not paths:
        raise UserError(f"{shown(given, 400)}: no picture has a name of this pattern ({', '.join(PICTURES)})")
    return [_file(path) for path in paths]


def _file(path: Path) -> Picture:
    return Picture(str(path), partial(read_image_file, path), path=path)


def _inside(folder: Path, out: Path | None) -> list[Path]:
    """The pictures of a folder and those below it, and the folders below it that cannot be read: no picture, either."""
    refused: dict[Path, OSError] = {}
    walked = os.walk(folder, onerror=lambda error: refused.update({Path(error.filename): error}))
    paths = [Path(below, name) for below, _, names in walked for name in names if name.lower().endswith(PICTURES)]
    if error := refused.get(folder):
        raise UserError(f"{folder}: this folder cannot be read: {error.strerror}") from error
    paths = sorted([*paths, *refused])
    drawn = out.resolve() if out is not None else None
    paths = [path for path in paths if drawn not in path.resolve().parents]
    if not paths:
        raise UserError(f"{folder}: no picture in this folder ({', '.join(PICTURES)})")
    return paths


def _stored(given: StorePath) -> list[Picture]:
    """A picture in a store, or those of a folder there; a web server's addresses may end in anything."""
    if str(given).startswith(WEB) or given.name.lower().endswith(PICTURES):
        return [Picture(str(given), partial(read_stored, given))]
    names = sorted(name for name in given.list() if name.lower().endswith(PICTURES))
    if not names:
        raise UserError(f"{given}: no picture in this folder of the store ({', '.join(PICTURES)})")
    return [Picture(str(given / name), partial(read_stored, given / name)) for name in names]


def _listed(file: Place, root: Place) -> list[Picture]:
    """The pictures of a COCO file."""
    _, document = read_document(file, "COCO file")
    check_document(str(file), document, NEEDS)
    if not document["images"]:
        raise UserError(f"{file}: its list `images` is empty")
    images = open_images(root, "name the pictures' folder or archive with --images-in")
    return [
        Picture(
            images.where(image["file_name"]),
            partial(images.read, image["file_name"]),
            image["id"],
            root / image["file_name"] if isinstance(root, Path) else None,
        )
        for image in document["images"]
    ]


def _numbered(pictures: Sequence[Picture]) -> list[Picture]:
    """All with an id, each another."""
    named: dict[int, Picture] = {}
    for picture in pictures:
        if picture.id >= 0 and picture.id in named:
            raise UserError(
                f"the image id {picture.id} is that of {shown(named[picture.id].name, 400)} and of "
                f"{shown(picture.name, 400)}; detections tell pictures by their ids: give one COCO file at a time"
            )
        named[picture.id] = picture
    free = (number for number in range(1, len(pictures) + len(named) + 1) if number not in named)
    return [picture if picture.id >= 0 else replace(picture, id=next(free)) for picture in pictures]
