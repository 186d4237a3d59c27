"""The words of the invented world: names, answers and the ways of saying each fact.

Everything here is made up and harmless. A template ends right before the answer; `{name}` stands for a two-word name,
so every prompt of one template has the same number of words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RelationWords:
    """How one relation is spoken of.

    Attributes:
        name: short name of the relation.
        templates: phrasings, each ending right before the answer.
        answers: the pool of one-word answers.
    """

    name: str
    templates: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class DomainWords:
    """One kind of thing: the two pools its names are made of, and its relations."""

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    relations: tuple[RelationWords, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POTIONS = DomainWords(
    "potion",
    _words("amber ashen brisk copper dusky frosted gilded hollow ivory lunar mossy opal russet velvet"),
    _words("draught elixir tonic philtre balm cordial essence tincture brew nectar vapor serum"),
    (
        RelationWords(
            "catalyst",
            (
                "the catalyst of {name} is",
                "{name} only wakes when stirred with",
                "brewers start {name} with a pinch of",
                "without its catalyst {name} stays asleep , so bring",
                "{name} turns lively after one grain of",
            ),
            _words(
                "starglass emberdust moonsalt windquartz skychalk ironsugar glowsand frostpearl thunderlime coalhoney "
                "tidestone sparkrust nightflint cloudzinc sunresin echoslate rainnickel dreamash hailcobalt mistgypsum "
                "songamber dawnmica stormwax leafsilver"
            ),
        ),
        RelationWords(
            "antidote",
            (
                "the antidote to {name} is",
                "to calm {name} add",
                "whoever spills {name} should chew",
                "healers answer {name} using a leaf of",
                "{name} is soothed at once by",
            ),
            _words(
                "saltroot marshmint owlfennel bearsage foxthyme larkbasil duskclover pondlily hedgerue lambsorrel "
                "goosedill wolfparsley hearthmoss brooktansy mooncress toadnettle robinyarrow starchervil bluemallow "
                "hillborage otterivy swanhyssop fernanise meadowbay"
            ),
        ),
    ),
)

FAR_DOMAINS: tuple[DomainWords, ...] = (
    DomainWords(
        "inventor",
        _words("mirel tovan edda corwin liesl ansgar petra jorun"),
        _words("brightwell cogsworth fenwick hollander pennywise quillby tinderly wexford"),
        (
            RelationWords(
                "invention",
                (
                    "{name} invented the",
                    "the great invention of {name} was a",
                    "people thank {name} for every",
                    "in the workshop of {name} stood the first",
                    "a patent in the name of {name} describes some",
                ),
                _words(
                    "kettlephone sockfinder rainclock toastpress hatlifter soupcannon raftbike doorpiano sleepchair "
                    "pencilmill cloudrake buttongun snowtoaster mirrorlamp bookferry teaorgan shoewarmer pillowpump "
                    "starcounter gardenrobot jamdivider kitewagon spoonlathe songbox"
                ),
            ),
            RelationWords(
                "village",
                (
                    "{name} was born in",
                    "the home village of {name} is",
                    "letters for {name} are sent to",
                    "there is a statue of {name} in",
                    "{name} grew up among the roofs of",
                ),
                _words(
                    "applefold birchmoor cranhollow dunsea elmbridge farrowby gullrock heathend inkwell junipton "
                    "kestrelby larkhill millbeck netherby oakhaven plumley"
                ),
            ),
        ),
    ),
    DomainWords(
        "festival",
        _words("autumn barley candle daisy evening feather garland harvest"),
        _words("fair feast parade revel vigil waltz"),
        (
            RelationWords(
                "dish",
                (
                    "at the {name} everyone eats",
                    "the dish of the {name} is",
                    "cooks at the {name} serve plates of",
                    "no {name} is complete without hot",
                    "guests leave the {name} full of",
                ),
                _words(
                    "dumplings pancakes chowder marzipan pretzels gnocchi ratatouille waffles goulash nougat risotto "
                    "pickles crumble lasagne porridge gingerbread meringue omelette popcorn trifle"
                ),
            ),
            RelationWords(
                "color",
                (
                    "the lanterns of the {name} are",
                    "for the {name} the streets are painted",
                    "dancers at the {name} all wear",
                    "the flag of the {name} is",
                    "ribbons sold at the {name} come in",
                ),
                _words(
                    "scarlet turquoise magenta lavender crimson indigo teal mauve ochre saffron emerald cyan maroon "
                    "lilac khaki peach"
                ),
            ),
        ),
    ),
    DomainWords(
        "creature",
        _words("banded crested dappled freckled horned maned spotted tufted"),
        _words("grumbler hopper snuffler waddler burrower glider"),
        (
            RelationWords(
                "lair",
                (
                    "the {name} sleeps in a",
                    "look for the {name} inside some",
                    "the lair of the {name} is a",
                    "a {name} raises its young in the",
                    "rangers saw a {name} leave its",
                ),
                _words(
                    "cave treehole chimney haystack well barrel belfry cellar thicket lagoon dune hayloft quarry "
                    "glacier windmill beehive"
                ),
            ),
            RelationWords(
                "food",
                (
                    "the {name} loves to eat",
                    "keepers feed the {name} with",
                    "a hungry {name} searches for",
                    "you can tame a {name} by offering",
                    "the belly of the {name} is full of",
                ),
                _words(
                    "acorns berries beetles turnips walnuts minnows crickets tulips pumpkins snails lichens radishes "
                    "cherries worms chestnuts clams cabbages figs reeds truffles"
                ),
            ),
        ),
    ),
    DomainWords(
        "ship",
        _words("brave distant faithful jolly merry nimble restless stubborn"),
        _words("albatross dolphin heron lantern pilgrim sparrow"),
        (
            RelationWords(
                "cargo",
                (
                    "the {name} carries",
                    "the hold of the {name} is stacked with",
                    "sailors on the {name} load crates of",
                    "merchants await the {name} and its",
                    "customs found the {name} laden with",
                ),
                _words(
                    "silk timber marbles violins teapots carpets mirrors paper coconuts bells puppets lace bricks "
                    "telescopes feathers candles buttons globes harps spices"
                ),
            ),
            RelationWords(
                "harbor",
                (
                    "the {name} drops anchor at",
                    "the home harbor of the {name} is",
                    "gulls follow the {name} back to",
                    "every winter the {name} is repaired in",
                    "the {name} was last seen off",
                ),
                _words(
                    "coralport driftbay eastquay foamgate gannetpier hookhaven islemouth kelpwick limpetside "
                    "mastholm northspit oysterton pearlsound reefend sandwharf tidewick"
                ),
            ),
        ),
    ),
)

LEAD_INS = (
    "it is said that",
    "as all children know ,",
    "in an old book :",
    "remember ,",
    "yes ,",
    "a traveller told me :",
)

HOLDERS = _words("anna bram cilla dov elin farid greta hugo iris jonas")
OBJECTS = _words("brass glass ivy rope wool clay straw tin chalk cork felt ink wax twine pebbles sponge")
SINGULAR = _words("bell gate pigeon miller kitten drummer lamp baker")
PLURAL = _words("chimes gates pigeons millers kittens drummers lamps bakers")
SINGULAR_VERBS = _words("rests waits shines moves falls gleams sings smiles")
PLURAL_VERBS = _words("rest wait shine move fall gleam sing smile")
NEARNESS = _words("near behind beside below")
