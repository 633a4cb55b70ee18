"""From a recipe to a result: evaluate, unlearn, evaluate again, report."""

from biasunlearn_trainer.runner.run import describe_plan, main, run

__all__ = ["describe_plan", "main", "run"]
