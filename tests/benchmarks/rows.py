"""Measure how fast SFT rows are prepared, and in how much memory, against TRL's own preparation.

    python tests/benchmarks/rows.py --model runs/smollm2-135m --rows 10000 100000 1000000

Each point is a separate process with an empty cache: it reads a file of conversations with two trained turns, each turn
of `--words` words. `first`
encodes the rows into Arrow files, `again` is the start of a second run, and `read` goes over all ids and labels, as a
fingerprint does. TRL's SFTTrainer (of a tiny model) loads the file by `datasets` and encodes the messages by our chat
template; it makes no loss mask, which is less work. `anonymous` is memory that is not a mapped file.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import load_folder_tokenizer, make_parser, print_table, write_report

WORDS = ("kettle", "water", "third", "point", "number", "example", "day", "boil", "even", "warm", "good", "add", "two")
TEMPLATE = Path(__file__).parents[2] / "data" / "chat_template.jinja"


class PeakMemory(threading.Thread):
    """Samples the anonymous memory of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Read the kernel's count every 20 ms."""
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.02)


def anonymous_bytes() -> int:
    """Return the resident bytes of this process that are not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def write_rows(path: Path, num_rows: int, num_words: int = 30) -> None:
    """Write conversations of four turns; with 30 words a turn, they have about 165 tokens."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    with path.open("w") as file:
        for number in range(num_rows):
            roles = ("user", "assistant") * 2
            messages = [{"role": role, "content": f"{number}: {words(num_words)}."} for role in roles]
            file.write(json.dumps({"messages": messages, "level": number % 7}) + "\n")


def prepare_ours(file: Path, model: str) -> dict[str, float]:
    """Return seconds of the first preparation, of the second, and of a pass over all rows."""
    import datasets

    from rekatrain.data.encoded_mixture import encode_mixture

    datasets.config.HF_DATASETS_CACHE = str(file.parent / "cache")
    tokenizer = load_folder_tokenizer(model)
    base = anonymous_bytes()
    memory = PeakMemory()
    memory.start()
    times = [time.perf_counter()]
    for _ in range(2):
        rows = encode_mixture({"path": str(file)}, tokenizer, 2048, {}).rows
        times.append(time.perf_counter())
    num_tokens = sum(len(ids) for ids, _ in rows.arrays())
    times.append(time.perf_counter())
    seconds = [after - before for before, after in zip(times, times[1:], strict=False)]
    return {"tokens": num_tokens, "first s": seconds[0], "again s": seconds[1], "read s": seconds[2]} | _memory(
        memory, base
    )


def prepare_trl(file: Path, model: str, *, num_proc: int | None) -> dict[str, float]:
    """Return the seconds of TRL's preparation."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = load_folder_tokenizer(model)
    tokenizer.chat_template = TEMPLATE.read_text()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    config = SFTConfig(
        output_dir=str(file.parent / "trl"), max_length=2048, dataset_num_proc=num_proc, report_to="none", use_cpu=True
    )
    base = anonymous_bytes()
    memory = PeakMemory()
    memory.start()
    start = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=str(file), cache_dir=str(file.parent / "cache"), split="train")
    loaded = loaded.select_columns("messages")
    trainer = SFTTrainer(model=tiny, args=config, train_dataset=loaded, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    num_tokens = sum(
        len(ids) for batch in trainer.train_dataset.select_columns("input_ids").iter(512) for ids in batch["input_ids"]
    )
    return {"tokens": num_tokens, "first s": seconds} | _memory(memory, base)


def _memory(memory: PeakMemory, base: int) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"anonymous MB": (memory.peak - base) / 1e6, "resident MB": peak / 1e6}


def measure(arm: str, num_rows: int, num_words: int, model: str) -> dict[str, Any]:
    """Measure one point in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, num_rows, num_words)
        command = [sys.executable, __file__, "--model", model, "--point", arm, str(file)]
        hidden = {"HF_HOME": folder, "HF_DATASETS_CACHE": f"{folder}/cache"}
        done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        result = json.loads(done.stdout.splitlines()[-1])
    return {"arm": arm, "rows": num_rows, "rows/s": num_rows / result["first s"], **result}


def main() -> None:
    """Print a line for each number of rows and each arm."""
    parser = make_parser(__doc__, "rows.json")
    parser.add_argument("--model", required=True, help="folder with a tokenizer")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--words", type=int, default=30, help="words of a turn")
    parser.add_argument("--arms", nargs="+", default=["rekatrain", "trl", "trl-2"], help="trl-2: two processes")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        arm, file = options.point[0], Path(options.point[1])
        if arm == "rekatrain":
            result = prepare_ours(file, options.model)
        else:
            result = prepare_trl(file, options.model, num_proc=2 if arm == "trl-2" else None)
        print(json.dumps(result))
        return
    points = []
    for num_rows in options.rows:
        for arm in options.arms:
            points.append(measure(arm, num_rows, options.words, options.model))
            print(points[-1], file=sys.stderr, flush=True)
    print_table(points)
    write_report(options.out, options, points)


if __name__ == "__main__":
    main()
