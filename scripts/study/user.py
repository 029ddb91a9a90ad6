"""The simulated user of the study: wishes that a program can check, and complaints in words.

The user wants a short reply to the question, in plain sentences, that comes to an end. Nothing of this is in the
question, so a policy can only know it from earlier complaints.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_WORDS = 25
_FEWEST_WORDS = 3
_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_END = re.compile(r"[.!?][\"')\]”’*_`]*$")
_STEM = 5  # letters by which words are the same: sleep, sleeping
_STOP = frozenset(
    {"what", "when", "where", "which", "about", "does", "that", "this", "with", "from", "have", "your", "make", "write"}
    | {"explain", "between", "difference", "should", "could", "would", "there", "their", "them", "they", "most", "best"}
    | {"good", "into", "over", "after", "before", "than", "then", "some", "please", "learn", "work"}
)


def is_plain(question: str, reply: str) -> bool:
    """No line begins like an item of a list."""
    return _LIST.search(reply) is None


def is_short(question: str, reply: str) -> bool:
    """At most `MOST_WORDS` words, and some."""
    return _FEWEST_WORDS <= len(reply.split()) <= MOST_WORDS


def is_finished(question: str, reply: str) -> bool:
    """The last sentence has its end."""
    return _END.search(reply.rstrip()) is not None


def is_on_topic(question: str, reply: str) -> bool:
    """It names a word of the question that carries meaning, if there is one. Weak: it may still be nonsense."""
    asked = _stems(question)
    return not asked or bool(asked & _stems(reply))


def _stems(text: str) -> set[str]:
    words = re.findall(r"[a-z]{3,}", text.lower())
    return {word[:_STEM] for word in words if word not in _STOP and (len(word) > 3 or word in _SHORT)}


_SHORT = frozenset({"sky", "sea", "ram", "llm", "gpu", "url", "div", "css", "egg", "cat", "cats", "job", "tap", "tie"})


@dataclass(frozen=True)
class Wish:
    """What the user wants, and how they say that they did not get it."""

    is_met: Callable[[str, str], bool]  # of (question, reply)
    complaints: Sequence[str]


# In the order in which a user complains: who gets a list seldom says that it is long.
WISHES: Mapping[str, Wish] = {
    "plain": Wish(
        is_plain,
        (
            "No list please. One or two plain sentences are enough.",
            "I don't want bullet points, just tell me in a sentence.",
            "Please don't make a list of it. A short sentence will do.",
        ),
    ),
    "short": Wish(
        is_short,
        (
            "That is far too long. Answer in one sentence, please.",
            "Too long, I will not read all that. One or two short sentences.",
            "I asked a simple question and got an essay. Please keep it short, a single sentence.",
            "Can you say that in one sentence? This is much too much text.",
            "tl;dr please, one short sentence",
            "You talk too much. Just give me the short answer.",
        ),
    ),
    "finished": Wish(
        is_finished,
        (
            "You stopped in the middle. Give me a short answer that is complete.",
            "That ends in mid-sentence. One whole sentence, please.",
        ),
    ),
    "on_topic": Wish(
        is_on_topic,
        (
            "That does not answer my question. Please answer it in one sentence.",
            "You did not even mention what I asked about. One short sentence on that, please.",
        ),
    ),
}


def unmet_wishes(question: str, reply: str) -> list[str]:
    """Names of the wishes that the reply does not meet, in the order of `WISHES`."""
    return [name for name, wish in WISHES.items() if not wish.is_met(question, reply)]


def is_satisfied(question: str, reply: str) -> bool:
    return not unmet_wishes(question, reply)


def complain(prompt_id: str, question: str, reply: str) -> str | None:
    """What the user says about the reply, None when they are happy with it. The id picks one of the phrasings."""
    unmet = unmet_wishes(question, reply)
    if not unmet:
        return None
    phrasings = WISHES[unmet[0]].complaints
    return phrasings[int(hashlib.sha256(prompt_id.encode()).hexdigest(), 16) % len(phrasings)]


def score(record: Any, reply: str) -> float:
    """The user as a ranker (`recipe.ranker: study.user:score`): the share of wishes that a reply meets.

    It is what no log holds, a verdict on every reply; the study's `iterdpo-user` shows what it would be worth.
    """
    return 1.0 - len(unmet_wishes(record.prompt[-1].content, reply)) / len(WISHES)
