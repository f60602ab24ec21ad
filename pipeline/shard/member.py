"""What stands in a shard for an image: its bytes, or those of a smaller copy, and the JSON member that follows them."""

from pipeline.data.images import BadImageError, decode_image, inspect_image
from pipeline.data.manifest import ORIGINAL_SIZE
from pipeline.shard.coco import CocoImage, to_json
from pipeline.shard.findings import Findings, Where
from pipeline.shard.origin import Images
from pipeline.shard.smaller import Smaller


def json_member(image: CocoImage) -> bytes:
    """The member that follows an image in its shard: image_id, file_name, width, height, annotations.

    That of a smaller copy also has the original_width and original_height of its image.
    """
    rest = {"file_name": image.file_name, "height": image.height, "image_id": image.id, "width": image.width}
    if image.original is not None:
        rest |= zip(ORIGINAL_SIZE, image.original, strict=True)
    return b'{"annotations":%b,%b' % (image.annotations_json, to_json(rest)[1:])


def image_member(
    image: CocoImage, files: Images, findings: Findings, verify: bool, smaller: Smaller | None
) -> tuple[CocoImage, bytes, str] | None:
    """The image or its smaller copy, its bytes and the extension of its member; None when it has to be left out.

    Args:
        image: what the annotation file says of it.
        files: where its bytes are.
        findings: is told what is wrong with it.
        verify: decode it fully.
        smaller: which images are copied smaller, and how.
    """
    where = Where(files.where(image.file_name), image.file_name, image.id)
    try:
        content = files.read(image.file_name)
        header = inspect_image(content, image.width, image.height)
        is_copied = smaller is not None and smaller.takes(image)
        pixels = decode_image(content, image.width, image.height) if verify or is_copied else None
    except FileNotFoundError:
        rule, told = "image_missing", "it is missing"
    except OSError as error:
        rule, told = "image_unreadable", f"it cannot be read: {error.strerror}"
    except BadImageError as error:
        rule, told = error.rule, str(error)
    else:
        findings.note(header.note, where)
        if smaller is None or pixels is None or not is_copied:
            return image, content, header.extension

        def report(what: str) -> None:
            findings.report("segmentation_malformed", where, what)

        return *smaller.copy(image, pixels, report), "jpg"
    findings.report(rule, where, told)
    return None
