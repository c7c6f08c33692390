"""Write the table of presets in docs/methods.md from the presets themselves.

python scripts/make_methods_table.py           # write
python scripts/make_methods_table.py --check   # exit status 1 if the page is out of date
"""

import argparse
import sys
from pathlib import Path

from generated_part import write_part

from crosslore import PRESETS, LowRankConfig
from crosslore.presets import Preset

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
START, END = "<!-- presets: written by scripts/make_methods_table.py -->", "<!-- end of presets -->"
HEADER = ("preset", "rank, alpha", "projector", "refresh", "moments", "residual", "rule", "paper", "where we differ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit status 1 if the page is out of date")
    check = parser.parse_args().check
    return write_part(PAGE, table(), start=START, end=END, check=check, command=Path(__file__).name)


def table() -> str:
    rows = [HEADER, ("---",) * len(HEADER)]
    rows += [row(name, preset) for name, preset in PRESETS.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def row(name: str, preset: Preset) -> tuple[str, ...]:
    config = preset.config
    differs = preset.differs or "nowhere"
    rule = config.rule
    if config.eps_placement == "uncorrected":
        rule += ", eps inside"
    rule += f", betas {preset.betas[0]:g} {preset.betas[1]:g}" if preset.betas != (0.9, 0.999) else ""
    parts = projector(config), refresh(config), config.moments, residual(config), rule
    return f"`{name}`", f"{config.rank}, {config.scale:g}", *parts, preset.paper, differs


def projector(config: LowRankConfig) -> str:
    text = config.first_projector
    if config.cross_head_targets:
        text += f"; one for all heads of {' and '.join(config.cross_head_targets)}"
    if config.fit_momentum:
        text += f"; fitted to {config.fit_momentum:g} momentum + {1 - config.fit_momentum:g} gradient"
    return text


def refresh(config: LowRankConfig) -> str:
    text = "each step" if config.refresh_every == 1 else f"every {config.refresh_every}"
    text += ", staggered" if config.refresh_stagger else ""
    return text + (f", window {config.fit_window}" if config.fit_window > 1 else "")


def residual(config: LowRankConfig) -> str:
    if config.residual == "sparse":
        where = " and ".join(config.residual_targets or ("all",))
        kind = f"{config.residual_rule}, by {config.residual_select}"
        return f"sparse {config.residual_ratio:.1%} of {where} ({kind})"
    if config.residual in ("norm_scaled", "scaled_gradient"):
        return f"{config.residual} per {config.norm_granularity}"
    return config.residual or "none"


if __name__ == "__main__":
    sys.exit(main())
