"""Whether weights fit a model: what is wrong is named, with the mend, and nothing changes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import OneToMany
from model.weights.files import export_weights, load_weights, read_tensors
from model.weights.fit import unique_tensors
from tests.model.weights.test_files import (
    VARIANTS,
    assert_equal,
    copy_of,
    make_detector,
    make_publishable,
    torchvision_state,
)


class TestOtherClassCount:
    def test_refused_with_the_mend(self) -> None:
        model = make_detector(num_classes=3)
        before = copy_of(model)
        with pytest.raises(ValueError, match=r"has 7 class logits and the model has 3.*set reset_heads: true"):
            load_weights(model, make_detector(num_classes=7).state_dict())
        assert_equal(model, before)

    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
    def test_reset_keeps_the_rest(self, settings: dict[str, Any]) -> None:
        model, source = make_detector(num_classes=3, **settings), make_detector(seed=1, num_classes=7, **settings)
        before, given = copy_of(model), copy_of(source)
        report = load_weights(model, source.state_dict(), reset_heads=True)
        expected = {name: (before if "class_embed" in name else given)[name] for name in before}
        assert_equal(model, expected)
        assert set(report.reset) == {name for name in unique_tensors(model) if "class_embed" in name}
        assert "class heads start anew: class_embed.0.weight" in str(report)

    @pytest.mark.parametrize("format", ["original", "hf"])
    def test_reset_from_other_formats(self, tmp_path: Path, format: str) -> None:
        model, source = make_publishable(num_classes=3), make_publishable(seed=1, num_classes=91)
        export_weights(source, tmp_path / "w", format)
        before, given = copy_of(model), copy_of(source)
        with pytest.raises(ValueError, match=r"has 91 class logits and the model has 3"):
            load_weights(model, tmp_path / "w")
        assert_equal(model, before)
        assert load_weights(model, tmp_path / "w", reset_heads=True).reset
        assert_equal(model, {name: (before if "class_embed" in name else given)[name] for name in before})

    def test_equal_counts_reset_nothing(self) -> None:
        model, source = make_detector(), make_detector(seed=1)
        assert not load_weights(model, source.state_dict(), reset_heads=True).reset
        assert_equal(model, copy_of(source))


class TestWhatTrainingAloneHas:
    def test_is_not_missed(self) -> None:
        model, source = make_detector(one_to_many=OneToMany(6, 2)), make_detector(seed=1)
        before = copy_of(model)["one_to_many_embed.weight"]
        report = load_weights(model, source.state_dict())
        assert "one_to_many_embed.weight" not in report.loaded
        assert_equal(model, copy_of(source) | {"one_to_many_embed.weight": before})

    def test_is_left_out(self) -> None:
        model, source = make_detector(), make_detector(seed=1, one_to_many=OneToMany(6, 2))
        assert load_weights(model, source.state_dict()).ignored == ("one_to_many_embed.weight",)
        assert_equal(model, {name: copy_of(source)[name] for name in model.state_dict()})

    def test_is_taken_where_both_have_it(self) -> None:
        model, source = (make_detector(seed=seed, one_to_many=OneToMany(6, 2)) for seed in (0, 1))
        assert not load_weights(model, source.state_dict()).ignored
        assert_equal(model, copy_of(source))
        with pytest.raises(ValueError, match=r"one_to_many_embed.weight is \[6, 64\], the model's is \[7, 64\]"):
            load_weights(make_detector(one_to_many=OneToMany(7, 2)), source.state_dict())


class TestDetectors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(
                lambda s: s.pop("transformer.level_embed"), "1 tensors .* missing: transformer.l", id="missing"
            ),
            pytest.param(lambda s: s.update(extra=torch.zeros(1)), "not the model's: extra", id="unexpected"),
            pytest.param(
                lambda s: s.update({"query_embed.weight": torch.zeros(9, 64)}),
                r"query_embed.weight is \[9, 64\], the model's is \[5, 64\]",
                id="shape",
            ),
            pytest.param(
                lambda s: s.update({"class_embed.1.bias": torch.ones(3)}), "differs from class_embed.1", id="shared"
            ),
            pytest.param(
                lambda s: s.update({"query_embed.weight": torch.zeros(5, 64, dtype=torch.int64)}),
                "not floating point",
                id="integers",
            ),
        ],
    )
    def test_what_does_not_fit_is_named_and_nothing_changes(self, change: Any, message: str) -> None:
        model, state = make_detector(), copy_of(make_detector(seed=1))
        before = copy_of(model)
        change(state)
        with pytest.raises(ValueError, match=message):
            load_weights(model, state)
        assert_equal(model, before)

    @pytest.mark.parametrize("format", ["raydetr", "original", "hf"])
    @pytest.mark.parametrize(
        ("made", "into", "mend"),
        [
            ("two-stage", "base", "set with_box_refine: true, two_stage: true$"),
            ("refine", "base", "set with_box_refine: true$"),
            ("base", "two-stage", "set with_box_refine: false, two_stage: false$"),
        ],
    )
    def test_another_variant_is_named(self, tmp_path: Path, format: str, made: str, into: str, mend: str) -> None:
        source = make_publishable(**VARIANTS[made])
        with torch.no_grad():
            for index, head in enumerate(source.bbox_embed):
                head.layers[0].bias += index  # type: ignore[union-attr, index, operator]
        export_weights(source, tmp_path / "w.safetensors" if format == "raydetr" else tmp_path / "w", format)
        model = make_publishable(seed=1, **VARIANTS[into])
        before = copy_of(model)
        with pytest.raises(ValueError, match=mend):
            load_weights(model, next(tmp_path.iterdir()))
        assert_equal(model, before)

    def test_missing_tensors_go_by_the_names_of_the_file(self, tmp_path: Path) -> None:
        export_weights(make_publishable(), tmp_path / "w", "hf")
        tensors = read_tensors(tmp_path / "w")
        del tensors["model.query_position_embeddings.weight"], tensors["model.level_embed"]
        with pytest.raises(ValueError, match=r"2 tensors .* missing: .*model\.query_position_embeddings\.weight"):
            load_weights(make_publishable(), tensors)

    def test_left_over_counters_are_ignored(self) -> None:
        model = make_detector()
        state = copy_of(model) | {"transformer.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
        assert set(load_weights(model, state).ignored) == {"transformer.total_ops", "total_params"}


class TestBackbones:
    def test_batch_norm_statistics_need_frozen_batch_norm(self) -> None:
        with pytest.raises(ValueError, match=r"set backbone_norm: frozen_batch_norm"):
            load_weights(make_detector(backbone_norm="group_norm"), torchvision_state(make_detector()))

    def test_another_depth_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"does not fit.*layer1\.0\.conv1\.weight is \[64, 64, 1, 1\]"):
            load_weights(make_detector(backbone="resnet18"), torchvision_state(make_detector(backbone="resnet50")))
