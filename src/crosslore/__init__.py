"""CrossLore: full-parameter fine-tuning in low-rank gradient space.

    from crosslore import create_optimizer
    optimizer = create_optimizer(model, "crosslore", lr=1e-6, rank=128)

Importing this package loads torch and nothing heavier.
"""

from crosslore.compact.attach import attach_compact
from crosslore.config import LowRankConfig
from crosslore.factory import create_optimizer
from crosslore.layerwise import attach_layerwise
from crosslore.layout import MatrixLayout
from crosslore.optimizer import LowRankOptimizer
from crosslore.presets import PRESETS

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "LowRankConfig",
    "LowRankOptimizer",
    "MatrixLayout",
    "__version__",
    "attach_compact",
    "attach_layerwise",
    "create_optimizer",
]
