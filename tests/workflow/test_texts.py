"""How texts are divided: what is held apart, and the digests that a checkpoint's history names."""

import hashlib

from gluprune.workflow.texts import OWN_TEXT, GivenTexts, Texts


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_digests_are_of_the_whole_texts(text):
    notes, own = text.read_text(), "What the model wrote. " * 20
    found = Texts.of(GivenTexts.read([text], [], ["text"]), own)
    assert found.calibration["notes.txt"] + found.test["notes.txt"] == notes and found.calibration[OWN_TEXT] == own
    assert found.test_digests == {"notes.txt": sha256(notes)}
    assert found.calibration_digests == {"notes.txt": sha256(notes), OWN_TEXT: sha256(own)}


def test_the_own_text_is_divided_where_there_is_no_other():
    own = "What the model wrote. " * 20
    found = Texts.of(GivenTexts({}, {}, {}), own)
    assert found.calibration[OWN_TEXT] + found.test[OWN_TEXT] == own and len(found.test[OWN_TEXT]) < len(own) / 8
    assert found.calibration_digests == found.test_digests == {OWN_TEXT: sha256(own)}
