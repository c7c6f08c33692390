import pytest

pytest.importorskip("sacrebleu", reason='needs sacrebleu: pip install "crosslore[eval]"')

from crosslore_eval.metrics.bleu import corpus_bleu  # noqa: E402

OUTPUTS = ["the cat sat on the mat now", "a dog barked at the mailman"]


def test_identical_output_scores_100() -> None:
    assert corpus_bleu(OUTPUTS, [[text] for text in OUTPUTS]).value == pytest.approx(100.0)


def test_one_reference_agrees_with_precisions_counted_by_hand() -> None:
    # 7 tokens each; matching 1- to 4-grams 6/7, 4/6, 2/5, 1/4 and equal lengths: (6/7 * 4/6 * 2/5 * 1/4) ** (1/4).
    score = corpus_bleu(["the cat sat on the mat now"], [["the cat sat on a mat now"]])
    assert score.value == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)


def test_signature_names_references_case_and_tokeniser() -> None:
    signature = corpus_bleu(OUTPUTS, [[text] for text in OUTPUTS]).signature
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_rows_may_have_different_numbers_of_references() -> None:
    score = corpus_bleu(OUTPUTS, [["something else entirely here", OUTPUTS[0]], [OUTPUTS[1]]])
    assert score.value == pytest.approx(100.0)
    assert score.signature.startswith("nrefs:var|")


def test_lowercase_ignores_case() -> None:
    references = [[text.upper()] for text in OUTPUTS]
    assert corpus_bleu(OUTPUTS, references).value < 1
    assert corpus_bleu(OUTPUTS, references, lowercase=True).value == pytest.approx(100.0)


def test_an_empty_output_line_is_scored_not_dropped() -> None:
    assert 0 < corpus_bleu([OUTPUTS[0], ""], [[text] for text in OUTPUTS]).value < 100


def test_fewer_outputs_than_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        corpus_bleu(OUTPUTS[:1], [[text] for text in OUTPUTS])


def test_a_bare_string_as_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 must be a list"):
        corpus_bleu(OUTPUTS[:1], [OUTPUTS[0]])  # a str is a Sequence[str] for the type checker
