"""One evaluation against another, as a page."""

import json
from pathlib import Path

import pytest

from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.comparison import write_comparison
from pipeline.evaluate.evaluated import read_evaluated, read_files
from pipeline.files import read_json
from tests.browser import look_at, needs_chromium
from tests.builders import CATEGORIES, make_manifest, write_coco
from tests.pipeline.evaluate.evaluations import (
    DOG,
    FOUND,
    HOSTILE,
    OBJECTS,
    PERFECT,
    make_detection,
    make_split,
    write_evaluation,
)
from tests.pipeline.evaluate.pages import Element, read_page


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_split(tmp_path_factory.mktemp("split"))


@pytest.fixture(scope="module")
def folders(split: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that makes errors, and one that makes none."""
    root = tmp_path_factory.mktemp("evaluations")
    return write_evaluation(root / "a", split), write_evaluation(root / "b", split, PERFECT, name="better", step=20)


def compare(out: Path, first: Path, second: Path) -> Element:
    write_comparison(out, read_evaluated(first), read_evaluated(second))
    return read_page(out)


@pytest.fixture(scope="module")
def page(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Element:
    return compare(tmp_path_factory.mktemp("page") / "comparison.html", *folders)


class TestPage:
    def test_whether_it_is_more_than_chance(
        self, page: Element, folders: tuple[Path, Path], split: Manifest, tmp_path: Path
    ) -> None:
        (verdict,) = page.of_class("verdict", "p")
        gained = 1 - read_json(folders[0] / "metrics.json", "")["AP"]
        assert f"AP is higher by {gained:.3f}, and that is more than chance" in verdict.text
        assert verdict.attributes["class"] == "verdict better"
        (verdict,) = compare(tmp_path / "worse.html", *reversed(folders)).of_class("verdict", "p")
        assert f"AP is lower by {gained:.3f}, and that is more than chance" in verdict.text
        little = write_evaluation(tmp_path / "little", split, [*FOUND, make_detection(5, DOG, 0, 0.9)])
        (verdict,) = compare(tmp_path / "unsure.html", folders[0], little).of_class("verdict", "p")
        assert "may be chance" in verdict.text
        assert verdict.attributes["class"] == "verdict unsure"

    def test_the_numbers_of_both(self, page: Element, folders: tuple[Path, Path]) -> None:
        ap = read_json(folders[0] / "metrics.json", "")["AP"]
        rows = {row[0]: row for row in page.section("numbers").rows()}
        assert rows["AP"][2:5] == [f"{ap:.3f}", "1.000", f"{1 - ap:+.3f}"]
        assert rows["APm"][2:] == ["no objects", ""]

    def test_categories_that_gained_most_come_first(self, page: Element) -> None:
        names = [row[0] for row in page.section("categories").rows()[1:]]
        assert names == ["dog", "cat"]

    def test_errors_and_origins(self, page: Element) -> None:
        counts = {row[0]: row[2:4] for row in page.section("errors").rows()[1:]}
        assert counts["Missed"] == ["2", "0"]
        rows = {row[0]: row[1:] for row in page.section("origin").rows()}
        assert (rows["step"], rows["git commit"]) == (["10", "20"], ["c0ffee", "c0ffee"])
        assert page.section("origin").all("pre")[0].text == "name: run -> better"

    def test_images_that_changed_stand_in_pairs(self, page: Element, tmp_path: Path, split: Manifest) -> None:
        captions = [scene.all("figcaption")[0].text for scene in page.section("images").of_class("scene", "figure")]
        assert [caption[:25] for caption in captions[:2]] == ["A · 000000000002.jpg · AP", "B · 000000000002.jpg · AP"]
        assert len(captions) == 8
        assert [title.text for title in page.section("images").all("h3")] == ["For the better"]

    def test_the_same_bytes_every_time(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        for name in ("first", "second"):
            compare(tmp_path / f"{name}.html", *folders)
        assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()

    def test_names_are_shown_as_they_are(self, tmp_path: Path) -> None:
        cat, *others = CATEGORIES
        files = write_coco(tmp_path, range(1, 8), OBJECTS, categories=[{**cat, "name": HOSTILE}, *others])
        for name, detections in (("<b>a", FOUND), ("<b>b", PERFECT)):
            (tmp_path / f"{name}.json").write_text(json.dumps(detections))
        sides = [read_files(files.annotations, tmp_path / f"<b>{name}.json", files.images) for name in "ab"]
        write_comparison(tmp_path / "page.html", *sides)
        page = read_page(tmp_path / "page.html")
        assert HOSTILE in [row[0] for row in page.section("categories").rows()]
        assert page.all("title")[0].text == "<b>b against <b>a"
        assert len(page.all("script")) == 1
        assert not page.all("img")


def test_other_images_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_manifest(tmp_path, range(1, 8), OBJECTS[1:], split="val")
    second = write_evaluation(tmp_path / "other", other, name="other")
    with pytest.raises(UserError, match="run, step 10 and other, step 10 were not scored on the same images"):
        compare(tmp_path / "page.html", folders[0], second)
    assert not (tmp_path / "page.html").exists()


def test_the_same_data_in_other_shards_can_be_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_manifest(tmp_path, range(1, 8), OBJECTS, split="val", max_samples=2)
    page = compare(tmp_path / "page.html", folders[0], write_evaluation(tmp_path / "other", other))
    assert page.of_class("verdict", "p")[0].attributes["class"] == "verdict unsure"


@needs_chromium
def test_filters_work_in_a_browser(folders: tuple[Path, Path], tmp_path: Path) -> None:
    compare(tmp_path / "page.html", *folders)
    count = "all('.scene .found:not(.off)').length"
    score = "one('#score').value = '0.8'; one('#score').dispatchEvent(new Event('input'));"
    seen = look_at(tmp_path / "page.html", [count, score + count])
    assert seen.answers == [7, 5]  # of the images 2 to 5: three, of which one is sure, and four
    assert (seen.requested, seen.complaints) == ([(tmp_path / "page.html").as_uri()], [])
