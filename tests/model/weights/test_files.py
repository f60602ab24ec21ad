import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import SwinConfig, SwinForImageClassification, SwinModel

from model.build import build_model
from model.config import DetrConfig, OneToMany
from model.deformable_detr import DeformableDetr
from model.weights.files import (
    IMAGENET_FILES,
    BackboneOnlyError,
    export_weights,
    load_backbone,
    load_weights,
    read_tensors,
    read_weights,
)
from model.weights.fit import unique_tensors


def make_detector(seed: int = 0, **settings: Any) -> DeformableDetr:
    small = {"backbone": "resnet_tiny", "hidden_dim": 32, "heads": 4, "ffn_dim": 32, "num_queries": 5, "num_classes": 3}
    small |= {"encoder_layers": 1, "decoder_layers": 2}
    return build_model(DetrConfig(**(small | settings)), torch.Generator().manual_seed(seed))


def copy_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert not [name for name in state if not torch.equal(state[name], expected[name])]


def torchvision_state(model: DeformableDetr) -> dict[str, Tensor]:
    """What torchvision's file of this backbone would hold."""
    generator = torch.Generator().manual_seed(9)
    state = {
        name: torch.rand(tensor.shape, generator=generator) for name, tensor in model.backbone.state_dict().items()
    }
    counters = {name.replace("mean", "x"): torch.tensor(0) for name in state if name.endswith("running_mean")}
    state |= {name.replace("running_x", "num_batches_tracked"): counter for name, counter in counters.items()}
    return state | {"fc.weight": torch.rand(10, 4), "fc.bias": torch.rand(10)}


def make_swin(**settings: Any) -> Any:
    return make_detector(**({"backbone": "swin_nano", "feature_levels": 3} | settings))


def official_vit(model: Any) -> dict[str, Tensor]:
    """What DINOv2's file of this backbone would hold."""
    own = model.backbone.state_dict()
    state = {name: torch.rand(tensor.shape) for name, tensor in own.items() if not name.startswith("pyramid.")}
    tokens = {name: torch.rand(1, 1, 32) for name in ("cls_token", "mask_token", "register_tokens")}
    patches = {"pos_embed": torch.rand(1, 1370, 32), "patch_embed.proj.weight": torch.rand(32, 3, 14, 14)}
    return state | tokens | patches


def official_swin(model: Any) -> dict[str, Tensor]:
    """What the official release's file of this backbone would hold: nothing of the norms of its maps."""
    state = {
        name: torch.rand(tensor.shape) for name, tensor in model.backbone.state_dict().items() if name[:4] != "norm"
    }
    for stage in range(4):
        for block in range(2):
            state[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = torch.zeros(49, 49).long()
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    head = {"head.weight": torch.rand(10, 128), "head.bias": torch.rand(10)}
    return state | head | {"norm.weight": torch.rand(128), "norm.bias": torch.rand(128)}


VARIANTS = {"base": {}, "refine": {"with_box_refine": True}, "two-stage": {"with_box_refine": True, "two_stage": True}}


class TestOwnFormat:
    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
    def test_out_and_in(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        model, other = make_detector(**settings), make_detector(seed=1, **settings)
        export_weights(model, tmp_path / "model.safetensors")
        report = load_weights(other, tmp_path)  # the folder
        assert_equal(other, copy_of(model))
        assert report.format == "raydetr"
        assert set(report.loaded) == set(unique_tensors(model))
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def test_each_tensor_is_written_once(self, tmp_path: Path) -> None:
        export_weights(make_detector(with_box_refine=True), tmp_path / "w.safetensors")
        with safe_open(tmp_path / "w.safetensors", "pt") as file:
            assert list(file.metadata()) == ["config"]  # several entries would come in any order: other bytes each time
            assert not [name for name in file.keys() if name.startswith("transformer.decoder.bbox")]  # noqa: SIM118

    def test_a_state_dict_with_all_names_is_taken(self) -> None:
        model, other = make_detector(), make_detector(seed=1)
        load_weights(other, copy_of(model))
        assert_equal(other, copy_of(model))

    def test_a_torch_file_is_taken(self, tmp_path: Path) -> None:
        model, other = make_detector(), make_detector(seed=1)
        torch.save(copy_of(model), tmp_path / "w.pth")
        load_weights(other, tmp_path / "w.pth")
        assert_equal(other, copy_of(model))

    def test_the_architecture_stands_in_the_file(self, tmp_path: Path) -> None:
        model = make_detector(with_box_refine=True, two_stage=True, heads=2, points=3, dropout=0.3, dilation=True)
        export_weights(model, tmp_path / "w.safetensors")
        assert read_weights(tmp_path / "w.safetensors").config() == model.config

    def test_unknown_format_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="choose raydetr, original, hf"):
            export_weights(make_detector(), tmp_path / "w", format="onnx")

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "taken").mkdir()
        with pytest.raises(OSError, match="taken"):
            export_weights(make_detector(), tmp_path / "taken")
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def make_publishable(seed: int = 0, **settings: Any) -> DeformableDetr:
    """A detector that the others' code can hold, too."""
    return make_detector(seed, **({"backbone": "resnet18", "hidden_dim": 64} | settings))


def write_original(path: Path, model: DeformableDetr, **arguments: Any) -> Path:
    """A checkpoint as the original's training leaves it, with the leftovers of a FLOP counter."""
    export_weights(model, path, "original")
    tensors = torch.load(path, weights_only=True)["model"]
    tensors |= {"transformer.total_ops": torch.zeros(1), "backbone.0.body.total_params": torch.zeros(1)}
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    args = argparse.Namespace(
        nheads=model.config.heads, dec_n_points=model.config.points, lr=2e-4, device="cuda", masks=False
    )
    vars(args).update(arguments)
    content = {"model": tensors, "optimizer": optimizer.state_dict(), "epoch": 49, "args": args}
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 40)
    torch.save(content | {"lr_scheduler": scheduler.state_dict()}, path)
    return path


@pytest.mark.parametrize("format", ["raydetr", "original", "hf"])
def test_what_training_alone_has_is_not_written(tmp_path: Path, format: str) -> None:
    model, other = make_publishable(one_to_many=OneToMany(6, 2)), make_publishable(seed=1)
    path = tmp_path / {"raydetr": "w.safetensors", "original": "w.pth", "hf": "folder"}[format]
    export_weights(model, path, format)
    weights = read_weights(path)
    assert weights.config() == other.config
    assert not load_weights(other, weights).ignored
    assert_equal(other, {name: tensor for name, tensor in copy_of(model).items() if name in other.state_dict()})


class TestOriginalFormat:
    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
    def test_a_checkpoint_of_the_original_is_read(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        model, other = make_publishable(**settings), make_publishable(seed=1, **settings)
        report = load_weights(other, write_original(tmp_path / "checkpoint.pth", model))
        assert_equal(other, copy_of(model))
        assert (report.format, len(report.ignored)) == ("original", 2)

    def test_every_head_is_written_under_all_its_names(self, tmp_path: Path) -> None:
        model = make_publishable(with_box_refine=True, two_stage=True)
        export_weights(model, tmp_path / "w.pth", "original")
        tensors = torch.load(tmp_path / "w.pth", weights_only=True)["model"]
        assert len(tensors) == len(model.state_dict())
        assert {
            "backbone.0.body.conv1.weight",
            "backbone.0.body.layer1.0.bn1.running_var",
            "class_embed.2.weight",
            "transformer.decoder.class_embed.2.weight",
            "transformer.decoder.bbox_embed.2.layers.0.bias",
        } <= tensors.keys()

    def test_other_things_than_namespaces_are_not_unpickled(self, tmp_path: Path) -> None:
        path = write_original(tmp_path / "w.pth", make_publishable(), folder=Path("x"), code=print)
        with pytest.raises(ValueError, match=r"w\.pth"):
            read_tensors(path)

    def test_arguments_are_believed(self, tmp_path: Path) -> None:
        model = make_publishable(heads=4, points=8)
        path = write_original(tmp_path / "w.pth", model, dilation=True, dropout=0.25)
        assert read_weights(path).config() == replace(model.config, dilation=True, dropout=0.25)
        report = load_weights(make_publishable(heads=4, points=8), path)
        assert "made with dilation: true, unlike this model" in str(report)
        with pytest.raises(ValueError, match=r"made with other settings; set heads: 4, points: 8"):
            load_weights(make_publishable(heads=8, points=4), path)

    @pytest.mark.parametrize("format", ["original", "hf"])
    def test_what_others_lack_is_not_written(self, tmp_path: Path, format: str) -> None:
        with pytest.raises(ValueError, match="the backbone resnet_tiny"):
            export_weights(make_detector(hidden_dim=64), tmp_path / "w", format)
        with pytest.raises(ValueError, match="a width of 32"):
            export_weights(make_detector(backbone="resnet18"), tmp_path / "w", format)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("format", ["raydetr", "hf"])
    def test_a_file_is_as_open_as_the_users_other_files(self, tmp_path: Path, format: str) -> None:
        (tmp_path / "other").touch()
        export_weights(make_publishable(), tmp_path / "w", format)
        file = tmp_path / "w" / "model.safetensors" if format == "hf" else tmp_path / "w"
        assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


class TestTransformersFormat:
    """Files only; `test_parity` has transformers itself read and write them."""

    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
    def test_out_and_in(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        model, other = make_publishable(**settings), make_publishable(seed=1, **settings)
        export_weights(model, tmp_path / "folder", "hf", ["cat", "dog", "bird"])
        assert json.loads((tmp_path / "folder" / "config.json").read_text())["id2label"]["2"] == "bird"
        for source in (tmp_path / "folder", tmp_path / "folder" / "model.safetensors"):
            assert read_weights(source).config() == model.config
            assert load_weights(other, source).format == "hf"
        assert_equal(other, copy_of(model))
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]

    def test_pickled_and_in_parts(self, tmp_path: Path) -> None:
        model = make_publishable()
        export_weights(model, tmp_path / "safe", "hf")
        tensors = list(read_tensors(tmp_path / "safe").items())
        parts = {"a.bin": dict(tensors[:50]), "b.bin": dict(tensors[50:])}
        index = {"weight_map": {name: part for part, content in parts.items() for name in content}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        torch.save(parts["a.bin"], tmp_path / "a.bin")
        with pytest.raises(ValueError, match=r"b\.bin: there is no such weights file"):
            load_weights(model, tmp_path)
        torch.save(parts["b.bin"], tmp_path / "b.bin")
        other = make_publishable(seed=1)
        load_weights(other, tmp_path)
        assert_equal(other, copy_of(model))

    def test_another_model_and_a_broken_config(self, tmp_path: Path) -> None:
        export_weights(make_publishable(), tmp_path / "w", "hf")
        (tmp_path / "w" / "config.json").write_text('{"model_type": "conditional_detr"}')
        with pytest.raises(ValueError, match=r"config\.json: is of a model of the type conditional_detr"):
            read_weights(tmp_path / "w")
        (tmp_path / "w" / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json: damaged, or not JSON"):
            read_weights(tmp_path / "w")

    def test_a_folder_with_something_in_it_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(OSError, match="not empty"):
            export_weights(make_publishable(), tmp_path, "hf")
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_through_all_formats_bit_by_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    first = make_publishable(heads=2, **settings)
    model = first
    for format, name in (("original", "w.pth"), ("hf", "folder"), ("raydetr", "w.safetensors")):
        export_weights(model, tmp_path / name, format)
        weights = read_weights(tmp_path / name)
        assert (weights.format, weights.config()) == (format, first.config)
        model = make_publishable(seed=1, heads=2, **settings)
        load_weights(model, weights)
    assert_equal(model, copy_of(first))


class TestFilesThatDoNotFit:
    @pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
    def test_truncated(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        if name == "w.pth":
            torch.save(copy_of(make_detector()), path)
        else:
            export_weights(make_detector(), path)
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            load_weights(make_detector(), path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            pytest.param("w.safetensors", b"", id="empty safetensors"),
            pytest.param("w.pth", b"", id="empty torch file"),
            pytest.param("w.pth", b"<html>not found</html>", id="a web page"),
        ],
    )
    def test_no_weights_file(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: damaged, or not a weights file"):
            read_tensors(tmp_path / name)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="there is no such weights file"):
            load_weights(make_detector(), tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"model\.safetensors: there is no such"):
            load_weights(make_detector(), tmp_path)

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        class Harmful:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "touched",))

        torch.save({"x": Harmful()}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"w\.pth"):
            read_tensors(tmp_path / "w.pth")
        assert not (tmp_path / "touched").exists()

    def test_something_else_than_tensors(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="something else than tensors"):
            read_tensors(tmp_path / "w.pth")

    @pytest.mark.parametrize("name", ["encoder.weight", "backbone.body.conv1.weight"])
    def test_another_network(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"not weights of DETR or Deformable DETR.*{name}"):
            load_weights(make_detector(), {name: torch.zeros(2), "rpn.head.weight": torch.zeros(2)})

    def test_a_two_stage_file_that_lacks_one_tensor(self) -> None:
        weights = read_weights(copy_of(make_detector(**VARIANTS["two-stage"])))
        del weights.tensors["transformer.enc_output.weight"]
        assert weights.config().two_stage

    @pytest.mark.parametrize("content", [b"hello world\n", b"(e x\n", b"<html>", b"version https://git-lfs"])
    def test_any_other_bytes_are_one_clear_error(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.pth: damaged, or not a weights file .*; get it again") as caught:
            load_weights(make_detector(), tmp_path / "w.pth")
        assert "weights_only" not in str(caught.value)

    def test_odd_contents(self, tmp_path: Path) -> None:
        model = make_detector()
        torch.save({"model": copy_of(make_detector(seed=1)), "args": None}, tmp_path / "w.pth")
        load_weights(model, tmp_path / "w.pth")
        (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": ["w.pth"]}')
        with pytest.raises(ValueError, match=r"index\.json: has no weight_map from tensors to files"):
            load_weights(model, tmp_path)


class TestBackbone:
    def test_torchvision_state_dict(self, tmp_path: Path) -> None:
        model = make_detector(backbone="resnet18")
        before, state = copy_of(model), torchvision_state(model)
        torch.save(state, tmp_path / "resnet18.pth")
        report = load_backbone(model, tmp_path / "resnet18.pth")
        expected = {n: state[n.removeprefix("backbone.")] if n.startswith("backbone.") else before[n] for n in before}
        assert_equal(model, expected)
        assert report.format == "torchvision"
        assert {"fc.weight", "bn1.num_batches_tracked"} <= set(report.ignored)

    def test_load_weights_knows_it_too(self) -> None:
        model = make_detector()
        state = torchvision_state(model)
        assert load_weights(model, state).format == "torchvision"
        assert torch.equal(model.backbone.get_parameter("layer1.0.conv1.weight"), state["layer1.0.conv1.weight"])

    @pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
    def test_digest_in_the_name_is_checked(self, tmp_path: Path, right: bool) -> None:
        model = make_detector()
        torch.save(torchvision_state(model), tmp_path / "w.pth")
        digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8] if right else "0123abcd"
        path = (tmp_path / "w.pth").rename(tmp_path / f"resnet-{digest}.pth")
        if right:
            load_backbone(model, path)
        else:
            with pytest.raises(ValueError, match=r"its name says 0123abcd.*get it again"):
                load_backbone(model, path)

    def test_from_a_url_through_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(torch.hub, "_hub_dir", None)
        model = make_detector()
        torch.save(torchvision_state(model), tmp_path / "w.pth")
        digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
        source = (tmp_path / "w.pth").rename(tmp_path / f"net-{digest}.pth")
        load_backbone(model, source.as_uri())
        source.unlink()
        load_backbone(model, source.as_uri())  # now from the cache
        wrong = tmp_path / "net-00000000.pth"
        wrong.write_bytes(b"else")
        with pytest.raises(ValueError, match="invalid hash value"):
            load_backbone(model, wrong.as_uri())
        with pytest.raises(ValueError, match=r"cannot be downloaded.*give its path"):
            load_backbone(model, (tmp_path / "none-00000000.pth").as_uri())

    def test_the_official_swin(self, tmp_path: Path) -> None:
        model = make_swin()
        state, before = official_swin(model), copy_of(model)
        torch.save({"model": state}, tmp_path / "swin.pth")
        report = load_backbone(model, tmp_path / "swin.pth")
        assert report.format == "swin"
        assert_equal(model, {n: state.get(n.removeprefix("backbone."), before[n]) for n in before})
        norms = [f"backbone.norm{stage}.{tensor}" for stage in (1, 2, 3) for tensor in ("bias", "weight")]
        assert list(report.initial) == norms
        assert "not in the file, so they start anew: backbone.norm1.bias" in str(report)
        assert set(report.ignored) == state.keys() - model.backbone.state_dict().keys()

    def test_a_swin_of_a_detector_brings_the_norms_of_its_maps(self) -> None:
        model = make_swin(feature_levels=1)
        norms = {f"norm{stage}.weight": torch.rand(2**stage * 16) for stage in range(4)}
        state = official_swin(model) | norms | {f"norm{stage}.bias": torch.rand(2**stage * 16) for stage in range(4)}
        report = load_weights(model, state)
        assert torch.equal(model.backbone.norm3.weight, norms["norm3.weight"])
        assert not report.initial
        assert {"norm0.weight", "norm1.bias", "norm2.weight"} <= set(report.ignored)

    @pytest.mark.parametrize("heads", [True, False], ids=["SwinForImageClassification", "SwinModel"])
    def test_transformers_swin(self, heads: bool, tmp_path: Path) -> None:
        """Which tensor is which is proved by the features, in test_swin.py."""
        settings = SwinConfig(embed_dim=16, depths=[2] * 4, num_heads=[1, 2, 4, 8], num_labels=5)
        theirs: Any = (SwinForImageClassification if heads else SwinModel)(settings)
        table = theirs.get_parameter(
            ("swin." if heads else "")
            + "encoder.layers.2.blocks.1.attention.relative_position_bias.relative_position_bias_table"
        )
        torch.nn.init.normal_(table)
        theirs.save_pretrained(tmp_path)
        for source in (tmp_path, theirs.state_dict()):  # with the names on the disk, and in the memory
            model = make_swin()
            report = load_backbone(model, source) if source is tmp_path else load_weights(model, source)
            assert report.format == "transformers"
            assert len(report.loaded) == len(list(model.backbone.parameters())) - len(report.initial)
            assert len(report.initial) == 6
            assert torch.equal(model.backbone.layers[2].blocks[1].attn.relative_position_bias_table, table)

    def test_the_official_vit(self, tmp_path: Path) -> None:
        model = make_swin(backbone="vit_nano")
        state, before = official_vit(model), copy_of(model)
        torch.save(state, tmp_path / "vit.pth")
        report = load_backbone(model, tmp_path / "vit.pth")
        assert report.format == "dinov2"
        assert set(report.ignored) == {"cls_token", "mask_token", "register_tokens"}
        assert {name for name in before if ".pyramid." in name} == set(report.initial)
        assert torch.equal(model.backbone.pos_embed, state["pos_embed"][:, 1:])
        same = {"pos_embed", "patch_embed.proj.weight", *(name for name in state if name in report.ignored)}
        for name in state.keys() - same:
            assert torch.equal(model.backbone.get_parameter(name), state[name]), name

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"blocks.0.norm1.weight": torch.ones(9)}, r"blocks\.0\.norm1\.weight is \[9\], the model's is \[32\]"),
            ({"pos_embed": torch.ones(1, 257, 32)}, r"pos_embed is \[1, 256, 32\], the model's is \[1, 1369, 32\]"),
            ({"pos_embed": torch.ones(7)}, r"pos_embed is \[7\]"),
            ({"patch_embed.proj.weight": torch.ones(7)}, r"patch_embed\.proj\.weight is \[7\]"),
            ({"patch_embed.proj.weight": torch.ones(32, 3, 14, 7)}, r"patch_embed\.proj\.weight is \[32, 3, 14, 7\]"),
            ({"blocks.0.mlp.w12.weight": torch.ones(4)}, r"1 tensors are not the model's: blocks\.0\.mlp\.w12"),
        ],
    )  # fmt: skip
    def test_what_is_not_of_this_vit(self, changed: dict[str, Tensor], told: str) -> None:
        model = make_swin(backbone="vit_nano")
        with pytest.raises(ValueError, match=told):
            load_weights(model, official_vit(model) | changed)

    def test_a_vit_is_none_of_a_resnet(self) -> None:
        with pytest.raises(ValueError, match="is of a ViT of DINOv2, and the backbone is resnet_tiny"):
            load_weights(make_detector(), official_vit(make_swin(backbone="vit_nano")))

    def test_what_is_not_of_this_swin(self, tmp_path: Path) -> None:
        model = make_swin()
        state = official_swin(model)
        with pytest.raises(ValueError, match=r"1 tensors are not the model's: layers\.9\.x"):
            load_weights(model, state | {"layers.9.x": torch.zeros(1)})
        table = "layers.0.blocks.0.attn.relative_position_bias_table"
        with pytest.raises(ValueError, match=r"table is \[529, 1\], the model's is \[169, 1\]"):
            load_weights(model, state | {table: torch.zeros(529, 1)})  # windows of 12
        with pytest.raises(ValueError, match="is of an official Swin, and the backbone is resnet_tiny"):
            load_weights(make_detector(), state)
        with pytest.raises(ValueError, match="is of a torchvision ResNet, and the backbone is swin_nano"):
            load_weights(model, torchvision_state(make_detector()))
        with pytest.raises(BackboneOnlyError, match="an official Swin, not a detector"):
            read_weights(state)
        (tmp_path / "config.json").write_text('{"model_type": "swin"}')
        save_file({"encoder.layers.0.blocks.0.layernorm_before.weight": torch.ones(16)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="tensors of the model are missing"):
            load_backbone(model, tmp_path)

    @pytest.mark.parametrize(("backbone", "release"), [("swin_tiny", "Swin-Transformer"), ("vit_base", "dinov2")])
    def test_published_transformers_are_given_by_path(self, backbone: str, release: str) -> None:
        with torch.device("meta"):
            model = build_model(DetrConfig(backbone=backbone))  # type: ignore[arg-type]
        told = rf"sha256 of {backbone}'s published weights is not known.*{release} and give the path"
        with pytest.raises(ValueError, match=told):
            load_backbone(model, "imagenet")

    def test_imagenet_of_a_tiny_backbone_does_not_exist(self) -> None:
        with pytest.raises(ValueError, match="no published ImageNet weights of resnet_tiny"):
            load_backbone(make_detector(), "imagenet")
        assert IMAGENET_FILES["resnet50"] == "resnet50-0676ba61.pth"

    def test_wrong_sources(self, tmp_path: Path) -> None:
        model = make_detector()
        with pytest.raises(ValueError, match="no such file of backbone weights"):
            load_backbone(model, tmp_path / "none.pth")
        torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="not a state dict of a torchvision ResNet, a Swin or a ViT of DINOv2"):
            load_backbone(model, tmp_path / "other.pth")
