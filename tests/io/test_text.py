"""Text from files: formats, fields, and errors that name the file and the place."""

import hashlib
import itertools
import json
import logging
import sys
from types import SimpleNamespace

import pytest

from gluprune.io.text import detokenised, fingerprints, read_text, read_texts


@pytest.fixture
def file(tmp_path):
    """Writes bytes or text to a file of this name."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_read_text(file):
    page = " = A = \n two @-@ part , 1 @,@ 000 <unk> <unk> men"
    rows = [{"page": page}, {"question": "Q?", "answer": "A."}, {"text": "t"}]
    path = file("text.jsonl", "\n".join(map(json.dumps, rows)))
    fields = ("text", "page", "question", "answer")
    assert read_text(path, fields) == "= A =\ntwo-part, 1,000 men\n\nQ?\nA.\n\nt"
    assert read_text(file("plain.txt", " = A = \na 1 @.@ 5 <unk> b")) == "= A =\na 1.5 b"
    assert read_texts([path, file("b.txt", "b")], fields) == [read_text(path, fields), "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_json_lines(file, name, end):
    """One text per line, whatever the line ends; not the JSON."""
    rows = [{"id": 1, "text": "one \u2028 line"}, {"text": "two"}]
    assert read_text(file(name, end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end)) == (
        "one \u2028 line\n\ntwo"
    )


def test_a_json_list(file):
    for name in ("a.json", "b.JSON"):
        assert read_text(file(name, json.dumps([{"body": "one"}, {"body": "two"}])), ["body"]) == "one\n\ntwo"


def test_a_byte_order_mark_is_no_text(file):
    assert read_text(file("a.txt", b"\xef\xbb\xbfabc")) == "abc"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"caf\xe9 au lait", "a.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", "a.txt is not UTF-8 text: byte 0xe9 at offset 6"),
        ("a.txt", b"\xff\xfea\x00", "a.txt is not UTF-8 text: byte 0xff at offset 0"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "a.jsonl.gz is not UTF-8 text: byte 0x8b at offset 1"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}', "a.jsonl is not UTF-8 text: byte 0xe9 at offset 25"),
        ("a.txt", "", "a.txt holds no text"),
        ("a.jsonl", "\n", "a.jsonl holds no text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text"', "a.jsonl, line 3 is not JSON: "),
        ("a.jsonl", '{"text": "a"}\n"b"', "a.jsonl, line 2 is not a JSON object"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"body": "b", "id": 3}',
            "line 2 has no field 'text': its fields with a value are body, id",
        ),
        ("a.jsonl", '{"text": null}', "line 1 has no field 'text'"),
        ("a.jsonl", '{"text": ["a"]}', "a.jsonl, line 1: the text must be a string"),
        ("a.jsonl", r'{"text": "\ud83d\ude00"}' + "\n" + r'{"text": "a\ud83d"}', "line 2: '\\ud83d' is no character"),
        ("a.json", r'[{"text": "\ude00 b"}]', "a.json, row 1: '\\ude00' is no character"),
        ("a.json", '{"text": "a"}', "a.json must hold a JSON list of objects, found dict"),
        ("a.jsonl", '{"text": null, "id": 3}', "line 1 has no field 'text': its fields with a value are id"),
        ("a.json", '[{"text": "a"}, {}]', "a.json, row 2 has no field 'text': its fields with a value are none"),
        ("a.json", "[", "a.json is not JSON: "),
    ],
)
def test_bad_files(file, name, content, message):
    with pytest.raises(ValueError) as error:
        read_text(file(name, content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(OSError, match=r"absent\.txt"):
        read_text(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    "names",
    [
        {"t.txt": "t.txt", "x/u.txt": "u.txt"},
        {"x/t.txt": "x/t.txt", "t.txt": "here/t.txt"},
        {"a/x/t.txt": "a/x/t.txt", "b/x/t.txt": "b/x/t.txt", "b/y/t.txt": "y/t.txt"},
        {"../here/x/t.txt": "x/t.txt", "../t.txt": "away/t.txt", "y/t.txt": "y/t.txt"},
        {"wikipedia": "wikipedia", "./wikipedia": "here/wikipedia"},
    ],
)
def test_texts_have_different_names(tmp_path, monkeypatch, names):
    """The name of a file with as many of its folders as it needs, in whichever order they come."""
    here = tmp_path / "away" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for source in names:
        (here / source).parent.mkdir(parents=True, exist_ok=True)
        (here / source).write_text(source)
    for sources in itertools.permutations(names):
        found = fingerprints(sources, sources)
        expected = [(names[source], hashlib.sha256(source.encode()).hexdigest()) for source in sources]
        assert list(found.items()) == expected


def test_the_same_file_twice_has_one_name(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = file("t.txt", "a")
    assert list(fingerprints([path, "t.txt", "./t.txt"], ["a"] * 3)) == ["t.txt"]


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    class Rows(dict):
        column_names = ("text", "label")

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        if arguments[0] == "absent":
            raise FileNotFoundError("no such data set\nat all")
        return Rows(text=["a", "", "b"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text("hf:owner/name:train:text") == read_text("hf:owner/name:raw:train:text") == "a\nb"
    assert asked == [(("owner/name",), {"split": "train"}), (("owner/name", "raw"), {"split": "train"})]
    with pytest.raises(ValueError, match="hf:owner/name:train:page has no column 'page': its columns are text, label"):
        read_text("hf:owner/name:train:page")
    with pytest.raises(ValueError, match="hf:absent:train:text cannot be loaded: no such data set$"):
        read_text("hf:absent:train:text")
    for name in ("hf:a:train", "hf:a:b:c:d:e", "hf::train:text"):
        with pytest.raises(ValueError, match="is not of the form hf:ID:SPLIT:COLUMN"):
            read_text(name)


def test_a_data_set_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="hf:a:train:text needs the package datasets: pip install"):
        read_text("hf:a:train:text")


@pytest.mark.parametrize(
    "tokens, text",
    [
        (" \n = A b = \n \n = = C = = \n \n D \n", "\n= A b =\n\n== C ==\n\nD\n"),
        ('x ( see " y z " ) ; w [ 2 ] ...', 'x (see "y z"); w [2]...'),
        ('she said : " no ! " and " go ? "', 'she said: "no!" and "go?"'),
        ("it 's the dogs ' own , don 't they 're", "it's the dogs' own, don't they're"),
        ("$ 5 @.@ 2 million , 30 % of 1 : 2 – 3", "$5.2 million, 30% of 1: 2 – 3"),
        ("the <unk> , a <unk> <unk> .", "the, a."),
    ],
)
def test_detokenised(tokens, text):
    assert detokenised(" = T = \nwell @-@ known \n" + tokens) == "= T =\nwell-known\n" + text


@pytest.mark.parametrize(
    "before",
    [
        "",
        "<unk> well @-@ known \n",
        "<unk> \n = Title = \n",
        "= Title =\n 1 @.@ 5 \n",
        " x = 1 = \n 1 @.@ 5 \n",
        "a = b @-@ c ; d = \n",
    ],
)
def test_other_text_is_unchanged(before):
    """Neither marks nor headings alone are a sign of the release: code and other corpora have them."""
    text = before + '  A " b " , c . \n\n\n\n d \'s'
    assert detokenised(text) == text


def test_turning_it_into_running_text_is_logged(file, caplog):
    caplog.set_level(logging.INFO, logger="gluprune")
    read_text(file("other.txt", "a 1 @.@ 5 <unk> b"))
    assert not caplog.messages
    read_text(file("release.txt", " = A = \n 1 @.@ 5 \n"))
    (message,) = caplog.messages
    assert "release.txt is the tokenised release of WikiText" in message
