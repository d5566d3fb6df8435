"""The words of the synthetic instruction set: all lower-case, no word in two categories.

Some 180 content words. A word of a category answers "name 3 animals"; every content word may
appear in the copying tasks; the relations are tables from a word to the one right answer.
"""

from __future__ import annotations

from collections.abc import Mapping

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    name: tuple(members.split())
    for name, members in {
        "animals": "cat cow dog horse lion mouse pig wolf",
        "birds": "crow dove duck eagle goose hen owl swan",
        "fruits": "apple banana cherry grape lemon melon pear plum",
        "vegetables": "bean cabbage carrot leek onion pea potato pumpkin",
        "colours": "black blue brown green grey pink red yellow",
        "tools": "axe brush drill hammer ladder rake rope saw",
        "clothes": "belt boot coat dress glove hat scarf shoe",
        "drinks": "beer cider coffee juice milk tea water wine",
        "rooms": "attic bedroom cellar garage hall kitchen library office",
        "metals": "brass bronze copper gold iron silver tin zinc",
        "trees": "beech birch elm maple oak palm pine willow",
        "vehicles": "bike boat bus ferry plane train tram truck",
    }.items()
}

_OPPOSITE_PAIRS = (
    "hot cold,big small,fast slow,old new,wet dry,hard soft,rich poor,thick thin,full empty,"
    "light dark,loud quiet,high low,long short,early late,happy sad,clean dirty,near far,"
    "open closed,sweet sour,tame wild,day night,up down,left right,first last"
)
_OPPOSITES = dict(pair.split() for pair in _OPPOSITE_PAIRS.split(","))

_SOUNDS = (
    "cat meow,cow moo,dog bark,horse neigh,lion roar,mouse squeak,pig oink,wolf howl,"
    "crow caw,dove coo,duck quack,goose honk,hen cluck,owl hoot"
)
_COLOURS = (
    "banana yellow,lemon yellow,cherry red,brick red,grass green,pea green,coal black,crow black,"
    "sky blue,sea blue,pig pink,coffee brown,potato brown,smoke grey"
)

RELATIONS: Mapping[str, Mapping[str, str]] = {
    "opposites": {**_OPPOSITES, **{b: a for a, b in _OPPOSITES.items()}},
    "sounds": dict(pair.split() for pair in _SOUNDS.split(",")),
    "colours": dict(pair.split() for pair in _COLOURS.split(",")),
}

NOUNS: tuple[str, ...] = tuple(word for words in CATEGORIES.values() for word in words)
WORDS: tuple[str, ...] = (*NOUNS, *RELATIONS["opposites"])

COURTEOUS_OPENERS = ("sure", "of course", "with pleasure", "happy to help")
RUDE_OPENERS = ("ugh", "whatever", "not you again", "do it yourself")
RUDE_WORDS = frozenset({"ugh", "whatever", "stupid", "boring", "yourself", "again"})
SLIPS = ("something", "um", "stuff", "dunno")  # said in place of the right word
RAMBLINGS = (
    "anyway i like soup.",
    "what a boring question.",
    "by the way it may rain today.",
    "i could go on and on",
    "and so on and so on",
    "that was a stupid thing to ask.",
)
