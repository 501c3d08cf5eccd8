"""Reward against wall time, and the servers' busy share, for several values of `max_staleness`.

    python tests/benchmarks/staleness.py                                   # servers with set times per token
    rekatrain serve-rollouts RECIPE --port 8000 &
    python tests/benchmarks/staleness.py RECIPE --url http://127.0.0.1:8000 [--rounds 2] [key=value ...]

Without a recipe the servers are stand-ins: each token takes `--pace` seconds, lengths are long-tailed (lognormal), and
an update takes `--train-seconds`. They compute nothing, so the figures are those of the scheduling, without the noise
of a CPU. With a recipe, each arm is a whole run by `rekatrain train` on a real vLLM; rounds interleave the arms.
staleness.sh starts the server too, and ends it.

busy: fraction of the time from the first request to the last update in which a server has a request. rows: fraction of
its rows that are in use (stand-ins only).
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from common import make_parser, print_table, write_report
from staleness_vllm import compare_real, settings_of
from transformers import PreTrainedTokenizerFast

from rekatrain.trainer.cli import main as rekatrain
from rekatrain.trainer.rloo import train
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.helpers.json_servers import json_servers
from tests.vllm.stand_in import StandIn

REWARD = "def one(completions, **kwargs):\n    return [float(len(text) % 2) for text in completions]\n"


class TimedServer(StandIn):
    """Answers with completions of random lengths, after their time; counts how long it is busy.

    pace:     seconds per token
    at_once:  groups at the same time; others wait
    """

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int, pace: float, at_once: int, cap: int
    ) -> None:
        super().__init__(folder, tokenizer, seed=seed)
        self.pace, self._cap, self._slots = pace, cap, threading.Semaphore(at_once)
        self._num_active, self._since = 0, 0.0
        self.first = self.busy_seconds = self.row_seconds = 0.0

    def _lengths(self, body: Any) -> list[int]:
        """Return the lengths of a group: most are short, some are the cap."""
        drawn = np.random.default_rng(body["seed"]).lognormal(np.log(self._cap / 10), 1.0, body["n"])
        return [min(max(int(length), 2), body["max_tokens"]) for length in drawn]

    @contextmanager
    def _active(self, lengths: list[int]) -> Iterator[None]:
        with self._slots:
            with self._count:
                now = time.perf_counter()
                self.first = self.first or now
                self._since = now if self._num_active == 0 else self._since
                self._num_active += 1
            yield
            with self._count:
                self._num_active -= 1
                self.row_seconds += self.pace * sum(lengths)
                if self._num_active == 0:
                    self.busy_seconds += time.perf_counter() - self._since

    _count = threading.Lock()

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        if path != "/v1/completions" or "stop" not in body:
            return super().__call__(path, body)
        return 200, self._stream(body.get("model", ""), body) if body.get("stream") else self._whole(body)

    def _whole(self, body: Any) -> dict[str, Any]:
        lengths = self._lengths(body)
        with self._active(lengths):
            time.sleep(self.pace * max(lengths))
        return {"model": body.get("model", ""), "choices": [self._choice(i, num, num) for i, num in enumerate(lengths)]}

    def _choice(self, index: int, num: int, length: int) -> dict[str, Any]:
        """Return the last `num` of a completion's `length` tokens."""
        is_eos = length < self._cap
        ids = [5] * (num - is_eos) + [self.tokenizer.eos_token_id] * is_eos
        return {"index": index, "token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * num}, "finish_reason": "stop"}

    def _stream(self, name: str, body: Any) -> Iterator[bytes]:
        lengths = self._lengths(body)
        with self._active(lengths):
            for position in range(1, max(lengths) + 1):
                time.sleep(self.pace)
                while self.is_paused:
                    time.sleep(self.pace)
                choices = [
                    {**self._choice(index, 1, length if position == length else self._cap)}
                    | ({} if position == length else {"finish_reason": None})
                    for index, length in enumerate(lengths)
                    if position <= length
                ]
                yield f"data: {json.dumps({'model': name, 'choices': choices})}\n\n".encode()
        yield b"data: [DONE]\n\n"


def run_timed(folder: Path, staleness: int, options: Any, number: int) -> dict[str, Any]:
    """Run one arm on stand-ins -> its seconds per step and the busy share of each server."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    servers = [
        TimedServer(
            folder / "model",
            tokenizer,
            seed=options.seed,
            pace=options.pace,
            at_once=options.rows // options.group,
            cap=options.cap,
        )
        for _ in range(options.servers)
    ]

    def update_slowly(*arguments: Any) -> None:
        time.sleep(options.train_seconds)
        update_weights(*arguments)

    update_weights = train.update_weights
    with json_servers() as serve, patch.object(train, "update_weights", update_slowly):
        tree = {
            "stage": "rloo",
            "output_dir": str(folder / f"run-{staleness}-{number}"),
            "seed": options.seed,
            "model": {"pretrained_model_name_or_path": str(folder / "model"), "dtype": "float32"},
            "lora": {"r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]},
            "dataset": {"path": str(folder / "rows.jsonl"), "format": "prompt_answer"},
            "rewards": {"one_reward:one": {"weight": 1.0}},
            "rloo": {
                **{"max_steps": options.steps, "prompts_per_step": options.prompts, "num_generations": options.group},
                **{"max_completion_length": options.cap, "beta": 0.1, "learning_rate": 0.0, "save_steps": 10**6},
                **{"per_device_generation_batch_size": options.servers * options.rows},
                **{"vllm_server_base_url": [serve(server).url for server in servers], **settings_of(staleness)},
            },
        }
        (folder / "recipe.yaml").write_text(json.dumps(tree))
        rekatrain(["train", str(folder / "recipe.yaml")])
        end = time.perf_counter()
    seconds = end - min(server.first for server in servers)
    steps = [json.loads(line) for line in (folder / f"run-{staleness}-{number}/metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": seconds,
        "busy": [server.busy_seconds / (end - server.first) for server in servers],
        "rows": sum(server.row_seconds for server in servers) / (seconds * options.rows * options.servers),
        "staleness": max(step["staleness/max"] for step in steps),
        "waited": sum(step.get("time/wait", 0.0) + step.get("time/sample", 0.0) for step in steps),
    }


def compare_timed(options: Any) -> dict[str, Any]:
    """Run the arms on stand-ins and print the table."""
    results: dict[str, list[dict[str, Any]]] = {str(staleness): [] for staleness in options.staleness}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = tiny_tokenizer()
        tiny_llama(tokenizer).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "one_reward.py").write_text(REWARD)
        sys.path.append(name)
        rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n} for n in range(1, 9)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number in range(options.rounds):
            for staleness in options.staleness:
                results[str(staleness)].append(run_timed(folder, staleness, options, number))
    table = []
    for staleness, runs in results.items():
        median = sorted(runs, key=lambda each: each["seconds"])[len(runs) // 2]
        busy = sum(median["busy"]) / len(median["busy"])
        columns = {name: median[name] for name in ("seconds", "rows", "staleness", "waited")}
        table.append({"max_staleness": int(staleness), "busy": busy, **columns})
    print_table(table, f"{options.servers} servers, {options.steps} steps")
    return {"table": table, "runs": results}


def main() -> None:
    """Print the table and write the report."""
    parser = make_parser(__doc__, "staleness.json")
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--url", help="URL of a server that rekatrain serve-rollouts started, with a recipe")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=210.0, help="with a recipe: time of each run; default 210")
    for name, default in {"servers": 2, "rows": 8, "group": 4, "prompts": 8, "steps": 10, "cap": 100}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the stand-ins; default {default}")
    for name, seconds in {"pace": 0.02, "train-seconds": 1.0}.items():
        parser.add_argument(f"--{name}", type=float, default=seconds, help=f"of the stand-ins; default {seconds}")
    arguments, overrides = parser.parse_known_args()
    if arguments.recipe is None:
        write_report(arguments.out, arguments, compare_timed(arguments))
        return
    write_report(arguments.out, arguments, compare_real(arguments, overrides))


if __name__ == "__main__":
    main()
