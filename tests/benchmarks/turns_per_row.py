"""Print the tokens of SFT rows over the tokens of their conversation: shared rows, and one row per assistant turn.

python tests/benchmarks/turns_per_row.py TOKENIZER_FOLDER
"""

import sys

from rekatrain.data.chat import Message, encode_row
from rekatrain.data.rows import Row
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.data.training_rows import encode_conversation

QUESTION = "Tell me more about the third point, please, with an example from everyday life. "
ANSWER = "A kettle is a good example: it warms the water evenly, and it stops when the water boils. "


def main() -> None:
    """Print one line of a table for each number of assistant turns."""
    tokenizer = load_tokenizer(sys.argv[1])
    print("| assistant turns | one row per turn | shared rows | shared rows, every 4th turn with reasoning |")
    print("|---|---|---|---|")
    for num_turns in (1, 2, 4, 8, 16, 32):
        plain, reasoned = conversation(num_turns, every=0), conversation(num_turns, every=4)
        apart = sum(len(encode_row(plain[:end], tokenizer).input_ids) for end in range(2, len(plain) + 1, 2))
        length = len(encode_row(plain, tokenizer).input_ids)
        shared = [
            sum(len(row.input_ids) for row in encode_conversation(Row(messages=messages), tokenizer))
            for messages in (plain, reasoned)
        ]
        print(f"| {num_turns} | {apart / length:.2f} | {shared[0] / length:.2f} | {shared[1] / length:.2f} |")


def conversation(num_turns: int, *, every: int) -> list[Message]:
    """Return a conversation of questions and answers; one answer in `every` has reasoning, none if it is 0."""
    messages: list[Message] = []
    for number in range(1, num_turns + 1):
        messages.append({"role": "user", "content": QUESTION * 2 + str(number)})
        messages.append({"role": "assistant", "content": ANSWER * 3})
        if every and number % every == 0:
            messages[-1]["reasoning_content"] = ANSWER
    return messages


if __name__ == "__main__":
    main()
