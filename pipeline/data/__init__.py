"""Reads: label maps, manifests, the order of samples, and the batches of training and evaluation.

Batches are torch's, which takes seconds to import: the loader comes when one of its names is first asked for (PEP 562),
and whoever shards data does without.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.data.augment import (
    Boxes,
    Plan,
    Plans,
    plan_eval,
    plan_train,
    resized,
)
from pipeline.data.batching import (
    cut_batch,
)
from pipeline.data.cache import (
    DEFAULT_CACHE,
    Cache,
    FetchAhead,
    cache_of,
)
from pipeline.data.images import (
    BadImageError,
    ImageHeader,
    Pixels,
    decode_image,
    inspect_image,
    read_image_file,
    refuse_odd_file,
    shown_size,
)
from pipeline.data.index import (
    Index,
    Member,
    Sample,
)
from pipeline.data.labels import (
    Category,
    LabelMap,
)
from pipeline.data.manifest import (
    Manifest,
    Shard,
    ShardReader,
    UnreadableSampleError,
    Value,
    describe,
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
from pipeline.data.philox import (
    philox,
)
from pipeline.data.samples import (
    StepPlan,
    label_list,
    load_image,
    load_train_sample,
    make_targets,
    plan_samples,
    plan_step,
    plan_steps,
    xyxy,
)
from pipeline.data.truth import (
    ground_truth,
    original_size,
    scaled_box,
)

if TYPE_CHECKING:
    from pipeline.data.loader import EvalBatch, EvalLoader, MicroBatch, Step, TrainLoader, eval_batches, prepare_workers

_LOADER = ("EvalBatch", "EvalLoader", "MicroBatch", "Step", "TrainLoader", "eval_batches", "prepare_workers")

__all__ = [
    "DEFAULT_CACHE",
    "BadImageError",
    "Boxes",
    "Cache",
    "Category",
    "EvalBatch",
    "EvalLoader",
    "FetchAhead",
    "ImageHeader",
    "Index",
    "LabelMap",
    "Manifest",
    "Member",
    "MicroBatch",
    "Pixels",
    "Plan",
    "Plans",
    "Sample",
    "SampleOrder",
    "Shard",
    "ShardReader",
    "Step",
    "StepPlan",
    "TrainLoader",
    "UnreadableSampleError",
    "Value",
    "cache_of",
    "cut_batch",
    "decode_image",
    "describe",
    "eval_batches",
    "ground_truth",
    "inspect_image",
    "label_list",
    "load_image",
    "load_train_sample",
    "make_targets",
    "original_size",
    "permutation",
    "philox",
    "plan_eval",
    "plan_samples",
    "plan_step",
    "plan_steps",
    "plan_train",
    "prepare_workers",
    "read_annotations",
    "read_image_bytes",
    "read_image_file",
    "read_manifest",
    "refuse_odd_file",
    "resized",
    "scaled_box",
    "seed_sequence",
    "shown_size",
    "write_manifest",
    "xyxy",
]


def __getattr__(name: str) -> Any:
    if name not in _LOADER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("pipeline.data.loader"), name)


def __dir__() -> list[str]:
    return __all__
