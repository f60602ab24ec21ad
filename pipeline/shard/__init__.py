"""Makes: COCO data checked, written as WebDataset tars with a manifest, or drawn."""

from pipeline.shard.coco import (
    CocoImage,
    CocoSplit,
    Findings,
    Source,
    clean,
    open_source,
    open_split,
    source_digest,
)
from pipeline.shard.look import (
    write_look,
)
from pipeline.shard.origin import (
    Images,
    open_images,
)
from pipeline.shard.synthetic import (
    Mask,
    draw_configured,
    draw_dataset,
)
from pipeline.shard.write import (
    ShardPlan,
    WriteAll,
    WriteTask,
    WrittenShard,
    check_same_categories,
    finish,
    json_member,
    plan_shards,
    report_problems,
    shard_split,
    verify_shard,
    write_in_a_row,
    write_shard,
)

__all__ = [
    "CocoImage",
    "CocoSplit",
    "Findings",
    "Images",
    "Mask",
    "ShardPlan",
    "Source",
    "WriteAll",
    "WriteTask",
    "WrittenShard",
    "check_same_categories",
    "clean",
    "draw_configured",
    "draw_dataset",
    "finish",
    "json_member",
    "open_images",
    "open_source",
    "open_split",
    "plan_shards",
    "report_problems",
    "shard_split",
    "source_digest",
    "verify_shard",
    "write_in_a_row",
    "write_look",
    "write_shard",
]
