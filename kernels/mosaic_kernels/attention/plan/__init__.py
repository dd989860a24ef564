"""How `segments` covers the visible pairs of a forest with a few calls of PyTorch's fused CPU attention."""

from mosaic_kernels.attention.plan.build import build_plan
from mosaic_kernels.attention.plan.known import plan_for
from mosaic_kernels.attention.plan.parts import Bucket, Context, Part, Plan, Rows, Stack

__all__ = ["Bucket", "Context", "Part", "Plan", "Rows", "Stack", "build_plan", "plan_for"]
