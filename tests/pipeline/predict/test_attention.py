"""What a detection looked at: at the right pixels of the picture, and drawn there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from pipeline.config.sections import EvaluateSection
from pipeline.data.labels import Category, LabelMap
from pipeline.errors import UserError
from pipeline.predict.attention import Look, check_samples, draw_look, look, save_look
from pipeline.predict.detector import Detector
from tests.builders import make_detector, make_image

LABELS = LabelMap("contiguous", tuple(Category(number, f"thing {number}") for number in (1, 2, 4, 7, 8)))
PICTURE = make_image(200, 80)


def make_served(**settings: Any) -> Detector:
    model = make_detector(**settings)
    return Detector(model, model.config, LABELS, EvaluateSection(short_side=64, max_side=160))


def make_look(points: np.ndarray, **changes: Any) -> Look:
    weights = np.linspace(0.5, 0.1, points[..., 0].size, dtype=np.float32).reshape(points.shape[:-1])
    reference = np.array([60, 30], dtype=np.float32)
    fields: dict[str, Any] = {"query": 3, "category": "thing 4", "score": 0.5, "box": (50.0, 20.0, 70.0, 40.0)}
    fields |= {"reference": reference, "points": points, "weights": weights, "size": (200, 80)}
    return Look(**(fields | {"levels": ((8, 8, 20), (16, 4, 10))} | changes))


class TestLook:
    def test_known_offsets_are_known_pixels(self) -> None:
        detector = make_served(feature_levels=3, points=1, heads=2)
        transformer = detector.model.transformer
        attention = transformer.decoder.layers[-1].cross_attn
        offsets = torch.arange(12.0).view(2, 3, 1, 2) - 5  # in cells: heads, levels, points, (x, y)
        with torch.no_grad():
            for linear in (transformer.reference_points, attention.sampling_offsets):
                linear.weight.zero_()
            transformer.reference_points.bias.copy_(torch.tensor([0.25, 0.75]).logit())
            attention.sampling_offsets.bias.copy_(offsets.flatten())
        (seen,) = look(detector, PICTURE)  # 200 x 80, seen as 160 x 64
        assert seen.levels == ((8, 8, 20), (16, 4, 10), (32, 2, 5))
        assert seen.reference == pytest.approx([50, 60], rel=1e-5)
        cell = np.array([[10, 10], [20, 20], [40, 40]])[:, None]  # pixels of the picture
        np.testing.assert_allclose(seen.points, [50, 60] + offsets.numpy() * cell, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen.weights.sum((1, 2)), 1, rtol=1e-5)

    @pytest.mark.parametrize(
        "settings",
        [{}, {"feature_levels": 1}, {"class_loss": "softmax"}, {"with_box_refine": True, "two_stage": True}],
        ids=["focal", "one level", "softmax", "two-stage"],
    )
    def test_best_first_and_each_query_once(self, settings: dict[str, Any]) -> None:
        detector = make_served(**settings)
        best, *others = detector(PICTURE)
        seen = look(detector, PICTURE, top=5)
        assert (seen[0].category, seen[0].score) == (best["category"], best["score"])
        left, top, right, bottom = seen[0].box
        assert [left, top, right - left, bottom - top] == pytest.approx(best["bbox"])
        assert {entry.score for entry in seen} <= {best["score"], *(entry["score"] for entry in others)}
        assert [entry.score for entry in seen] == sorted((entry.score for entry in seen), reverse=True)
        assert len({entry.query for entry in seen}) == 5

    def test_chosen_queries(self) -> None:
        detector = make_served()
        everything = {entry.query: entry for entry in look(detector, PICTURE, top=12)}
        seen = look(detector, PICTURE, queries=[7, 2])
        assert [entry.query for entry in seen] == [7, 2]
        assert [entry.score for entry in seen] == [everything[7].score, everything[2].score]
        assert np.array_equal(seen[0].points, everything[7].points)
        with pytest.raises(UserError, match=r"query 12: .* there are 0 to 11"):
            look(detector, PICTURE, queries=[12])

    def test_detr_has_no_points(self) -> None:
        with pytest.raises(UserError, match="it is a DETR"):
            check_samples(make_served(arch="detr"))


def shown(axes: Axes) -> tuple[tuple[float, ...], list[list[float]]]:
    """The part of the picture (left, top, right, bottom) and the points of a panel."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return (left, top, right, bottom), np.asarray(axes.collections[0].get_offsets()).tolist()


class TestDrawing:
    def test_a_panel_for_each_level(self) -> None:
        points = np.array([[[[55, 25]], [[65, 35]]]], dtype=np.float32)
        whole, fine, coarse, unused, bar = draw_look(PICTURE, make_look(points)).axes
        assert shown(whole) == ((0, 0, 200, 80), [[65, 35], [55, 25]])  # the greater weight is drawn last
        assert shown(fine)[1] == [[55, 25]]
        assert shown(coarse)[1] == [[65, 35]]
        assert fine.get_title() == "stride 8, 20 x 8 cells\n83% of the weight"
        assert coarse.get_title() == "stride 16, 10 x 4 cells\n17% of the weight"
        assert whole.get_title() == "query 3: thing 4 0.50"
        assert not unused.has_data()
        assert bar.get_ylim() == pytest.approx((0, 0.5))

    @pytest.mark.parametrize(
        ("point", "window"),
        [
            pytest.param((60, 30), (60 - 28.75, 30 - 11.5, 60 + 28.75, 30 + 11.5), id="inside the box"),
            pytest.param((-40, 30), (0, 30 - 16.1, 80.5, 30 + 16.1), id="beside the picture"),
        ],
    )
    def test_levels_show_what_was_looked_at(self, point: tuple[int, int], window: tuple[float, ...]) -> None:
        seen = make_look(np.full((1, 2, 1, 2), point, dtype=np.float32))
        for axes in draw_look(PICTURE, seen).axes[1:3]:
            assert shown(axes)[0] == pytest.approx(window, abs=1e-3)

    def test_the_same_every_time(self, tmp_path: Path) -> None:
        seen = make_look(np.full((1, 1, 1, 2), 50, dtype=np.float32), levels=((32, 2, 5),))
        first, second = (save_look(PICTURE, seen, tmp_path / name) for name in ("a.png", "b.png"))
        assert first.read_bytes() == second.read_bytes()
        assert min(Image.open(first).size) > 150
