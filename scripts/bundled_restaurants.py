"""Restaurants for the bundled data: draws attributes and writes them down in one or two sentences or three."""

import re
from collections.abc import Sequence

import bundled_vocabulary as words
from bundled_draw import Draw

Facts = dict[str, str]


def draw_name(draw: Draw) -> str:
    """Return an invented restaurant name."""
    second, other = draw.shuffled(words.SECONDS)[:2]
    family, partner = draw.shuffled(words.FAMILIES)[:2]
    fields = {"first": draw.pick(words.FIRSTS), "room": draw.pick(words.ROOMS), "second": second, "other": other}
    return draw.pick(words.NAME_PATTERNS).format(**fields, family=family, partner=partner)


def draw_facts(draw: Draw) -> Facts:
    """Return the attributes of one restaurant, name first: its name and three to seven others."""
    values: dict[str, Sequence[str]] = {
        "name": (draw_name(draw),),
        "eatType": words.EAT_TYPES,
        "food": words.FOODS,
        "area": tuple(words.AREAS),
        "near": (*words.LANDMARKS, f"The {draw.pick(words.FIRSTS)} {draw.pick(words.SECONDS)}"),
        **{name: [value for other, value in words.PHRASES if other == name] for name, _ in words.PHRASES},
    }
    optional = draw.shuffled([name for name in words.ATTRIBUTES if name not in ("name", "eatType")])
    kept = {"name", *optional[: draw.pick((2, 3, 3, 4, 4, 5, 6))]}
    if len(kept) == 3 or draw.chance(0.85):
        kept.add("eatType")
    return {name: draw.pick(values[name]) for name in words.ATTRIBUTES if name in kept}


def meaning(facts: Facts, draw: Draw) -> str:
    """Return the facts as `name[value], ...`: the name first, the others in the usual order or in any."""
    name, *others = facts
    order = others if draw.chance(0.6) else draw.shuffled(others)
    return ", ".join(f"{attribute}[{facts[attribute]}]" for attribute in (name, *order))


def joined(parts: Sequence[str]) -> str:
    """Return "", "a", "a and b", or "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def tidy(text: str) -> str:
    """Return the text without the traces of empty slots, every sentence with a capital."""
    text = re.sub(r"\s+([.,?])", r"\1", re.sub(r"\s+", " ", text)).strip()
    return re.sub(r"(^|[.?] )([a-z])", lambda match: match.group(1) + match.group(2).upper(), text)


def with_article(noun: str) -> str:
    """Return the noun phrase after "a" or "an"."""
    vowel = noun[0].lower() in "aeiou" and not noun.startswith("one-")
    return f"{'an' if vowel else 'a'} {noun}"


class Sentences:
    """One telling of a restaurant: every attribute gets exactly one place in it."""

    def __init__(self, facts: Facts, draw: Draw) -> None:
        self.facts = facts
        self.draw = draw
        self.heads: list[str] = []
        self.withs: list[str] = []
        self.wheres: list[str] = []
        # (mood, verb phrase)
        self.verbs: list[tuple[int, str]] = []
        self.bare = facts.get("eatType", "place")
        self.food = ""

    def place_where(self, opening: str) -> None:
        """Give area and near a place: together in the opening, or one of them after "it"."""
        draw, places = self.draw, []
        if "area" in self.facts:
            places.append(draw.text(words.AREAS[self.facts["area"]]))
        if "near" in self.facts:
            places.append(draw.text(words.NEAR).format(near=self.facts["near"]))
        places = draw.shuffled(places)
        fits = (1 if len(places) == 2 and draw.chance(0.3) else 2) if "{where}" in opening else 0
        self.wheres = places[:fits]
        self.verbs += [(0, f"{draw.text('is|is located|stands|can be found')} {place}") for place in places[fits:]]

    def place_food(self, opening: str) -> None:
        """Give the food a place: where the opening asks for it, before the noun, after "with", or in a verb phrase."""
        if "food" not in self.facts:
            return
        food = self.facts["food"]
        if "{food}" in opening:
            self.food = self.draw.text(words.FOOD_OBJECT).format(food=food)
        elif "{noun}" in opening and self.draw.chance(0.45):
            self.heads.append(food)
        elif "{with}" in opening and self.draw.chance(0.2):
            self.withs.append(self.draw.text(words.FOOD_WITH).format(food=food, a_food=with_article(food)))
        else:
            self.verbs.append((0, self.draw.text(words.FOOD_VERB).format(food=food, a_food=with_article(food))))

    def place_quality(self, attribute: str, opening: str) -> None:
        """Give price, rating or family-friendliness a place: before the noun, after "with", or in a verb phrase."""
        phrases = words.PHRASES[attribute, self.facts[attribute]]
        if "{noun}" in opening and phrases.head and len(self.heads) < 2 and self.draw.chance(0.4):
            self.heads.insert(0, self.draw.text(phrases.head))
        elif "{with}" in opening and len(self.withs) < 2 and self.draw.chance(0.45):
            self.withs.append(self.draw.text(phrases.with_))
        else:
            self.verbs.append((phrases.mood, self.draw.text(phrases.verb)))

    def place_all(self, opening: str) -> None:
        """Give every attribute its place in `opening` or behind it."""
        self.place_where(opening)
        self.place_food(opening)
        for attribute in self.draw.shuffled(["priceRange", "customer rating", "familyFriendly"]):
            if attribute in self.facts:
                self.place_quality(attribute, opening)
        self.verbs = self.draw.shuffled(self.verbs)

    def noun(self) -> str:
        """Return the noun phrase: "a cheap, family-friendly Greek pub"."""
        food = [head for head in self.heads if head in words.FOODS]
        others = [head for head in self.heads if head not in words.FOODS]
        noun = self.facts.get("eatType") or self.draw.pick(words.PLACE_NOUNS)
        return with_article(" ".join([*([", ".join(others)] if others else []), *food, noun]))

    def verb_phrases(self, count: int) -> str:
        """Return the next `count` verb phrases, joined; bad news and good news may be set against each other."""
        taken, self.verbs = self.verbs[:count], self.verbs[count:]
        if len(taken) == 2 and taken[0][0] * taken[1][0] < 0 and self.draw.chance(0.8):
            return self.draw.text(" but | although it ").join(phrase for _, phrase in taken)
        return joined([phrase for _, phrase in taken])

    def follow_up(self) -> str:
        """Return sentences with the verb phrases that are left."""
        text = ""
        while self.verbs:
            left = len(self.verbs)
            subject = "It" if text else self.draw.pick(("It", "It", f"The {self.bare}", f"This {self.bare}"))
            text += f" {subject} {self.verb_phrases(left if left < 3 else self.draw.pick((2, 3)))}."
        return text


def describe(facts: Facts, draw: Draw) -> str:
    """Return one description of the restaurant that says all of `facts` and nothing else."""
    while True:
        opening, needs = draw.pick(words.OPENINGS)
        telling = Sentences(facts, draw)
        telling.place_all(opening)
        has = {"where": telling.wheres, "verb": telling.verbs, "food": telling.food}
        if all(has[need] for need in needs.split()):
            break
    first = draw.text(opening).format(
        name=facts["name"],
        noun=telling.noun(),
        bare=telling.bare,
        where=" ".join(telling.wheres),
        food=telling.food,
        verbs=telling.verb_phrases(2) if "{verbs}" in opening else "",
        **{"with": f"with {joined(telling.withs)}" if telling.withs else ""},
    )
    return tidy(first + telling.follow_up())
