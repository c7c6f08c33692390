"""The tasks by name. A new one is one file here, its import and its line in `ALL`."""

from crosslore_eval.errors import unknown_name
from crosslore_eval.tasks.base import Task
from crosslore_eval.tasks.bundled import ARITHMETIC, RESTAURANTS
from crosslore_eval.tasks.cnn_dm import CNN_DM
from crosslore_eval.tasks.e2e import E2E
from crosslore_eval.tasks.gsm8k import GSM8K
from crosslore_eval.tasks.mawps import MAWPS
from crosslore_eval.tasks.xsum import XSUM

# In the order in which they are listed.
ALL = (
    GSM8K,
    MAWPS,
    E2E,
    CNN_DM,
    XSUM,
    RESTAURANTS,
    ARITHMETIC,
)
TASKS: dict[str, Task] = {task.name: task for task in ALL}


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        EvalError: if there is none, with the near and the known names.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
