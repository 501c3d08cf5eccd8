"""The serving/ folder of an export: start scripts, clients and vLLM's plugin, filled in for the model.

The files in templates/ are `string.Template`s, except the plugin, which is copied unchanged.
"""

import json
import shlex
from pathlib import Path
from string import Template

from transformers import AutoConfig

from rekatrain.rewards.models.classifier import read_card
from rekatrain.trainer.models.source import Source
from rekatrain.trainer.models.vllm_limits import MAX_RANKS, find_vllm_limit, largest_rank

TEMPLATES = Path(__file__).with_name("templates")
PARSER = "reka_reasoning_parser.py"
# templates/NAME -> serving/NAME
FILES = {
    "merged": {
        "vllm_merged.sh": "vllm.sh",
        "transformers_serve.sh": "transformers_serve.sh",
        "transformers_chat.py": "transformers_chat.py",
        "client.py": "client.py",
    },
    "adapter": {
        "vllm_adapter.sh": "vllm.sh",
        "transformers_adapter_chat.py": "transformers_chat.py",
        "client.py": "client.py",
    },
    "gguf": {"llama_server.sh": "llama_server.sh", "client.py": "client.py"},
    "reward": {
        "vllm_reward.sh": "vllm.sh",
        "reward_model.yaml": "reward_model.yaml",
        "remote_reward_model.yaml": "remote_reward_model.yaml",
    },
}
MAX_LENGTH = 32_768


def write_serving(folder: Path, form: str, source: Source, *, out: Path) -> None:
    """Write serving/ into the export in `folder`, which will be renamed to `out`; the model is served as `out.name`."""
    config = AutoConfig.from_pretrained(source.base, revision=source.revision)
    name = out.name
    values = {
        "name": name,
        "shell_name": shlex.quote(name),
        "num_heads": config.num_attention_heads,
        "max_length": min(MAX_LENGTH, config.max_position_embeddings),
    }
    if form == "adapter":
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, revision = largest_rank(adapter), adapter.get("revision")
        values |= {
            "base": shlex.quote(adapter["base_model_name_or_path"])
            + (f" --revision {shlex.quote(revision)}" if revision else ""),
            "max_rank": next((limit for limit in MAX_RANKS if limit >= rank), rank),
        }
    if form == "reward":
        card = read_card(str(folder))
        assert card is not None
        stored = AutoConfig.from_pretrained(folder)
        values |= {
            "dtype": str(stored.dtype).removeprefix("torch."),
            "yaml_path": json.dumps(str(out)),  # JSON is YAML
            "yaml_name": json.dumps(name),
            "reasoning": json.dumps(card.reasoning),
            "mean": card.mean,
            "std": card.std,
        }
    serving = folder / "serving"
    serving.mkdir()
    files = dict(FILES[form])
    if form == "adapter" and find_vllm_limit(adapter):
        del files["vllm_adapter.sh"], files["client.py"]
    for template, target in files.items():
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        (serving / target).write_text(Template(text).substitute(values), encoding="utf-8")
    for path in sorted(folder.glob("*.gguf")):
        target = f"Modelfile-{path.stem.removeprefix('model-')}"
        own = {"file": path.name, "modelfile": target, "bos": _bos_of_template(folder)}
        text = (TEMPLATES / "Modelfile").read_text(encoding="utf-8")
        (serving / target).write_text(Template(text).substitute(values | own), encoding="utf-8")
    if "vllm.sh" in files.values() and form != "reward":
        (serving / PARSER).write_text((TEMPLATES / PARSER).read_text(encoding="utf-8"), encoding="utf-8")


def _bos_of_template(folder: Path) -> str:
    """Return the bos token if the export's chat template begins with it, or an empty text."""
    if not (folder / "chat_template.jinja").read_text(encoding="utf-8").startswith("{{- bos_token -}}"):
        return ""
    return str(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["bos_token"])
