"""Personal data and secrets in texts, replaced by placeholders and counted.

E-mail addresses, public IP addresses, telephone numbers that are written as such, keys of well-known services and
private keys. Names and postal addresses are not found here. Digits alone are no telephone number: it takes a plus
sign, a word such as "Tel." before them, or a national form with brackets or hyphens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from qwench.config import config

PLACEHOLDERS = {"email": "<EMAIL>", "ip": "<IP_ADDRESS>", "phone": "<PHONE>", "key": "<KEY>"}

# Searched from what is rare ("@", a digit, a plus sign), so that text without it costs nothing; what stands before a
# match is looked at afterwards, since a look-behind in front would be tried at every character.
_LOCAL_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}$")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])")
_RESERVED_HOSTS = (
    "example.com",
    "example.org",
    "example.net",
    ".example",
    ".invalid",
    ".test",
    "users.noreply.github.com",
)
_IPV4 = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![\w-]|\.[0-9])")
_IPV6 = re.compile(
    r"\b[0-9A-Fa-f]{1,4}:(?:[0-9A-Fa-f]{1,4}:){6}[0-9A-Fa-f]{1,4}(?![\w:])"
    r"|\b2[0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{1,4}:){0,6}:[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{1,4}){0,6}(?![\w:])"
)
_COLONS = re.compile(":[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]")
"""Every address of version 6 has it."""
_VERSION_BEFORE = re.compile(r"(?:version|release|firmware|build|chrome|safari|section|v)[ :/]*$", re.I)
_PHONES = (
    re.compile(
        r"\+[0-9]{1,3}[ .\-/]?(?:\([0-9]{1,4}\)[ .\-/]?)?[0-9]{1,4}(?:[ .\-/]?[0-9]{2,4}){2,4}(?![\w-]|\.[0-9])"
    ),
    re.compile(r"\([0-9]{3}\) ?[0-9]{3}[ .-][0-9]{4}(?![\w-])"),
    re.compile(r"[2-9][0-9]{2}-[2-9][0-9]{2}-[0-9]{4}(?![\w-])|[2-9][0-9]{2}\.[2-9][0-9]{2}\.[0-9]{4}(?![\w-])"),
)
_NUMBER = re.compile(r"[0-9][0-9 ()/.\-]{5,20}[0-9](?!\w)")
_DIGITS = re.compile(r"[+(0-9][0-9 ()/.\-]{5,30}")
"""Where a telephone number or IPv4 address may begin."""
_PHONE_WORD = re.compile(
    r"(?:\b(?:tel|telefon|telephone|teléfono|téléphone|phone|fax|mobile?|handy|cell|hotline|whatsapp|тел|телефон|факс)"
    r"|电话|電話|手机|手機|联系方式|传真|전화|携帯)\s{0,2}(?:nr|no|number|num|号码|番号)?\s{0,2}[.:：]{0,2}\s{0,3}\+?\(?$",
    re.I,
)
_KEY_MARKS = ("AKIA", "ASIA", "glpat-", "sk-", "AIza", "xox", "eyJ", "PRIVATE KEY", "pypi-")
_KEY_MARKS_WITH_LINE = ("ghp_", "gho_", "ghs_", "github_pat_", "sk_live_", "rk_live_", "hf_", "npm_")
"""The others, without which there is no key either; most prose has no underscore."""
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9 ]{0,30})PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----)){1,12000}"
    r"-----END (?:[A-Z0-9 ]{0,30})PRIVATE KEY(?: BLOCK)?-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[0-9A-Za-z]{36,}\b|\bgithub_pat_[0-9A-Za-z_]{60,}\b"
    r"|\bglpat-[0-9A-Za-z_-]{20,}|\bsk-(?:proj-|ant-[a-z0-9]+-)?[0-9A-Za-z_-]{32,}|\b[sr]k_live_[0-9A-Za-z]{20,}\b"
    r"|\bAIza[0-9A-Za-z_-]{35}\b|\bxox[abeprs]-[0-9A-Za-z-]{20,}|\bhf_[A-Za-z]{30,}\b|\bnpm_[0-9A-Za-z]{36}\b"
    r"|\bpypi-AgE[0-9A-Za-z_-]{50,}|\beyJ[0-9A-Za-z_-]{15,}\.eyJ[0-9A-Za-z_-]{15,}\.[0-9A-Za-z_-]{20,}"
)


@config
class PiiRules:
    """What is replaced."""

    email: bool = True
    ip: bool = True
    phone: bool = True
    """Not in source code and mathematics, where rows of digits are numbers."""
    key: bool = True


def scrub(text: str, rules: PiiRules, *, numbers_are_data: bool = False) -> tuple[str, Counter[str]]:
    """The text with placeholders, and how many of each kind were put in.

    `numbers_are_data` (source code, mathematics) leaves telephone numbers.

    >>> scrub("Write to a.b@mail.org or call +49 30 1234567.", PiiRules())
    ('Write to <EMAIL> or call <PHONE>.', Counter({'email': 1, 'phone': 1}))
    """
    counts: Counter[str] = Counter()
    if rules.key and (marks := _key_marks(text)):
        # Only a private key goes over several lines.
        if "PRIVATE KEY" in marks:
            text = _replace(_KEY, "key", text, counts)
        else:
            text = _replace_in_lines(_KEY, "key", text, lambda line: any(mark in line for mark in marks), counts)
    if rules.email and "@" in text:
        text = _scrub_emails(text, counts)
    if rules.ip and _COLONS.search(text):
        text = _replace_in_lines(_IPV6, "ip", text, _may_have_ipv6, counts)
    if rules.ip or rules.phone:
        text = _scrub_numbers(text, rules.ip, rules.phone and not numbers_are_data, counts)
    return text, counts


def _may_have_ipv6(line: str) -> bool:
    return "::" in line or _COLONS.search(line) is not None


def _key_marks(text: str) -> list[str]:
    marks = [mark for mark in _KEY_MARKS if mark in text]
    return marks + [mark for mark in _KEY_MARKS_WITH_LINE if mark in text] if "_" in text else marks


def _scrub_numbers(text: str, ip: bool, phone: bool, counts: Counter[str]) -> str:
    parts: list[str] = []
    end = 0
    for run in _DIGITS.finditer(text):
        found, kind = None, "ip"
        if (
            ip
            and run[0].count(".") >= 3
            and (match := _IPV4.search(text, run.start(), run.end() + 3))
            and match.start() < run.end()
        ):
            found = match if _is_address(match) else None
        if phone and found is None and sum(map(str.isdigit, run[0])) >= 6:
            kind = "phone"
            found = _find_phone(text, run)
        if found is not None and found.start() >= end:
            parts += (text[end : found.start()], PLACEHOLDERS[kind])
            end = found.end()
            counts[kind] += 1
    return "".join(parts) + text[end:] if parts else text


def _find_phone(text: str, run: re.Match[str]) -> re.Match[str] | None:
    for pattern in _PHONES:
        if (
            (match := pattern.search(text, run.start(), run.end() + 3))
            and match.start() < run.end()
            and _stands_alone(match)
        ):
            return match
    match = _NUMBER.search(text, run.start(), run.end() + 3)
    return match if match and match.start() < run.end() and _is_phone(match) else None


def _replace(pattern: re.Pattern[str], kind: str, text: str, counts: Counter[str]) -> str:
    text, count = pattern.subn(PLACEHOLDERS[kind], text)
    if count:
        counts[kind] += count
    return text


def _replace_in_lines(
    pattern: re.Pattern[str], kind: str, text: str, worth: Callable[[str], bool], counts: Counter[str]
) -> str:
    """`_replace` for a pattern without line ends, tried in those lines alone that may have it."""
    lines = text.split("\n")
    return "\n".join([_replace(pattern, kind, line, counts) if worth(line) else line for line in lines])


def _scrub_emails(text: str, counts: Counter[str]) -> str:
    parts: list[str] = []
    end, place = 0, -1
    while (place := text.find("@", place + 1)) >= 0:
        domain = _DOMAIN.match(text, place + 1)
        local = _LOCAL_PART.search(text[max(end, place - 64) : place]) if domain else None
        remote = local is not None and local[0] == "git"  # of a repository: git@host:path
        if domain and local and not remote and not domain[0].lower().endswith(_RESERVED_HOSTS):
            parts += (text[end : place - len(local[0])], PLACEHOLDERS["email"])
            end = domain.end()
            counts["email"] += 1
    return "".join(parts) + text[end:] if parts else text


def _before(match: re.Match[str], size: int) -> str:
    return match.string[max(0, match.start() - size) : match.start()]


def _stands_alone(match: re.Match[str]) -> bool:
    before = _before(match, 1)
    return not before or not (before.isalnum() or before in "_.+-/:=#%")


def _is_phone(match: re.Match[str]) -> bool:
    return 6 <= sum(map(str.isdigit, match[0])) <= 15 and _PHONE_WORD.search(_before(match, 32)) is not None


def _is_address(match: re.Match[str]) -> bool:
    """A public IPv4 address, no version number and none that documents use."""
    before = _before(match, 12)
    if before and (before[-1].isalnum() or before[-1] in "_.-"):
        return False
    written = match[0].split(".")
    parts = [int(part) for part in written]
    first, second = parts[0], parts[1]
    private = first in (0, 10, 127) or parts[:2] in ([192, 168], [169, 254]) or (first == 172 and 16 <= second < 32)
    documentation = parts[:3] in ([192, 0, 2], [198, 51, 100], [203, 0, 113])
    if max(parts) > 255 or first >= 224 or private or documentation or any(p[0] == "0" and len(p) > 1 for p in written):
        return False
    return _VERSION_BEFORE.search(before) is None
