"""The multi-scale deformable attention operator: compiled kernels, and plain torch where there are none."""

from model.ops.operator import compiled, description, ms_deform_attn

__all__ = ["compiled", "description", "ms_deform_attn"]
