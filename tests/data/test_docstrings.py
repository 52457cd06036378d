import pytest

from qwench.data.docstrings import as_reference, described, first_sentence, module_name

SOURCE = '''"""A module."""
def shown(a, *, b=1) -> int:
    """Return a.

    More.
    """
    def inner(): "hidden"
def _private(): "hidden"
class Thing(list):
    """A thing."""
    async def act(self): "Act."
    def silent(self): pass
'''


def test_public_docstrings_with_signatures():
    entries = list(described("pkg.mod", SOURCE))
    assert [(e.name, e.kind, e.signature) for e in entries] == [
        ("pkg.mod", "module", ""),
        ("pkg.mod.shown", "function", "(a, *, b=1)"),
        ("pkg.mod.Thing", "class", ""),
        ("pkg.mod.Thing.act", "method", "(self)"),
    ]
    assert entries[1].doc == "Return a.\n\nMore."
    assert "pkg.mod.shown(a, *, b=1)\n\nReturn a." in as_reference(entries)


@pytest.mark.parametrize("source", ["def broken(:", "\0", "(" * 500, "print 'python 2'", ""])
def test_source_that_does_not_parse_gives_nothing(source):
    assert list(described("m", source)) == []


def test_module_names():
    assert module_name("json/decoder.py") == "json.decoder"
    assert module_name("json/__init__.py") == "json"
    assert module_name("abc.py") == "abc"


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return the sum of a 'start' value.\n\nMore text.", "Return the sum of a 'start' value."),
        ("Return all names,\nsorted. Then stop.", "Return all names, sorted."),
        ("Open a file (e.g. A.txt) for reading. Next.", "Open a file (e.g. A.txt) for reading."),
        ("log(x, base)\n\nReturn the logarithm of x.", "Return the logarithm of x."),
        ("Without a final stop", "Without a final stop."),
        ("Too short", ""),
        (">>> example(1)\n2", ""),
        ("The following are supported:", ""),
        ("word " * 60, ""),
        ("log(x[, base]) -> value of the logarithm", ""),
        ("", ""),
    ],
)
def test_first_sentences(doc, sentence):
    assert first_sentence(doc) == sentence
