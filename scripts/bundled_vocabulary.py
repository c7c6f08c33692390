"""Words of the bundled restaurant rows: names, attribute values, and the ways to say each value.

Written for this project. The attribute names and the `name[value]` notation are those of the E2E NLG challenge; the
names and the sentences are ours. Texts hold choices in square brackets, `[near|close to]`, of which one is drawn.
"""

from dataclasses import dataclass

# Order in which a list of attributes is usually written.
ATTRIBUTES = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")

# {first}, {second}, {family}, {partner}, {room} are drawn from the lists below.
NAME_PATTERNS = (
    "The {first} {second}",
    "The {first} {second}",
    "The {second} & {other}",
    "{family} & {partner}",
    "{family}'s {room}",
    "{family}'s",
    "{first} {room}",
)
FIRSTS = tuple("Copper Velvet Crooked Painted Quiet Amber Tin Scarlet Hollow Lucky Salty Mossy Striped Iron".split())
SECONDS = tuple("Otter Lantern Anvil Heron Kettle Bramble Thimble Badger Compass Pear Sparrow Teapot Walnut".split())
FAMILIES = tuple("Tansley Brockett Ollerby Quince Marrow Pellworth Garrow Hatherly Jubb Lorimer Nettleby Orrin".split())
ROOMS = tuple("Kitchen Table Cellar Yard Larder Parlour Pantry".split())
LANDMARKS = (
    "Tolliver Library",
    "Pippin Hall",
    "Marsh Lane Cinema",
    "Saint Orla's Church",
    "Harrow Clock Tower",
    "Quillfeather Books",
    "Beacon Theatre",
    "Larkspur Gardens",
    "Foundry Arch",
    "Mallow Bridge",
    "Northgate Station",
    "Ferry Steps",
)

EAT_TYPES = ("pub", "restaurant", "coffee shop", "bistro", "tea room", "wine bar")
# Nouns for a restaurant whose eatType is not given.
PLACE_NOUNS = ("eatery", "place to eat", "venue")
FOODS = (
    "Greek",
    "Korean",
    "Turkish",
    "Mexican",
    "Lebanese",
    "Vietnamese",
    "Polish",
    "Moroccan",
    "Italian",
    "Thai",
    "vegetarian",
    "Portuguese",
)
# {a_food} is the food after its article.
FOOD_OBJECT = "{food} [food|dishes|meals|cooking]"
FOOD_VERB = (
    "[serves|offers|sells] {food} [food|dishes|meals]|has {a_food} menu|[cooks|prepares] {food} [food|dishes]|"
    "specialises in {food} [food|cooking]"
)
FOOD_WITH = "{food} [food|dishes] on the menu|{a_food} menu"


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """The ways to say one value of one attribute, by their place in a sentence; alternatives divided by `|`."""

    # before a noun: "a ... pub"; "" if there is none
    head: str = ""
    # after "with"
    with_: str = ""
    # after "it"
    verb: str = ""
    # +1 good news, -1 bad news, 0 neither: decides where "but" and "although" may stand
    mood: int = 0


PHRASES: dict[tuple[str, str], Phrases] = {
    ("priceRange", "cheap"): Phrases(
        head="cheap|inexpensive|low-cost|budget",
        with_="[low|cheap] prices|a low price range",
        verb="is [cheap|inexpensive]|has [low|cheap] prices|charges little|keeps its prices low",
        mood=1,
    ),
    ("priceRange", "moderate"): Phrases(
        head="moderately priced|mid-priced",
        with_="[moderate|average] prices|a moderate price range",
        verb="is moderately priced|has [moderate|average] prices|charges moderate prices",
    ),
    ("priceRange", "high"): Phrases(
        head="expensive|high-priced|pricey",
        with_="[high|steep] prices|a high price range",
        verb="is [expensive|pricey]|has high prices|charges high prices",
        mood=-1,
    ),
    ("priceRange", "less than £15"): Phrases(
        with_="prices [below|under] £15|meals for less than £15",
        verb="charges less than £15|keeps its prices [below|under] £15|costs less than £15 [a head|per person]",
        mood=1,
    ),
    ("priceRange", "£15-25"): Phrases(
        with_="prices between £15 and £25|prices from £15 to £25|a price range of £15-25",
        verb="charges [between £15 and £25|£15 to £25]|has a price range of £15-25|costs £15-25 [a head|per person]",
    ),
    ("priceRange", "more than £25"): Phrases(
        with_="prices [above|over] £25|meals for more than £25",
        verb="charges more than £25|has prices [above|over] £25|costs more than £25 [a head|per person]",
        mood=-1,
    ),
    ("customer rating", "low"): Phrases(
        head="low-rated|poorly rated",
        with_="a [low|poor] customer rating|[low|poor] ratings",
        verb="has a [low|poor] customer rating|is rated low by [its customers|customers|guests]|gets poor ratings",
        mood=-1,
    ),
    ("customer rating", "average"): Phrases(
        head="average-rated",
        with_="an average customer rating|average ratings",
        verb="has an average customer rating|is rated average by [its customers|customers|guests]|gets average ratings",
    ),
    ("customer rating", "high"): Phrases(
        head="highly rated|top-rated|well-rated",
        with_="a high customer rating|[high|excellent] ratings",
        verb="has a high customer rating|is rated highly by [its customers|customers|guests]|gets excellent ratings",
        mood=1,
    ),
    ("customer rating", "1 out of 5"): Phrases(
        head="one-star",
        with_="a [customer rating|rating] of 1 out of 5|a 1 out of 5 rating",
        verb="[has a customer rating of|is rated|scores only] 1 out of 5|has [only one star|a one-star rating]",
        mood=-1,
    ),
    ("customer rating", "3 out of 5"): Phrases(
        head="three-star",
        with_="a [customer rating|rating] of 3 out of 5|a 3 out of 5 rating",
        verb="[has a customer rating of|is rated|scores] 3 out of 5|has a three-star rating",
    ),
    ("customer rating", "5 out of 5"): Phrases(
        head="five-star",
        with_="a [customer rating|rating] of 5 out of 5|a 5 out of 5 rating",
        verb="[has a customer rating of|is rated|scores] 5 out of 5|has [all five stars|a five-star rating]",
        mood=1,
    ),
    ("familyFriendly", "yes"): Phrases(
        head="family-friendly|child-friendly",
        with_="a [warm welcome|welcome] for [families|children]",
        verb="is [family friendly|child friendly|good for families]|welcomes [families|children]",
        mood=1,
    ),
    ("familyFriendly", "no"): Phrases(
        head="adults-only",
        with_="an adults-only policy|no place for children",
        verb="is not [family friendly|child friendly|meant for children]|does not [welcome|admit] children",
        mood=-1,
    ),
}

# Where a place is, by value of `area`; {near} stands for a landmark.
AREAS = {
    "riverside": "[by|beside] the river|on the riverside|in the riverside area",
    "city centre": "in the [city centre|centre of the city|heart of the city]",
    "old town": "in the old town|in the old part of town",
    "harbour": "at the harbour|in the harbour area|on the harbour front",
    "market square": "on the market square|at the market square",
    "university quarter": "in the university quarter",
}
NEAR = "near {near}|close to {near}|next to {near}|[a short walk|not far] from {near}|round the corner from {near}"

# First sentences, and what each needs beside a name: "where", "verb", "food", or nothing. The slots: {noun} the noun
# phrase with its article, {bare} the noun alone, {where} the place, {with} "with ...", {verbs} verb phrases. An empty
# slot leaves no trace.
OPENINGS: tuple[tuple[str, str], ...] = (
    ("{name} is {noun} {where} {with}.", ""),
    ("{name} is {noun} {with} {where}.", ""),
    ("{name} is {noun} {with}, [located|found|set] {where}.", "where"),
    ("{where}, {name} is {noun} {with}.", "where"),
    ("{where} you [will|can] find {name}, {noun} {with}.", "where"),
    ("[Located|Set|Tucked away] {where}, {name} is {noun} {with}.", "where"),
    ("{noun} {with}, {name} [can be found|is located|stands] {where}.", "where"),
    ("There is {noun} called {name} {where} {with}.", ""),
    ("You can find {noun} called {name} {where}.", "where"),
    ("[If you want|If you are after|If you fancy] {noun} {where} {with}, [try|visit|go to] {name}.", ""),
    ("[Looking for|Do you want] {noun} {where} {with}? [Try|Visit|Go to] {name}.", ""),
    ("[Looking for|In search of] {noun} {where}? {name} {verbs}.", "verb"),
    ("Anyone looking for {noun} {where} {with} [should try|could visit|will like] {name}.", ""),
    ("{name}, {noun} {where}, {verbs}.", "verb"),
    ("{name}, {noun} {with} {where}, {verbs}.", "verb"),
    ("{where}, {name} {verbs}. It is {noun} {with}.", "where verb"),
    ("For {food} {where}, [try|visit|go to] {name}, {noun} {with}.", "food"),
    ("{food} can be [found|had] at {name}, {noun} {where} {with}.", "food"),
    ("{name} is the {bare} to [try|visit] {where} for {food}.", "food where"),
)
