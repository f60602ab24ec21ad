"""What a detector asks of a feature extractor."""

from typing import ClassVar, Literal

from model.recompute import Recomputing

Frozen = Literal["none", "stem_and_layer1", "all"]


class Backbone(Recomputing):
    """A feature extractor: images `[batch, 3, H, W]` to a list of maps `[batch, channels, H / stride, W / stride]`, of
    the strides 8, 16 and 32, or of the last alone.
    """

    early: tuple[str, ...]
    """What the names of the parameters of the stem and of the first stage begin with."""
    late: ClassVar[tuple[str, ...]] = ("norm",)
    """What those of the parameters after the last block begin with."""
    name: str
    """As `DetrConfig.backbone` has it."""
    channels: tuple[int, ...]
    """Channels of the maps."""
    depths: tuple[int, ...]
    """Blocks of each stage."""

    def freeze(self, frozen: Frozen) -> None:
        """Choose what is trained: everything, all but the stem and the first stage (the published recipe with a
        ResNet), or nothing.
        """
        if frozen not in ("none", "stem_and_layer1", "all"):
            raise ValueError(f'cannot freeze "{frozen}": choose none, stem_and_layer1 or all')
        for name, parameter in self.named_parameters():
            early = name.startswith(self.early)
            parameter.requires_grad_(frozen == "none" or (frozen == "stem_and_layer1" and not early))

    def blocks_above(self, name: str) -> int:
        """How many blocks a feature passes after the parameter of that name on its way to the last map.

        What stands between two stages counts as the block before it, and what follows the last block as that one.
        """
        place = self._place(name)
        if place is None:
            return 0 if name.startswith(self.late) else sum(self.depths)
        stage, block = place
        return sum(self.depths[stage:]) - 1 - block

    def _place(self, name: str) -> tuple[int, int] | None:
        """Stage and block of a parameter, from 0, or None where it is in none."""
        raise NotImplementedError
