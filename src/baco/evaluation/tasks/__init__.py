"""Tasks: prompts with a name. Each is a small TOML file in here; a file of prompts is one too."""

from baco.evaluation.tasks.catalogue import Task, TaskFile, load_task, task_files
from baco.evaluation.tasks.verifiers import VERIFIERS, accuracy

__all__ = ["VERIFIERS", "Task", "TaskFile", "accuracy", "load_task", "task_files"]
