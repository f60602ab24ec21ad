"""The report of an evaluation, as a parser of HTML and as a browser sees it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.sections import METRICS
from pipeline.data.images import Pixels
from pipeline.data.manifest import Manifest
from pipeline.evaluate.evaluated import Evaluated, read_evaluated, read_files
from pipeline.evaluate.page import BEST, LABEL_ERRORS, MATRIX, WORST, write_report
from pipeline.files import read_json
from tests.browser import look_at, needs_chromium
from tests.builders import CATEGORIES, write_coco
from tests.pipeline.evaluate.evaluations import (
    FOUND,
    HOSTILE,
    OBJECTS,
    PERFECT,
    make_split,
    write_evaluation,
)
from tests.pipeline.evaluate.pages import Element, read_page
from tests.pipeline.evaluate.scenes import make_scene


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_split(tmp_path_factory.mktemp("split"))


@pytest.fixture(scope="module")
def folder(split: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of two checkpoints, with its report."""
    folder = write_evaluation(tmp_path_factory.mktemp("evaluation"), split)
    write_evaluation(folder / "other", split, PERFECT, step=20)
    (folder / "other" / "checkpoint-20").rename(folder / "checkpoint-20")
    write_report(folder / "report.html", read_evaluated(folder))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Element:
    return read_page(folder / "report.html")


def make_hostile(root: Path) -> Path:
    """The report of files whose names are markup."""
    cat, *others = CATEGORIES
    images = [{"id": number, "file_name": f"<i>{number}&.jpg"} for number in range(1, 8)]
    files = write_coco(root, images, OBJECTS, categories=[{**cat, "name": HOSTILE}, *others])
    detections = root / "<b>mine<!--.json"
    detections.write_text(json.dumps(FOUND))
    write_report(root / "report.html", read_files(files.annotations, detections, files.images))
    return root / "report.html"


class TestPage:
    def test_the_twelve_numbers_are_those_of_metrics_json(self, page: Element, folder: Path) -> None:
        metrics = read_json(folder / "metrics.json", "")
        shown = {row[0]: row[2] for row in page.section("numbers").rows()[1:]}
        assert shown == {name: f"{metrics[name]:.4f}" if metrics[name] >= 0 else "-" for name in METRICS}
        assert "no objects" in page.section("numbers").text  # medium ones

    def test_the_run_is_told(self, page: Element) -> None:
        assert page.all("h1")[0].text == "run, step 10"
        assert page.all("p")[1].text == "7 images, 5 objects, 3 categories"
        origin = page.section("origin").text
        wanted = ("c0ffee", "0" * 64, "checkpoint-10", "name: run\n", "picture_score: 0.4")
        assert [word for word in wanted if word not in origin] == []

    def test_the_checkpoints_are_told(self, page: Element) -> None:
        rows = page.section("training").rows()
        assert [(row[0], row[1]) for row in rows[1:]] == [("10", rows[1][1]), ("20", "1.0000")]
        assert len(page.section("training").of_class("line", "polyline")) == 3

    def test_categories_and_errors(self, page: Element) -> None:
        rows = page.section("categories").rows()
        assert [row[:2] for row in rows[1:]] == [["cat", "2"], ["dog", "3"], ["toothbrush", "0"]]
        counts = {row[0]: row[2] for row in page.section("errors").rows()[1:]}
        assert counts["Missed"] == "2"
        assert set(counts.values()) == {"1", "2"}

    def test_confusion_and_labels(self, page: Element) -> None:
        rows = page.section("confusion").rows()
        assert rows[0] == ["", "cat", "dog", "toothbrush", "none"]
        assert rows[1] == ["cat", "1", "1", "0", "0"]
        assert "cat taken for dog 1 of 2" in page.section("confusion").text
        captions = [caption.text for caption in page.section("labels").all("figcaption")]
        assert captions[0] == "found dog 0.95, annotated cat000000000002.jpg"
        assert "found cat 0.85, nothing annotated000000000006.jpg" in captions

    def test_pictures_have_their_boxes(self, page: Element) -> None:
        scenes = page.section("images").of_class("scene", "figure")
        assert len(scenes) == 5
        (first,) = [scene for scene in scenes if "000000000001.jpg" in scene.text]
        assert first.all("image")[0].attributes["href"].startswith("data:image/jpeg;base64,")
        marks = [(mark.attributes["class"], mark.attributes["data-score"]) for mark in first.of_class("mark")]
        assert marks == [
            *(("mark object", "0.9"), ("mark crowd", "")),
            *(("mark wrong found", "0.8"), ("mark right found", "0.9")),  # the best is on top
        ]
        assert "1 right, 1 wrong, 0 missed" in first.text
        missed = [scene.text for scene in scenes if scene.of_class("missed")]
        assert len(missed) == 4

    def test_nothing_is_fetched(self, folder: Path) -> None:
        text = (folder / "report.html").read_text()
        assert set(re.findall(r'(?:href|src)="([^"]{1,5})', text)) == {"#numb", "data:"} | {
            f"#{name}" for name in ("trai", "prec", "cate", "erro", "conf", "cali", "labe", "imag", "orig")
        }
        assert "url(" not in text
        assert "@import" not in text

    def test_the_same_bytes_every_time(self, folder: Path, tmp_path: Path) -> None:
        write_report(tmp_path / "again.html", read_evaluated(folder))
        assert (tmp_path / "again.html").read_bytes() == (folder / "report.html").read_bytes()


class TestText:
    def test_names_are_shown_as_they_are(self, tmp_path: Path) -> None:
        page = read_page(make_hostile(tmp_path))
        assert HOSTILE in [cell for row in page.section("categories").rows() for cell in row]
        assert HOSTILE in [option.text for option in page.all("option")]
        assert any(HOSTILE in title.text for title in page.section("images").all("title"))
        assert any("<i>1&.jpg" in caption.text for caption in page.all("figcaption"))
        assert page.all("title")[0].text == "<b>mine<!--"
        assert len(page.all("script")) == 1
        assert not page.all("img")
        assert not [tag for tag in page.all("b") if tag.text == "cat"]

    def test_control_characters_are_told(self, tmp_path: Path) -> None:
        files = write_coco(tmp_path, [{"id": 1, "file_name": "a\x1b[31m\ud800.jpg"}], OBJECTS[:1], draw=False)
        (tmp_path / "found.json").write_text("[]")
        write_report(tmp_path / "report.html", read_files(files.annotations, tmp_path / "found.json"))
        assert r"a\x1b[31m\ud800.jpg" in (tmp_path / "report.html").read_text()


class TestSize:
    def test_many_large_pictures_stay_below_five_megabytes(self, tmp_path: Path) -> None:
        """Of noise, which no JPEG makes small, with as many boxes as are drawn."""
        document, detections = make_scene(0, images=60)
        few = {(entry["image_id"], entry["category_id"]): entry for entry in detections}.values()
        many = [{**entry, "score": entry["score"] * (1 - 0.001 * number)} for entry in few for number in range(30)]
        for name, content in (("truth", document), ("found", many)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)

        def read(_: int) -> Pixels:
            return noise

        evaluated = read_files(tmp_path / "truth.json", tmp_path / "found.json")
        write_report(tmp_path / "report.html", Evaluated(**{**vars(evaluated), "read": read}))
        page = read_page(tmp_path / "report.html")
        assert len(page.section("images").all("figure")) == WORST + BEST
        assert len(page.section("labels").all("figure")) == LABEL_ERRORS
        assert (tmp_path / "report.html").stat().st_size < 5_000_000

    def test_a_matrix_of_the_categories_that_are_confused(self, tmp_path: Path) -> None:
        categories = [{"id": number, "name": f"kind {number}"} for number in range(1, 61)]
        found = [{**FOUND[2], "category_id": 55}]
        files = write_coco(tmp_path, range(1, 8), OBJECTS[:3], categories=categories)
        (tmp_path / "found.json").write_text(json.dumps(found))
        write_report(tmp_path / "report.html", read_files(files.annotations, tmp_path / "found.json"))
        section = read_page(tmp_path / "report.html").section("confusion")
        rows = section.rows()
        assert len(rows) == len(rows[0]) == MATRIX + 2
        assert {"kind 1", "kind 55"} < set(rows[0])
        assert f"Of 60 categories the {MATRIX} that are confused most" in section.text

    def test_scores_that_are_no_probabilities(self, split: Manifest, tmp_path: Path) -> None:
        folder = write_evaluation(tmp_path, split, [{**entry, "score": 10 * entry["score"] - 7} for entry in FOUND])
        write_report(folder / "report.html", read_evaluated(folder))
        page = read_page(folder / "report.html")
        assert "these scores are no probabilities" in page.section("calibration").text
        (slider,) = page.all("input", lambda element: element.attributes.get("id") == "score")
        assert (slider.attributes["min"], slider.attributes["max"]) == ("-1.0", "2.5")

    def test_no_detections(self, split: Manifest, tmp_path: Path) -> None:
        folder = write_evaluation(tmp_path, split, [])
        write_report(folder / "report.html", read_evaluated(folder))
        page = read_page(folder / "report.html")
        assert page.section("numbers").rows()[1][2] == "0.0000"
        assert not page.all("section", lambda element: element.attributes["id"] == "labels")


SET_SCORE = "one('#score').value = '{}'; one('#score').dispatchEvent(new Event('input'));"
VISIBLE = "all('.{}').filter((mark) => getComputedStyle(mark).display !== 'none').length"
COUNTS = "all('.scene [data-count={}]').reduce((sum, element) => sum + Number(element.textContent), 0)"
CLICK = "one('[data-hides={}]').click();"
CHOOSE = "one('#category').value = '{}'; one('#category').dispatchEvent(new Event('input'));"


@needs_chromium
class TestInABrowser:
    def test_filters_work_without_a_network(self, folder: Path) -> None:
        page = folder / "report.html"
        found, objects = VISIBLE.format("scene .found"), VISIBLE.format("scene .object")
        seen = look_at(
            page,
            [
                *(found, objects, COUNTS.format("missed")),
                *(SET_SCORE.format(0.82) + found, COUNTS.format("wrong"), COUNTS.format("missed")),
                *(SET_SCORE.format(0.92) + found, COUNTS.format("right"), COUNTS.format("missed")),
                *(CLICK.format("no-found") + found, CLICK.format("no-found") + found),
                *(CLICK.format("no-objects") + objects, CLICK.format("no-objects") + objects),
                SET_SCORE.format(0) + CHOOSE.format(2) + found,
                COUNTS.format("missed"),
                CHOOSE.format("") + found,
                "document.documentElement.scrollWidth - innerWidth",
            ],
        )
        assert seen.answers[:3] == [5, 5, 4]
        assert seen.answers[3:6] == [2, 1, 4]
        assert seen.answers[6:9] == [1, 0, 5]
        assert seen.answers[9:13] == [0, 1, 0, 5]
        assert seen.answers[13:16] == [2, 3, 5]  # dogs: two detections, and three that are missed
        assert seen.answers[16] <= 0  # nothing to scroll to the right
        assert seen.requested == [page.as_uri()]
        assert seen.complaints == []

    def test_tables_are_sorted_by_a_click(self, folder: Path) -> None:
        names = "all('#categories tbody tr').map((row) => row.cells[0].textContent).join()"
        click = "all('#categories th')[0].click();"
        seen = look_at(folder / "report.html", [click + names, click + names])
        assert seen.answers == ["toothbrush,dog,cat", "cat,dog,toothbrush"]

    def test_names_run_no_scripts(self, tmp_path: Path) -> None:
        page = make_hostile(tmp_path)
        seen = look_at(page, ["document.title", "document.querySelectorAll('img').length"])
        assert seen.answers == ["<b>mine<!--", 0]
        assert seen.requested == [page.as_uri()]

    def test_the_policy_refuses_scripts_of_others(self, folder: Path, tmp_path: Path) -> None:
        text = (folder / "report.html").read_text().replace("<footer>", "<script>document.title = 'x'</script><footer>")
        (tmp_path / "page.html").write_text(text)
        seen = look_at(tmp_path / "page.html", ["document.title"])
        assert seen.answers == ["run"]
        assert "Content Security Policy" in seen.complaints[0]
