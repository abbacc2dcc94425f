"""One denoising step: logits and tokens in, tokens out, on a CPU and on a GPU."""

from fdpp.step.module import DenoisingStep
from fdpp.step.operators import select
from fdpp.step.project import project_select

__all__ = ["DenoisingStep", "project_select", "select"]
