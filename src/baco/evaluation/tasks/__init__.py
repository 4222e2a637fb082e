"""Tasks: named sets of prompts. Each is a TOML file here; a file of prompts is a task too."""

from baco.evaluation.tasks.catalogue import (
    Task,
    TaskFile,
    check_limit,
    load_task,
    task_files,
)
from baco.evaluation.tasks.verifiers import VERIFIERS, accuracy

__all__ = [
    "VERIFIERS",
    "Task",
    "TaskFile",
    "accuracy",
    "check_limit",
    "load_task",
    "task_files",
]
