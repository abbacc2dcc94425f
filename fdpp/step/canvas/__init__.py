"""One denoising step of a canvas that has no mask id: DiffusionGemma's, whose noise is uniform over the vocabulary."""

from fdpp.step.canvas.conditioning import processed_logits, soft_embeddings
from fdpp.step.canvas.operator import denoise_canvas
from fdpp.step.canvas.outcome import CanvasStep

__all__ = ["CanvasStep", "denoise_canvas", "processed_logits", "soft_embeddings"]
