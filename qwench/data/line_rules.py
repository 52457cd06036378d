"""Rules that take lines out of web pages: what C4 and FineWeb call boilerplate, in many languages.

Removed are notices about scripts and cookies, calls to share, log in or read on, lines of numbers and counters. What
is left is judged by `data.prose_rules`. Only short lines are
candidates, so that no sentence of an article on cookies goes.
"""

from __future__ import annotations

import re
from collections import Counter

from qwench.config import config

_NOTICES = {
    "javascript": "javascript|java-script|enable scripts",
    "cookies": "cookie|consent|gdpr|dsgvo",
    "policy": "terms of use|terms of service|privacy policy|all rights reserved|datenschutz|alle rechte "
    "vorbehalten|impressum|"
    "mentions légales|politique de confidentialité|tous droits réservés|política de privacidad|todos los derechos|"
    "aviso legal|"
    "tutti i diritti|alle rechten voorbehouden|wszelkie prawa|все права защищены|политика конфиденциальности|版权所有|"
    "版權所有|"
    "保留所有权利|备案号|利用規約|個人情報保護|著作権|無断転載|개인정보|저작권|무단 전재",
}
_WORDS = {word: reason for reason, words in _NOTICES.items() for word in words.split("|")}
# Alone on their line ...
_CALL = re.compile(
    r"\W*(?:like|tweet|pin|reply|print|download|previous|next|home|menu|search|comments?|advertisement|sponsored|"
    r"register|"
    r"teilen|drucken|anmelden|abmelden|registrieren|suche|startseite|zurück|nach oben|kommentare?|anzeige|"
    r"partager|se connecter|s'inscrire|rechercher|accueil|retour|commentaires?|compartir|buscar|inicio|volver|"
    r"comentarios?|"
    r"condividi|accedi|cerca|commenti|compartilhar|entrar|delen|inloggen|zoeken|udostępnij|zaloguj|szukaj|"
    r"поделиться|войти|"
    r"поиск|комментарии|转发|更多|登录|登入|注册|註冊|搜索|首页|返回顶部|评论|留言|收藏|シェア|ツイート|ログイン|検索|コメント|"
    r"공유|더보기|로그인|검색|댓글)\W*",
    re.I,
)
# ... or with a few words after them.
_OPEN_CALL = re.compile(
    r"\W*(?:share (?:on|this|via)|follow (?:us|me|on)|subscribe (?:to|now|by)|sign (?:up|in)|log ?in|read more|"
    r"click here|"
    r"view all|see more|load more|show more|continue reading|print this|e-?mail this|back to top|skip to|leave a "
    r"(?:comment|reply)|"
    r"related (?:posts|articles)|weiterlesen|mehr lesen|mehr erfahren|auf \w+ teilen|lire la suite|en savoir plus|"
    r"leer más|ver más|"
    r"iniciar sesión|registrarse|leggi tutto|leggi di più|leia mais|lees meer|czytaj więcej|читать далее)\b"
    r"|\W*(?:分享到|点击查看|點擊查看|阅读更多|閱讀更多|上一篇|下一篇|続きを読む|もっと見る)",
    re.I,
)
_COUNTER = re.compile(
    r"[\W\d_]*(?:\d[\W\d_]*(?:likes?|views?|comments?|shares?|replies|followers?|min(?:utes)? read|kommentare?|次|条|"
    r"人)?)[\W\d_]*",
    re.I,
)
_TABLE = re.compile(r"\||\d+[.,]\d|[=+*^<>]")
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


@config
class LineRules:
    """Which lines are removed, and how much may go."""

    max_notice_chars: int = 160
    """Notices (scripts, cookies, policies) are looked for in lines up to so long, half in East Asian scripts ..."""
    max_call_chars: int = 40
    """... calls to share, read on or log in in lines up to so long."""
    drop_counters: bool = True
    """Lines of digits and counters ("12 comments")."""
    max_removed_share: float = 0.5
    """More of the characters removed: the document is dropped, "boilerplate_lines"."""


def remove_lines(text: str, rules: LineRules) -> tuple[str, Counter[str], float]:
    """The text without boilerplate lines, how many went for which reason, and the share of characters in them."""
    removed: Counter[str] = Counter()
    size = 0
    kept: list[str] = []
    longest = max(rules.max_notice_chars, rules.max_call_chars)
    lowered = text.lower()
    notices = [word for word in _WORDS if word in lowered]
    for line in text.split("\n"):
        length = len(line)
        if 0 < length <= longest and (reason := _reason(line, length, notices, rules)):
            removed[reason] += 1
            size += length
        else:
            kept.append(line)
    if not removed:
        return text, removed, 0.0
    return _BLANK_LINES.sub("\n\n", "\n".join(kept)).strip("\n"), removed, size / len(text)


_BLANK_LINES = re.compile(r"\n{3,}")


def _reason(line: str, length: int, notices: list[str], rules: LineRules) -> str:
    wide = 1 if line.isascii() else 2 if _WIDE.search(line) else 1
    if length * wide <= rules.max_call_chars:
        if _CALL.fullmatch(line) or (_OPEN_CALL.match(line) and not line.endswith(_SENTENCE_ENDS)):
            return "call"
        if rules.drop_counters and _COUNTER.fullmatch(line) and not _TABLE.search(line) and length > 1:
            return "counter"
    if notices and length * wide <= rules.max_notice_chars:
        lowered = line.lower()
        return next((_WORDS[word] for word in notices if word in lowered), "")
    return ""


_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
