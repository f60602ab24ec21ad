"""Makes: COCO data checked, written as WebDataset tars with a manifest, drawn, or converted."""

from pipeline.shard.coco import (
    CocoImage,
    CocoSplit,
    Source,
    clean,
    open_source,
    open_split,
    source_digest,
)
from pipeline.shard.findings import (
    Findings,
)
from pipeline.shard.foreign import (
    Packed,
    Split,
    read_foreign,
)
from pipeline.shard.imported import (
    Imported,
    import_dataset,
)
from pipeline.shard.look import (
    write_look,
)
from pipeline.shard.member import (
    image_member,
    json_member,
)
from pipeline.shard.origin import (
    Images,
    open_images,
)
from pipeline.shard.smaller import (
    Smaller,
    smaller_of,
)
from pipeline.shard.synthetic import (
    Mask,
    draw_configured,
    draw_dataset,
)
from pipeline.shard.webdataset import (
    read_webdataset,
)
from pipeline.shard.write import (
    ShardPlan,
    WriteAll,
    WriteTask,
    WrittenShard,
    check_same_categories,
    finish,
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
    "Imported",
    "Mask",
    "Packed",
    "ShardPlan",
    "Smaller",
    "Source",
    "Split",
    "WriteAll",
    "WriteTask",
    "WrittenShard",
    "check_same_categories",
    "clean",
    "draw_configured",
    "draw_dataset",
    "finish",
    "image_member",
    "import_dataset",
    "json_member",
    "open_images",
    "open_source",
    "open_split",
    "plan_shards",
    "read_foreign",
    "read_webdataset",
    "report_problems",
    "shard_split",
    "smaller_of",
    "source_digest",
    "verify_shard",
    "write_in_a_row",
    "write_look",
    "write_shard",
]
