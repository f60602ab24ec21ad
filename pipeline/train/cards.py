"""Graphics cards whose most is known, by their data sheets: NVIDIA's of the SXM form, without sparsity."""

from dataclasses import dataclass

from model.complexity import Work
from pipeline.config.sections import Precision
from pipeline.errors import UserError, shown


@dataclass(frozen=True)
class Card:
    """What a card has and does at most."""

    name: str
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes a second."""
    fp32: float
    """FLOP a second of matrix products in fp32."""
    tf32: float
    """FLOP a second of convolutions in fp32, which torch gives to the tensor cores where they take TF32."""
    fp16: float
    """FLOP a second in fp16."""
    has_bf16: bool
    """Whether it computes in bf16, too, as fast."""
    link: float
    """Bytes a second to the other cards of its machine, in one direction."""

    def has(self, precision: Precision) -> bool:
        """Whether it computes in a precision."""
        return precision != "bf16" or self.has_bf16

    def seconds(self, work: Work, precision: Precision, utilisation: float) -> float:
        """Time of what is computed, and then of what is moved.

        Args:
            work: of a micro-batch.
            precision: of the arithmetic.
            utilisation: part of the card's most that is reached.

        Raises:
            UserError: the card does not have the precision.
        """
        if not self.has(precision):
            raise UserError(f"train.precision: a {self.name} has no bf16; use fp16, or plan for another --gpu")
        if precision == "fp32":
            computes = work.conv_flops / self.tf32 + (work.flops - work.conv_flops) / self.fp32
        else:
            computes = work.flops / self.fp16
        return (computes + work.moved / self.memory_bandwidth) / utilisation


_T, _G = 1e12, 1e9
CARDS = (
    Card("V100", 32 * _G, 900 * _G, fp32=15.7 * _T, tf32=15.7 * _T, fp16=125 * _T, has_bf16=False, link=150 * _G),
    Card("A100", 80 * _G, 2039 * _G, fp32=19.5 * _T, tf32=156 * _T, fp16=312 * _T, has_bf16=True, link=300 * _G),
    Card("H100", 80 * _G, 3350 * _G, fp32=67 * _T, tf32=494.5 * _T, fp16=989.5 * _T, has_bf16=True, link=450 * _G),
    Card("H200", 141 * _G, 4800 * _G, fp32=67 * _T, tf32=494.5 * _T, fp16=989.5 * _T, has_bf16=True, link=450 * _G),
    Card("B200", 180 * _G, 8000 * _G, fp32=75 * _T, tf32=1125 * _T, fp16=2250 * _T, has_bf16=True, link=900 * _G),
)


def find_card(name: str) -> Card:
    """The card of a name, written in capitals or not.

    Raises:
        UserError: none has it; it lists those that are known.
    """
    for card in CARDS:
        if card.name.lower() == name.lower():
            return card
    known = ", ".join(card.name for card in CARDS)
    raise UserError(f"--gpu {shown(name)}: not a known card; choose one of {known}, or measure one with --measure")


def card_of_device(device: str) -> Card | None:
    """The card that a device's own name, such as "NVIDIA H100 80GB HBM3", tells; None where it is none of these."""
    words = device.replace("-", " ").split()
    return next((card for card in CARDS if card.name in words), None)
