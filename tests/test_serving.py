"""The page on deploying has the tables that the records of `make test-serving` make."""

from serving import tables


def test_tables_are_those_of_the_records():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page.count("| --:") >= 2 and tables.rewritten(page) == page


def test_a_table_replaces_what_stood_there():
    emptied = tables.PAGE.read_text(encoding="utf-8")
    for line in ("| 1024 |", "| none |"):
        assert line in emptied
    emptied = "\n".join(line for line in emptied.splitlines() if not line.startswith(("| 1024 |", "| none |")))
    assert tables.rewritten(emptied + "\n") == tables.PAGE.read_text(encoding="utf-8")
