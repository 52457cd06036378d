"""Source files: the language by a file's name, the licence by its header.

Nothing is parsed. A licence is told by its SPDX tag or by words that its usual notice has; "" means none was found in
the beginning of the file, not that there is none.
"""

from __future__ import annotations

import re

_LANGUAGES = {
    "python": ".py .pyi .pyx .pxd", "c": ".c .h", "cpp": ".cc .cpp .cxx .hpp .hh .hxx .inl", "cuda": ".cu .cuh",
    "java": ".java", "kotlin": ".kt .kts", "scala": ".scala .sc", "groovy": ".groovy .gradle",
    "javascript": ".js .mjs .cjs .jsx", "typescript": ".ts .tsx .mts", "go": ".go", "rust": ".rs",
    "ruby": ".rb .rake", "php": ".php", "perl": ".pl .pm", "lua": ".lua", "r": ".r", "julia": ".jl",
    "objective-c": ".m .mm", "swift": ".swift", "csharp": ".cs", "fsharp": ".fs .fsx", "visual-basic": ".vb",
    "haskell": ".hs .lhs", "ocaml": ".ml .mli", "erlang": ".erl .hrl", "elixir": ".ex .exs", "clojure": ".clj .cljs",
    "lisp": ".lisp .lsp .el .scm .rkt", "shell": ".sh .bash .zsh .fish", "powershell": ".ps1 .psm1",
    "batch": ".bat .cmd", "sql": ".sql", "css": ".css .scss .sass .less", "vue": ".vue .svelte", "protobuf": ".proto",
    "cmake": ".cmake", "toml": ".toml", "yaml": ".yaml .yml", "ini": ".ini .cfg", "nix": ".nix", "hcl": ".tf .hcl",
    "dart": ".dart", "zig": ".zig", "verilog": ".v .sv .svh", "vhdl": ".vhd .vhdl", "assembly": ".asm .s",
    "fortran": ".f .f90 .f95", "pascal": ".pas", "d": ".d", "nim": ".nim", "solidity": ".sol",
    "glsl": ".glsl .wgsl .hlsl", "jupyter": ".ipynb", "tcl": ".tcl", "coq": ".coq", "lean": ".lean",
    "graphql": ".graphql", "crystal": ".cr",
}  # fmt: skip
LANGUAGE_OF = {suffix: language for language, suffixes in _LANGUAGES.items() for suffix in suffixes.split()}
"""Suffix -> language: ".py" -> "python"."""
_NAMES = {"makefile": "make", "gnumakefile": "make", "dockerfile": "dockerfile", "cmakelists.txt": "cmake"}
_NAMES |= {"rakefile": "ruby", "gemfile": "ruby", "jenkinsfile": "groovy", "build.bazel": "bazel"}

_SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+\-]+(?:\s+(?:OR|AND|WITH)\s+[\w.+\-]+)*)")
# Words of the usual notices, white space and comment marks folded; the first that stands there wins.
_NOTICES = (
    ("Apache-2.0", "licensed under the apache license, version 2.0"),
    ("Apache-2.0", "apache license version 2.0"),
    ("AGPL-3.0", "gnu affero general public license"),
    ("LGPL", "gnu lesser general public license"),
    ("LGPL", "gnu library general public license"),
    ("GPL", "gnu general public license"),
    ("MPL-2.0", "mozilla public license"),
    ("EPL-2.0", "eclipse public license"),
    ("MIT", "permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("MIT", "licensed under the mit license"),
    ("MIT", "mit license"),
    ("BSD", "redistribution and use in source and binary forms"),
    ("BSD", "bsd-style license"),
    ("BSD", "bsd license"),
    ("ISC", "permission to use, copy, modify, and/or distribute this software for any purpose"),
    ("Unlicense", "this is free and unencumbered software released into the public domain"),
    ("BSL-1.0", "boost software license"),
    ("CC0-1.0", "cc0 1.0 universal"),
    ("proprietary", "all rights reserved. proprietary"),
    ("proprietary", "confidential and proprietary"),
)
_FOLD = re.compile(r"[\s#*/;%\"'!-]+")
_HEADER_CHARS = 4000


def language_of_file(name: str) -> str:
    """The programming language by a file's name, or "".

    >>> language_of_file("src/main.rs"), language_of_file("Makefile"), language_of_file("a.txt")
    ('rust', 'make', '')
    """
    base = name.rpartition("/")[2].lower()
    if base in _NAMES:
        return _NAMES[base]
    return LANGUAGE_OF.get(base[base.rfind(".") :], "") if "." in base else ""


def licence_of_header(text: str) -> str:
    """SPDX identifier or family of the licence that the first lines name, or "".

    >>> licence_of_header("// SPDX-License-Identifier: MIT OR Apache-2.0")
    'MIT OR Apache-2.0'
    """
    head = text[:_HEADER_CHARS]
    if tag := _SPDX.search(head):
        return tag[1]
    if "icen" not in head and "ermission" not in head and "edistribution" not in head:
        return ""
    folded = _FOLD.sub(" ", head.lower())
    return next((licence for licence, notice in _NOTICES if _FOLD.sub(" ", notice) in folded), "")
