"""Weight saliency: which weights hold what is to be forgotten, and gradients that move those alone.

Source: MMUnlearner, arXiv 2502.11051, section 3.3.
"""

from biasunlearn_trainer.saliency.building import FISHERS, SaliencyBuilder, SaliencySettings
from biasunlearn_trainer.saliency.gradients import SCOPES, GradientMask
from biasunlearn_trainer.saliency.masks import SaliencyMask, salient

__all__ = ["FISHERS", "SCOPES", "GradientMask", "SaliencyBuilder", "SaliencyMask", "SaliencySettings", "salient"]
