"""What a training run will cost: counted, measured on this machine, or assumed, before anything starts."""

from pipeline.plan.data import (
    BYTES_PER_PIXEL,
    COCO_SIZES,
    PlannedData,
    draw_canvases,
    planned_data,
)
from pipeline.plan.memory import (
    STAGES,
    Layout,
    Memory,
    layout_of,
    memory_of_rank,
)
from pipeline.plan.profile import (
    Point,
    Profile,
    measure_profile,
    profile_settings,
    read_profile,
)
from pipeline.plan.speed import (
    Exchange,
    Link,
)
from pipeline.plan.table import (
    GPUS_OF_NODE,
    LATENCY,
    NETWORK,
    Checkpoints,
    Plan,
    Row,
    profile_canvases,
)

__all__ = [
    "BYTES_PER_PIXEL",
    "COCO_SIZES",
    "GPUS_OF_NODE",
    "LATENCY",
    "NETWORK",
    "STAGES",
    "Checkpoints",
    "Exchange",
    "Layout",
    "Link",
    "Memory",
    "Plan",
    "PlannedData",
    "Point",
    "Profile",
    "Row",
    "draw_canvases",
    "layout_of",
    "measure_profile",
    "memory_of_rank",
    "planned_data",
    "profile_canvases",
    "profile_settings",
    "read_profile",
]
