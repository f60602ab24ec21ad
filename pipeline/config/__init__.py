"""One YAML is one pipeline: typed, frozen sections, read with `load_config`."""

from pipeline.config.deepspeed import (
    OWNED,
    merged,
    refused,
)
from pipeline.config.keys import (
    with_keys,
)
from pipeline.config.load import (
    ConfigError,
    dump_config,
    load_config,
    parse_config,
)
from pipeline.config.sections import (
    METRICS,
    AugmentSection,
    ClusterSection,
    Config,
    DatasetSection,
    EvaluateSection,
    InitSection,
    LabelKind,
    Metric,
    OnError,
    RegisterSection,
    Role,
    Section,
    ShardsSection,
    SplitSection,
    SyntheticSection,
    TrackingSection,
    TrainSection,
    default_tracking_uri,
    settings_with,
)
from pipeline.config.values import (
    differences,
    digest,
    flatten,
    plain,
)

__all__ = [
    "METRICS",
    "OWNED",
    "AugmentSection",
    "ClusterSection",
    "Config",
    "ConfigError",
    "DatasetSection",
    "EvaluateSection",
    "InitSection",
    "LabelKind",
    "Metric",
    "OnError",
    "RegisterSection",
    "Role",
    "Section",
    "ShardsSection",
    "SplitSection",
    "SyntheticSection",
    "TrackingSection",
    "TrainSection",
    "default_tracking_uri",
    "differences",
    "digest",
    "dump_config",
    "flatten",
    "load_config",
    "merged",
    "parse_config",
    "plain",
    "refused",
    "settings_with",
    "with_keys",
]
