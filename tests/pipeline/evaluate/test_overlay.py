"""Pictures of a report."""

import base64
import io

import pytest
from PIL import Image

from pipeline.evaluate.diagnose import diagnose
from pipeline.evaluate.evaluated import Evaluated, read_evaluated
from pipeline.evaluate.overlay import CROP_SIDE, MOST_FOUND, Mark, Picture, Pictures, worst_and_best
from tests.pipeline.evaluate.evaluations import CAT, FOUND, make_detection, make_split, write_evaluation


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    root = tmp_path_factory.mktemp("evaluation")
    many = [make_detection(7, CAT, 0, 0.001 * number) for number in range(60)]
    return read_evaluated(write_evaluation(root / "out", make_split(root), [*FOUND, *many]))


@pytest.fixture(scope="module")
def pictures(evaluated: Evaluated) -> Pictures:
    return Pictures(evaluated, diagnose(evaluated.truth, evaluated.found, 0.4), range(1, 8))


def whole(pictures: Pictures, number: int) -> Picture:
    picture = pictures.whole(number)
    assert picture is not None
    return picture


def pixels(picture: Picture) -> Image.Image:
    assert picture.address is not None
    kind, _, content = picture.address.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


class TestWhole:
    def test_boxes_and_how_they_came_out(self, pictures: Pictures) -> None:
        picture = whole(pictures, 1)
        assert (picture.title, picture.frame) == ("000000000001.jpg", (0, 0, 32, 24))
        assert picture.objects == [
            Mark((0, 0, 20, 20), 1, 0.9, "object"),
            Mark((22, 0, 8, 20), 2, None, "crowd"),
        ]
        assert picture.found == [Mark((0, 0, 20, 20), 1, 0.9, "right"), Mark((0, 0, 20, 20), 1, 0.8, "wrong")]
        assert pixels(picture).size == (32, 24)

    def test_counts_follow_the_score(self, pictures: Pictures) -> None:
        """An object is missed where the detection that finds it is not shown."""
        picture = whole(pictures, 1)
        assert [picture.counts(score) for score in (0.5, 0.85, 0.95)] == [(1, 1, 0), (1, 0, 0), (0, 0, 1)]

    def test_the_best_of_many_detections(self, pictures: Pictures) -> None:
        scores = [mark.score for mark in whole(pictures, 7).found]
        assert scores == [0.001 * number for number in range(59, 59 - MOST_FOUND, -1)]

    def test_an_image_that_cannot_be_read_has_its_boxes(
        self, evaluated: Evaluated, caplog: pytest.LogCaptureFixture
    ) -> None:
        def read(_: int) -> None:
            raise OSError("no such disk")

        broken = Evaluated(**{**vars(evaluated), "read": read})
        made = Pictures(broken, diagnose(evaluated.truth, evaluated.found, 0.4), [1])
        picture = whole(made, 1)
        assert (picture.address, picture.frame[2:], len(picture.objects)) == (None, (32, 24), 2)
        assert "image 1 is not shown: no such disk" in caplog.text


def test_a_part_is_a_square_around_what_it_is_about(evaluated: Evaluated, pictures: Pictures) -> None:
    errors = diagnose(evaluated.truth, evaluated.found, 0.4).label_errors
    wrong = next(error for error in errors if error.image == 2)
    part = pictures.part(wrong)
    assert part is not None
    assert part.frame == (0, 0, 32, 24)  # 20 pixels and twice 12 are more than there is
    assert [mark.category for mark in (*part.objects, *part.found)] == [1, 2]
    assert max(pixels(part).size) <= CROP_SIDE


def test_worst_and_best_images(evaluated: Evaluated) -> None:
    diagnosis = diagnose(evaluated.truth, evaluated.found, 0.4)
    worst, best = worst_and_best(diagnosis, 12, 6)
    assert sorted([*worst, *best]) == [1, 2, 3, 4, 5]  # no object is in the others
    assert best[0] == 1
    assert worst[:3] == [2, 3, 4]  # an object missed, and a detection that is wrong
    assert worst_and_best(diagnosis, 2, 1) == ([2, 3], [1])
