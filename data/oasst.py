"""Conversations of OpenAssistant's trees: of each tree, the thread of the best-ranked replies.

Both published forms are read: one tree per record (`prompt` with nested `replies`), and one message per record
(`message_id`, `parent_id`), as the data sets of the hub have it.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.data.files import Located

ROLES = {"prompter": "user", "assistant": "assistant"}
TREE_KEYS = ("message_tree_id", "lang")

Node = dict[str, Any]


def read_threads(records: Iterable[Located]) -> Iterator[Located]:
    """Yield a record of `messages` for each tree, with the origin of its first message.

    A thread follows the reply with the lowest rank, then the first one; it skips deleted messages and those that
    reviewers rejected, and ends with an answer where there is one.
    """
    roots: list[tuple[str, Node]] = []
    nodes: dict[str, Node] = {}
    places: dict[str, str] = {}
    for where, record in records:
        if isinstance(record, dict) and isinstance(record.get("prompt"), dict):
            yield where, _thread({**record, **record["prompt"]})
        elif isinstance(record, dict) and isinstance(record.get("message_id"), str):
            # Collected, because replies may come before what they reply to.
            name = record["message_id"]
            if name in nodes:
                yield where, InputError(f"message_id {name!r} is also that of {places[name]}: remove one of the two")
                continue
            nodes[name], places[name] = {**record, "replies": []}, where
            if record.get("parent_id") is None:
                roots.append((where, nodes[name]))
        elif isinstance(record, InputError):
            yield where, record
        else:
            yield where, InputError("a record of oasst is a tree (prompt with replies) or a message with message_id")
    for name, node in nodes.items():
        parent = node.get("parent_id")
        if parent in nodes:
            nodes[parent]["replies"].append(node)
        elif parent is not None:
            yield places[name], InputError(f"the file has no message {parent!r}, to which this one replies")
    for name in _in_circles(nodes):
        yield places[name], InputError(f"message {name!r} replies to itself, directly or through others")
    for where, root in roots:
        yield where, _thread(root)


def _in_circles(nodes: Mapping[str, Node]) -> Iterator[str]:
    """Yield the messages that no message without a parent leads to, though the file has all of their parents."""
    ends: dict[str, bool] = {}  # True: going up from the message comes to an end
    for name in nodes:
        path: list[str] = []
        here = name
        while here in nodes and here not in ends and here not in path:
            path.append(here)
            here = nodes[here].get("parent_id") or ""
        has_end = here not in path and ends.get(here, True)
        ends |= dict.fromkeys(path, has_end)
        if not has_end:
            yield name


def _thread(root: Node) -> dict[str, object] | InputError:
    thread, node = [], root
    while True:
        if node.get("role") not in ROLES or not isinstance(node.get("text"), str):
            return InputError(f"a message of the tree is no prompter's or assistant's text: {node.get('message_id')!r}")
        thread.append({"role": ROLES[node["role"]], "content": node["text"]})
        replies = [reply for reply in node.get("replies") or [] if _is_kept(reply)]
        if not replies:
            break
        node = min(replies, key=_rank)
    while len(thread) > 1 and thread[-1]["role"] == "user":
        thread.pop()
    return {**{key: root[key] for key in TREE_KEYS if root.get(key) is not None}, "messages": thread}


def _is_kept(reply: Node) -> bool:
    return not reply.get("deleted") and reply.get("review_result") is not False


def _rank(reply: Node) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else float(rank)
