"""Evaluation tasks: what is put to a model, and what is made of its answers."""

from biasunlearn_trainer.eval.tasks.base import Task
from biasunlearn_trainer.eval.tasks.registry import TASKS, TaskSpec, load_task, load_tasks, parse_task_spec

__all__ = ["TASKS", "Task", "TaskSpec", "load_task", "load_tasks", "parse_task_spec"]
