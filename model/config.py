"""Architecture and loss settings of the detectors: frozen values, checked when made."""

import difflib
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class OneToMany:
    """More queries in training alone, each object wanted by several of them: the hybrid branch of H-DETR
    (arXiv 2207.13080).
    """

    queries: int = 1500
    """How many."""
    repeats: int = 6
    """Queries that every object is matched to."""
    weight: float = 1.0
    """Factor on the weights of their losses."""

    def __post_init__(self) -> None:
        for name in ("queries", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.weight <= 0:
            raise ValueError(f"weight is {self.weight}, it must be above 0")


@dataclass(frozen=True)
class Denoising:
    """Objects with noise as queries of training alone (DINO, arXiv 2203.03605, section 3.3)."""

    queries: int = 200
    """How many of an image: half of them begin near an object, half too far off."""
    label_noise: float = 0.25
    """Share of their labels that are drawn anew (DINO's 0.5 is halved in its code)."""
    box_noise: float = 1.0
    """What edges are moved by at the most, in halves of the side; too far off is that and up to as much more."""

    def __post_init__(self) -> None:
        if self.queries < 2 or self.queries % 2:
            raise ValueError(f"queries is {self.queries}, it must be an even number: they come in pairs")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise is {self.label_noise}, it must be in [0, 1]")
        if self.box_noise <= 0:
            raise ValueError(f"box_noise is {self.box_noise}, it must be above 0")


@dataclass(frozen=True)
class DetrConfig:
    """What the network is; nothing about how it is trained.

    The defaults are Deformable DETR's (arXiv 2010.04159, appendix A.4). DETR (arXiv 2005.12872) is `arch` detr,
    `feature_levels` 1, `num_queries` 100, `ffn_dim` 2048 and `class_loss` softmax.
    """

    arch: Literal["deformable_detr", "detr"] = "deformable_detr"
    """Which detector: sampled points of several levels, or DETR's attention to every cell of C5."""
    backbone: Literal[
        "resnet18", "resnet34", "resnet50", "resnet101", "resnext101_64x4d", "resnet_tiny",
        "swin_tiny", "swin_small", "swin_base", "swin_large", "swin_base_384", "swin_large_384", "swin_nano",
        "vit_small", "vit_base", "vit_large", "vit_nano",
    ] = "resnet50"  # fmt: skip
    """Feature extractor; `resnet_tiny`, `swin_nano` and `vit_nano` (0.5, 0.6 and 0.3 M parameters, strides 8, 16, 32)
    are for demos on a CPU."""
    backbone_norm: Literal["frozen_batch_norm", "group_norm"] = "frozen_batch_norm"
    """Frozen batch norm for pretrained weights, group norm when the backbone is trained from scratch. Swin and
    ViT have layer norms: leave it alone."""
    dilation: bool = False
    """Dilate the last stage of a ResNet instead of striding it (DC5)."""
    drop_path: float = 0.0
    """Probability that an image skips a branch of the last block of a Swin or ViT in training, such as 0.2 (swin_tiny)
    to 0.5 (swin_large); from the first block on it rises evenly from 0."""
    num_classes: int = 91
    """Logits of a query. In a pipeline it follows from the label map of the data."""
    num_queries: int = 300
    """Object queries of the decoder."""
    hidden_dim: int = 256
    """Width of the transformer."""
    heads: int = 8
    """Attention heads; divides hidden_dim."""
    encoder_layers: int = 6
    """Encoder layers."""
    decoder_layers: int = 6
    """Decoder layers."""
    ffn_dim: int = 1024
    """Width of the feed-forward blocks."""
    dropout: float = 0.1
    """Dropout probability in the transformer."""
    feature_levels: int = 4
    """Feature levels: C3, C4, C5 and strided convolutions after that; 1 uses C5 alone."""
    points: int = 4
    """Sampling points of a head and level; DETR has none and leaves it alone."""
    with_box_refine: bool = False
    """Every decoder layer refines the boxes of the layer before it."""
    look_forward_twice: bool = False
    """A layer's box loss also trains the refinement before it (DINO, arXiv 2203.03605, section 3.5); needs
    with_box_refine. What the network computes is the same."""
    two_stage: Literal[False, True, "mixed"] = False
    """The encoder proposes the queries; needs with_box_refine. `mixed` takes their positions from the proposals and
    learns their contents (DINO, section 3.4)."""
    class_loss: Literal["focal", "vfl", "ia_bce", "ma", "softmax"] = "focal"
    """Sigmoid focal loss with num_classes logits; varifocal loss, IoU-aware cross-entropy or matchability-aware loss,
    under which scores tell how well boxes fit, too; or softmax with one more logit for "no object"."""
    one_to_many: OneToMany | None = None
    """More queries in training alone, such as {queries: 1500, repeats: 6, weight: 1.0}."""
    denoising: Denoising | None = None
    """Objects with noise as queries of training alone, such as {queries: 200, label_noise: 0.25, box_noise: 1.0}; needs
    two_stage."""
    auxiliary_losses: bool = True
    """Give the output of every decoder layer for deep supervision."""

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("num_classes", "num_queries", "hidden_dim", "heads", "decoder_layers", "ffn_dim", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.encoder_layers < 0:
            raise ValueError(f"encoder_layers is {self.encoder_layers}, it must not be negative")
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of heads {self.heads}")
        if self.hidden_dim % 32:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of 32, the groups of the norms")
        if not 1 <= self.feature_levels <= 5:
            raise ValueError(f"feature_levels is {self.feature_levels}, it must be 1 to 5")
        if self.feature_levels == 2:
            raise ValueError("feature_levels is 2: use 1 (C5), or 3 and more (C3, C4, C5 and beyond)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, it must be in [0, 1)")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}, it must be in [0, 1)")
        if self.has_vision_transformer and (self.dilation or self.backbone_norm != "frozen_batch_norm"):
            raise ValueError(
                f"backbone {self.backbone} has layer norms and no convolutions to dilate: leave out backbone_norm and "
                "dilation"
            )
        if self.drop_path and not self.has_vision_transformer:
            raise ValueError(f"drop_path is of a Swin or ViT, and backbone is {self.backbone}: leave it out")
        if self.two_stage and not self.with_box_refine:
            raise ValueError("two_stage needs with_box_refine: the proposals are refined boxes")
        if self.look_forward_twice and not self.with_box_refine:
            raise ValueError("look_forward_twice needs with_box_refine: without it no layer corrects the one before")
        if self.arch == "detr":
            self._check_detr()
        if self.denoising and not self.two_stage:
            raise ValueError("denoising needs two_stage: only there do queries begin with boxes")
        if self.denoising and self.class_loss == "softmax":
            raise ValueError("denoising needs a class_loss with a logit for each class alone: all but softmax")

    def _check_detr(self) -> None:
        """Refuse what plain DETR does not have, all of it in one message."""
        needed: dict[str, Any] = {"feature_levels": 1, "points": DetrConfig.points}
        needed |= dict.fromkeys(("with_box_refine", "look_forward_twice", "two_stage"), False)
        needed |= dict.fromkeys(("one_to_many", "denoising"))
        wrong = [
            f"{name}: {'null' if value is None else str(value).lower()}"
            for name, value in needed.items()
            if getattr(self, name) != value
        ]
        if wrong:
            raise ValueError(
                "arch detr attends to every cell of C5, without levels, points, references or proposals: "
                f"set {', '.join(wrong)}, or arch: deformable_detr"
            )

    def at_inference(self) -> "DetrConfig":
        """The architecture without what training alone has."""
        return replace(self, one_to_many=None, denoising=None)

    @property
    def has_vision_transformer(self) -> bool:
        """Whether the backbone is a transformer, too: a Swin or a ViT."""
        return self.backbone.startswith(("swin_", "vit_"))

    @property
    def num_logits(self) -> int:
        """Logits of a query: the classes, and "no object" under softmax."""
        return self.num_classes + (self.class_loss == "softmax")

    @property
    def query_width(self) -> int:
        """Numbers that are learned of a query of Deformable DETR: position and content, the content, or none."""
        return {False: 2 * self.hidden_dim, "mixed": self.hidden_dim, True: 0}[self.two_stage]

    @property
    def strides(self) -> list[int]:
        """Pixels from a cell to the next, of each feature level."""
        last = 16 if self.dilation else 32
        if self.feature_levels == 1:
            return [last]
        return [8, 16, *(last * 2**level for level in range(self.feature_levels - 2))]


def _check_choices(config: DetrConfig) -> None:
    """Refuse a value that is none of its field's choices, naming the nearest one."""
    hints: dict[str, Any] = get_type_hints(type(config))
    for name, hint in hints.items():
        choices, value = get_args(hint) if get_origin(hint) is Literal else (), getattr(config, name)
        if choices and value not in choices:
            nearest = difflib.get_close_matches(str(value), map(str, choices), n=1)
            raise ValueError(
                f"{name} is {value!r}, it must be one of {', '.join(str(choice).lower() for choice in choices)}"
                + (f"; did you mean {nearest[0]}?" if nearest else "")
            )


@dataclass(frozen=True)
class CriterionConfig:
    """Loss weights; the matching costs are the same numbers (appendix A.4). DETR's are class 1, bbox 5, giou 2.

    With `vfl`, `ia_bce` and `ma` class_weight 1 and class_cost 2 are published.
    """

    class_weight: float = 2.0
    """Weight of the classification loss."""
    class_cost: float | None = None
    """Weight of the classification cost of the matching; null takes class_weight."""
    bbox_weight: float = 5.0
    """Weight of the L1 box loss and cost."""
    giou_weight: float = 2.0
    """Weight of the generalised IoU loss and cost."""
    focal_alpha: float = 0.25
    """Focal loss: weight of the positive term."""
    focal_gamma: float = 2.0
    """Focal, varifocal and IoU-aware loss: focusing exponent."""
    vfl_alpha: float = 0.75
    """Varifocal loss: weight of the logits without an object."""
    ia_bce_alpha: float = 0.25
    """IoU-aware loss: share of the score, beside that of the IoU, in the score that is wanted."""
    ma_gamma: float = 1.5
    """Matchability-aware loss: exponent of the IoU in the score that is wanted, and of the scores that are not."""
    no_object_weight: float = 0.1
    """Softmax loss: weight of the "no object" class."""

    def __post_init__(self) -> None:
        weights = ("class_weight", "class_cost", "bbox_weight", "giou_weight", "no_object_weight")
        for name in (*weights, "focal_gamma", "vfl_alpha", "ma_gamma"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}, it must not be negative")
        for name in ("focal_alpha", "ia_bce_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be in [0, 1]")
