"""The paper's tables: complete, as printed, refused when malformed, rendered in three formats."""

import csv
import io
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "scripts" / "paper_tables.toml"
# Rows and columns of figures, by table.
SHAPES = {1: (8, 6), 2: (8, 9), 5: (8, 6), 6: (16, 6), 7: (8, 9), 8: (16, 9), 9: (8, 8), 10: (6, 4)}
# Sum of all figures of a table as it is printed in the paper; of the means where there are deviations.
SUMS = {
    1: "984.46",
    2: "2283.68",
    5: "974.18",
    6: "2519.92",
    7: "2323.29",
    8: "4820.11",
    9: "1267.15",
    10: "1442.754",
}


@pytest.fixture(scope="module")
def lib(load_script):
    """The modules of `scripts/reproduction`."""
    names = ("paper", "keys", "reading", "render", "grids")
    return SimpleNamespace(**{name: load_script(f"reproduction.{name}") for name in names})


@pytest.fixture(scope="module")
def paper(lib):
    return lib.paper.load_paper()


def load_edited(lib, tmp_path, old, new):
    """Load the data file with one text of it, which must be there once, replaced."""
    text = DATA.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{text.count(old)} times in the file: {old}"
    file = tmp_path / "paper.toml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    return lib.paper.load_paper(file)


def grid(lib, *lines, heads=1, caption="A caption."):
    """A small grid with one label."""
    columns = tuple(lib.render.Head(text=f"c{n}", group="g", arrow="↑") for n in range(heads))
    made = tuple(lib.render.Line(labels=(label,), source=source, values=tuple(v)) for label, source, v in lines)
    return lib.render.Grid(name="Table 1", caption=caption, labels=("Method",), heads=columns, lines=made)


# The data


@pytest.mark.parametrize("number", SHAPES)
def test_every_table_of_results_has_the_rows_columns_and_sum_of_the_paper(paper, number):
    table = paper.tables[number]
    assert (len(table.rows), len(table.columns)) == SHAPES[number]
    assert all(len(row.cells) == SHAPES[number][1] for row in table.rows)
    assert sum(cell.figure for row in table.rows for cell in row.cells) == Decimal(SUMS[number])


def test_all_ten_tables_are_there_and_no_key_is_there_twice(paper):
    assert paper.table_numbers == tuple(range(1, 11))
    assert set(paper.tables) == set(SHAPES)
    assert len(paper.by_key) == len(list(paper.cells())) == sum(rows * columns for rows, columns in SHAPES.values())


@pytest.mark.parametrize(
    ("key", "printed"),
    [
        (("table1", "llama2-7b", "crosslore", "gsm8k", 128, "accuracy"), "34.65"),
        (("table1", "llama2-7b", "lora", "gsm8k", 16, "memory"), "15.40"),
        (("table2", "llama2-7b", "galore", "e2e", 16, "time"), "18.53"),
        (("table2", "llama2-7b", "crosslore", "e2e", 128, "CIDEr"), "1.82"),
        (("table5", "llama2-7b", "lora", "mawps", 256, "time"), "0.4"),
        (("table6", "llama2-13b", "crosslore", "mawps", 128, "accuracy"), "69.75"),
        (("table7", "llama2-7b", "dora", "e2e", 256, "ROUGE_2"), "40.72"),
        (("table8", "llama2-13b", "galore", "e2e", 32, "NIST"), "4.87"),
        (("table9", "llama2-7b", "crosslore", "cnn_dm", 32, "ROUGE_L"), "23.40"),
        (("table9", "llama2-13b", "galore", "xsum", 32, "time"), "2.03"),
        (("table10", "llama3-8b", "crosslore", "mawps", None, "1.8"), "83.40"),
    ],
)
def test_a_figure_has_the_digits_that_the_paper_prints(lib, paper, key, printed):
    assert str(paper.by_key[lib.keys.CellKey(*key)].figure) == printed


def test_table_10_has_deviations_over_four_seeds_and_the_others_none(paper):
    for number, table in paper.tables.items():
        cells = [cell for row in table.rows for cell in row.cells]
        assert {cell.seeds for cell in cells} == ({4} if number == 10 else {None})
        assert all((cell.std is not None) == (number == 10) for cell in cells)
    row = paper.tables[10].rows[2]
    assert row.labels == {"dataset": "mawps", "model": "llama2-7b", "metric": "accuracy"}
    assert [str(cell.std) for cell in row.cells] == ["2.80", "0.51", "1.77", "1.34"]


ALPHAS = {
    ("llama2-7b", "e2e"): [32, 32, 128, 64],
    ("llama2-7b", "gsm8k"): [32, 32, 64, 32],
    ("llama2-7b", "mawps"): [32, 16, 32, 32],
    ("llama2-13b", "e2e"): [32, 32, 128, 64],
    ("llama2-13b", "gsm8k"): [32, 32, 32, 32],
    ("llama2-13b", "mawps"): [32, 32, 64, 64],
}


@pytest.mark.parametrize(("model", "dataset"), ALPHAS)
def test_settings_of_tables_3_and_4(paper, model, dataset):
    entries = [paper.hyperparameters(model=model, dataset=dataset, rank=rank) for rank in (16, 32, 128, 256)]
    assert [entry.alpha for entry in entries] == ALPHAS[model, dataset]
    assert {entry.learning_rate for entry in entries} == {1e-6}
    assert {entry.epochs for entry in entries} == {3 if dataset == "mawps" else 1}
    assert {entry.batch_size for entry in entries} == {4 if (model, dataset) == ("llama2-13b", "e2e") else 1}
    assert {entry.residual_ratio_percent for entry in entries} == {1.2}
    assert {(entry.lr_schedule, entry.optimizer) for entry in entries} == {("cosine", "AdamW8bit")}


def test_settings_that_the_paper_does_not_give_are_refused_with_those_it_gives(paper):
    with pytest.raises(LookupError, match="xsum at rank 32. They have: llama2-7b on e2e, .*ranks 16, 32, 128, 256"):
        paper.hyperparameters(model="llama2-7b", dataset="xsum", rank=32)


@pytest.mark.parametrize(
    ("config", "rank"), [("crosslore_gsm8k", 128), ("crosslore_mawps", 128), ("crosslore_e2e", 128)]
)
def test_the_committed_configurations_have_the_settings_of_table_3(paper, config, rank):
    import yaml

    written = yaml.safe_load((ROOT / "yaml_configs" / f"{config}.yaml").read_text(encoding="utf-8"))
    entry = paper.hyperparameters(model="llama2-7b", dataset=config.removeprefix("crosslore_"), rank=rank)
    assert written["rank"] == rank and written["alpha"] == entry.alpha
    assert written["num_train_epochs"] == entry.epochs and written["learning_rate"] == entry.learning_rate
    batch = written["per_device_train_batch_size"] * written["gradient_accumulation_steps"]
    assert batch == entry.batch_size and written["lr_scheduler_type"] == entry.lr_schedule
    assert written["residual_ratio"] == pytest.approx(entry.residual_ratio_percent / 100)


def test_figures_name_a_table_that_holds_their_model(paper):
    assert list(paper.figures) == ["1", "2a", "2b", "3", "4"]
    for number in ("3", "4"):
        figure = paper.figures[number]
        models = {row.labels["model"] for row in paper.tables[figure.table].rows}
        assert set(figure.models) < models
    assert [(n.relation, n.value, n.unit) for n in paper.figures["2a"].numbers] == [(">", 80, "%"), ("about", 50, "%")]


def test_the_missing_ablations_compare_the_whole_method_on_all_scores(lib, paper):
    assert list(paper.ablations) == ["residual", "cross-head"]
    for name, variants in (("residual", 2), ("cross-head", 3)):
        ablation = paper.ablations[name]
        assert ablation.variants[0].settings == {} and len(ablation.variants) == variants
        keys = list(ablation.keys())
        assert len(set(keys)) == len(keys) == variants * 2 * (3 + 3 + 9)
        assert lib.keys.CellKey(f"ablation-{name}", "llama2-7b", "crosslore", "e2e", 128, "CIDEr") in keys


@pytest.mark.slow
def test_the_settings_of_ablations_are_a_configuration(paper):
    from crosslore.integrations.llamafactory.arguments import CrossLoreArguments, CrossLoreFinetuningArguments
    from crosslore.presets import get_preset

    changed = {"residual_ratio": 0.0, "cross_head_targets": None, "projector": "svd"}
    found = {}
    for ablation in paper.ablations.values():
        for variant in ablation.variants:
            arguments = CrossLoreFinetuningArguments(finetuning_type="crosslore", rank=16, **variant.settings)
            assert isinstance(arguments, CrossLoreArguments)
            overrides = arguments.crosslore_overrides(training_seed=0)
            found |= {name: value for name, value in overrides.items() if name not in ("seed", "rank")}
    assert found == changed
    config = get_preset("crosslore").config
    assert all(getattr(config, name) != value for name, value in changed.items())


# Malformed data

GSM_ROW = '["lora",       16, 0.53, 15.40, 25.55, 0.38, 14.11, 47.90],'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (GSM_ROW, GSM_ROW.replace(", 47.90", ""), r"table 1, row 1 \(lora, 16\) must have 2 labels .* got 7 entries"),
        (GSM_ROW, GSM_ROW.replace("47.90", "48"), r"table 1, row 1 \(lora, 16\), mawps accuracy must be .* got 48\."),
        (GSM_ROW, GSM_ROW.replace("47.90", '"?"'), r"table 1, row 1 \(lora, 16\), mawps accuracy must be .* got '\?'"),
        (GSM_ROW, GSM_ROW.replace("47.90", "-47.90"), r"row 1 .* must be finite and not negative, got -47.90"),
        (GSM_ROW, GSM_ROW.replace("47.90", "nan"), r"row 1 .* must be finite and not negative, got NaN"),
        (GSM_ROW, GSM_ROW.replace("47.90", "[1.0, 2.0, 3.0]"), r"row 1 .* must be a figure or \[mean, deviation\]"),
        (GSM_ROW, GSM_ROW.replace("lora", "lra"), r"row 1 \(lra, 16\): unknown method 'lra'. Did you mean 'lora'\?"),
        (
            GSM_ROW,
            GSM_ROW.replace("16,", '"16",'),
            r"table 1, row 1 \(lora, 16\), rank must be a whole number, got '16'",
        ),
        (GSM_ROW, f"{GSM_ROW}\n  {GSM_ROW}", r"table 1, row 2 \(lora, 16\) must be there once, got it twice"),
        ('fixed = { method = "crosslore" }', "fixed = {}", r"table 10, row 1 .* must say the method, none does"),
        ("fixed = { rank = 32 }", "fixed = { rnk = 32 }", r"table 9, row 1 .* must be one of model, .* got 'rnk'"),
        ('column_key = "residual_ratio"\n', 'column_key = "ratio"\n', r"table 10, `column_key` must be 'metric' or"),
        ('columns = ["cnn_dm.time", ', 'columns = ["cnn_dn.time", ', r"table 9, column 'cnn_dn.time': unknown dataset"),
        ('columns = ["cnn_dm.time", ', 'columns = ["cnn_dm.tme", ', r"table 9, column 'cnn_dm.tme': unknown metric"),
        ("number = 10", "number = 9", "table 9 is there 2 times"),
        ("number = 10", "number = 3", "table 3 is there 2 times"),
        ("number = 10", "numbr = 10", r"\[\[tables\]\] 8 has no `number`, which must be a whole number"),
        ("seeds = 4\nfixed", "seed = 4\nfixed", "table 10: unknown key 'seed'. Did you mean 'seeds'"),
        ("alpha = [32, 16, 32, 32]", "alpha = [32, 16, 32]", "table 3, datasets, mawps, `alpha` must have 4 values"),
        ("alpha = [32, 16, 32, 32]", "alpha = 0.5", "table 3, datasets, mawps, `alpha` must be a whole number"),
        ('MET", better = "higher"', 'MET", better = "high"', "metrics, METEOR, `better` must be 'lower' or 'higher'"),
        ("[paper]", "[extra]\n[paper]", "paper.toml: unknown key 'extra'"),
        ("[paper]", "[papr]", "paper.toml has no `paper`, which must be a table of keys"),
        ('number = "2b"', 'number = "2b"\nx = 1', "figure 2b: unknown key 'x'"),
        ('title = "Ablation of the cross-head', 'titel = "Ablation of the cross-head', "cross-head has no `title`"),
        ('id = "arXiv 2412.19820"', "id = ", "is not TOML"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(lib, tmp_path, old, new, message):
    with pytest.raises(lib.reading.PaperDataError, match=message):
        load_edited(lib, tmp_path, old, new)


def test_a_file_that_is_not_there_is_named(lib, tmp_path):
    with pytest.raises(lib.reading.PaperDataError, match="none.toml cannot be read"):
        lib.paper.load_paper(tmp_path / "none.toml")


def test_a_missing_figure_is_a_dash_in_every_format(lib, tmp_path):
    paper = load_edited(lib, tmp_path, GSM_ROW, GSM_ROW.replace("47.90", '"-"'))
    assert paper.tables[1].rows[0].cells[5].figure is None
    made = lib.grids.grid_of(paper, 1)
    assert "| LoRA | 16 | paper | 0.53 | 15.40 | 25.55 | 0.38 | 14.11 | – |\n" in lib.render.render(made, "md")
    assert "\nTable 1,LoRA,16,paper,0.53,15.40,25.55,0.38,14.11,-\n" in lib.render.render(made, "csv")
    assert "\nLoRA & 16 & paper & 0.53 & 15.40 & 25.55 & 0.38 & 14.11 & -- \\\\\n" in lib.render.render(made, "latex")


# Rendering


@pytest.mark.parametrize("number", range(1, 11))
def test_every_format_holds_every_entry_and_marks_the_source(lib, paper, number):
    made = lib.grids.grid_of(paper, number)
    entries = [value.printed for line in made.lines for value in line.values]
    assert made.sources == ("paper",)
    caption = (paper.tables.get(number) or paper.hyperparameter_tables[number]).caption

    lines = lib.render.render(made, "md").splitlines()
    assert lines[0].startswith(f"**Table {number}.** {caption} (Source: paper")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    lead = len(made.labels) + 1
    assert [row[lead - 1] for row in rows] == ["paper"] * len(made.lines)
    assert [cell.split(" ± ")[0] for row in rows for cell in row[lead:]] == entries
    assert len(lines[2].strip("|").split("|")) == lead + len(made.heads)

    header, *rows = csv.reader(io.StringIO(lib.render.render(made, "csv")))
    assert len(set(header)) == len(header) and {len(row) for row in rows} == {len(header)}
    kept = [n for n, name in enumerate(header) if n > lead and not name.endswith((" std", " seeds"))]
    assert [row[n] for row in rows for n in kept] == entries

    latex = lib.render.render(made, "latex")
    rows = [line.removesuffix(" \\\\").split(" & ") for line in latex.split("\\midrule\n")[1].splitlines()]
    rows = rows[: len(made.lines)]
    assert [cell.split(" $")[0].replace("\\", "") for row in rows for cell in row[lead:]] == entries
    assert f"\\begin{{tabular}}{{{'l' * lead}{'r' * len(made.heads)}}}" in latex


def test_table_1_in_markdown(lib, paper):
    lines = lib.render.render(lib.grids.grid_of(paper, 1), "md").splitlines()
    heads = "GSM8k Time (hours) ↓ | GSM8k Mem. (GB) ↓ | GSM8k Acc. (%) ↑ | MAWPS Time (hours) ↓"
    assert lines[2] == f"| Method | Rank | source | {heads} | MAWPS Mem. (GB) ↓ | MAWPS Acc. (%) ↑ |"
    assert lines[-1] == "| CrossLore | 128 | paper | 0.92 | 15.73 | 34.65 | 0.62 | 15.44 | 67.64 |"


def test_table_10_states_deviations_and_says_the_seeds_once(lib, paper):
    made = lib.grids.grid_of(paper, 10)
    text = lib.render.render(made, "md")
    assert "| GSM8k | LLaMA2-7B | Acc. | paper | 33.64 ± 0.97 | 33.70 ± 1.00 |" in text
    assert text.count("n = 4") == 1
    row = next(csv.DictReader(io.StringIO(lib.render.render(made, "csv"))))
    title = "Residual ratio (%) 1.2"
    assert [row[title], row[f"{title} std"], row[f"{title} seeds"]] == ["33.80", "0.69", "4"]
    assert "33.64 $\\pm$ 0.97 & 33.70 $\\pm$ 1.00" in lib.render.render(made, "latex")


def test_table_3_has_the_settings_of_each_dataset_and_rank(lib, paper):
    lines = lib.render.render(lib.grids.grid_of(paper, 3), "md").splitlines()
    assert "| α | paper | 32 | 32 | 128 | 64 | 32 | 32 | 64 | 32 | 32 | 16 | 32 | 32 |" in lines
    assert len(lines) == 4 + 7 and lines[6].count("1E-06") == 12 and lines[-1].count("1.2%") == 12


def test_latex_escapes_its_special_letters_and_spans_groups(lib):
    value = lib.render.Value(text="50% & a_b {#1} \\x ~^ ≈")
    text = lib.render.render(grid(lib, ("a", "paper", [value, None]), heads=2, caption="100% $"), "latex")
    escaped = r"50\% \& a\_b \{\#1\} \textbackslash{}x \textasciitilde{}\textasciicircum{} $\approx$"
    assert f"a & paper & {escaped} & -- \\\\" in text
    assert "\\caption{100\\% \\$ (Source: paper.)}" in text
    assert " &  & \\multicolumn{2}{c}{g} \\\\\n\\cmidrule(lr){3-4}\n" in text


def test_markdown_escapes_bars_and_csv_quotes_commas(lib):
    made = grid(lib, ("a|b", "paper", [lib.render.Value(text="x, y")]))
    assert "| a\\|b | paper | x, y |" in lib.render.render(made, "md")
    assert list(csv.reader(io.StringIO(lib.render.render(made, "csv"))))[1] == ["Table 1", "a|b", "paper", "x, y"]


def test_an_unknown_format_lists_the_known_ones(lib):
    with pytest.raises(ValueError, match="one of md, csv, latex, got 'html'"):
        lib.render.render(grid(lib, ("a", "paper", [None])), "html")


def test_measured_values_stand_below_the_papers_with_their_difference(lib, paper):
    key = lib.keys.CellKey("table1", "llama2-7b", "crosslore", "gsm8k", 128, "accuracy")
    memory = key._replace(column="memory")
    ours = {
        key: lib.render.measured([34.0, 35.0, 36.5], like=paper.by_key[key].figure),
        memory: lib.render.Value(text="out of memory"),
    }
    made = lib.grids.grid_of(paper, 1, measured=ours)
    assert len(made.lines) == 8 + 2 and made.sources == ("paper", "measured", "difference")
    text = lib.render.render(made, "md")
    rows = [line for line in text.splitlines() if line.startswith("| CrossLore | 128 |")]
    assert rows == [
        "| CrossLore | 128 | paper | 0.92 | 15.73 | 34.65 | 0.62 | 15.44 | 67.64 |",
        "| CrossLore | 128 | measured | – | out of memory | 35.17 ± 1.26 (n = 3) | – | – | – |",
        "| CrossLore | 128 | difference | – | – | +0.52 | – | – | – |",
    ]
    table = list(csv.DictReader(io.StringIO(lib.render.render(made, "csv"))))
    title, mine = "GSM8k Acc. (%)", table[-2]
    assert (mine["source"], mine[title], mine[f"{title} std"], mine[f"{title} seeds"]) == (
        "measured",
        "35.17",
        "1.26",
        "3",
    )
    assert (table[-1]["source"], table[-1][title], table[-1][f"{title} std"]) == ("difference", "+0.52", "")
    assert "& out of memory & 35.17 $\\pm$ 1.26 (n = 3) & --" in lib.render.render(made, "latex")


def test_a_measured_value_of_another_table_changes_nothing(lib, paper):
    key = lib.keys.CellKey("table2", "llama2-7b", "lora", "e2e", 16, "BLEU")
    ours = {key: lib.render.measured([60.0])}
    assert lib.grids.grid_of(paper, 1, measured=ours) == lib.grids.grid_of(paper, 1)
    assert len(lib.grids.grid_of(paper, 2, measured=ours).lines) == 8 + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "accurcy"}, "unknown column 'accurcy'. Did you mean 'accuracy'"),
        ({"dataset": "xsum"}, "must be of a cell of table 1, got .*xsum.* Correct its key"),
    ],
)
def test_a_measured_value_without_a_column_is_refused(lib, paper, change, message):
    key = lib.keys.CellKey("table1", "llama2-7b", "crosslore", "gsm8k", 128, "accuracy")._replace(**change)
    with pytest.raises(ValueError, match=message):
        lib.grids.grid_of(paper, 1, measured={key: lib.render.measured([1.0])})


def test_the_papers_galore_is_the_one_of_llamafactory_and_ours_has_a_row_of_its_own(lib, paper):
    key = lib.keys.CellKey("table1", "llama2-7b", "galore", "gsm8k", 16, "accuracy")
    ours = {key: lib.render.measured([26.0]), key._replace(method="galore_stock"): lib.render.measured([27.0])}
    rows = [line for line in lib.grids.grid_of(paper, 1, measured=ours).lines if "GaLore" in line.labels[0]][:4]
    shown = [(*line.labels, line.source, line.values[2].printed) for line in rows]
    assert shown == [
        ("GaLore", "16", "paper", "26.31"),
        ("GaLore", "16", "measured", "27.00"),
        ("GaLore", "16", "difference", "+0.69"),
        ("GaLore (this code)", "16", "measured", "26.00"),
    ]


def test_measured_takes_the_decimals_of_the_figure_and_the_deviation_of_a_sample(lib):
    value = lib.render.measured([1.0, 2.0, 4.0, 5.0], like=Decimal("53.966"))
    assert (str(value.number), str(value.std), value.seeds) == ("3.000", "1.826", 4)
    assert str(lib.render.measured([0.41234], like=Decimal("0.4")).number) == "0.41"
    assert lib.render.measured([0.5]).std is None
    for wrong in ([], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="finite number for each seed"):
            lib.render.measured(wrong)


# The command


def run(*words):
    command = [sys.executable, str(ROOT / "scripts" / "make_table.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def test_the_command_prints_all_tables_in_their_order():
    result = run("--paper-only")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\*\*Table (\d+)\.", result.stdout, re.M) == [str(n) for n in range(1, 11)]


def test_the_command_prints_one_table_in_one_format(lib, paper):
    result = run("--paper-only", "--table", "9", "--format", "csv")
    assert result.returncode == 0, result.stderr
    assert result.stdout == lib.render.render(lib.grids.grid_of(paper, 9), "csv")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--paper-only", "--table", "11"), "table must be one of 1, 2, 3, .*10, got 11"),
        (("--table", "1", "--results", "/nowhere"), "/nowhere must be a folder with results"),
        (("--paper-only", "--ablation", "residual"), "the paper has no such table"),
        (("--paper-only", "--format", "html"), "invalid choice: 'html'"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(words, message):
    result = run(*words)
    assert result.returncode == 2 and re.search(message, result.stderr)
