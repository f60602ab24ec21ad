"""Converting weights, and going on from published ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.convert import convert
from model import DetrConfig, build_model
from model.deformable_detr import DeformableDetr
from model.weights.files import export_weights, load_weights, read_tensors, read_weights
from model.weights.names import to_foreign
from pipeline.config.sections import InitSection, TrainSection
from pipeline.data.labels import Category, LabelMap
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.run_folder import RunFolder
from pipeline.train.loop import train
from pipeline.train.run import TrainJob
from tests.builders import make_varied_manifest, write_checkpoint
from tests.jobs.test_cli import raydetr
from tests.pipeline.train.runs import SETTINGS, losses

SMALL: dict[str, Any] = {
    "backbone": "resnet18", "hidden_dim": 64, "heads": 4, "ffn_dim": 64, "num_queries": 10, "encoder_layers": 1,
    "decoder_layers": 2,
}  # fmt: skip


def make_detector(seed: int = 0, **settings: Any) -> DeformableDetr:
    model = build_model(DetrConfig(**(SMALL | settings)), torch.Generator().manual_seed(seed))
    assert isinstance(model, DeformableDetr)
    return model


def test_round_trip_on_the_command_line(tmp_path: Path) -> None:
    export_weights(make_detector(with_box_refine=True), tmp_path / "first.safetensors")
    for source, out, to in (
        ("first.safetensors", "w.pth", "original"),
        ("w.pth", "folder", "hf"),
        ("folder", "last.safetensors", "raydetr"),
    ):
        result = raydetr("convert", str(tmp_path / source), str(tmp_path / out), "--to", to)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        assert f"to {tmp_path / out} ({to})" in result.stdout
    first, last = (read_weights(tmp_path / name) for name in ("first.safetensors", "last.safetensors"))
    assert first.config() == last.config()
    assert first.tensors.keys() == last.tensors.keys()
    assert all(torch.equal(tensor, last.tensors[name]) for name, tensor in first.tensors.items())


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"<html>")
    result = raydetr("convert", str(tmp_path / "w.pth"), str(tmp_path / "out"), "--to", "hf")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'w.pth'}: damaged, or not a weights file")
    assert result.stderr.count("\n") == 1


def test_what_had_to_be_assumed_is_said(tmp_path: Path) -> None:
    model = make_detector(heads=8, with_box_refine=True, two_stage=True, num_queries=300)
    torch.save({"model": to_foreign(model.state_dict(), "original", "deformable_detr")}, tmp_path / "bare.pth")
    lines = convert(tmp_path / "bare.pth", tmp_path / "out", "hf")
    assert "model.heads: 8, model.points: 4, model.dilation: false, model.num_queries: 300; if that is wrong" in lines
    assert read_weights(tmp_path / "out").config() == model.config


def test_a_configuration_has_the_last_word(tmp_path: Path) -> None:
    model = make_detector(heads=4, num_classes=7)
    export_weights(model, tmp_path / "w.pth", "original")
    bare = {"model": torch.load(tmp_path / "w.pth", weights_only=True)["model"]}
    torch.save(bare, tmp_path / "bare.pth")
    settings = DetrConfig(**(SMALL | {"heads": 2, "points": 8}))
    assert "assumed" not in convert(tmp_path / "bare.pth", tmp_path / "out", "hf", settings)
    assert read_weights(tmp_path / "out").config() == DetrConfig(
        **(SMALL | {"heads": 2, "points": 8, "num_classes": 7})
    )


def test_a_checkpoint_brings_its_names(tmp_path: Path) -> None:
    labels = LabelMap("coco91", (Category(1, "cat"), Category(90, "toothbrush")))
    checkpoint = write_checkpoint(tmp_path, labels)
    with pytest.raises(UserError, match="transformers has not the backbone resnet_tiny"):
        convert(checkpoint, tmp_path / "folder", "hf")
    state = json.loads((checkpoint / "state.json").read_text())
    model = make_detector()
    state["config"]["model"] |= SMALL | {"backbone_norm": "frozen_batch_norm", "points": 4, "feature_levels": 4}
    (checkpoint / "state.json").write_text(json.dumps(state))
    export_weights(model, checkpoint / "model.safetensors")
    convert(checkpoint, tmp_path / "folder", "hf")
    names = json.loads((tmp_path / "folder" / "config.json").read_text())["id2label"]
    assert (names["0"], names["1"], names["90"], len(names)) == ("N/A", "cat", "toothbrush", 91)


def test_what_is_refused(tmp_path: Path) -> None:
    export_weights(make_detector(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="is there already"):
        convert(tmp_path / "w.safetensors", tmp_path / "w.safetensors", "raydetr")
    with pytest.raises(UserError, match="its folder does not exist"):
        convert(tmp_path / "w.safetensors", tmp_path / "none" / "w", "hf")
    torch.save(make_detector().backbone.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"a torchvision ResNet, not a detector; it is for train\.init\.backbone"):
        convert(tmp_path / "resnet.pth", tmp_path / "out", "hf")


def test_settings_to_change_are_said_by_their_keys(tmp_path: Path) -> None:
    export_weights(make_detector(with_box_refine=True, two_stage=True), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"set model\.with_box_refine: true, model\.two_stage: true$"):
        convert(tmp_path / "w.safetensors", tmp_path / "out", "hf", DetrConfig(**SMALL))
    export_weights(make_detector(dilation=True), tmp_path / "dilated.pth", "original")
    lines = convert(tmp_path / "dilated.pth", tmp_path / "out", "hf", DetrConfig(**SMALL))
    assert "made with model.dilation: true, unlike this model" in lines


def test_fine_tuning_from_published_weights(tmp_path: Path, world: World) -> None:
    """The original's file of 91 classes, 3 classes of one's own, a few steps: all but the class heads goes on."""
    published = make_detector(seed=5, num_classes=91)
    export_weights(published, tmp_path / "published.pth", "original")
    manifest = make_varied_manifest(tmp_path / "data", 8)
    config = DetrConfig(num_classes=manifest.labels.num_classes, **SMALL)
    assert config.num_classes == 3

    def job(name: str, **settings: Any) -> TrainJob:
        recipe = SETTINGS | {
            "max_steps": 10,
            "lr": 1e-3,
            "freeze_backbone": "stem_and_layer1",
            "lr_drop_epochs": (40.0,),
            **settings,
        }
        train_section = TrainSection.model_validate(recipe)
        return TrainJob(config, train_section, manifest.folder, RunFolder(tmp_path / name), root=tmp_path)

    init = InitSection(weights="published.pth")  # beside the command, wherever the worker runs
    with pytest.raises(
        UserError, match=r"train\.init: .*published\.pth: has 91 class logits .*set train\.init\.reset_heads: true"
    ):
        train(job("refused", init=init), world)

    start = make_detector(num_classes=3)
    report = load_weights(start, tmp_path / "published.pth", reset_heads=True)
    assert report.reset == ("class_embed.0.weight", "class_embed.0.bias")
    given = published.state_dict()
    assert all(torch.equal(t, given[n]) for n, t in start.state_dict().items() if "class_embed" not in n)

    tuned = job("tuned", init=init.model_copy(update={"reset_heads": True}))
    weights = read_tensors(train(tuned, world))
    assert weights["class_embed.0.weight"].shape == (3, 64)
    assert torch.equal(weights["backbone.conv1.weight"], given["backbone.conv1.weight"])  # frozen
    moved = (weights["transformer.level_embed"] - given["transformer.level_embed"]).abs().max()
    assert 0 < moved < 0.02
    values = list(losses(tuned.out).values())
    assert sum(values[-3:]) < 0.92 * sum(values[:3])
