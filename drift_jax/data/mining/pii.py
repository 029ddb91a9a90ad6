"""Patterns of personal data, each replaced by its kind in brackets. Patterns only: names of people stay as they are.

A number counts where its check digits are right (cards, IBANs) or its form is that of a telephone number, with + or
with separators; digits in a row may be anything.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple


def mask(text: str, counts: Counter[str]) -> str:
    """The text with `[EMAIL]` and the like in place of what the patterns find; each is counted by its kind."""
    for rule in _RULES:
        if rule.hint(text):

            def replace(found: re.Match[str], rule: _Rule = rule) -> str:
                if not rule.holds(found[0]):
                    return found[0]
                counts[rule.kind] += 1
                return f"[{rule.kind}]"

            text = rule.pattern.sub(replace, text)
    return text


class _Rule(NamedTuple):
    kind: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = lambda _: True
    hint: Callable[[str], bool] = lambda _: True  # cheap: whether the pattern can be in a text at all


def _digits(text: str) -> list[int]:
    return [int(char) for char in text if char in "0123456789"]


def _is_card(text: str) -> bool:
    """Luhn's check digit."""
    digits = _digits(text)[::-1]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 7064, MOD 97-10."""
    plain = text.replace(" ", "")
    turned = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in turned)) % 97 == 1


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
    _Rule("EMAIL", re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"), hint=lambda text: "@" in text),
    _Rule(
        "API_KEY",
        re.compile(r"\b(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|AKIA[0-9A-Z]{16})\b"),
        hint=lambda text: any(start in text for start in ("sk-", "hf_", "gh", "AKIA")),
    ),
    _Rule("IBAN", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _is_iban),
    _Rule("CARD", re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]\d)"), _is_card),
    _Rule("IP", re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.]\d)"), _is_address),
    _Rule(
        "IP",
        re.compile(r"(?<![\w:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])"),
        lambda text: sum(char.isalnum() for char in text) > 3 and _is_address(text),
        lambda text: text.count(":") > 1,
    ),
    _Rule("SSN", re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")),
    _Rule(
        "PHONE",
        re.compile(
            r"(?<![\w.+])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
            r"|\(\d{2,4}\) ?\d{3,4}[ .-]?\d{3,4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w]|[.-]\d)"
        ),
        _is_phone,
    ),
)
