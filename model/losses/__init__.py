"""What training minimises: groups of predictions, their matching, class losses, and the criterion over them."""

from model.losses.class_loss import (
    ClassLoss,
    FocalLoss,
    IouAwareLoss,
    Matched,
    SoftmaxLoss,
    VarifocalLoss,
    make_class_loss,
)
from model.losses.criterion import Criterion, Losses
from model.losses.groups import Group, Matches, Targets, groups_of
from model.losses.matcher import match_all, matching_costs

__all__ = [
    "ClassLoss",
    "Criterion",
    "FocalLoss",
    "Group",
    "IouAwareLoss",
    "Losses",
    "Matched",
    "Matches",
    "SoftmaxLoss",
    "Targets",
    "VarifocalLoss",
    "groups_of",
    "make_class_loss",
    "match_all",
    "matching_costs",
]
