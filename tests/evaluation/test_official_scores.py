"""Scores that the official scripts printed, with the commands, against ours.

e2e-metrics, commit 1b9c4d87fd0bbb171ea966741cdc012588581ed4 (Perl mteval-v13a, METEOR 1.5, COCO caption code):

    python measure_scores.py REFERENCES OUTPUTS

BLEU and NIST as its Perl script prints them, with 4 decimals; the others with 8, which a changed print statement gave.
The texts in `fixtures/` were written for this project. Those of the E2E challenge are not part of it: their tests run
where CROSSLORE_DATA_DIR names a folder that holds them.
"""

import os
from pathlib import Path

import pytest

pytest.importorskip("pycocoevalcap", reason='needs the evaluation packages: pip install "crosslore[eval]"')

from crosslore_eval.inputs import read_outputs, read_references  # noqa: E402
from crosslore_eval.metrics.base import Corpus  # noqa: E402
from crosslore_eval.metrics.java import find_java  # noqa: E402
from crosslore_eval.protocols import E2E_OFFICIAL, PAPER, Missing, Protocol  # noqa: E402
from crosslore_eval.scoring import corpus_of, score_corpus  # noqa: E402
from crosslore_eval.tasks.e2e import E2E  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
# Half a unit of the 4th decimal, and the rounding of what the script printed.
TOLERANCE = 5e-5 + 1e-9

needs_java = pytest.mark.skipif(find_java() is None, reason="METEOR and the PTB tokeniser need Java")


def scores_of(corpus: Corpus, protocol: Protocol = E2E_OFFICIAL) -> dict[str, float]:
    report = score_corpus(E2E, protocol, corpus)
    assert [score.reason for score in report.scores] == [""] * len(report.scores)
    return {score.name: score.value for score in report.scores if score.value is not None}


def corpus_from(outputs: Path, references: Path) -> Corpus:
    system = read_outputs(outputs)
    return corpus_of(system, read_references(references, task=E2E, count=len(system.predictions)), task=E2E)


def challenge(name: str) -> Path:
    folder = os.environ.get("CROSSLORE_DATA_DIR")
    path = Path(folder or "") / "e2e" / name
    if folder is None or not path.is_file():
        pytest.skip(f"needs e2e/{name} below CROSSLORE_DATA_DIR")
    return path


@needs_java
@pytest.mark.parametrize(
    ("references", "recorded"),
    [
        ("references.txt", (0.4051, 6.9262, 0.37636592, 0.61555552, 2.70958573)),  # 1 to 45 an example
        ("single_references.txt", (0.3075, 5.7950, 0.34214791, 0.55249217, 3.25166653)),
    ],
)
def test_scores_equal_the_official_script(references: str, recorded: tuple[float, ...]) -> None:
    found = scores_of(corpus_from(FIXTURES / "outputs.txt", FIXTURES / references))
    assert found == pytest.approx(dict(zip(NAMES, recorded, strict=True)), abs=TOLERANCE)


@needs_java
def test_tiny_corpus_without_4_grams_equals_the_official_script() -> None:
    corpus = Corpus.of(["two words", "", "a b c"], [["two words"], ["some thing"], ["a c b"]])
    recorded = (0.4283, 1.7418, 0.35006868, 0.55555556, 2.5)
    assert scores_of(corpus) == pytest.approx(dict(zip(NAMES, recorded, strict=True)), abs=TOLERANCE)


@needs_java
@pytest.mark.parametrize(
    ("split", "recorded"),
    [
        ("test", (0.6593, 8.6094, 0.4483, 0.6850, 2.2338)),
        ("dev", (0.6925, 8.4781, 0.4703, 0.7257, 2.3987)),
    ],
)
def test_tgen_baseline_scores_equal_the_published_ones(split: str, recorded: tuple[float, ...]) -> None:
    found = scores_of(corpus_from(challenge(f"tgen_{split}_output.txt"), challenge(f"{split}_refs.txt")))
    assert {name: round(value, 4) for name, value in found.items()} == dict(zip(NAMES, recorded, strict=True))


@needs_java
def test_example_inputs_of_the_official_script() -> None:
    # Its example-inputs/ are the first 10 examples of the development set, and TGEN's outputs for them.
    outputs = challenge("tgen_dev_output.txt").read_text(encoding="utf-8").split("\n")[:10]
    blocks = challenge("dev_refs.txt").read_text(encoding="utf-8").strip().split("\n\n")[:10]
    corpus = Corpus.of(outputs, [block.split("\n") for block in blocks])
    recorded = (0.7203, 7.8212, 0.48007167, 0.79095261, 2.30394314)
    assert scores_of(corpus) == pytest.approx(dict(zip(NAMES, recorded, strict=True)), abs=TOLERANCE)


@needs_java
def test_paper_protocol_gives_the_figures_that_identified_it() -> None:
    # Single references of TGEN's test outputs, 4693 rows, computed with the libraries themselves.
    corpus = corpus_from(challenge("tgen_test_output.txt"), challenge("test_refs.txt"))
    found = scores_of(corpus, PAPER)
    assert found["METEOR"] == pytest.approx(36.57, abs=0.005)
    assert found["NIST"] == pytest.approx(5.23, abs=0.005)
    assert found["CIDEr"] == pytest.approx(1.854, abs=0.0005)
    rounded = {name: round(found[name], 2) for name in ("BLEU", "ROUGE_1", "ROUGE_2", "ROUGE_L")}
    assert rounded == {"BLEU": 64.53, "ROUGE_1": 68.70, "ROUGE_2": 39.70, "ROUGE_L": 48.97}


def test_meteor_without_java_says_so_and_the_others_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    corpus = corpus_from(FIXTURES / "outputs.txt", FIXTURES / "references.txt")
    by_name = {result.name: result for result in E2E_OFFICIAL.score(corpus)}
    meteor = by_name.pop("METEOR")
    assert isinstance(meteor, Missing)
    assert "needs Java" in meteor.reason and "apt-get install default-jre-headless" in meteor.reason
    recorded = {"BLEU": 0.4051, "NIST": 6.9262, "ROUGE_L": 0.61555552, "CIDEr": 2.70958573}
    values = {name: result.value() for name, result in by_name.items() if not isinstance(result, Missing)}
    # Another tokeniser, which the signature names: 1 % (ROUGE_L) and 4 % (CIDEr) apart on these texts, full of
    # unusual punctuation; BLEU and NIST do not use it.
    assert values == pytest.approx(recorded, rel=0.05)
    assert [values[name] for name in ("BLEU", "NIST")] == pytest.approx([0.4051, 6.9262], abs=TOLERANCE)
    signatures = {result.name: result.signature for result in by_name.values() if not isinstance(result, Missing)}
    assert "|tok:nltk-treebank-" in signatures["ROUGE_L"] and "|tok:nltk-treebank-" in signatures["CIDEr"]
    assert "|tok:mteval13a|" in signatures["BLEU"]
