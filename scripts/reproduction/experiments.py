"""Which cells are run: `experiments(target, profile=...)`; one cell is one training and its evaluation.

Rows are those of the paper's tables, and for each of them three that it lacks: GaLore by this project, `crosslore_plus`
and AdamW on all weights. A profile says which model and rank stand for the paper's.
"""

from collections.abc import Iterable, Sequence

from reproduction.cells import BASE_METHOD, METHODS, TUNING, Experiment
from reproduction.costs import estimated_seconds
from reproduction.paper import Paper, Table, load_paper
from reproduction.profiles import Profile, load_profiles
from reproduction.settings import Ablation
from reproduction.tuning import tuning_grid

# Of figure 1, which compares the times of these two.
FIGURE1_METHODS = ("galore_stock", "crosslore")
# Targets without a cell of their own: settings, and figures of benchmarks.
WITHOUT_CELLS = ("table3", "table4", "figure2a", "figure2b")


def experiments(target: str, *, profile: str, seeds: int | None = None) -> list[Experiment]:
    """Return the cells of a target, each once, the cheapest first.

    Args:
        target: "table1" to "table10", "figure1" to "figure4", "ablation-residual", "ablation-cross-head", "ablations",
            "tuning", or "all": first the runs for tuning, then all others.
        profile: "paper", "small" or "smoke".
        seeds: how many, from 1; None: the profile's, and the paper's four for table 10. Not of tuning.

    Returns:
        The cells; none for tables 3 and 4, which are settings, and figures 2a and 2b, which are benchmarks.

    Raises:
        ValueError: if the profile has no such target, or is unknown.
    """
    chosen, paper = load_profiles().profile(profile), load_paper()
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be 1 or more, got {seeds}. Leave it out for the profile's number.")
    known = (*chosen.targets, "ablations", "all", *([TUNING] if chosen.tuning else []), *WITHOUT_CELLS)
    if target not in known:
        raise ValueError(
            f"target must be one of {', '.join(known)} in profile {profile}, got {target!r}. Choose one of these or "
            "another profile."
        )
    if target == "all":
        parts = [_cells(name, chosen, paper, seeds) for name in chosen.targets]
        tuning = _tuning(chosen, paper) if chosen.tuning else []
        return [*_ordered(tuning), *_ordered(cell for part in parts for cell in part)]
    if target == "ablations":
        names = [name for name in chosen.targets if name.startswith("ablation-")]
        return _ordered(cell for name in names for cell in _cells(name, chosen, paper, seeds))
    return _ordered(_tuning(chosen, paper) if target == TUNING else _cells(target, chosen, paper, seeds))


def _ordered(cells: Iterable[Experiment]) -> list[Experiment]:
    once = {(cell.table, cell.name): cell for cell in cells}
    return sorted(once.values(), key=estimated_seconds)


def _cells(target: str, profile: Profile, paper: Paper, seeds: int | None) -> list[Experiment]:
    if target in WITHOUT_CELLS:
        return []
    if target == "figure1":
        cells = [cell for number in (1, 2) for cell in _of_table(paper.tables[number], profile, seeds)]
        return [cell for cell in cells if cell.method in FIGURE1_METHODS]
    if target.startswith("figure"):
        models = paper.figures[target.removeprefix("figure")].models
        return _of_table10(paper, profile, seeds, models=models)
    if target == "table10":
        return _of_table10(paper, profile, seeds)
    if target.startswith("ablation-"):
        return _of_ablation(paper.ablations[target.removeprefix("ablation-")], profile, seeds)
    return _of_table(paper.tables[int(target.removeprefix("table"))], profile, seeds)


def _of_table(table: Table, profile: Profile, seeds: int | None) -> list[Experiment]:
    methods, found = load_profiles().methods, []
    places = dict.fromkeys(
        (cell.key.model, cell.key.dataset, cell.key.rank) for row in table.rows for cell in row.cells
    )
    for model, dataset, rank in places:
        for method in METHODS:
            for seed in range(1, (seeds or profile.seeds) + 1):
                found.append(
                    Experiment(
                        table=table.name,
                        profile=profile.name,
                        model=profile.models[model],
                        method=method,
                        dataset=dataset,
                        rank=profile.ranks[rank or 0] if methods[method].has_rank else 0,
                        seed=seed,
                    )
                )
    return found


def _of_table10(
    paper: Paper, profile: Profile, seeds: int | None, *, models: Sequence[str] | None = None
) -> list[Experiment]:
    table = paper.tables[10]
    count = seeds or profile.table10_seeds or paper.protocol.ablation_seeds
    return [
        Experiment(
            table=table.name,
            profile=profile.name,
            model=profile.models[cell.key.model],
            method=BASE_METHOD,
            dataset=cell.key.dataset,
            rank=profile.table10_rank,
            seed=seed,
            column=cell.key.column,
            settings={"residual_ratio": round(float(cell.key.column) / 100, 6)},
        )
        for row in table.rows
        for cell in row.cells
        for seed in range(1, count + 1)
        if models is None or cell.key.model in models
    ]


def _of_ablation(ablation: Ablation, profile: Profile, seeds: int | None) -> list[Experiment]:
    return [
        Experiment(
            table=f"ablation-{ablation.name}",
            profile=profile.name,
            model=profile.models[model],
            method=variant.name,
            dataset=dataset,
            rank=rank,
            seed=seed,
            settings=variant.settings,
        )
        for model in ablation.models
        for rank in profile.ablation_ranks or [profile.ranks[rank] for rank in ablation.ranks]
        for variant in ablation.variants
        for dataset in ablation.columns
        for seed in range(1, (seeds or profile.seeds) + 1)
    ]


def _tuning(profile: Profile, paper: Paper) -> list[Experiment]:
    """Return a run for each method, data set and learning rate of its family."""
    cells = [cell for name in profile.targets for cell in _cells(name, profile, paper, 1) if cell.method in METHODS]
    places = dict.fromkeys((cell.model, cell.method, cell.dataset) for cell in cells)
    return [
        run for model, method, dataset in places for run in tuning_grid(profile, model, method=method, dataset=dataset)
    ]
