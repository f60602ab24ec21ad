"""One YAML is one pipeline: typed, frozen sections, strict about unknown keys. Every key stands here.

Derived values are methods beside the fields they come from. What else is to be known of a setting is metadata on it, a
`Role`, so that whoever adds one decides it in the same line.
"""

import math
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from model.config import CriterionConfig, DetrConfig
from pipeline.config.address import sqlite_uri
from pipeline.config.deepspeed import refused
from pipeline.run_folder import RunFolder, run_folder
from pipeline.store import WEB, Place, absolute, place


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Role(Enum):
    """What a setting does, as metadata on it: `epochs: Annotated[int, Role.MAY_DIFFER]`."""

    MAY_DIFFER = "it does not change what a training step does, so a run may go on with another value"
    SCORES = "the numbers of an evaluation depend on it"
    SERVES = "a detector that is saved or registered keeps it"


def settings_with(section: type[Section], role: Role) -> tuple[str, ...]:
    """Names of the settings of a section that have a role, in their order."""
    return tuple(name for name, field in section.model_fields.items() if role in field.metadata)


def _check_place(text: str) -> str:
    place(text)
    return text


PlaceText = Annotated[str, AfterValidator(_check_place)]
"""A path, or an address of a store."""

OnError = Literal["fail", "skip"]
"""What unusable input does: stop with an error, or be left out and counted."""

LabelKind = Literal["contiguous", "coco91"]
"""Logits numbered 0..n-1 in the order of the category ids, or by the raw category id (91 logits)."""


class SplitSection(Section):
    annotations: str
    """COCO JSON file, packed by gzip or not, relative to dataset.root."""
    images: str
    """Folder of the images, or a zip or tar archive of them, relative to dataset.root."""


class SyntheticSection(Section):
    """Draw a synthetic COCO-format dataset into dataset.root when it is not there yet (see `raydetr synth`)."""

    train_images: int = Field(1000, ge=1)
    """Images of the training split."""
    val_images: int = Field(250, ge=1)
    """Images of the validation split."""
    image_size: int = Field(128, ge=64)
    """Side of the square images, in pixels."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the drawing."""


class DatasetSection(Section):
    root: PlaceText = "data"
    """Folder that the splits' paths are relative to, on a disk that every worker sees or in a store (`s3://`...)."""
    train: SplitSection = SplitSection(annotations="annotations/instances_train2017.json", images="train2017")
    """Training split."""
    val: SplitSection = SplitSection(annotations="annotations/instances_val2017.json", images="val2017")
    """Validation split."""
    labels: LabelKind = "contiguous"
    """Logits numbered 0..n-1 in the order of the category ids, or by the raw category id (91 logits)."""
    on_error: OnError = "fail"
    """What an unusable image or annotation does: stop with an error, or be left out and counted."""
    allow_outside: bool = False
    """Let file names of images lead out of the images' folder: by `..`, absolute, or through symbolic links."""
    synthetic: SyntheticSection | None = None
    """Draw the dataset instead of reading one."""

    @property
    def name(self) -> str:
        """Name of the dataset, after its folder."""
        return self.place.name

    @property
    def place(self) -> Place:
        """The folder that `root` names."""
        return absolute(self.root)


class ShardsSection(Section):
    out: PlaceText | None = None
    """Folder of the shards, on a disk that every worker sees or in a store; the default is <runs>/shards/<dataset>."""
    cache: str | None = None
    """Folder of each machine that keeps the shards of a store; the default is in its folder of temporary files."""
    cache_bytes: int = Field(100 * 2**30, ge=1)
    """Most bytes of that folder; two windows of train.window shards should fit."""
    workers: int | None = Field(None, ge=1)
    """Shards written at once; the default is the number of CPUs of the cluster."""
    max_samples: int = Field(1000, ge=1)
    """Most samples of a shard."""
    max_bytes: int = Field(256 * 2**20, ge=1024)
    """Most bytes of a shard (one sample may exceed it)."""
    segmentations: bool = False
    """Keep the annotations' segmentations."""
    max_side: int | None = Field(None, ge=32)
    """Most pixels of the longer side of an image: a larger one is kept as a smaller JPEG, with annotations that follow
    it, and still scored in its own pixels. Null keeps all images as they are, byte for byte; the sides that train and
    evaluate resize to are worth no more than this one."""
    quality: int | None = Field(None, ge=1, le=100)
    """Quality of those JPEGs; the default is 90."""

    @model_validator(mode="after")
    def _check(self) -> "ShardsSection":
        if self.quality is not None and self.max_side is None:
            raise ValueError(f"quality {self.quality} is that of smaller copies: set shards.max_side, or leave it out")
        return self

    @property
    def jpeg_quality(self) -> int:
        """`quality`, with its default."""
        return self.quality or 90


class AugmentSection(Section):
    """Training augmentation of DETR (reference: facebookresearch/detr, datasets/coco.py); sizes in pixels."""

    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """Lengths that the short side is resized to, one drawn for each image."""
    max_side: int = 1333
    """Most pixels of the long side."""
    crop: float = Field(0.5, ge=0, le=1)
    """Probability of resizing, cropping and resizing again instead of resizing once."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Lengths of the short side before a crop."""
    crop_min: int = Field(384, ge=1)
    """Least side of a crop."""
    crop_max: int = Field(600, ge=1)
    """Greatest side of a crop."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter in place of resizing and cropping, such as [0.1, 2.0]: the long side is resized to that
    many times jitter_side, drawn between the two; what does not fit is cropped, what is missing filled."""
    jitter_side: int = Field(1024, ge=1)
    """Side of the square canvas that jitter makes of every image. What is filled counts as image, not as padding."""
    plain_after: int | None = Field(None, ge=1)
    """Epochs after which images are neither jittered nor cropped, but flipped and resized alone; null never ends it."""

    @model_validator(mode="after")
    def _check(self) -> "AugmentSection":
        if self.jitter is not None and not 0 < self.jitter[0] <= self.jitter[1] <= 16:
            raise ValueError(f"jitter {list(self.jitter)} must be the least and the greatest factor, in (0, 16]")
        if not self.short_sides or min(self.short_sides) < 1:
            raise ValueError("short_sides must name at least one positive length")
        if self.max_side < max(self.short_sides):
            raise ValueError(f"max_side {self.max_side} is less than the greatest of short_sides")
        if self.crop > 0 and (not self.crop_short_sides or min(self.crop_short_sides) < 1):
            raise ValueError("crop_short_sides must name at least one positive length")
        if self.crop_min > self.crop_max:
            raise ValueError(f"crop_min {self.crop_min} is more than crop_max {self.crop_max}")
        return self

    @property
    def greatest_side(self) -> int:
        """Most pixels of the long side of any augmented image."""
        return max(self.max_side, self.jitter_side if self.jitter else 0)


class InitSection(Section):
    backbone: str | None = None
    """Backbone weights: a path or URL of torchvision's state dict, or `imagenet` for the published ones; of a Swin a
    path or URL of the official release's, or a folder of transformers'."""
    weights: str | None = None
    """Detector weights: a checkpoint folder, a file or folder of ours, of the original or of transformers, or a
    registered version, `models:/NAME@ALIAS` or `models:/NAME/7`, of the registry at tracking.uri."""
    reset_heads: bool = False
    """Re-initialise the class heads where the weights are of another number of classes; else they are kept."""

    @property
    def is_registered(self) -> bool:
        """Whether the detector weights are a registered version."""
        return self.weights is not None and self.weights.startswith("models:/")


class ProfileSection(Section):
    """Steps of which torch's profiler writes a trace, to <run>/profile."""

    steps: tuple[int, int]
    """The first and the last, from 0: those at the very beginning are slower than the rest."""
    rank: int = Field(0, ge=0)
    """The worker that is looked at."""

    @model_validator(mode="after")
    def _check(self) -> "ProfileSection":
        first, last = self.steps
        if not 0 <= first <= last:
            raise ValueError(f"steps [{first}, {last}] must be the first and the last one, from 0")
        return self


Precision = Literal["fp32", "bf16", "fp16"]
"""Arithmetic of a network in training."""


class TrainSection(Section):
    epochs: Annotated[int, Role.MAY_DIFFER] = Field(50, ge=1)
    """Passes over the training split."""
    max_steps: Annotated[int | None, Role.MAY_DIFFER] = Field(None, ge=1)
    """Stop after this many optimizer steps, if that comes before the last epoch."""
    global_batch: int = Field(32, ge=1)
    """Images of an optimizer step, over all workers."""
    micro_batch: int = Field(2, ge=1)
    """Images that go through the network at once."""
    lr: float = Field(2e-4, gt=0, allow_inf_nan=False)
    """Learning rate of the transformer and the heads."""
    lr_backbone: float = Field(2e-5, ge=0, allow_inf_nan=False)
    """Learning rate of the backbone."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on lr_backbone from a block of the backbone to the one before it, such as 0.9: its last block and the
    norms of its maps learn at lr_backbone, its stem the slowest (BEiT, arXiv 2106.08254)."""
    lr_sampling_factor: float = Field(0.1, ge=0)
    """Factor on lr for the `reference_points` and `sampling_offsets` projections, which DETR does not have."""
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    """How both learning rates follow global_batch / lr_batch: not, in proportion, or by its root, the rule for Adam
    (arXiv 2205.10287). Large batches want warmup_steps with it."""
    lr_batch: int = Field(32, ge=1)
    """Images of a step that the learning rates are stated for; scale_lr alone uses it."""
    lr_drop_epochs: tuple[Annotated[float, Field(ge=0)], ...] = (40.0,)
    """Epochs (fractions allowed) after which the learning rates are multiplied by 0.1."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rates rise linearly from 0."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay, on all parameters."""
    clip_grad_norm: float = Field(0.1, ge=0)
    """Most norm of the gradient of a step; 0 does not clip."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, such as 0.9997, which is then what is evaluated and registered, while
    training goes on with the weights themselves. It rises to that with the steps n, as (1 + n) / (10 + n)."""
    freeze_backbone: Literal["none", "stem_and_layer1", "all"] = "stem_and_layer1"
    """Backbone parameters that are not trained; of a Swin `stem_and_layer1` means its patches and its first stage."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], Role.MAY_DIFFER] = 0
    """DeepSpeed ZeRO stage: what is sharded over the workers, 1 the optimizer's state, 2 also the gradients, 3 also the
    weights, which are gathered layer by layer when they are used."""
    offload: Annotated[Literal["none", "cpu"], Role.MAY_DIFFER] = "none"
    """Where the optimizer's state lies and its step is done: with cpu on the host, from ZeRO stage 1 on. It leaves room
    on the GPU and costs the way of the gradients there and of the weights back. AdamW is torch's as ever."""
    deepspeed: dict[str, Any] = {}
    """More of DeepSpeed's own JSON, such as `{zero_optimization: {overlap_comm: true}}`, in place of what stands here;
    what follows from other settings is refused. DeepSpeed passes over a key at the top that it does not know. `raydetr
    config --deepspeed` prints what it gets."""
    precision: Precision = "fp32"
    """Arithmetic of the network: fp32, or autocast to bf16 or fp16 with fp32 parameters. fp16, for cards without bf16,
    multiplies the loss by a scale that halves when the gradient overflows, whose step is left out, and doubles after
    1,000 steps without."""
    activation_checkpointing: Annotated[bool, Role.MAY_DIFFER] = False
    """Keep only the inputs of the layers and of a ResNet's stages or a Swin's blocks for the backward pass, and compute
    the rest again: less memory, a third more computation, the same numbers."""
    compile: bool = False
    """Compile the transformer with torch.compile, which needs a C++ compiler on every worker and takes minutes in the
    first step; other image sizes use the same code. Dropout draws other numbers than without."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the order, the augmentation and the dropout."""
    window: int = Field(8, ge=1)
    """Shards whose samples are shuffled together."""
    loader_workers: Annotated[int, Role.MAY_DIFFER] = Field(2, ge=0)
    """Decoding processes of a training worker; 0 decodes in the worker itself."""
    checkpoint_epochs: Annotated[float, Role.MAY_DIFFER] = Field(1.0, gt=0)
    """Epochs (fractions allowed) between checkpoints; the last step always writes one."""
    keep_checkpoints: Annotated[int | None, Role.MAY_DIFFER] = Field(3, ge=1)
    """Newest checkpoints that are kept, and the best of those that were scored by then, on evaluate.subset where there
    is one; null keeps all."""
    max_hours: Annotated[float | None, Role.MAY_DIFFER] = Field(None, gt=0, allow_inf_nan=False)
    """Hours after the command began at which training ends in order, with a checkpoint, as at a SIGTERM: a little less
    than a queue allows. The same command goes on."""
    patience: Annotated[int | None, Role.MAY_DIFFER] = Field(None, ge=1)
    """Scored checkpoints in a row without a better register.metric after which training ends; null trains to the end of
    the schedule. It looks at what evaluate.beside scores: where the cluster has no room for it, nothing ends early."""
    log_steps: Annotated[int, Role.MAY_DIFFER] = Field(10, ge=1)
    """Steps between two points of the training curves."""
    profile: Annotated[ProfileSection | None, Role.MAY_DIFFER] = None
    """Steps to write a trace of, such as {steps: [20, 24]}; nothing else of them changes but their time."""
    max_restarts: Annotated[int, Role.MAY_DIFFER] = Field(3, ge=0)
    """Times that lost workers are started again, without a new checkpoint in between, before the step fails."""
    augment: AugmentSection = AugmentSection()
    """Training augmentation."""
    criterion: CriterionConfig = CriterionConfig()
    """Loss weights."""
    init: InitSection = InitSection()
    """Weights to begin with."""

    @model_validator(mode="after")
    def _check(self) -> "TrainSection":
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError("offload cpu is of the part of the optimizer that a rank has: it needs zero_stage 1 to 3")
        return self

    @field_validator("deepspeed")
    @classmethod
    def _check_deepspeed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if keys := refused(settings):
            raise ValueError(f"not yours to set: {', '.join(keys)}; remove it")
        return settings

    @property
    def lr_scale(self) -> float:
        """What the stated learning rates are multiplied by at this batch."""
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.scale_lr]
        return float((self.global_batch / self.lr_batch) ** power)

    @property
    def autocast(self) -> str | None:
        """Torch's name of the type of autocast; None in fp32."""
        return {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}[self.precision]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step, over all workers."""
        return self.global_batch // self.micro_batch

    def periods(self, steps: int, samples: int) -> int:
        """How often `checkpoint_epochs` are full after so many steps on a split of `samples` images."""
        return math.floor(steps * self.global_batch / samples / self.checkpoint_epochs)

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the whole schedule for a split of `samples` images."""
        steps = -(-self.epochs * samples // self.global_batch)
        return steps if self.max_steps is None else min(steps, self.max_steps)


class EvaluateSection(Section):
    batch_size: Annotated[int, Role.SCORES] = Field(2, ge=1)
    """Images that go through the network at once."""
    workers: int | None = Field(None, ge=1)
    """Processes that score at once, or with `--follow` checkpoints; the default is cluster.workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs when it is scored; auto is what cluster.device means."""
    gpus: float = Field(1, gt=0, le=1)
    """Part of a GPU that Ray sets aside for each of them: with 0.25 four share one, and its memory."""
    loader_workers: int | None = Field(None, ge=0)
    """Processes that decode for each of them; the default is train.loader_workers."""
    precision: Annotated[Literal["fp32", "bf16"], Role.SCORES] = "fp32"
    """Arithmetic of the network when it is scored: fp32, or bf16 autocast. What is registered serves in fp32."""
    short_side: Annotated[int, Role.SCORES, Role.SERVES] = Field(800, ge=1)
    """Length that the short side is resized to, in pixels."""
    max_side: Annotated[int, Role.SCORES, Role.SERVES] = Field(1333, ge=1)
    """Most pixels of the long side."""
    max_detections: Annotated[int, Role.SCORES, Role.SERVES] = Field(100, ge=1)
    """Detections kept of an image."""
    curve: bool = False
    """Score every kept checkpoint, not the last alone: the AP curve of the run."""
    beside: bool = True
    """Score new checkpoints while training goes on, one at a time, where the cluster has room beside its workers.
    `raydetr evaluate --follow` does it from elsewhere, and what one of the two scores the other does not."""
    every: int = Field(1, ge=1)
    """Of the checkpoints of train.checkpoint_epochs each so many-th is scored while training goes on, and the last."""
    subset: int = Field(0, ge=0)
    """Images of the validation split, always the same, that checkpoints are scored on while training goes on
    (`val_subset/AP`); 0 takes all. The last checkpoint, and what is registered, is scored on the whole split."""
    train_sample: int = Field(0, ge=0)
    """Images of the training split, always the same, that are scored, too: where AP rises on them alone, the detector
    learns them by heart."""
    verify: bool = True
    """Have pycocotools compute the score of the last checkpoint, too: one digit that differs is an error. It takes a
    minute and 2.6 GB for 5,000 images of COCO, and the scorer itself a second."""
    pictures: int = Field(8, ge=0)
    """Pictures of detections beside ground truth that are logged."""
    picture_score: float = Field(0.4, ge=0, le=1)
    """Least score of a detection that is drawn."""


Metric = Literal["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
"""COCO's twelve numbers, the keys at the top of metrics.json."""
METRICS: tuple[Metric, ...] = get_args(Metric)


class GateSection(Section):
    """What a version has to reach to become `@champion`; one that does not is registered, and is `@challenger`."""

    baseline: bool = True
    """Whether register.metric must be above that of one constant box a category, the same for every image."""
    minimum: float | None = Field(None, ge=0, le=1)
    """Least register.metric, also of the first champion; null asks for none."""
    margin: float = Field(0.0, ge=0, le=1)
    """Least improvement of register.metric over the champion's; it has to be better in any case."""
    category_drop: float | None = Field(None, ge=0, le=1)
    """Most that the AP of any category may be below the champion's; null does not look at categories."""


class RegisterSection(Section):
    model_name: str = "raydetr"
    """Registered model that the run becomes a version of."""
    metric: Metric = "AP"
    """Metric by which @champion moves."""
    gate: GateSection = GateSection()
    """What a version has to reach to become @champion."""
    which: Literal["best", "last"] = "best"
    """Which of the scored checkpoints becomes the version: the best by metric of those that are there, or the last."""

    @field_validator("model_name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name.strip() or any(letter in "/:'" or not letter.isprintable() for letter in name):
            raise ValueError(f"{name!r} must not be empty or hold / : ' or unprintable characters")
        if name in (".", "..") or len(name) > 250:
            raise ValueError(f"{name!r} must not be . or .. or longer than 250 characters")
        return name


class TrackingSection(Section):
    uri: str | None = None
    """MLflow tracking server; the default is a SQLite database under `runs`. User and password of a server come from
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; those that stand here are kept and shown nowhere."""
    experiment: str = "raydetr"
    """MLflow experiment of the run."""
    required: bool = False
    """Refuse to begin while the tracking server is away; else what is for it waits on the disk."""
    patience: float = Field(1800, ge=0, allow_inf_nan=False)
    """Seconds that a command whose work is done waits for a tracking server that is away; then its exit code is 3."""

    @field_validator("experiment")
    @classmethod
    def _check_experiment(cls, name: str) -> str:
        if not name.strip() or len(name) > 500 or not name.isprintable():
            raise ValueError(f"{name!r} must be 1 to 500 printable characters")
        return name


RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
"""Resources of which other settings say how much is asked for."""
LEAST_RESOURCE = 0.0001
"""Least amount of a resource that Ray counts."""


def _check_resources(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in RAYS_OWN:
            raise ValueError(
                f"{name} is Ray's own; cluster.cpus_per_worker, cluster.device and evaluate.gpus say how many CPUs and "
                "GPUs are taken"
            )
        if not LEAST_RESOURCE <= amount < math.inf:
            raise ValueError(
                f"{name} {amount:g}: Ray counts from {LEAST_RESOURCE:g}, which asks for a node that has it"
            )
    return resources


Resources = Annotated[dict[str, float], AfterValidator(_check_resources)]
"""Amounts of custom resources by name."""


class ResourcesSection(Section):
    """Custom resources of nodes, of which each task of a step takes so much beside its CPUs and its GPU.

    A node has those that its `ray start --resources '{"big_disk": 1}'` names, and the type of its GPUs.
    """

    shard: Resources = {}
    """Of a task that makes a shard, on one CPU."""
    train: Resources = {}
    """Of a training worker: `{"accelerator_type:H100": 0.001}` asks for a node with such GPUs."""
    evaluate: Resources = {}
    """Of a task that scores, also beside training."""


class ClusterSection(Section):
    address: str | None = None
    """Ray to join: host:port, ray://host:port or auto; null starts one here (or joins the one of a submitted job)."""
    workers: int | tuple[int, int] = 1
    """Training workers; [least, most] lets their number follow the room on the cluster, whose batch stays the same."""
    wait: float | None = Field(None, ge=0)
    """Longest wait in seconds for room for the least workers; null: none at the start, without limit after a loss."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that Ray sets aside for a training or inference worker; also its torch threads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs; auto takes a GPU where Ray has one for each worker."""
    resources: ResourcesSection = ResourcesSection()
    timeout: float = Field(60, ge=1)
    """Seconds without a sign of life after which a training worker counts as lost, and training goes on without it."""
    step_timeout: float = Field(1200, ge=1)
    """Seconds in which no step ends, after which training hangs: stacks are kept, and the workers start anew."""
    require_compiled: bool = True
    """Refuse to train without the compiled attention operator."""

    @model_validator(mode="after")
    def _check(self) -> "ClusterSection":
        if self.least_workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.least_workers}")
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers {list(self.bounds)}: the first must not be greater than the second")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @property
    def least_workers(self) -> int:
        """Workers without which training does not go on."""
        return self.bounds[0]

    @property
    def most_workers(self) -> int:
        """Workers that training has where there is room."""
        return self.bounds[1]

    @property
    def collective_timeout(self) -> float:
        """Seconds that a collective waits: longer than the watch, which knows more about what is wrong."""
        return self.step_timeout + 2 * self.timeout


class Config(Section):
    """A whole pipeline. `raydetr config -c FILE` prints it with all defaults."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is <runs>/<name>."""
    runs: PlaceText = "runs"
    """Folder of all runs: on a disk that every worker sees, or in a store, as `s3://bucket/runs`."""
    dataset: DatasetSection = DatasetSection()
    shards: ShardsSection = ShardsSection()
    model: DetrConfig = DetrConfig()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    register_: RegisterSection = Field(RegisterSection(), alias="register")
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.train.patience is not None and not self.evaluate.beside:
            raise ValueError("train.patience looks at the scores of evaluate.beside, which is false: mend one")
        if "://" in self.runs and not self.runs.startswith("file://"):
            if self.runs.startswith(WEB):
                raise ValueError(f"runs {self.runs}: a web server takes no files: give a folder, or another store")
            uri = self.tracking.uri or ""
            if "://" not in uri or uri.startswith("sqlite:"):
                raise ValueError(
                    f"runs {self.runs}: set tracking.uri to an MLflow server: a database of one machine would not be "
                    "there on the next"
                )
        if not self.world_sizes:
            least, most = self.cluster.bounds
            raise ValueError(
                f"train.global_batch {self.train.global_batch} is {self.train.micro_batches} micro-batches of "
                f"{self.train.micro_batch}, which {least if least == most else f'{least} to {most}'} cluster.workers "
                "cannot share equally"
            )
        return self

    @property
    def world_sizes(self) -> list[int]:
        """Numbers of workers that share the micro-batches of a step equally, the greatest first."""
        least, most = self.cluster.bounds
        return [size for size in range(most, least - 1, -1) if self.train.micro_batches % size == 0]

    def scores_beside(self, step: int, samples: int) -> bool:
        """Whether the checkpoint of a step is scored while training goes on, on a split of `samples` images."""
        every = self.evaluate.every
        full = [self.train.periods(steps, samples) // every for steps in (step - 1, step)]
        return every == 1 or step == self.train.total_steps(samples) or full[1] > full[0]

    @property
    def folder(self) -> RunFolder:
        """Folder of the run."""
        return run_folder(absolute(self.runs), self.name)

    @property
    def shards_folder(self) -> Place:
        """Folder of the dataset's shards, shared by runs."""
        return absolute(self.shards.out) if self.shards.out else absolute(self.runs) / "shards" / self.dataset.name

    @property
    def tracking_uri(self) -> str:
        """MLflow tracking server, with the embedded default filled in; for its client alone, it may hold a password."""
        return self.tracking.uri or default_tracking_uri(self.runs)

    def model_for(self, num_classes: int) -> DetrConfig:
        """The architecture for a dataset's label map."""
        return replace(self.model, num_classes=num_classes)


def default_tracking_uri(runs: Path | str = "runs") -> str:
    """The embedded tracking server: a SQLite database in the folder of all runs."""
    return sqlite_uri(Path(runs) / "mlflow.db")
