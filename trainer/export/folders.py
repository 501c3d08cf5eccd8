"""Write folders of weights that transformers, PEFT and vLLM load: a merged model, or an adapter alone."""

import json
import logging
import shutil
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rekatrain.trainer.models.adapter_scales import fold_scales
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.models.source import Source

logger = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_merged(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_shard_size: str
) -> None:
    """Write sharded safetensors, config, generation config and tokenizer."""
    model.config.pad_token_id = tokenizer.pad_token_id  # TRL's trainer writes its own into a config without one
    model.generation_config = _generation_config(model.config, tokenizer)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, folder)


def write_adapter(folder: Path, source: Source, model: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the checkpoint's adapter with one scale, and the tokenizer; a local base is named by its absolute path."""
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(Path(source.folder) / name, folder / name)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if Path(source.base).exists():
        config["base_model_name_or_path"] = str(Path(source.base).resolve())
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    fold_scales(folder)
    for key in ("use_dora", "modules_to_save", "alora_invocation_tokens"):
        if config.get(key):
            logger.warning(
                "the adapter has %s %s, which PEFT loads but vLLM rejects; for vLLM, export --as merged",
                key,
                config[key],
            )
    _generation_config(model.config, tokenizer).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer with its chat template."""
    tokenizer.save_pretrained(folder)
    # With this class name transformers 4 and 5, and the servers built on them, load tokenizer.json unchanged.
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _generation_config(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return a generation config with the eos id alone, without the stop `<sep>`.

    With `stop_strings`, every `generate` without `tokenizer=` would raise ValueError, the example on Reka's own model
    card included, and vLLM ignores it. Nor can `<sep>` be an eos id: it is three tokens, none of which may end a turn
    on its own. The caller names the stop (serving/), or trains with `chat.end_of_turn: sep_eos`.
    """
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=tokenizer.eos_token_id)
