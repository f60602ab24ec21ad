"""Reads: label maps, manifests, the order of samples, and the batches of training and evaluation."""

from pipeline.data.augment import (
    Boxes,
    Plan,
    plan_eval,
    plan_train,
    resized,
)
from pipeline.data.images import (
    BadImageError,
    ImageHeader,
    Pixels,
    decode_image,
    inspect_image,
)
from pipeline.data.labels import (
    Category,
    LabelMap,
)
from pipeline.data.loader import (
    EvalBatch,
    EvalLoader,
    MicroBatch,
    Step,
    TrainLoader,
    eval_batches,
)
from pipeline.data.manifest import (
    Manifest,
    Sample,
    Shard,
    ShardReader,
    UnreadableSampleError,
    describe,
    ground_truth,
    read_annotations,
    read_image_bytes,
    read_manifest,
    write_manifest,
)
from pipeline.data.order import (
    SampleOrder,
    permutation,
    seed_sequence,
)
from pipeline.data.samples import (
    PlannedSample,
    label_list,
    load_image,
    load_train_sample,
    make_targets,
    plan_step,
    sample_plan,
    xyxy,
)

__all__ = [
    "BadImageError",
    "Boxes",
    "Category",
    "EvalBatch",
    "EvalLoader",
    "ImageHeader",
    "LabelMap",
    "Manifest",
    "MicroBatch",
    "Pixels",
    "Plan",
    "PlannedSample",
    "Sample",
    "SampleOrder",
    "Shard",
    "ShardReader",
    "Step",
    "TrainLoader",
    "UnreadableSampleError",
    "decode_image",
    "describe",
    "eval_batches",
    "ground_truth",
    "inspect_image",
    "label_list",
    "load_image",
    "load_train_sample",
    "make_targets",
    "permutation",
    "plan_eval",
    "plan_step",
    "plan_train",
    "read_annotations",
    "read_image_bytes",
    "read_manifest",
    "resized",
    "sample_plan",
    "seed_sequence",
    "write_manifest",
    "xyxy",
]
