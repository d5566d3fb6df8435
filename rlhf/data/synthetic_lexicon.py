"""The words of the synthetic instruction set: all lower-case, no word in two categories.

About 220 content words. A word of a category answers "name 3 animals"; every content word may
appear in the copying tasks; the relations are tables from a word to the one right answer.
"""

from __future__ import annotations

from collections.abc import Mapping

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    name: tuple(members.split())
    for name, members in {
        "animals": "bear cat cow dog fox goat horse lion mouse pig sheep wolf",
        "birds": "crow dove duck eagle goose hawk hen owl robin swan",
        "fruits": "apple banana cherry grape lemon mango melon peach pear plum",
        "vegetables": "bean cabbage carrot leek onion pea potato pumpkin radish turnip",
        "colours": "black blue brown green grey pink purple red white yellow",
        "tools": "axe brush drill hammer ladder nail rake rope saw shovel",
        "clothes": "belt boot coat dress glove hat scarf shirt shoe sock",
        "drinks": "beer cider cocoa coffee juice milk soda tea water wine",
        "rooms": "attic bathroom bedroom cellar garage hall kitchen library office pantry",
        "metals": "brass bronze copper gold iron lead silver steel tin zinc",
        "trees": "ash beech birch cedar elm maple oak palm pine willow",
        "vehicles": "bike boat bus car ferry plane ship train tram truck",
    }.items()
}

_OPPOSITE_PAIRS = (
    "hot cold,big small,fast slow,old new,wet dry,hard soft,rich poor,thick thin,full empty,"
    "light dark,loud quiet,high low,long short,early late,happy sad,clean dirty,near far,"
    "open closed,sweet sour,tame wild,day night,up down,left right,first last"
)
_OPPOSITES = dict(pair.split() for pair in _OPPOSITE_PAIRS.split(","))

_SOUNDS = (
    "bear growl,cat meow,cow moo,dog bark,horse neigh,lion roar,mouse squeak,pig oink,"
    "sheep bleat,wolf howl,crow caw,dove coo,duck quack,goose honk,hen cluck,owl hoot"
)
_COLOURS = (
    "banana yellow,lemon yellow,carrot orange,pumpkin orange,cherry red,brick red,grass green,"
    "pea green,snow white,milk white,coal black,crow black,sky blue,sea blue,plum purple,"
    "pig pink,cocoa brown,smoke grey"
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
RAMBLINGS = (
    "anyway i like soup.",
    "what a boring question.",
    "by the way it may rain today.",
    "i could go on and on",
    "and so on and so on",
    "that was a stupid thing to ask.",
)
