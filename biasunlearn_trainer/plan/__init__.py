"""What a run needs before it is started: parameters, memory on each GPU, steps, time."""

from biasunlearn_trainer.plan.report import describe
from biasunlearn_trainer.plan.run import plan, show_plan

__all__ = ["describe", "plan", "show_plan"]
