"""What training minimises: matching, class losses, and the criterion that puts them together."""

from model.losses.criterion import (
    Criterion,
)
from model.losses.matcher import (
    Matches,
    match,
    match_all,
    matching_costs,
)

__all__ = [
    "Criterion",
    "Matches",
    "match",
    "match_all",
    "matching_costs",
]
