"""How texts are divided: what is held apart, and the digests that a checkpoint's history names."""

import hashlib

import pytest

import gluprune
from gluprune.workflow.texts import OWN_TEXT, GivenTexts, Texts


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_digests_are_of_the_whole_texts(text):
    notes, own = text.read_text(), "What the model wrote. " * 20
    found = Texts.of(GivenTexts.read([text], [], ["text"]), own)
    assert found.calibration["notes.txt"] + found.test["notes.txt"] == notes and found.calibration[OWN_TEXT] == own
    assert found.test_digests == {"notes.txt": sha256(notes)}
    assert found.calibration_digests == {"notes.txt": sha256(notes), OWN_TEXT: sha256(own)}


def test_wikipedia_where_no_text_is_given(text):
    own, articles = "What the model wrote. " * 20, gluprune.wikipedia_text()
    found = Texts.of(GivenTexts.read([], [], ["text"]), own)
    assert found.calibration["wikipedia"] + found.test["wikipedia"] == articles
    assert len(articles) / 11 < len(found.test["wikipedia"]) < len(articles) / 9
    assert found.calibration_digests == {"wikipedia": sha256(articles), OWN_TEXT: sha256(own)}
    assert found.test_digests == {"wikipedia": sha256(articles)}
    with pytest.raises(ValueError, match="two texts are equal, .* held apart: text wikipedia; test_text wikipedia"):
        GivenTexts.read([], ["wikipedia"], ["text"])
    found = Texts.of(GivenTexts.read([], [text], ["text"]), own)
    assert found.calibration == {"wikipedia": articles, OWN_TEXT: own} and set(found.test) == {"notes.txt"}
