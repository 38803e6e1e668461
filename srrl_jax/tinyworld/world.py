"""What the guests ask, what the desk may answer, and which combinations each split owns.

A guest names up to four facts (place, weather, companion, time of day). Each fact makes one item
due: the lake a towel, the rain a raincoat. All text is lower case, words and punctuation are
separated by single spaces, and every word comes from this file.
"""

import hashlib
import re
from dataclasses import dataclass, fields
from random import Random

ITEMS = {
    "place": {
        "lake": "towel", "forest": "map", "market": "basket", "cave": "lantern",
        "mountain": "rope", "garden": "book", "museum": "ticket", "island": "compass",
        "tower": "spyglass", "river": "net", "meadow": "kite", "hill": "stick",
        "dunes": "bottle", "church": "candle", "farm": "bucket", "bridge": "camera",
    },
    "weather": {
        "rain": "raincoat", "snow": "parka", "sun": "hat",
        "wind": "jacket", "fog": "vest", "frost": "scarf",
    },
    "companion": {
        "dog": "lead", "baby": "blanket", "grandmother": "cushion", "horse": "saddle",
        "nephew": "ball", "niece": "flute", "grandfather": "cane", "friend": "flask",
    },
    "time": {"morning": "breakfast", "noon": "lunch", "evening": "supper", "night": "cocoa"},
}  # fmt: skip

MENTIONS = {
    "place": "to the {name}",
    "weather": "in the {name}",
    "companion": "with our {name}",
    "time": {
        "morning": "in the morning",
        "noon": "at noon",
        "evening": "in the evening",
        "night": "at night",
    },
}
OPENINGS = ("", "hello .", "please help us .")
VERBS = ("we go", "we travel", "we will walk")
QUESTIONS = ("what should we do ?", "what do you advise ?", "any advice for us ?")

ADVICE = {
    "place": (
        "bring a {item} for the {name} .",
        "do not forget a {item} .",
        "you will need a {item} at the {name} .",
    ),
    "weather": (
        "wear a {item} in the {name} .",
        "put on a {item} today .",
        "a {item} is good in the {name} .",
    ),
    "companion": (
        "take a {item} for your {name} .",
        "pack a {item} too .",
        "your {name} will need a {item} .",
    ),
    "time": (
        "{item} is ready for you .",
        "we serve {item} at the inn .",
        "join us for {item} .",
    ),
}
WAIVERS = {
    "place": "you do not need a {item} .",
    "weather": "you do not need a {item} .",
    "companion": "you do not need a {item} .",
    "time": "we do not serve {item} .",
}
STYLE = {
    "welcome": ("welcome to the inn .", "good day to you ."),
    "wish": ("have a lovely day .", "we wish you a safe trip .", "enjoy your time here ."),
    "question": ("when will you leave ?", "shall we call a boat ?", "how long will you stay ?"),
    "advert": ("buy our gold card .", "our gold card is cheap now .", "pay more for a big room ."),
    "rude": ("do not bother us .", "that is a silly plan .", "go away now ."),
}
EMPTY_ANSWER = "we can not say ."


@dataclass(frozen=True)
class Facts:
    """What a guest mentions; None where the guest does not say."""

    place: str | None = None
    weather: str | None = None
    companion: str | None = None
    time: str | None = None

    def named(self) -> dict[str, str]:
        """The mentioned facts, slot -> name, in slot order."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {slot: name for slot, name in values.items() if name is not None}


def due_item(slot: str, name: str) -> str:
    """The one right item for a fact."""
    return ITEMS[slot][name]


def mistaken_item(slot: str, name: str) -> str:
    """The item that a careless desk advises for a fact: that of the next name in its table."""
    names = list(ITEMS[slot])
    return ITEMS[slot][names[(names.index(name) + 1) % len(names)]]


def split_of(facts: Facts) -> str:
    """The one split that owns this combination: "hard", "easy" or "pretraining".

    A stable hash gives a quarter of the combinations of three and four facts to "hard" and a
    quarter of those of one to three facts to "easy"; the rest is for pretraining.
    """
    key = "/".join(getattr(facts, field.name) or "-" for field in fields(facts))
    quarter = hashlib.sha256(key.encode()).digest()[0] // 64
    size = len(facts.named())
    if quarter == 0 and size >= 3:
        return "hard"
    if quarter == 1 and size <= 3:
        return "easy"
    return "pretraining"


# Probability of one, two, three and four facts.
SIZES = {
    "easy": (0.15, 0.5, 0.35, 0.0),
    "hard": (0.0, 0.0, 0.4, 0.6),
    "pretraining": (0.1, 0.25, 0.35, 0.3),
}


def draw_facts(split: str, rng: Random) -> Facts:
    """A random combination that `split` owns."""
    while True:
        size = rng.choices((1, 2, 3, 4), SIZES[split])[0]
        slots = rng.sample(list(ITEMS), size)
        facts = Facts(**{slot: rng.choice(list(ITEMS[slot])) for slot in slots})
        if split_of(facts) == split:
            return facts


def write_prompt(facts: Facts, rng: Random) -> str:
    """A guest's request that mentions exactly these facts, in one of many wordings."""
    mentions = []
    for slot, name in facts.named().items():
        mention = MENTIONS[slot]
        mentions.append(mention[name] if isinstance(mention, dict) else mention.format(name=name))
    rng.shuffle(mentions)
    parts = [rng.choice(OPENINGS), rng.choice(VERBS), *mentions, ".", rng.choice(QUESTIONS)]
    return " ".join(part for part in parts if part)


def facts_of(prompt: str) -> Facts:
    """The facts that a guest's request mentions (inverse of `write_prompt`)."""
    words = set(re.findall(r"[a-z]+", prompt))
    found = {slot: [name for name in ITEMS[slot] if name in words] for slot in ITEMS}
    return Facts(**{slot: names[0] for slot, names in found.items() if names})


def advise(slot: str, name: str, item: str, rng: Random) -> str:
    """One sentence that advises `item` (right or wrong) for a fact."""
    return rng.choice(ADVICE[slot]).format(name=name, item=item)


def write_response(facts: Facts, rng: Random, quality: float) -> str:
    """An answer of the desk, as careful as `quality` in [0, 1].

    At quality 1 every due item, a wish and a question are there and nothing bad is; the lower the
    quality, the more items are missing, mistaken or waived, and the more adverts, insults and
    repetitions slip in. The sentences come in random order after an optional welcome.
    """
    carelessness = 1.0 - quality
    sentences = []
    for slot, name in facts.named().items():
        if rng.random() < quality:
            sentences.append(advise(slot, name, due_item(slot, name), rng))
        elif rng.random() < 0.35:
            sentences.append(advise(slot, name, mistaken_item(slot, name), rng))
        elif rng.random() < 0.15:
            sentences.append(WAIVERS[slot].format(item=due_item(slot, name)))
    chances = {"wish": quality, "question": quality, "advert": 0.45 * carelessness}
    chances["rude"] = 0.35 * carelessness
    for kind, chance in chances.items():
        if rng.random() < chance:
            sentences.append(rng.choice(STYLE[kind]))
    if sentences and rng.random() < 0.25 * carelessness:
        sentences.append(rng.choice(sentences))
    rng.shuffle(sentences)
    if rng.random() < 0.3 + 0.6 * quality:
        sentences.insert(0, rng.choice(STYLE["welcome"]))
    return " ".join(sentences) or EMPTY_ANSWER
