"""Prompts of which a model writes a chat text of its own: topics in forms that people ask in."""

from __future__ import annotations

import random

TOPICS = (
    *("photosynthesis", "the water cycle", "black holes", "earthquakes", "vaccines", "the immune system", "magnets"),
    *("electric cars", "the internet", "encryption", "databases", "recursion in programming", "sorting algorithms"),
    *("machine learning", "the French Revolution", "the Roman Empire", "the Silk Road", "the printing press"),
    *("the moon landing", "the Industrial Revolution", "ancient Egypt", "the history of chess", "the Olympic Games"),
    *("volcanoes", "coral reefs", "the Amazon rainforest", "deserts", "glaciers", "bees", "whales", "dinosaurs"),
    *("bread baking", "coffee", "vegetarian cooking", "spices", "fermentation", "gardening", "houseplants"),
    *("running a marathon", "yoga", "sleep", "stress", "learning a language", "playing the guitar", "painting"),
    *("photography", "saving money", "compound interest", "inflation", "job interviews", "public speaking"),
    *("time management", "moving to a new city", "travelling by train", "camping", "cycling to work", "raising a dog"),
    *("cats", "board games", "science fiction", "poetry", "jazz", "architecture", "bridges", "maps"),
)
FORMS = (
    "What is interesting about {}?",
    "Explain {} to a child of ten.",
    "Give me five facts about {}.",
    "Write a short paragraph on {}.",
    "What should a beginner know about {}?",
    "What do people often get wrong about {}?",
    "I have to give a talk on {}. Write an outline.",
    "Compare what was known about {} a hundred years ago with what is known today.",
    "Write an e-mail that invites colleagues to a lecture on {}.",
    "Write four lines of verse on {}.",
    "Ask me three quiz questions about {}, with answers.",
    "Which words come up again and again when people talk about {}? Explain each in a sentence.",
)
FURTHER = (
    "Say that again in one sentence.",
    "Can you give an example?",
    "Thank you. What should I read next?",
    "Why is that so?",
    "Make a list of the main points.",
)
# Every how many chats one has a second turn.
_TWO_TURNS = 3
MOST = len(TOPICS) * len(FORMS)


def chat_prompts(rows: int, seed: int) -> list[tuple[str, ...]]:
    """What a user says in each of so many chats, one message or two; no two chats begin alike.

    Args:
        rows: Number of chats, ``MOST`` at most.
        seed: Seed of the choice and of the order.
    """
    draw = random.Random(seed)
    chosen = draw.sample([(form, topic) for form in FORMS for topic in TOPICS], rows)
    return [
        (form.format(topic), draw.choice(FURTHER)) if number % _TWO_TURNS == 0 else (form.format(topic),)
        for number, (form, topic) in enumerate(chosen)
    ]
