"""Methods by the name that recipes use."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from biasunlearn_trainer.trainers.base import UnlearnConfig, UnlearnTrainer

METHODS = {
    "ga": ("ga", "GATrainer"),
    "ga_diff": ("ga_diff", "GADiffTrainer"),
    "kl_min": ("kl_min", "KLMinTrainer"),
    "npo": ("npo", "NPOTrainer"),
    "simnpo": ("simnpo", "SimNPOTrainer"),
    "dpo": ("dpo", "UnlearnDPOTrainer"),
    "idk_dpo": ("dpo", "UnlearnDPOTrainer"),  # the name in Maini 2024
    "pubg": ("pubg", "PUBGTrainer"),
    "biasunlearn": ("biasunlearn", "BiasUnlearnTrainer"),
    "mmunlearner": ("mmunlearner", "MMUnlearnerTrainer"),
}


def get_method(name: str) -> tuple[type[UnlearnTrainer], type[UnlearnConfig]]:
    """The trainer and the configuration of a method.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    if name not in METHODS:
        near = get_close_matches(str(name), METHODS, n=2)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"Unknown method {name!r}; there are: {', '.join(METHODS)}.{hint}")
    module, trainer_name = METHODS[name]
    trainer = getattr(import_module(f"biasunlearn_trainer.trainers.{module}"), trainer_name)
    return trainer, trainer.config_class
