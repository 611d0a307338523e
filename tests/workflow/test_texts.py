"""How texts are divided: what is held apart, and the digests that a checkpoint's history names."""

import hashlib

import pytest

import gluprune
from gluprune.workflow.texts import OWN_TEXT, GivenTexts, HeldApart, Texts, check_lengths


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_digests_are_of_the_whole_texts(text):
    notes, own = text.read_text(), "What the model wrote. " * 20
    found = Texts.of(GivenTexts.read([text], [], ["text"]), own)
    assert found.calibration["notes.txt"] + found.test["last tenth of notes.txt"] == notes
    assert found.calibration[OWN_TEXT] == own
    assert found.test_digests == {"last tenth of notes.txt": sha256(notes)}
    assert found.calibration_digests == {"notes.txt": sha256(notes), OWN_TEXT: sha256(own)}


def test_one_text_needs_no_list(text):
    listed = GivenTexts.read([text], ["wikipedia"], ["text"])
    assert GivenTexts.read(text, "wikipedia", "text") == GivenTexts.read(str(text), ("wikipedia",), ["text"]) == listed


def test_wikipedia_where_no_text_is_given(text):
    own, articles = "What the model wrote. " * 20, gluprune.wikipedia_text()
    found = Texts.of(GivenTexts.read([], [], ["text"]), own)
    assert found.calibration["wikipedia"] + found.test["last tenth of wikipedia"] == articles
    assert len(articles) / 11 < len(found.test["last tenth of wikipedia"]) < len(articles) / 9
    assert found.calibration_digests == {"wikipedia": sha256(articles), OWN_TEXT: sha256(own)}
    assert found.test_digests == {"last tenth of wikipedia": sha256(articles)}
    with pytest.raises(ValueError, match="two texts are equal, .* held apart: text wikipedia; test_text wikipedia"):
        GivenTexts.read([], ["wikipedia"], ["text"])
    found = Texts.of(GivenTexts.read([], [text], ["text"]), own)
    assert found.calibration == {"wikipedia": articles, OWN_TEXT: own} and set(found.test) == {"notes.txt"}


@pytest.mark.parametrize("names", [("x/t.txt", "t.txt"), ("t.txt", "x/t.txt")])
def test_files_of_one_name_are_two_texts(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    found = GivenTexts.read([names[0]], [names[1]], ["text"])
    assert (list(found.calibration.values()), list(found.test.values())) == ([names[0]], [names[1]])
    assert sorted(found.digests.values()) == sorted(map(sha256, names))


@pytest.mark.parametrize("tokenizer, begins", [(False, 0), (True, 1)], indirect=["tokenizer"])
def test_the_least_text(tokenizer, begins):
    """One window of text to calibrate on, with the token that begins it; one window and a token to measure on."""
    length, test = 24, {"test.txt": "x" * 25}

    def given(tokens, test=test):
        return GivenTexts({"notes.txt": "y" * tokens}, test, {"notes.txt": "a", "test.txt": "b"})

    assert check_lengths(given(length - begins), tokenizer, length) == 1
    assert check_lengths(given(3 * (length - begins) - 1), tokenizer, length) == 2
    with pytest.raises(ValueError, match=f"notes.txt has {23 - begins} tokens: one window needs {24 - begins}; give"):
        check_lengths(given(length - begins - 1), tokenizer, length)
    with pytest.raises(ValueError, match="notes.txt has 18 tokens before its last tenth: one window needs"):
        check_lengths(given(20, {}), tokenizer, length)
    assert HeldApart(test, tokenizer, length).tokens >= length
    with pytest.raises(ValueError, match=r"the text to measure on \(test.txt\) has 24 tokens: one window needs 25"):
        check_lengths(given(100, {"test.txt": "x" * 24}), tokenizer, length)
