"""Patterns of personal data, each replaced by its kind in brackets. Patterns only: names of people stay as they are.

A number counts where its check digits are right (cards, IBANs) or its form is that of a telephone number, with + or
with separators; digits in a row may be anything. Cards and IBANs are found with other numbers and words beside them,
but never inside of a longer row of digits.

A text may have megabytes, and whoever chatted has written it: every search takes time in proportion to it.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

Find = Callable[[str], Iterator[tuple[int, int]]]


def mask(text: str, counts: Counter[str]) -> str:
    """The text with `[EMAIL]` and the like in place of what the patterns find; each is counted by its kind."""
    for rule in _RULES:
        if rule.hint(text):
            parts, done = [], 0
            for start, end in rule.find(text):
                parts += [text[done:start], f"[{rule.kind}]"]
                done = end
                counts[rule.kind] += 1
            text = "".join([*parts, text[done:]])
    return text


class _Rule(NamedTuple):
    kind: str
    find: Find  # starts and ends, in their order
    hint: Callable[[str], bool] = lambda _: True  # cheap: whether there can be one in a text at all


def _matches(pattern: str, holds: Callable[[str], bool] = lambda _: True) -> Find:
    """What the pattern matches and the check holds for."""
    compiled = re.compile(pattern)

    def find(text: str) -> Iterator[tuple[int, int]]:
        start = 0
        while found := compiled.search(text, start):
            passes = holds(found[0])
            if passes:
                yield found.span()
            # What fails the check may have swallowed the beginning of what passes it.
            start = found.end() if passes else found.start() + 1

    return find


# --- e-mail addresses ------------------------------------------------------------------------------------------

_AROUND_AT = re.compile(r"(?<![\w.+@-])[\w.+-]*+@[\w.+@-]*+")
# A name has 127 labels at most. Without a bound the matcher remembers each one: gigabytes, of a text made for it.
_DOMAIN = re.compile(r"@[\w-]+(?:\.[\w-]+){1,126}\b")


def _emails(text: str) -> Iterator[tuple[int, int]]:
    """From each @ on and back: to try an address at every letter takes the square of a long word without one."""
    for found in _AROUND_AT.finditer(text):
        run, done = found[0], 0
        for domain in _DOMAIN.finditer(run):
            name = run[done : domain.start()].rpartition("@")[2].lstrip(".+-")
            if name:
                done = domain.end()
                yield found.start() + domain.start() - len(name), found.start() + done


# --- numbers with check digits -----------------------------------------------------------------------------------


def _digits(text: str) -> list[int]:
    return [int(char) for char in text if char in "0123456789"]


def _is_card(text: str) -> bool:
    """Luhn's check digit."""
    digits = _digits(text)[::-1]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


_THIRTEEN = re.compile(r"\d(?:[ -]?\d){12}")
# Among other numbers, one in ten passes by chance: there, a card begins as those of its length do and is cut as it is
# printed. Groups of four at the head of a long row of such groups are a table. 19 digits come first: the first 16 of
# them may pass as well.
_PRINTED = (
    r"[46]\d{3}(?:[ -]\d{4}){3}[ -]\d{3}",
    r"(?=4|5[0-5]|2[2-7]|35|6[02-57]|9792)\d{4}(?:[ -]\d{4}){3}(?!(?:[ -]\d{4}){9})"
    r"|3[47]\d\d[ -]\d{6}[ -]\d{5}|3[0689]\d\d[ -]\d{6}[ -]\d{4}"
    r"|(?=[3-6]|2[2-7]|9792)\d{13,19}",
)
# With no number beside it, of any issuer and cut anyhow.
_ALONE = r"(?<!\d[ -])(?:\d{13,19}|\d{1,12}(?:[ -]\d{1,12}){1,18})(?![ -]?\d)"

# The registry of ISO 13616, release 101, and countries that use such numbers without being in it.
_IBAN_LENGTHS = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "AO CV GW LY MZ PT ST",
    26: "DZ IR IS TR",
    27: "BI CF CG CM DJ FR GA GQ GR IT KM MC MG MR SM TD",
    28: "AL AZ BF BJ BY CI CY DO GT HN HU LB MA ML NE NI PL SN SV TG",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}


def _iban_pattern() -> str:
    """In groups of four or in one, as long as the country's are; of a country that is not in the table, any length."""
    forms = []
    for length, codes in _IBAN_LENGTHS.items():
        fours, rest = divmod(length - 4, 4)
        last = rf" ?[A-Z0-9]{{{rest}}}" if rest else ""
        forms.append(rf"(?:{codes.replace(' ', '|')})\d\d(?: ?[A-Z0-9]{{4}}){{{fours}}}{last}")
    known = "|".join(_IBAN_LENGTHS.values()).replace(" ", "|")
    forms.append(rf"(?!{known})[A-Z]{{2}}\d\d(?: ?[A-Z0-9]{{4}}){{2,7}}(?: ?[A-Z0-9]{{1,3}})?")
    return rf"\b(?=[A-Z]{{2}}\d\d)(?:{'|'.join(forms)})\b"


def _is_iban(text: str) -> bool:
    """ISO 7064, MOD 97-10."""
    plain = text.replace(" ", "")
    turned = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in turned)) % 97 == 1


# --- numbers of a form -------------------------------------------------------------------------------------------


def _is_address(text: str) -> bool:
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (ip.is_loopback or ip.is_unspecified)


def _is_phone(text: str) -> bool:
    return 8 <= len(_digits(text)) <= 15 and not re.fullmatch(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}.*", text)


# In this order: what is in an e-mail address is no telephone number.
_RULES = (
    _Rule("EMAIL", _emails, lambda text: "@" in text),
    _Rule(
        "API_KEY",
        _matches(r"\b(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16})\b"),
        lambda text: any(start in text for start in ("sk-", "hf_", "gh", "AKIA")),
    ),
    _Rule("IBAN", _matches(_iban_pattern(), _is_iban)),
    *(
        _Rule(
            "CARD",
            _matches(rf"(?<![\d.])(?:{pattern})(?!\d|\.\d)", _is_card),
            lambda text: _THIRTEEN.search(text) is not None,
        )
        for pattern in (*_PRINTED, _ALONE)
    ),
    _Rule("IP", _matches(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d|\.\d)", _is_address)),
    _Rule(
        "IP",
        _matches(
            r"(?<![\w:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])",
            lambda text: sum(char.isalnum() for char in text) > 3 and _is_address(text),
        ),
        lambda text: text.count(":") > 1,
    ),
    _Rule("SSN", _matches(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")),
    _Rule(
        "PHONE",
        _matches(
            r"(?<![\w.+])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
            r"|\(\d{2,4}\) ?\d{3,4}[ .-]?\d{3,4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w]|[.-]\d)",
            _is_phone,
        ),
    ),
)
