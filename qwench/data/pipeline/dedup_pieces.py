"""The jobs that cut repeated paragraphs, lines and passages out of the documents that stay.

    pieces        hashes and places of the pieces of every kept document, grouped by hash
    match_pieces  of equal pieces the one in the best document stays; the places of the others, grouped by part

The cuts are made when the parts are rewritten (`pipeline.dedup_jobs.rewrite_job`). Which document is the best is
decided as for whole documents: by DedupSettings.prefer, never by order; within a document the first place stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwench.data.minhash import MinHasher
from qwench.data.pipeline.buckets import BucketWriter, bucket_of, iterate
from qwench.data.pipeline.dedup_hashes import GROUP_PARTS, ROW, decisions_of, descending, read_rows
from qwench.data.pipeline.parts import read_part
from qwench.data.pipeline.work import Item
from qwench.data.substring import anchors
from qwench.types import Document

PIECES, CUTS = "pieces.bin", "cuts.bin"
CUT = np.dtype([("node", "<u8"), ("begin", "<u4"), ("end", "<u4")])
_KINDS = {"paragraph": 1, "line": 2, "passage": 3}
_PARAGRAPH_BREAK = re.compile(r"\n(?:[ \t]*\n)+")
_BLANK_LINES = re.compile(r"(?:[ \t]*\n)+")


def piece_dtype(num_ranks: int) -> np.dtype:
    """`better` orders documents: the smaller, compared from the left, the better."""
    return np.dtype(
        [
            ("hash", "<u8"),
            ("low", "<u8"),
            ("better", "<u8", (num_ranks + 1,)),
            ("node", "<u8"),
            ("begin", "<u4"),
            ("end", "<u4"),
        ]
    )


# ------------------------------------------------------------------------------------------------------------ pieces
def piece_job(item: Item, directory: Path) -> dict[str, Any]:
    """Hashes of the pieces of the kept documents of a part."""
    decisions = decisions_of(item)
    rows = read_rows(Path(item["hashes"]))
    ranks = [name for name in rows.column_names if name.startswith("rank")]
    better = np.stack(
        [descending(rows.column(name).to_numpy()) for name in ranks] + [rows.column("tie").to_numpy()], axis=1
    )
    dtype = piece_dtype(len(ranks))
    writer = BucketWriter(directory / PIECES, dtype, item["num_buckets"], chunk_records=item["records"])
    counts: Counter[str] = Counter()
    hasher = MinHasher()
    for row, document in enumerate(read_part(Path(item["docs"]))):
        if row in decisions and not decisions[row]["kept"]:
            continue
        for name, hashes, places in _pieces(document, item, hasher):
            if not len(hashes):
                continue
            counts[f"{name}s"] += len(hashes)
            records = np.zeros(len(hashes), dtype)
            records["hash"], records["low"] = hashes[:, 0], hashes[:, 1] ^ np.uint64(_KINDS[name])
            records["better"], records["node"] = better[row], (item["part"] << 32) + row
            records["begin"], records["end"] = places[:, 0], places[:, 1]
            writer.add(bucket_of(records["hash"], item["num_buckets"]), records)
    writer.close()
    return dict(counts)


def _pieces(document: Document, item: Item, hasher: MinHasher) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Kind, hashes [n, 2] and places [n, 2] of the pieces of a document."""
    text = document.text
    if least := item["paragraph_chars"]:
        yield "paragraph", *_hashed(text, list(paragraphs(text, least)), hasher)
    if least := item["line_chars"]:
        yield "line", *_hashed(text, list(lines(text, least)), hasher)
    if item["substring_tokens"]:
        yield "passage", *anchors(text, item["substring_tokens"], item["substring_slack"])


def _hashed(text: str, found: Sequence[tuple[int, int, int]], hasher: MinHasher) -> tuple[np.ndarray, np.ndarray]:
    hashes = hasher.exact([text[begin:end] for _, begin, end in found])
    return hashes, np.array([(cut, end) for cut, _, end in found], np.int64).reshape(-1, 2)


def paragraphs(text: str, least: int) -> Iterator[tuple[int, int, int]]:
    """(cut, begin, end) of the paragraphs of at least that many characters; a cut takes the break before it along."""
    cut = begin = 0
    for found in _PARAGRAPH_BREAK.finditer(text):
        if found.start() - begin >= least:
            yield cut, begin, found.start()
        cut, begin = found.start(), found.end()
    if len(text) - begin >= least:
        yield cut, begin, len(text)


def lines(text: str, least: int) -> Iterator[tuple[int, int, int]]:
    """(cut, begin, end) of the lines of at least that many characters; a cut takes the line end before it along."""
    begin = 0
    while begin <= len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        if end - begin >= least:
            yield max(0, begin - 1), begin, end
        begin = end + 1


# -------------------------------------------------------------------------------------------------------------- match
def match_pieces_job(item: Item, directory: Path) -> dict[str, Any]:
    """The places to be cut, of the pieces in one bucket of hashes, to the groups of parts."""
    files, bucket, dtype = [Path(file) for file in item["files"]], item["bucket"], piece_dtype(item["num_ranks"])
    best = np.zeros(0, dtype)
    for chunk in iterate(files, bucket, dtype, item["records"]):
        best = _best_of(np.concatenate([best, chunk]))
    writer = BucketWriter(directory / CUTS, CUT, item["num_groups"])
    for chunk in iterate(files, bucket, dtype, item["records"]):
        winner = best[_place_in(best, chunk)]
        own = winner["node"] == chunk["node"]
        # A repetition inside one document may overlap the place that stays.
        begin = np.where(own, np.maximum(chunk["begin"], winner["end"]), chunk["begin"])
        lost = (~own | (chunk["begin"] != winner["begin"])) & (begin < chunk["end"])
        cuts = np.zeros(int(lost.sum()), CUT)
        cuts["node"], cuts["begin"], cuts["end"] = chunk["node"][lost], begin[lost], chunk["end"][lost]
        writer.add((cuts["node"] >> np.uint64(32)).astype(np.int64) // GROUP_PARTS, cuts)
    writer.close()
    return {"distinct": len(best), "cuts": writer.num_records}


def _best_of(pieces: np.ndarray) -> np.ndarray:
    """The best piece of each hash, sorted by hash."""
    pieces = pieces[np.argsort(pieces["hash"], kind="stable")]
    hashes = pieces["hash"]
    repeated = np.zeros(len(pieces), bool)
    same = hashes[1:] == hashes[:-1]
    repeated[1:] |= same
    repeated[:-1] |= same
    # Most pieces stand alone; only the others need sorting by everything.
    some = pieces[repeated]
    better = [some["better"][:, place] for place in range(some["better"].shape[1])]
    some = some[np.lexsort((some["begin"], some["node"], *reversed(better), some["low"], some["hash"]))]
    pieces[repeated] = some
    changes = np.ones(len(pieces), bool)
    changes[1:] = (pieces["hash"][1:] != pieces["hash"][:-1]) | (pieces["low"][1:] != pieces["low"][:-1])
    return pieces[changes]


def _place_in(best: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Where the hash of each piece stands in `best`. Equal first halves of hashes (never seen) are told apart."""
    place = np.searchsorted(np.ascontiguousarray(best["hash"]), pieces["hash"])
    while len(wrong := np.flatnonzero(best["low"][place] != pieces["low"])):
        place[wrong] += 1
    return place


# --------------------------------------------------------------------------------------------------------------- cuts
def read_cuts(item: Item) -> dict[int, np.ndarray]:
    """Row -> places [n, 2] to be cut, for part `part`; `cuts` are the files of match_pieces."""
    files = [Path(file) for file in item["cuts"]]
    mine = [np.zeros(0, CUT)]
    for chunk in iterate(files, item["part"] // GROUP_PARTS, CUT):
        mine.append(chunk[(chunk["node"] >> np.uint64(32)) == np.uint64(item["part"])])
    cuts = np.sort(np.concatenate(mine))
    rows, first = np.unique((cuts["node"] & ROW).astype(np.int64), return_index=True)
    places = np.stack([cuts["begin"], cuts["end"]], axis=1).astype(np.int64)
    return dict(zip(rows.tolist(), np.split(places, first[1:]), strict=False))


def cut_text(text: str, places: np.ndarray) -> str:
    """The text without those places [n, 2]; if its beginning went, so do the blank lines that then stand there."""
    kept: list[str] = []
    at = 0
    for begin, end in sorted(places.tolist()):
        if begin > at:
            kept.append(text[at:begin])
        at = max(at, end)
    kept.append(text[at:])
    result = "".join(kept)
    if not len(places) or places[:, 0].min() > 0:
        return result
    blank = _BLANK_LINES.match(result)
    return result[blank.end() :] if blank else result
