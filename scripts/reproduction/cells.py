"""A cell of the reproduction: one training and its evaluation."""

from dataclasses import dataclass, field, replace

from reproduction.profiles import Settings
from reproduction.results import Identity

# Result folder of the runs that choose learning rates.
TUNING = "tuning"
# Methods of tables 1, 2 and 5 to 9; stock GaLore is the paper's row, the last three are added.
METHODS = ("lora", "dora", "galore_stock", "crosslore", "galore", "crosslore_plus", "full")
# What every variant of an ablation and of table 10 is a variant of.
BASE_METHOD = "crosslore"


@dataclass(frozen=True, kw_only=True)
class Experiment(Identity):
    """One cell."""

    # LLaMA-Factory's keys, over those of the method and the profile
    settings: Settings = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its files: `llama2-7b--crosslore--gsm8k--r128--s1`; `--x0.6` and `--lr3e-5` for a column."""
        if self.table == TUNING:
            return f"{replace(self, table='', column=None).name}--lr{self.column}"
        return super().name

    @property
    def identity(self) -> Identity:
        """What result files hold of it."""
        values = {name: getattr(self, name) for name in Identity.__dataclass_fields__}
        return Identity(**values)

    @property
    def base_method(self) -> str:
        """The method that a variant is a variant of; else the method itself."""
        return self.method if self.method in METHODS else BASE_METHOD
