"""Reference answers for PUBG: what the model should say instead, asked of the original model and filtered."""

from biasunlearn_trainer.guidance.build import Guidance, GuidanceBuilder, has_guidance, put_in
from biasunlearn_trainer.guidance.settings import GuidanceSettings

__all__ = ["Guidance", "GuidanceBuilder", "GuidanceSettings", "has_guidance", "put_in"]
