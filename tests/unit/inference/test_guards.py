"""Guards of language, by hand."""

from __future__ import annotations

from simple_llama.inference.guards import REFUSALS, count_language, language_metrics, refuses

STOP = {7}


def test_three_answers_by_hand() -> None:
    """1 2 1 2 1 2 <stop>: trigrams 121 212 121 212, two repeated. 1 2 3: one trigram. <stop>: nothing.

    Repeated: 2 of 5 trigrams; tokens (6 + 3 + 0) / 3; two of three ended by themselves, one at once; 4 of 9 tokens are
    the unknown one.
    """
    sums = count_language([[1, 2, 1, 2, 1, 2, 7], [1, 2, 3], [7]], STOP, unknown_id=2)
    assert language_metrics(sums) == {
        "samples/repeated_trigrams": 2 / 5,
        "samples/tokens": 3.0,
        "samples/ended": 2 / 3,
        "samples/empty": 1 / 3,
        "samples/unknown": 4 / 9,
    }


def test_sums_of_shares_add_up() -> None:
    """Two ranks' sums are those of all answers; the same trigram in two answers is no repetition."""
    answers = [[1, 2, 3, 7], [1, 2, 3, 1, 2, 3], [4], []]
    parts = count_language(answers[:1], STOP) + count_language(answers[1:], STOP)
    assert parts.tolist() == count_language(answers, STOP).tolist() == [4, 10, 5, 1, 1, 1, 0]


def test_no_answers_are_no_division_by_zero() -> None:
    """A rank without a prompt."""
    assert set(language_metrics(count_language([], STOP)).values()) == {0.0}


def test_refusals() -> None:
    """Each phrase in any case, with either apostrophe and line breaks; not behind 200 characters of an answer."""
    assert all(refuses(f"Well. {phrase} x") for phrase in REFUSALS)
    assert refuses("I\u2019M SORRY,\nbut that would hurt someone.")
    assert not refuses("Of course: cut the onions first.") and not refuses("")
    assert not refuses("As an aid to memory, write it down.") and refuses("As an AI, no.")
    assert refuses("x" * 180 + " I cannot") and not refuses("x" * 200 + " I cannot")
