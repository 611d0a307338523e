"""The text that comes with the package."""

import re
from importlib.resources import files

import gluprune
from gluprune.io.text import detokenised


def test_articles_of_running_text():
    text = gluprune.wikipedia_text()
    assert len(re.findall(r"(?m)^= [^=].* =$", text)) == 60
    assert detokenised(text) == text and "@-@" not in text and "<unk>" not in text
    assert text.startswith("= Homarus gammarus =\nHomarus gammarus, known as the European lobster")


def test_its_source_and_licence_lie_beside_it():
    readme = (files("gluprune.calibration") / "data" / "README.md").read_text(encoding="utf-8")
    assert "WikiText-2" in readme and "CC BY-SA 3.0" in readme
