import json

import pytest

from qwench.data.documents import read_documents
from qwench.data.source_code import language_of_file, licence_of_header


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("a/b.rs", "rust"),
        ("x.PY", "python"),
        ("Makefile", "make"),
        ("CMakeLists.txt", "cmake"),
        ("a.txt", ""),
        ("a", ""),
        (".gitignore", ""),
    ],
)
def test_languages(name, language):
    assert language_of_file(name) == language


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ("// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception\n", "Apache-2.0 WITH LLVM-exception"),
        ("# Licensed under the Apache License,\n#  Version 2.0 (the ...", "Apache-2.0"),
        ("/*\n * This program is free software under the GNU General\n * Public License\n */", "GPL"),
        ("# GNU Lesser General Public License", "LGPL"),
        ("// Use of this source code is governed by a BSD-style\n// license that can be found", "BSD"),
        ("Permission is hereby granted, free of charge,\nto any person obtaining a copy", "MIT"),
        ("import sys\n", ""),
    ],
)
def test_licences(header, licence):
    assert licence_of_header(header + "code\n" * 3) == licence


def test_a_licence_far_below_is_no_header():
    assert licence_of_header("x = 1\n" * 2000 + "# SPDX-License-Identifier: MIT") == ""


def test_a_source_tree(tmp_path):
    root = tmp_path / "project"
    (root / "src").mkdir(parents=True)
    (root / "src" / "main.go").write_text("// SPDX-License-Identifier: MIT\npackage main\n")
    (root / "Makefile").write_text("all:\n\tgo build\n")
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "x = 1", "outputs": ["no"]},
    ]
    (root / "book.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    (root / "bad.ipynb").write_text("{}")
    skipped = []
    documents = {d.id: d for d in read_documents([root], skipped=skipped)}
    assert documents["project/src/main.go"].lang == "go"
    assert documents["project/src/main.go"].meta == {"licence": "MIT"}
    assert documents["project/Makefile"].lang == "make"
    assert documents["project/book.ipynb"].text == "# # Title\n# text\n\nx = 1"
    assert {d.kind for d in documents.values()} == {"code"}
    assert [(s.id, s.reason) for s in skipped] == [("project/bad.ipynb", "no valid notebook")]
