"""Unlearning of social bias in language and image-text models.

Public names are looked up when they are first used, so that `import biasunlearn_trainer` costs nothing.
"""

from importlib import import_module

from biasunlearn_trainer.torchvision_operators import watch_import
from biasunlearn_trainer.version import __version__

watch_import()  # before anything of transformers is imported, which reaches for torchvision

_PUBLIC = {
    "UnlearnConfig": "trainers.base",
    "UnlearnTrainer": "trainers.base",
    "GAConfig": "trainers.ga",
    "GATrainer": "trainers.ga",
    "GADiffConfig": "trainers.ga_diff",
    "GADiffTrainer": "trainers.ga_diff",
    "KLMinConfig": "trainers.kl_min",
    "KLMinTrainer": "trainers.kl_min",
    "NPOConfig": "trainers.npo",
    "NPOTrainer": "trainers.npo",
    "SimNPOConfig": "trainers.simnpo",
    "SimNPOTrainer": "trainers.simnpo",
    "UnlearnDPOConfig": "trainers.dpo",
    "UnlearnDPOTrainer": "trainers.dpo",
    "PUBGConfig": "trainers.pubg",
    "PUBGTrainer": "trainers.pubg",
    "BiasReading": "trainers.steering",
    "BiasUnlearnConfig": "trainers.biasunlearn",
    "BiasUnlearnTrainer": "trainers.biasunlearn",
    "MMUnlearnerConfig": "trainers.mmunlearner",
    "MMUnlearnerTrainer": "trainers.mmunlearner",
    "SaliencyMask": "saliency",
    "ProbeCallback": "probes",
    "get_method": "trainers.registry",
    "load_model": "models",
    "load_processor": "models",
    "module_groups": "models",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
