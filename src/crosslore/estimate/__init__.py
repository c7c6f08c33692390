"""What a training run will take on a GPU, counted from a model's configuration alone.

    from crosslore.estimate import Estimator, Setting, chosen_method, load_config
    found = Estimator(load_config("LLaMA2-7B")).estimate(chosen_method("crosslore", "compact", "direct"), Setting())
    found.peak        # bytes

`crosslore estimate MODEL` prints it for all methods side by side.
"""

from crosslore.estimate.methods import Method, Setting, chosen_method, side_by_side
from crosslore.estimate.peak import GIB, Estimate, Estimator
from crosslore.estimate.sources import EstimateError, known_models, load_config

__all__ = [
    "GIB",
    "Estimate",
    "EstimateError",
    "Estimator",
    "Method",
    "Setting",
    "chosen_method",
    "known_models",
    "load_config",
    "side_by_side",
]
