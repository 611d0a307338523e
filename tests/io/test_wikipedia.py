"""The text that comes with the package."""

import hashlib
import re
from importlib.resources import files

import gluprune
from gluprune.io.text import detokenised, fingerprints, read_text


def test_articles_of_running_text():
    text = gluprune.wikipedia_text()
    assert len(re.findall(r"(?m)^= [^=].* =$", text)) == 60
    assert detokenised(text) == text and "@-@" not in text and "<unk>" not in text
    assert text.startswith("= Homarus gammarus =\nHomarus gammarus, known as the European lobster")


def test_its_source_and_licence_lie_beside_it():
    readme = (files("gluprune.io") / "data" / "README.md").read_text(encoding="utf-8")
    assert "WikiText-2" in readme and "CC BY-SA 3.0" in readme


def test_the_name_of_a_text(tmp_path, monkeypatch):
    """`wikipedia` is the text of the package, also where a file has that name; `./wikipedia` is the file."""
    (tmp_path / "wikipedia").write_text("Not the articles.")
    monkeypatch.chdir(tmp_path)
    articles = gluprune.wikipedia_text()
    assert read_text("wikipedia") == articles and read_text("./wikipedia") == "Not the articles."
    digests = fingerprints(["wikipedia", "./wikipedia"], [articles, "Not the articles."])
    assert digests == {
        "wikipedia": hashlib.sha256(articles.encode()).hexdigest(),
        f"{tmp_path.name}/wikipedia": hashlib.sha256(b"Not the articles.").hexdigest(),
    }
