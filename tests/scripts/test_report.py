"""Tables, figures and the report of result files: every status is shown, nothing is invented or compared wrongly."""

import base64
import csv
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.scripts.result_samples import sample

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"profile": "small", "model": "smollm2-135m"}
NAMES = ("results", "paper", "render", "grids", "tables", "panels", "drawings", "motivation", "figures", "report")


@pytest.fixture(scope="module")
def lib(load_script):
    """The modules of `scripts/reproduction`, and the two commands."""
    modules = {name: load_script(f"reproduction.{name}") for name in NAMES}
    return SimpleNamespace(**modules, make_table=load_script("make_table"), make_report=load_script("make_report"))


@pytest.fixture(scope="module")
def paper(lib):
    return lib.paper.load_paper()


@pytest.fixture
def make(lib):
    """A function that makes a plausible result."""
    return lambda **changes: sample(lib.results, **changes)


@pytest.fixture
def plan(lib):
    """A function that makes a planned cell."""

    def planned(**changes):
        return sample(lib.results, **changes).experiment

    return planned


def rows(lib, grid, *start):
    """The rows of a table in Markdown whose first cells are these, as lists of texts."""
    lines = lib.render.render(grid, "md").splitlines()[4:]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in found if tuple(row[: len(start)]) == start]


# Tables


def test_seeds_are_averaged_and_stand_below_the_papers_row(lib, paper, make):
    grid = lib.tables.table_grid(paper, 1, [make(), make(seed=2, add=3.0, hours=1.05)], profile="paper")
    assert rows(lib, grid, "CrossLore", "128") == [
        ["CrossLore", "128", "paper", "0.92", "15.73", "34.65", "0.62", "15.44", "67.64"],
        ["CrossLore", "128", "measured", "1.00 ± 0.07 (n = 2)", "15.81 ± 0.00 (n = 2)", "35.50 ± 2.12 (n = 2)"]
        + ["–"] * 3,
        ["CrossLore", "128", "difference", "+0.08", "+0.08", "+0.85"] + ["–"] * 3,
    ]
    assert grid.caption.startswith("Profile paper, LLaMA2-7B: ")


@pytest.mark.parametrize("status", ["oom", "failed", "not run"])
def test_a_cell_without_a_number_says_why_and_has_no_difference(lib, paper, make, plan, status):
    word = {"oom": "out of memory"}.get(status, status)
    results = [] if status == "not run" else [make(method="dora", status=status)]
    grid = lib.tables.table_grid(paper, 1, results, profile="paper", planned=[plan(method="dora")])
    measured = [row for row in rows(lib, grid, "DoRA", "128") if row[2] != "paper"]
    assert measured == [["DoRA", "128", "measured", word, word, word, "–", "–", "–"]]


def test_seeds_that_gave_no_number_are_counted_beside_those_that_did(lib, paper, make, plan):
    results = [make(), make(seed=2, status="oom"), make(seed=3, status="failed")]
    planned = [plan(seed=seed) for seed in (1, 2, 3, 4)]
    grid = lib.tables.table_grid(paper, 1, results, profile="paper", planned=planned)
    (row,) = [row for row in rows(lib, grid, "CrossLore", "128") if row[2] == "measured"]
    assert row[5] == "34.00 (n = 1, 1 out of memory, 1 failed, 1 not run)"
    table = list(csv.DictReader(io.StringIO(lib.render.render(grid, "csv"))))
    (mine,) = [line for line in table if line["source"] == "measured"]
    assert mine["GSM8k Acc. (%)"] == "34.00"
    assert mine["GSM8k Acc. (%) note"] == "1 out of memory, 1 failed, 1 not run"


def test_methods_that_the_paper_lacks_have_rows_after_those_of_their_rank(lib, paper, make):
    methods = ("galore_stock", "galore", "crosslore_plus", "full")
    results = [make(method=method, rank=0 if method == "full" else 16) for method in methods]
    grid = lib.tables.table_grid(paper, 1, results, profile="paper")
    found = [(*line.labels, line.source) for line in grid.lines]
    assert found[2:5] == [("GaLore", "16", s) for s in ("paper", "measured", "difference")]
    assert found[6:8] == [("GaLore (this code)", "16", "measured"), ("CrossLore+ (this code)", "16", "measured")]
    assert found[8] == ("LoRA", "128", "paper") and found[-1] == ("Full fine-tuning", "–", "measured")


@pytest.mark.parametrize("profile", ["small", "smoke"])
def test_another_profile_is_marked_has_rows_of_its_own_and_no_differences(lib, paper, make, profile):
    model = {"small": "smollm2-135m", "smoke": "tiny-llama"}[profile]
    results = [make(profile=profile, model=model, rank=16, method="lora"), make()]  # the last: of profile paper
    grid = lib.tables.table_grid(paper, 1, results, profile=profile)
    assert grid.sources == ("paper", "measured") and grid.labels == ("Model", "Method", "Rank")
    name = {"small": "SmolLM2-135M", "smoke": "Tiny Llama, random weights"}[profile]
    assert [(*line.labels, line.source) for line in grid.lines[:2]] == [
        ("LLaMA2-7B", "LoRA", "16", "paper"),
        (name, "LoRA", "16", "measured"),
    ]
    assert sum(line.source == "measured" for line in grid.lines) == 1
    assert grid.caption.startswith(f"Profile {profile}, {name}: ")
    assert "The paper's rows are of LLaMA2-7B; they stand here as printed" in grid.caption
    assert ("no result" in grid.caption) == (profile == "smoke")


def test_the_papers_own_model_in_another_profile_is_not_compared_either(lib, paper, make):
    grid = lib.tables.table_grid(paper, 1, [make(profile="small")], profile="small")
    assert grid.sources == ("paper", "measured")
    assert [line.source for line in grid.lines if line.labels == ("CrossLore", "128")] == ["paper", "measured"]


def test_intervals_stand_beside_scores_of_the_small_profile_and_not_of_the_papers(lib, paper, make):
    small = lib.tables.table_grid(paper, 1, [make(**SMALL), make(seed=2, add=1.0, **SMALL)], profile="small")
    (row,) = rows(lib, small, "SmolLM2-135M", "CrossLore", "128")
    assert row[6] == "34.50 ± 0.71 [32.00, 37.00] (n = 2)" and "[" not in row[4] + row[5]
    table = list(csv.DictReader(io.StringIO(lib.render.render(small, "csv"))))
    (mine,) = [line for line in table if line["source"] == "measured"]
    assert (mine["GSM8k Acc. (%) low"], mine["GSM8k Acc. (%) high"]) == ("32.00", "37.00")
    full = lib.tables.table_grid(paper, 1, [make()], profile="paper")
    assert "[3" not in lib.render.render(full, "md")


def test_short_times_keep_their_digits(lib, paper, make):
    grid = lib.tables.table_grid(paper, 1, [make(hours=0.01234, **SMALL)], profile="small")
    assert rows(lib, grid, "SmolLM2-135M")[0][4] == "0.0123 (n = 1)"


def test_time_on_one_cpu_thread_is_the_processors(lib, paper, make):
    train = {"steps": 3, "cpu_seconds": 36.0}
    for kind, threads, shown in (("cpu", 1, "0.0100"), ("cpu", 2, "0.0500"), ("cuda", 1, "0.0500")):
        device = lib.results.Device(name="AMD EPYC", kind=kind, threads=threads)
        grid = lib.tables.table_grid(paper, 1, [make(hours=0.05, train=train, device=device, **SMALL)], profile="small")
        assert rows(lib, grid, "SmolLM2-135M")[0][4] == f"{shown} (n = 1)"
        assert f"On AMD EPYC, {kind}, threads: {threads}." in grid.caption


def test_table_2_has_the_scores_of_the_papers_protocol(lib, paper, make):
    grid = lib.tables.table_grid(paper, 2, [make(table="table2", dataset="e2e")], profile="paper")
    (row,) = [row for row in rows(lib, grid, "CrossLore", "128") if row[2] == "measured"]
    assert [cell.split(" ")[0] for cell in row[3:]] == "0.95 15.81 60.00 4.90 35.00 66.00 35.00 43.00 1.20".split()


def test_a_score_that_could_not_be_computed_is_not_measured(lib, paper, make):
    scores = {
        "BLEU": lib.results.Score(value=60.0),
        "METEOR": lib.results.Score(value=None, reason="METEOR needs Java"),
    }
    grid = lib.tables.table_grid(paper, 2, [make(table="table2", dataset="e2e", scores=scores)], profile="paper")
    (row,) = [row for row in rows(lib, grid, "CrossLore", "128") if row[2] == "measured"]
    assert row[5] == "60.00 (n = 1)" and row[7] == "not measured"


def test_table_9_is_lead_by_models(lib, paper, make):
    results = [make(table="table9", rank=32, dataset=name, model="llama2-13b") for name in ("cnn_dm", "xsum")]
    grid = lib.tables.table_grid(paper, 9, results, profile="paper")
    (row,) = [row for row in rows(lib, grid, "LLaMA2-13B", "CrossLore") if row[2] == "difference"]
    assert row[3:] == ["+0.30", "-1.05", "-1.25", "-0.44", "+0.46", "-9.70", "-6.06", "-11.26"]


def test_table_10_compares_accuracy_and_not_the_score_that_is_not_stated(lib, paper, make):
    results = [
        make(table="table10", column="0.6", dataset=dataset, seed=seed, add=seed)
        for dataset in ("gsm8k", "e2e")
        for seed in (1, 2)
    ]
    grid = lib.tables.table_grid(paper, 10, results, profile="paper")
    (mine, apart) = rows(lib, grid, "GSM8k", "LLaMA2-7B", "Acc.")[1:]
    assert mine[3:] == ["measured", "–", "35.50 ± 0.71 (n = 2)", "–", "–"]
    assert apart[3:] == ["difference", "–", "+1.80", "–", "–"]
    (e2e,) = rows(lib, grid, "E2E", "LLaMA2-7B", "mean of ROUGE-1, -2, -L")
    assert e2e[3:6] == ["measured", "–", "49.500 ± 0.707 (n = 2)"]  # (66 + 35 + 43) / 3, plus the seed
    assert len(rows(lib, grid, "E2E", "LLaMA2-7B", "not stated")) == 1


@pytest.mark.parametrize("number", [3, 4])
def test_tables_of_settings_have_the_papers_rows_alone(lib, paper, make, number):
    grid = lib.tables.table_grid(paper, number, [make()], profile="small")
    assert grid == lib.grids.grid_of(paper, number)


def test_an_ablation_has_its_variants_by_rank_with_the_papers_whole_method(lib, paper, make, plan):
    table = "ablation-residual"
    results = [make(table=table, method="crosslore-no-residual", add=-2.0), make(table=table)]
    planned = [plan(table=table, method="crosslore", rank=16)]
    grid = lib.tables.ablation_grid(paper, "residual", results, profile="paper", planned=planned)
    assert [(*line.labels[1:], line.source, lib.render.in_words(line.values[2])) for line in grid.lines] == [
        ("16", "CrossLore", "paper", "27.47"),
        ("16", "CrossLore", "measured", "not run"),
        ("128", "CrossLore", "paper", "34.65"),
        ("128", "CrossLore", "measured", "34.00 (n = 1)"),
        ("128", "CrossLore without the residual", "measured", "32.00 (n = 1)"),
    ]
    small = lib.tables.ablation_grid(paper, "residual", [make(table=table, **SMALL)], profile="small")
    assert small.sources == ("measured",)
    assert len(grid.heads) == 3 + 3 + 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "xsum"}, "a result of table1 must be of a data set and a column of it, got .*xsum"),
        ({"column": "0.6"}, "a result of table1 must be of a data set and a column of it"),
        ({"table": "table10", "column": "0.7"}, "a result of table10 must be of .* column of it, got .*0.7"),
        ({"table": "table10"}, "a result of table10 must be of a data set and a column"),
    ],
)
def test_a_result_of_no_cell_is_refused(lib, paper, make, changes, message):
    result = make(**changes)
    with pytest.raises(lib.results.ResultError, match=message):
        lib.tables.table_grid(paper, int(result.experiment.table[5:]), [result], profile="paper")


def test_two_results_of_one_cell_and_seed_are_refused(lib, paper, make):
    twice = [make(table="table10", column="0.6"), make(table="table10", column="0.6", method="other")]
    with pytest.raises(lib.results.ResultError, match="only result of its cell and seed"):
        lib.tables.table_grid(paper, 10, twice, profile="paper")


def test_an_unknown_ablation_lists_the_known_ones(lib, paper):
    with pytest.raises(ValueError, match="unknown ablation 'residal'. Did you mean 'residual'"):
        lib.tables.ablation_grid(paper, "residal", [], profile="paper")


# The command of tables


def test_the_command_prints_a_table_of_a_results_folder(lib, make, tmp_path, capsys):
    lib.results.write_result(tmp_path, make(add=2.0))
    lib.results.write_result(tmp_path, make(method="galore_stock", status="oom"))
    assert lib.make_table.main(["--table", "1", "--results", str(tmp_path), "--format", "csv"]) == 0
    found = {(r["Method"], r["Rank"], r["source"]): r for r in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert found["CrossLore", "128", "measured"]["GSM8k Acc. (%)"] == "36.00"
    assert found["CrossLore", "128", "difference"]["GSM8k Acc. (%)"] == "+1.35"
    assert found["GaLore", "128", "measured"]["GSM8k Acc. (%)"] == "out of memory"
    assert found["DoRA", "16", "measured"]["MAWPS Acc. (%)"] == "not run"


def test_the_command_prints_all_tables_and_ablations_of_a_profile(lib, tmp_path, capsys):
    assert lib.make_table.main(["--profile", "small", "--results", str(tmp_path)]) == 0
    names = re.findall(r"^\*\*(Table \d+|Ablation of [a-z- ]+) ?[.(]", capsys.readouterr().out, re.M)
    assert [name.strip() for name in names] == [
        *(f"Table {n}" for n in range(1, 11)),
        "Ablation of the sparsely coded residual",
        "Ablation of the cross-head projection",
    ]


def test_the_command_names_a_file_that_it_cannot_read(lib, tmp_path, capsys):
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1" / "broken.json").write_text("{")
    assert lib.make_table.main(["--table", "1", "--results", str(tmp_path)]) == 2
    assert "table1/broken.json is not JSON" in capsys.readouterr().err


# Figures


@pytest.fixture
def sources(lib, paper):
    """A function that returns the sources of figures."""

    def of(results=(), profile="paper", benchmarks=ROOT / "results" / "benchmarks"):
        return lib.panels.Sources(paper=paper, results=list(results), profile=profile, benchmarks=benchmarks)

    return of


def texts(figure):
    """All texts of a figure's panels, titles and legends."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def points(axes):
    """The markers of a panel, by hours and score."""
    return {tuple(map(float, offset)) for marks in axes.collections for offset in marks.get_offsets()}


def test_figure_1_has_the_papers_hours_and_scores_where_nothing_was_measured(lib, sources):
    figure = lib.figures.draw("1", sources())
    assert len(figure.axes) == 4 and "Nothing was measured" in texts(figure)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [3.5, 2.61, 18.45, 0.92, 0.62, 4.52]
    assert "paper, LLaMA2-7B\nhours of training, rank 128" in texts(figure) and "-74 %" in texts(figure)
    assert len(points(figure.axes[1])) == 16 and (0.92, 34.65) in points(figure.axes[1])
    assert (4.52, 64.22) in points(figure.axes[3])


def test_figure_1_has_means_of_what_was_measured_in_a_line_of_its_own(lib, sources, make):
    results = [
        *(make(rank=8, hours=0.125 * seed, add=seed, seed=seed, **SMALL) for seed in (1, 3)),
        make(rank=8, hours=1.0, method="galore_stock", **SMALL),
        make(rank=8, method="dora", status="oom", **SMALL),
        make(hours=7.0),  # of another profile
    ]
    figure = lib.figures.draw("1", sources(results, "small"))
    assert len(figure.axes) == 8 and "measured, SmolLM2-135M (profile small)" in texts(figure)
    assert points(figure.axes[5]) == {(0.25, 36.0), (1.0, 34.0)}
    assert [bar.get_height() for bar in figure.axes[4].patches] == [1.0, 0, 0, 0.25, 0, 0]
    assert "0.25\n-75 %" in texts(figure) and "not run" in texts(figure.axes[6])


def test_figure_2a_has_the_papers_shares_and_the_measured_ones(lib, sources):
    figure = lib.figures.draw("2a", sources())
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "paper, LLaMA2-7B, GaLore\n(SVD > 80 %, of attention about 50 %)"
    bars = list(csv.DictReader((ROOT / "results" / "benchmarks" / "time_split.csv").open(encoding="utf-8")))
    stock = next(row for row in bars if (row["contender"], row["figure"]) == ("galore-torch", "amortised"))
    share = 100 * float(stock["fit"]) / float(stock["total_seconds"])
    assert labels[1] == f"measured, GaLore (galore-torch)\n(fit of bases {share:.1f} %)"
    widths = {}
    for bar in figure.axes[0].patches:
        widths.setdefault(round(bar.get_y(), 3), []).append(bar.get_width())
    assert len(widths) == len(labels) and [sum(w) for w in widths.values()] == pytest.approx([100.0] * len(labels))


def test_figure_2b_has_both_projections_of_the_benchmark_suite(lib, sources):
    figure = lib.figures.draw("2b", sources())
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "q_proj, rank 16", "q_proj, rank 128", "k_proj, rank 16", "k_proj, rank 128",
    ]  # fmt: skip
    table = list(csv.DictReader((ROOT / "results" / "benchmarks" / "subspace_error.csv").open(encoding="utf-8")))
    for bars, basis in zip(figure.axes[1].containers, ("exact", "one head, random"), strict=True):
        mine = [r for r in table if (r["weight"], r["rank"], r["basis"]) == ("q_proj", "128", basis)]
        assert list(bars.lines[0].get_ydata()) == [float(row["error_median"]) for row in mine]
    assert "are not in its text" in texts(figure).replace("\n", " ")


def test_one_seed_is_drawn_without_a_deviation(lib, sources, make):
    figure = lib.figures.draw("3", sources([make(table="table10", column="0.6")]))
    assert not figure.axes[3].containers[0].has_yerr and "1 seed)" in figure.axes[3].get_xlabel()


@pytest.mark.parametrize(("number", "first"), [("3", (33.64, 0.97)), ("4", (69.57, 0.76))])
def test_figures_3_and_4_have_means_and_deviations_of_table_10(lib, sources, number, first):
    figure = lib.figures.draw(number, sources())
    assert len(figure.axes) == 3
    line, _, (bars,) = figure.axes[0].containers[0].lines
    low, high = sorted(point[1] for point in bars.get_segments()[0])
    assert line.get_ydata()[0] == first[0] and (high - low) / 2 == pytest.approx(first[1])
    assert "4 seeds" in figure.axes[0].get_xlabel() and figure.axes[2].get_ylabel() == "score (not stated)"


def test_figure_3_has_only_results_of_its_model_below_the_papers(lib, sources, make):
    results = [
        make(table="table10", column=ratio, seed=seed, add=seed, model=model)
        for ratio in ("0.0", "1.2")
        for seed in (1, 3)
        for model in ("llama2-7b", "llama3-8b")
    ]
    figure = lib.figures.draw("3", sources(results[::2]))
    assert len(figure.axes) == 6 and "measured, LLaMA2-7B (profile paper)" in texts(figure)
    line = figure.axes[3].containers[0].lines[0]
    assert list(line.get_xdata()) == [0.0, 1.2] and list(line.get_ydata()) == [36.0, 36.0]
    assert "2 seeds" in figure.axes[3].get_xlabel() and "not run" in texts(figure.axes[5])
    assert len(lib.figures.draw("4", sources(results[::2])).axes) == 3


def test_a_smoke_run_is_named_a_function_test_in_its_figure(lib, sources, make):
    result = make(profile="smoke", model="tiny-llama", rank=4)
    assert "smoke: a function test, no result" in texts(lib.figures.draw("1", sources([result], "smoke")))


def test_a_figure_is_saved_with_the_same_bytes_each_time(lib, sources, tmp_path):
    files = []
    for folder in ("a", "b"):
        paths = lib.figures.save(lib.figures.draw("4", sources()), tmp_path / folder / "figure4")
        assert [path.name for path in paths] == ["figure4.png", "figure4.svg"]
        files.append([path.read_bytes() for path in paths])
    assert files[0] == files[1]


def test_what_figures_need_is_named(lib, sources, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown figure '5'. .*Known: 1, 2a, 2b, 3, 4"):
        lib.figures.draw("5", sources())
    with pytest.raises(lib.results.ResultError, match=r"time_split\.csv cannot be read.*make benchmark"):
        lib.figures.draw("2a", sources(benchmarks=tmp_path))
    (tmp_path / "subspace_error.csv").write_text("a,b\n1,2\n")
    with pytest.raises(lib.results.ResultError, match=r"subspace_error\.csv must be a file of the benchmark suite"):
        lib.figures.draw("2b", sources(benchmarks=tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(lib.results.ResultError, match=r'pip install "crosslore\[eval\]"'):
        lib.figures.draw("1", sources())


# The report


class Page(HTMLParser):
    """What a page refers to and shows."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.anchors, self.ids, self.tags, self.texts = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        self.ids |= {found["id"]} if "id" in found else set()
        for name in ("src", "href", "srcset", "data"):
            target = found.get(name)
            if target is not None:
                (self.anchors if target.startswith("#") else self.addresses).append(target)

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def shown(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def written(lib, paper, folder, results, profile, **more):
    for result in results:
        lib.results.write_result(folder / "results", result)
    path = lib.report.write_report(
        folder / "out" / "report.html",
        paper=paper,
        results=lib.results.read_results(folder / "results"),
        folder=folder / "results",
        profile=profile,
        **more,
    )
    return path, Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small_report(lib, paper, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    cpu = lib.results.Device(name="Xeon", kind="cpu", threads=2)
    results = [
        sample(lib.results, **SMALL),
        sample(lib.results, seed=2, add=1.0, device=cpu, **SMALL),
        sample(lib.results, table="table2", dataset="e2e", **SMALL),
        sample(lib.results, method="full", rank=0, status="oom", **SMALL),
        sample(lib.results, method="lora", status="failed", reason="<script>alert(1)</script> & more", **SMALL),
        sample(lib.results, commit="of the paper's profile"),
    ]
    extra = sample(lib.results, method="dora", **SMALL).experiment
    planned = [result.experiment for result in results] + [extra]
    return written(lib, paper, folder, results, "small", planned=planned, benchmarks=ROOT / "results" / "benchmarks")


def test_the_report_loads_nothing_and_its_contents_lead_somewhere(small_report):
    path, page = small_report
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    loaded = [address for address in page.addresses if not address.startswith("../results/")]
    assert len(loaded) == 5 and all(address.startswith("data:image/png;base64,") for address in loaded)
    assert base64.b64decode(loaded[0].partition(",")[2]).startswith(b"\x89PNG\r\n")
    text = path.read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    anchors = {anchor.removeprefix("#") for anchor in page.anchors}
    tables = {f"table-{n}" for n in range(1, 11)} | {"ablation-residual", "ablation-cross-head"}
    figures = {f"figure{n}" for n in ("1", "2a", "2b", "3", "4")}
    assert anchors == {"summary", "tables", "figures", "cells", "missing"} | tables | figures
    assert anchors <= page.ids


def test_the_report_has_every_cell_of_its_profile_with_a_link_to_its_file(small_report):
    path, page = small_report
    files = [address for address in page.addresses if address.startswith("../results/")]
    assert len(files) == 5 and all((path.parent / file).is_file() for file in files)
    shown = page.shown
    assert "accuracy_flexible 34 [31.5, 36.5]" in shown and "accuracy_flexible 35 [32.5, 37.5]" in shown
    assert "e2e-official/BLEU 0.64 [0.62, 0.66]" in shown
    assert "out of memory CUDA" not in shown and "CUDA out of memory. Tried to allocate" in shown
    assert "7473 rows, sha256 aaaa" in shown and "0123456789abcdef" in shown
    assert "3 ok, 1 out of memory, 1 failed, 1 not run" in shown
    assert "NVIDIA RTX 4090 (cuda, 8 threads), Xeon (cpu, 2 threads)" in shown
    assert "llamafactory 0.9.5, torch 2.11.0" in shown and "abc123def456" in shown and "Seeds 1, 2 " in shown
    assert "of the paper's profile" not in shown


def test_the_report_shows_texts_of_results_as_texts(small_report):
    path, page = small_report
    assert "<script>alert(1)</script> & more" in page.shown
    assert "<script>" not in path.read_text(encoding="utf-8")


def test_the_report_lists_what_was_not_run(small_report):
    _, page = small_report
    missing = page.shown.partition("What was not run")[2].partition("What was not run")[2]
    assert missing.split() == ["table1:", "1", "of", "5", "cells", "smollm2-135m--dora--gsm8k--r128--s1"]


@pytest.mark.parametrize(("profile", "said"), [("paper", "Profile paper:"), ("small", "no reproduction of")])
def test_the_report_says_which_profile_it_is_of(lib, paper, tmp_path, profile, said):
    (tmp_path / "results").mkdir()
    _, page = written(lib, paper, tmp_path, [], profile)
    assert said in page.shown and "FUNCTION TEST" not in page.shown
    assert "Nothing was run." in page.shown and "Every planned cell was run." in page.shown


def test_a_smoke_report_says_loudly_that_it_is_no_result(lib, paper, make, tmp_path):
    path, page = written(lib, paper, tmp_path, [make(profile="smoke", model="tiny-llama", rank=4)], "smoke")
    assert "A FUNCTION TEST AND NO RESULT" in page.shown
    assert '<div class="banner smoke">' in path.read_text(encoding="utf-8")
    assert [address[:5] for address in page.addresses if not address.startswith("../")] == ["data:"] * 3


def test_the_command_writes_the_report_of_a_results_folder(lib, make, tmp_path, capsys):
    lib.results.write_result(tmp_path, make(**SMALL))
    assert lib.make_report.main(["--profile", "small", "--results", str(tmp_path)]) == 0
    path = tmp_path / "report-small.html"
    assert capsys.readouterr().out == f"{path}\n"
    assert "smollm2-135m--lora--gsm8k" in Page(path.read_text(encoding="utf-8")).shown
    assert lib.make_report.main(["--results", str(tmp_path / "none")]) == 2
    assert "none must be a folder with results" in capsys.readouterr().err


def test_both_units_of_memory_stand_in_the_head_of_measured_tables(lib, paper, make):
    made = lib.tables.table_grid(paper, 1, [make()], profile="paper")
    assert [head.text for head in made.heads].count("Mem. (GB; measured: GiB)") == 2
    assert "GSM8k Mem. (GB; measured: GiB)" in lib.render.render(made, "csv")
    ablation = lib.tables.ablation_grid(paper, "residual", [], profile="paper")
    assert [head.text for head in ablation.heads].count("Mem. (GB; measured: GiB)") == 3
    assert "GiB" not in lib.render.render(lib.tables.table_grid(paper, 1, [], profile="paper"), "md")


def test_an_interval_of_nothing_is_explained_where_intervals_are(lib, paper, make):
    small, full = (
        lib.tables.table_grid(paper, 1, [make(**changes)], profile=profile).caption
        for profile, changes in (("small", SMALL), ("paper", {}))
    )
    assert "a bootstrap cannot say how wide it is" in small
    assert "bootstrap" not in full and "± is the deviation over n seeds" in full


def test_captions_are_the_papers(lib, paper):
    assert paper.tables[10].caption.endswith("with proportions 0.0, 0.6, 1.2, and 1.8%.")
