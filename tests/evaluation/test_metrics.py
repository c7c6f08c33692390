"""Single metrics: corners, libraries they wrap, and formulas that are ours."""

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pycocoevalcap", reason='needs the evaluation packages: pip install "crosslore[eval]"')

from crosslore_eval.errors import EvalError  # noqa: E402
from crosslore_eval.metrics import coco, java, llamafactory, meteor, mteval, rouge  # noqa: E402
from crosslore_eval.metrics.base import Corpus, Statistics  # noqa: E402
from crosslore_eval.protocols import E2E_OFFICIAL, PAPER, PAPER_SUMMARIES, ROUGE_SCORE, Missing, Protocol  # noqa: E402

needs_java = pytest.mark.skipif(java.find_java() is None, reason="METEOR and the PTB tokeniser need Java")
PAIRS = [
    ("The Heron is a cheap Thai place by the river.", "The Heron is a Thai restaurant at the riverside. It is cheap."),
    ("", "Something was expected."),
    ("word", "word"),
    ("caf\u00e9 \u996d\u5e97 \U0001f35c", "a caf\u00e9, \u996d\u5e97"),
    ("...", "!!!"),
    ("A price of \u00a320-25, 5 out of 5", "\u00a320-25 is its price range"),
]


def corpus() -> Corpus:
    return Corpus.of([output for output, _ in PAIRS], [[reference] for _, reference in PAIRS])


def values(results: list[Statistics | Missing]) -> dict[str, float]:
    return {result.name: result.value() for result in results if isinstance(result, Statistics)}


PROTOCOLS = {"e2e-official": E2E_OFFICIAL, "paper": PAPER, "summaries": PAPER_SUMMARIES, "rouge-score": ROUGE_SCORE}


# Degenerate corpora


DEGENERATE: list[tuple[list[str], list[list[str]]]] = [
    ([""], [["a reference"]]),
    (["", "  ", "\t"], [["a"], ["b c"], ["d e f g"]]),
    (["..."], [["!"]]),
    (["an output"], [["..."]]),
    (["an output"], [[""]]),
    (["one two three four five"], [[f"reference number {i}" for i in range(45)]]),
    (["\u996d\u5e97 \U0001f35c \u0645\u0631\u062d\u0628\u0627"], [["\u996d\u5e97"]]),
    (["a ||| b"], [["a ||| b ||| c"]]),
    (["x" * 5000], [["x y z"]]),
    (["half a \ud83c character"], [["a whole one"]]),
]


def assert_finite(protocol: Protocol, outputs: list[str], references: list[list[str]]) -> None:
    for result in protocol.score(Corpus.of(outputs, references)):
        if isinstance(result, Missing):
            assert java.find_java() is None, result.reason
        else:
            assert np.isfinite(result.value()) and result.value() >= 0.0, result.name


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
@pytest.mark.parametrize(("outputs", "references"), DEGENERATE)
def test_degenerate_corpora_give_finite_scores_without_java(
    protocol: Protocol, outputs: list[str], references: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert_finite(protocol, outputs, references)


@needs_java
@pytest.mark.parametrize("case", [2, 4])
def test_texts_without_words_give_finite_scores(case: int) -> None:
    assert_finite(E2E_OFFICIAL, *DEGENERATE[case])


@needs_java
def test_degenerate_texts_beside_each_other_keep_their_places() -> None:
    outputs = [text for texts, _ in DEGENERATE for text in texts]
    references = [texts for _, examples in DEGENERATE for texts in examples]
    assert_finite(E2E_OFFICIAL, [*outputs, "a cheap pub"], [*references, ["a cheap pub"]])
    captions = coco.CocoCorpus(Corpus.of([*outputs, "a cheap pub"], [*references, ["a cheap pub"]]))
    assert coco.rouge_l(captions).rows[-1, 0] == pytest.approx(1.0)


@needs_java
def test_identical_outputs_reach_the_highest_score(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The Heron is a cheap Thai place by the river.", "It is a pub near the clock tower with good food."]
    same = Corpus.of(texts, [[text] for text in texts])
    found = values(E2E_OFFICIAL.score(same))
    assert found["BLEU"] == pytest.approx(1.0)
    assert found["ROUGE_L"] == pytest.approx(1.0)
    assert found["METEOR"] == pytest.approx(1.0)
    assert found["CIDEr"] == pytest.approx(10.0)
    monkeypatch.setattr("shutil.which", lambda name: None)
    paper = values(PAPER.score(same))
    assert [paper[name] for name in ("BLEU", "ROUGE_1", "ROUGE_2", "ROUGE_L")] == pytest.approx([100.0] * 4, abs=1e-3)


def test_white_space_of_any_kind_counts_as_one_space() -> None:
    spaced = Corpus.of(["a\u2028b\tc\x0c d"], [["a  b c\nd"]])
    assert spaced.plain == Corpus(("a b c d",), (("a b c d",),))


def test_llama_factory_scores_the_texts_as_they_are() -> None:
    """Its `ComputeSimilarity` counts line breaks as characters: its formula, on the raw texts."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    output, reference = "Two lines\nof a summary.", "Two lines of\na summary.\n"
    expected = sentence_bleu([list(reference)], list(output), smoothing_function=SmoothingFunction().method3)
    bleu = next(one for one in llamafactory.similarity(Corpus.of([output], [[reference]])) if one.name == "BLEU")
    assert bleu.value() == pytest.approx(100 * expected, abs=1e-4)
    joined = sentence_bleu(
        [list(" ".join(reference.split()))],
        list(" ".join(output.split())),
        smoothing_function=SmoothingFunction().method3,
    )
    assert abs(expected - joined) > 1e-3  # so this test can fail


@pytest.mark.parametrize(
    ("outputs", "references", "message"),
    [
        ([], [], "got 0 outputs and 0 examples"),
        (["x"], [["a"], ["b"]], "got 1 output and 2 examples"),
        (["x", "y"], [["a"], []], "references of example 2 must be a list of at least one text"),
        (["x"], ["a"], "references of example 1 must be a list of at least one text, got 'a'"),
    ],
)
def test_corpora_that_do_not_pair_up_are_refused(outputs: list[str], references: Any, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        Corpus.of(outputs, references)


# Signatures


def test_every_signature_names_references_settings_and_version() -> None:
    several = Corpus.of(["a b"], [["a", "b", "c"]])
    for result in E2E_OFFICIAL.score(several):
        if isinstance(result, Statistics):
            assert re.fullmatch(rf"{result.name}\|refs:3\|.*\|v:\d+\.\d+\.\d+", result.signature)
    assert mteval.bleu(mteval.MtevalCorpus(several)).signature.startswith(
        "BLEU|refs:3|case:lc|tok:mteval13a|smooth:exp|"
    )
    mixed = Corpus.of(["a", "b"], [["a"], ["b", "c"]])
    assert "|refs:1-2|" in mteval.bleu(mteval.MtevalCorpus(mixed)).signature


# BLEU and NIST


def test_bleu_agrees_with_precisions_counted_by_hand() -> None:
    # 7 tokens each; matching 1- to 4-grams 6/7, 4/6, 2/5, 1/4 and equal lengths.
    found = mteval.bleu(mteval.MtevalCorpus(Corpus.of(["the cat sat on the mat now"], [["the cat sat on a mat now"]])))
    assert found.value() == pytest.approx((6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_bleu_equals_sacrebleu_where_the_two_formulas_agree() -> None:
    from sacrebleu.metrics import BLEU

    outputs = ["The Heron is a Thai place by the river.", "It is a pub, near the Clock Tower!", "$5.00 isn't much"]
    references = [["The Heron is a cheap Thai place."], ["It is a pub near the Clock Tower."], ["$5.00 is not much"]]
    theirs = BLEU(lowercase=True, smooth_method="exp").corpus_score(outputs, [[r[0] for r in references]])
    ours = mteval.bleu(mteval.MtevalCorpus(Corpus.of(outputs, references))).value()
    assert 100 * ours == pytest.approx(theirs.score, abs=1e-9)


def test_nist_agrees_with_a_sum_written_out_by_hand() -> None:
    # One reference "a b a": info(a) = log2(3/2), info(b) = log2(3/1), info(a b) = log2(2/1), info(b a) = log2(1/1),
    # info(a b a) = log2(1/1). Output "a b": two unigrams, one bigram, 2 of 3 words: penalty 0.5.
    found = mteval.nist(mteval.MtevalCorpus(Corpus.of(["a b"], [["a b a"]])))
    assert found.value() == pytest.approx(0.5 * ((np.log2(1.5) + np.log2(3)) / 2 + np.log2(2) / 1))


@pytest.mark.parametrize(
    ("output", "reference", "recorded"),
    [  # as the Perl script prints them: it undoes tags and entities before it lower-cases
        ("<SKIPPED> the pub is nice and cheap", "<SKIPPED> the pub is nice and very cheap", (0.7956, 3.1700)),
        ("Tom &AMP; Jerry serve food in town", "Tom &AMP; Jerry serve good food in town", (0.6690, 3.1700)),
        (
            "price &quot;low&quot; and &QUOT;high&QUOT; here now",
            'price "low" and "high" here and now',
            (0.2990, 1.9274),
        ),
    ],
)
def test_tags_and_entities_in_capitals_stay(output: str, reference: str, recorded: tuple[float, float]) -> None:
    found = mteval.MtevalCorpus(Corpus.of([output], [[reference]]))
    assert (mteval.bleu(found).value(), mteval.nist(found).value()) == pytest.approx(recorded, abs=5e-5)


def test_lower_casing_leaves_letters_beyond_ascii_as_the_perl_script_does() -> None:
    assert mteval.tokenise("\u00c9CLAIR Bar") == ("\u00c9clair", "bar")


# METEOR


@needs_java
def test_meteor_formula_equals_the_program_own_scores() -> None:
    found = coco.coco_meteor(coco.CocoCorpus(corpus()))
    asked = [row for row in found.rows if row.any()]
    requests = ["EVAL ||| " + " ".join(str(float(field)) for field in row) for row in asked]
    lines = java.meteor_lines(requests)  # for each request: the segment's score, then the total of the request
    theirs = [float(line) for line in lines[::2]]
    ours = [float(found.combine(row)) for row in asked]
    assert ours == pytest.approx(theirs, abs=1e-12)


@needs_java
def test_meteor_takes_the_best_reference() -> None:
    one = meteor.meteor(["a cheap pub"], [["a cheap pub"]], reference_counts="1").value()
    more = meteor.meteor(["a cheap pub"], [["nothing alike", "a cheap pub", "pub"]], reference_counts="3").value()
    assert one == more == pytest.approx(1.0)


def test_meteor_separator_inside_a_text_cannot_shift_the_request() -> None:
    assert meteor.request("a ||| b", ["c ||| d"]) == "SCORE ||| c   d ||| a   b"


def test_a_java_that_only_says_where_to_get_java_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    stub = tmp_path / "bin" / "java"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    results = {result.name: result for result in E2E_OFFICIAL.score(Corpus.of(["a pub"], [["a nice pub"]]))}
    assert isinstance(results.pop("METEOR"), Missing)
    assert all(isinstance(result, Statistics) for result in results.values()) and len(results) == 4


def test_a_java_that_fails_gives_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    broken = tmp_path / "bin" / "java"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'no memory left' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(java.JavaError, match=r"the PTB tokeniser failed \(exit 3\): no memory left"):
        java.ptb_tokenise(["a text"])


# The COCO caption code's tokens


@needs_java
def test_tokens_are_penn_treebank_lower_case_without_punctuation() -> None:
    assert java.ptb_tokenise(["It isn't child-friendly, is it?", "", "(Tom & Ann's)"]) == [
        "it is n't child-friendly is it", "", "-lrb- tom & ann 's -rrb-",
    ]  # fmt: skip


@needs_java
def test_tokens_without_java_are_nearly_the_same() -> None:
    texts = [text for pair in PAIRS for text in pair if text.isascii() and text != "!!!"]  # one token of Stanford's
    assert coco.nltk_tokenise(texts) == java.ptb_tokenise(texts)


# LLaMA-Factory's and Google's


def test_similarity_equals_llamafactory_own_metric(tokenizer: Any) -> None:
    pytest.importorskip("llamafactory", reason='needs llamafactory: pip install "crosslore[llamafactory]"')
    from llamafactory.train.sft.metric import ComputeSimilarity
    from transformers import EvalPrediction

    width = 200
    encoded = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in PAIRS]
    padded = np.array([[ids + [-100] * (width - len(ids)) for ids in pair] for pair in encoded])
    theirs = ComputeSimilarity(tokenizer=tokenizer)(EvalPrediction(predictions=padded[:, 0], label_ids=padded[:, 1]))
    assert theirs is not None
    ours = {statistics.name: statistics.value() for statistics in llamafactory.similarity(corpus())}
    names = {"BLEU": "bleu-4", "ROUGE_1": "rouge-1", "ROUGE_2": "rouge-2", "ROUGE_L": "rouge-l"}
    assert ours == pytest.approx({name: theirs[key] for name, key in names.items()}, abs=1e-9)


def test_rouge_stems_and_takes_the_best_reference() -> None:
    found = rouge.rouge(Corpus.of(["running dogs"], [["nothing", "the dog runs"]]))
    assert [result.name for result in found] == ["ROUGE_1", "ROUGE_2", "ROUGE_L"]
    assert found[0].value() == pytest.approx(2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))  # both words, by their stems
    assert found[2].value() == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


# The paper's reading


def test_paper_protocol_scores_one_reference_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)  # METEOR is not what this is about, and starts slowly
    several = Corpus.of(["a b c d", "x y"], [["a b c d", "e f g h"], ["x y"]])
    single, groups = several.single
    assert single.predictions == ("a b c d", "a b c d", "x y")
    assert groups == [0, 0, 1]
    by_rows = {result.name: result for result in llamafactory.similarity(single)}
    paper = {result.name: result for result in PAPER.score(several) if isinstance(result, Statistics)}
    assert paper["ROUGE_1"].value() == pytest.approx(by_rows["ROUGE_1"].value())
    assert len(paper["ROUGE_1"].rows) == 2  # rows of one example are drawn together
