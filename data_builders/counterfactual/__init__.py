"""Counterfactuals: a sentence with the other group in it, by word pairs and rules of grammar, or a refusal.

    swap("The nurse said her shift was over.", "gender").text    "The nurse said his shift was over."
    swap("He called her fat.", "gender").reason                  "ambiguous_her"
    Counterfactuals().run(rows)                                  each row that can be swapped, and its counterpart

Words are in `data_builders/words/`; rules, reasons and measured figures in docs/counterfactuals.md.
"""

from biasunlearn_trainer.data_builders.counterfactual.stage import Counterfactuals
from biasunlearn_trainer.data_builders.counterfactual.swap import REASONS, Swap, swap
from biasunlearn_trainer.data_builders.counterfactual.words import BIAS_TYPES, words_version

__all__ = ["BIAS_TYPES", "REASONS", "Counterfactuals", "Swap", "swap", "words_version"]
