"""Questions of unequal length for a small model that converses."""

SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face. You answer in short and simple sentences."
)

_STORY = (
    "A baker in a small town by the sea gets up at three every morning. She lights the oven, kneads the dough that has "
    "rested overnight, and listens to the radio while the first loaves rise. By six the fishermen come in, cold and "
    "hungry, and buy everything that is still warm. At noon she sweeps the floor, counts the coins, and sets the next "
    "dough to rest. In the evening she walks along the harbour and thinks of her daughter, who studies far away."
)
_LIBRARY = (
    "A library has one long shelf with numbered places, and every book is a set of chapters. A new chapter goes to any "
    "free place, and a card for each book lists the places of its chapters in order. When a reader gives a book back, "
    "its places are free again, whichever they are."
)

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three colours.",
    "What is a library for?",
    "How many days does a week have?",
    "Explain what a page table is, to somebody who has never used a computer but knows how a library works.",
    "Give me a short recipe for pancakes with only flour, milk and eggs.",
    f"Here is a story. {_STORY} What does the baker do at noon?",
    "What is the largest planet of our solar system, and what is it made of?",
    "Say hello in Spanish.",
    f"Read this description. {_LIBRARY} What happens to the places of a book that is given back?",
    "Who wrote Romeo and Juliet?",
    "What is the difference between weather and climate?",
    "Tell me something surprising about octopuses, and tell me why it surprises people who hear it for the first time.",
    "What does a heart do?",
    f"Give the following story a title of at most five words. {_STORY}",
    "How do plants make their food?",
    "What is 7 plus 5?",
    "Why do we have seasons? Mention the tilt of the Earth's axis in your answer.",
    "Write one sentence about rain.",
    f"{_LIBRARY} Why does no chapter ever have to move?",
    "Which animal is known for building dams in rivers?",
    "What should I pack for a weekend of hiking in the mountains in autumn, when it may rain and the nights are cold?",
    "What is gravity?",
    "Translate 'good morning' into French.",
    "Name a famous scientist and say in one sentence what that scientist is known for.",
    f"Here is a story. {_STORY} Where does the daughter live?",
    "What is bread made of?",
)
