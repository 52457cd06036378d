"""Filler for long prompts: sentences made by a small grammar from a seed, in English and Chinese.

They are about nothing in particular, hold no digits and no names that needles use. A directory with plain texts
(`essays/*.txt`) takes their place where one is given, which is nearer to the published benchmarks.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from random import Random

from qwench.evals import context
from qwench.evals.local_files import Files
from qwench.evals.own.lengths import seeded

ESSAYS = ("essays/*.txt", "haystack/*.txt")
NOISE = "The road is long. The night is quiet. The lamp is lit. On we walk. Round and round again."
"""The repeated noise of the simplest needle task and of passkey retrieval."""


def words(text: str, at: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(at))


ADJECTIVES = words(
    "amber brisk broad calm careful clever coarse cold crisp damp dim distant dry dusty early eager faint fair "
    "famous fine firm flat fresh gentle glossy golden grand hollow humble idle keen kind large late lean light "
    "lively lonely long loose loud mellow mild modern narrow neat noble odd old pale patient plain proud quick "
    "quiet rare rough round sharp shy silent silver simple slow small smooth soft solid sour steady steep "
    "strange strong sturdy subtle sudden sweet tall tame thick thin tidy tiny vast warm wide wild wise young"
)
NOUNS = words(
    "anchor apple artist baker banner barrel basket beacon bell bench blanket boat bottle bridge brush bucket "
    "button cabin candle canvas captain carpet castle cellar chair chapel clock cloud coach coat compass cottage "
    "cousin crane curtain dancer desk doctor drum engine farmer feather fence ferry fiddle flag flute fountain "
    "garden gate glove guitar hammer harbour hat helmet hill horse inn island jacket journal kettle kite ladder "
    "lamp lantern lemon letter library lighthouse loom map market meadow mill mirror mountain neighbour notebook "
    "oar orchard organ painter parcel path pencil piano pillow pilot plough pocket potter quilt raft ribbon "
    "river road roof saddle sailor scarf school shelf shepherd ship shoe singer sister smith spoon stable "
    "staircase station stone stove student table tailor teacher tent tower trader tree trumpet tunnel umbrella "
    "uncle valley village violin wagon wall watch weaver well wheel whistle window writer yard"
)
_VERBS = words(
    "admired avoided borrowed bought carried cleaned counted covered crossed described drew examined followed "
    "forgot found guarded lifted measured mended missed moved noticed opened packed painted passed praised "
    "pulled pushed repaired returned reached sketched sold studied touched trusted visited washed watched"
)
_PLACES = words(
    "near the river|behind the old mill|on the market square|at the edge of the wood|beside the chapel|"
    "in the upper valley|along the coast|under the long bridge|in a side street|at the foot of the hill|"
    "next to the school|on the northern road|in the back garden|across the meadow|by the harbour wall",
    "|",
)
_TIMES = words(
    "in the morning|after lunch|before sunset|late at night|during the first snow|on a rainy day|every spring|"
    "for a whole week|at the end of summer|without any hurry|as everyone expected|to nobody's surprise|once more|"
    "for the last time|on the way home",
    "|",
)
_SHAPES = (
    "The {a} {n} {v} the {n2} {p}.",
    "{T}, the {n} {v} a {a} {n2}.",
    "Nobody knew why the {n} {v} the {a} {n2} {p}.",
    "The {n} and the {n2} were {a}, and the {n3} {v} them {t}.",
    "It was a {a} {n} that {v} the {n2} {t}.",
    "When the {n} {v} the {n2}, the {n3} stayed {p}.",
    "Some said that the {n} was {a}, others that the {n2} {v} it {t}.",
    "{P}, a {a} {n} {v} the {n2} and then the {n3}.",
)
_WHO = words(
    "木匠|老师|船长|裁缝|画家|邻居|农夫|医生|学生|歌手|牧羊人|商人|铁匠|作家|园丁|渔夫|面包师|旅人|姐姐|叔叔|"
    "厨师|邮差|琴师|织工|守门人|司机|猎人|护士|店主|向导",
    "|",
)
_HOW = words(
    "安静|旧|宽大|明亮|古怪|结实|小巧|遥远|温暖|朴素|鲜艳|沉重|柔软|粗糙|精致|陌生|平整|清凉|干净|细长|厚实|光滑",
    "|",
)
_WHAT = words(
    "灯笼|篮子|木船|铜钟|地图|雨伞|梯子|毯子|风筝|水壶|镜子|手套|围巾|信封|箱子|椅子|画笔|帽子|竹笛|石桥|栅栏|"
    "窗户|书架|马车|瓷碗|桌子|帐篷|枕头|水桶|车轮|笔记本|望远镜|小提琴|蜡烛",
    "|",
)
_DID = words(
    "修好了|借走了|忘记了|找到了|搬走了|擦干净了|画下了|看见了|卖掉了|打开了|带回了|称赞了|放下了|丈量了|收起了|推开了",
    "|",
)
_WHERE = words(
    "河边|集市上|山脚下|学校旁边|老磨坊后面|村口|桥下|树林边上|院子里|码头旁|小巷里|北边的路上|山谷里|海岸边|草地上",
    "|",
)
_WHEN = words(
    "清晨|午饭后|日落之前|深夜|下雪的那天|每年春天|整整一个星期里|夏末|雨天|回家的路上|大家都睡着以后|节日里",
    "|",
)
_SHAPES_ZH = (
    "{time}，{who}在{where}{did}一件{how}的{what}。",
    "{who}{did}{what}，{who2}却一直待在{where}。",
    "没有人知道{who}为什么在{where}{did}那件{what}。",
    "那是一件{how}的{what}，{time}被{who}带到了{where}。",
    "有人说{who}很{how}，也有人说{who2}{did}{what}。",
    "{where}有{how}的{what}，{time}{who}{did}它。",
)


def _english(rng: Random) -> str:
    n, n2, n3 = rng.sample(NOUNS, 3)
    place, time = rng.choice(_PLACES), rng.choice(_TIMES)
    parts = {"a": rng.choice(ADJECTIVES), "n": n, "n2": n2, "n3": n3, "v": rng.choice(_VERBS), "p": place, "t": time}
    sentence = rng.choice(_SHAPES).format(**parts, P=place[0].upper() + place[1:], T=time[0].upper() + time[1:])
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def _chinese(rng: Random) -> str:
    who, who2 = rng.sample(_WHO, 2)
    parts = {"who": who, "who2": who2, "how": rng.choice(_HOW), "what": rng.choice(_WHAT)}
    return rng.choice(_SHAPES_ZH).format(
        **parts, did=rng.choice(_DID), where=rng.choice(_WHERE), time=rng.choice(_WHEN)
    )


class Haystack:
    """Sentences in a fixed order, made or read as they are needed: `Haystack("en", seed=1).sentences(1000)`."""

    def __init__(self, language: str, seed: int, texts: tuple[str, ...] = ()) -> None:
        if language not in ("en", "zh"):
            raise ValueError(f"filler is written in en and zh, not in {language!r}")
        self.language, self._rng = language, seeded("filler", language, seed)
        self._made: list[str] = []
        self._given = [sentence for text in texts for sentence in split_sentences(text)]

    def sentences(self, count: int) -> list[str]:
        """The first `count`; given texts are repeated where they are too short."""
        if self._given:
            times = -(-count // len(self._given))
            return (self._given * times)[:count]
        make = _english if self.language == "en" else _chinese
        while len(self._made) < count:
            self._made.append(make(self._rng))
        return self._made[:count]

    @property
    def joint(self) -> str:
        """What stands between sentences."""
        return " " if self.language == "en" else ""


def split_sentences(text: str) -> list[str]:
    """Sentences of running text, each without blanks around it."""
    pieces = re.split(r"(?<=[.!?])\s+|(?<=[。！？])", re.sub(r"\s+", " ", text))
    return [piece.strip() for piece in pieces if piece.strip()]


@functools.lru_cache(maxsize=4)
def _haystack(language: str, seed: int, files: tuple[Path, ...]) -> Haystack:
    return Haystack(language, seed, tuple(path.read_text(encoding="utf-8", errors="replace") for path in files))


def haystack(language: str) -> Haystack:
    """The filler of the evaluation that runs: English essays of its data directories, else made sentences."""
    running = context.current()
    files = tuple(Files(running.data_dirs).search(*ESSAYS)) if language == "en" else ()
    return _haystack(language, running.seed, files)


def pseudo_word(rng: Random) -> str:
    """A word that no language has: two to three syllables."""
    syllables = rng.choice((2, 2, 3))
    word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))
    return word + rng.choice(("", "n", "r", "l", "st", "nd"))
