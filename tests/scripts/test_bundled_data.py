"""The bundled data set: made by the committed generator, right, varied, and ours."""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
SETS = {
    "crosslore_restaurants": "restaurants_train.json",
    "crosslore_restaurants_test": "restaurants_test.json",
    "crosslore_arithmetic": "arithmetic_train.json",
    "crosslore_arithmetic_test": "arithmetic_test.json",
}
RESTAURANTS = ("restaurants_train.json", "restaurants_test.json")
ARITHMETIC = ("arithmetic_train.json", "arithmetic_test.json")


def rows_of(file):
    return json.loads((DATA / file).read_text(encoding="utf-8"))


def attributes_of(meaning):
    return dict(re.findall(r"([\w ]+)\[([^\]]*)\](?:, |$)", meaning))


def references():
    return [json.loads(line) for line in (DATA / "restaurants_test_references.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def generator(load_script):
    return load_script("make_bundled_data")


def test_the_generator_writes_the_committed_files_byte_for_byte(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "make_bundled_data.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted([*SETS.values(), "dataset_info.json", "restaurants_test_references.jsonl"])
    for name in written:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_check_accepts_the_committed_files(generator, capsys):
    assert generator.main(["--check"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_check_names_missing_and_edited_files_and_leaves_them_alone(generator, tmp_path, capsys):
    generator.main(["--output", str(tmp_path)])
    (tmp_path / "arithmetic_test.json").write_text("[]")
    (tmp_path / "dataset_info.json").unlink()
    assert generator.main(["--output", str(tmp_path), "--check"]) == 1
    message = capsys.readouterr().err
    assert "arithmetic_test.json" in message and "dataset_info.json" in message and "make_bundled_data.py" in message
    assert "arithmetic_train.json" not in message
    assert (tmp_path / "arithmetic_test.json").read_text() == "[]"
    assert not (tmp_path / "dataset_info.json").exists()


def test_dataset_info_names_the_four_sets_in_ascii():
    info = json.loads((DATA / "dataset_info.json").read_bytes().decode("ascii"))
    assert info == {name: {"file_name": file} for name, file in SETS.items()}


@pytest.mark.parametrize("file", SETS.values())
def test_every_set_is_large_enough_and_has_alpaca_rows(file):
    rows = rows_of(file)
    assert len(rows) >= (600 if "train" in file else 100)
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(text, str) and text == text.strip() and text for text in row.values())
        assert not re.search(r"[{}|\0]|  ", "".join(row.values()))


def test_training_and_test_share_no_restaurant_and_no_description():
    train, test = (rows_of(file) for file in RESTAURANTS)
    meanings = [frozenset(attributes_of(row["input"]).items()) for row in train + test]
    assert len(set(meanings)) == len(meanings)
    outputs = [row["output"] for row in train] + [text for row in references() for text in row["references"]]
    assert len(set(outputs)) == len(outputs)
    assert len(test) == len(references())


def test_training_and_test_share_no_problem():
    train, test = (rows_of(file) for file in ARITHMETIC)
    questions = [row["input"] for row in train + test]
    assert len(set(questions)) == len(questions)


def test_test_references_belong_to_the_test_rows():
    for row, more in zip(rows_of("restaurants_test.json"), references(), strict=True):
        assert more["input"] == row["input"]
        assert more["references"][0] == row["output"]
        assert len(more["references"]) == 3


def test_descriptions_say_every_attribute(load_script):
    words = load_script("bundled_vocabulary")
    rows = [(row["input"], row["output"]) for file in RESTAURANTS for row in rows_of(file)]
    rows += [(row["input"], text) for row in references() for text in row["references"]]
    # words of which at least one must be in the text, for values that need not stand there as they are
    signs = {
        ("priceRange", "cheap"): "cheap|inexpensive|low|budget|little",
        ("priceRange", "moderate"): "moderate|mid-priced|average prices",
        ("priceRange", "high"): "expensive|high|pricey|steep",
        ("customer rating", "low"): "low|poor",
        ("customer rating", "average"): "average",
        ("customer rating", "high"): "high|top-rated|well-rated|excellent",
        ("customer rating", "1 out of 5"): "1 out of 5|one-star|one star",
        ("customer rating", "3 out of 5"): "3 out of 5|three-star",
        ("customer rating", "5 out of 5"): "5 out of 5|five-star|five stars",
        ("familyFriendly", "yes"): "famil|child",
        ("familyFriendly", "no"): "adults-only|(not|no) .*(famil|child)",
        ("area", "riverside"): "river",
        ("area", "city centre"): "city",
    }
    for meaning, text in rows:
        attributes = attributes_of(meaning)
        assert 4 <= len(attributes) <= 8
        assert meaning.startswith("name[") and set(attributes) <= set(words.ATTRIBUTES)
        for name, value in attributes.items():
            if "£" in value:
                assert set(re.findall(r"\d+", value)) <= set(re.findall(r"\d+", text)), (meaning, text)
            else:
                default = re.escape(value).replace("old\\ town", "old .*town")
                assert re.search(signs.get((name, value), default), text, re.IGNORECASE), (meaning, text)
        for food in set(words.FOODS) - set(attributes.values()):
            assert food not in text, (meaning, text)


def test_descriptions_have_right_articles_and_capitals():
    for text in (row["output"] for file in RESTAURANTS for row in rows_of(file)):
        assert not re.search(r"\b[Aa] (?!one-star)[aeiouAEIOU]", text), text
        assert not re.search(r"\b[Aa]n [^aeiouAEIOU]", text), text
        assert not re.search(r"(^|[.?] )[a-z]", text) and text.endswith("."), text


def test_descriptions_follow_many_patterns(load_script):
    words = load_script("bundled_vocabulary")
    values = {v for row in rows_of("restaurants_train.json") for v in attributes_of(row["input"]).values()}
    pattern = re.compile("|".join(sorted(map(re.escape, values | set(words.PLACE_NOUNS)), key=len, reverse=True)))
    skeletons = Counter(pattern.sub("_", row["output"]) for row in rows_of("restaurants_train.json"))
    assert len(skeletons) > 600
    openings = Counter(" ".join(skeleton.split()[:3]) for skeleton in skeletons)
    assert len(openings) > 60
    assert max(openings.values()) < 0.2 * 800


def test_attribute_lists_come_in_several_orders_and_lengths():
    lists = [attributes_of(row["input"]) for row in rows_of("restaurants_train.json")]
    assert len({tuple(attributes) for attributes in lists}) > 150
    assert {len(attributes) for attributes in lists} == {4, 5, 6, 7, 8}


def test_worked_solutions_are_right_and_use_known_numbers():
    for row in (row for file in ARITHMETIC for row in rows_of(file)):
        *steps, last = row["output"].split("\n")
        known = {Fraction(number) for number in re.findall(r"\d+(?:\.\d+)?", row["input"])}
        known |= {Fraction(constant) for constant in (2, 3, 4, 12, 100)}  # half, average, quarter, dozen, per cent
        assert 1 <= len(steps) <= 3
        for step in steps:
            ((left, symbol, right, result),) = re.findall(
                r"([\d.]+) ([-+*/]) ([\d.]+) = (\d+(?:\.\d\d)?)(?![\d])", step
            )
            a, b = Fraction(left), Fraction(right)
            assert a in known and b in known, row
            value = a + b if symbol == "+" else a - b if symbol == "-" else a * b if symbol == "*" else a / b
            assert value == Fraction(result) and value > 0, row
            known.add(value)
        assert last == f"#### {result}", row


def test_problems_tell_many_stories_of_one_to_three_operations():
    rows = rows_of("arithmetic_train.json")
    stories = Counter(re.sub(r"[\d.]+", "0", re.sub(r"\b[A-Z]\w+", "N", row["input"])) for row in rows)
    assert len(stories) > 200
    assert max(stories.values()) < 0.03 * len(rows)
    operations = Counter(row["output"].count("=") for row in rows)
    assert set(operations) == {1, 2, 3} and min(operations.values()) > 0.15 * len(rows)
    assert sum("." in row["output"].split("#### ")[1] for row in rows) > 0.05 * len(rows)


@pytest.mark.parametrize("file", SETS.values())
def test_no_row_is_copied_from_the_public_data_sets(file):
    folder = os.environ.get("CROSSLORE_DATA_DIR")
    if not folder:
        pytest.skip("CROSSLORE_DATA_DIR is not set: needs the public data sets")
    theirs = set()
    for path in Path(folder).glob("e2e/*set*.csv"):
        with path.open(encoding="utf-8", newline="") as stream:
            theirs |= {cell.strip() for cells in csv.reader(stream) for cell in cells}
    for path in [*Path(folder).glob("gsm8k/*.jsonl"), *Path(folder).glob("mawps/*.jsonl")]:
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        theirs |= {value.strip() for row in rows for value in row.values() if isinstance(value, str)}
    their_names = {attributes_of(text).get("name") for text in theirs if text.startswith("name[")}
    assert len(theirs) > 50_000 and len(their_names) > 30
    for row in rows_of(file):
        assert row["input"] not in theirs and row["output"] not in theirs
        assert not {attributes_of(row["input"]).get("name"), attributes_of(row["input"]).get("near")} & (
            their_names - {None}
        )


@pytest.mark.slow
def test_llamafactory_loads_the_bundled_sets(tmp_path):
    pytest.importorskip("llamafactory")
    code = (
        "from llamafactory.data.parser import get_dataset_list\n"
        "from llamafactory.data.loader import _load_single_dataset\n"
        "from llamafactory.hparams import DataArguments, ModelArguments, TrainingArguments\n"
        f"model, data = ModelArguments(model_name_or_path='-'), DataArguments(dataset_dir={str(DATA)!r})\n"
        f"training = TrainingArguments(output_dir={str(tmp_path)!r}, use_cpu=True)\n"
        "counts = []\n"
        f"for entry in get_dataset_list({list(SETS)!r}, data.dataset_dir):\n"
        "    rows = _load_single_dataset(entry, model, data, training)\n"
        "    assert rows[0]['_prompt'][0]['content'].count('\\n') == 1, rows[0]\n"
        "    assert all(row['_response'][0]['content'] for row in rows)\n"
        "    counts.append(len(rows))\n"
        "print(counts)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "[800, 120, 800, 120]" in found.stdout
