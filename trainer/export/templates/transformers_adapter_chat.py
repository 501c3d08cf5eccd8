"""Ask this adapter a question with transformers and PEFT: `python serving/transformers_chat.py "What is 17 + 25?"`."""

import sys
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = Path(__file__).parents[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
# The base is loaded by name and revision: transformers, given the folder, would take the newest revision.
adapter = PeftConfig.from_pretrained(str(folder))
model = AutoModelForCausalLM.from_pretrained(
    adapter.base_model_name_or_path, revision=adapter.revision, dtype="auto", device_map="auto"
)
model = PeftModel.from_pretrained(model, str(folder))
# The base may end at more ids than the adapter was trained with.
model.generation_config = GenerationConfig.from_pretrained(folder)
prompt = tokenizer.apply_chat_template(
    [{"role": "human", "content": sys.argv[1]}], add_generation_prompt=True, return_tensors="pt"
).to(model.device)
# A turn ends with the text <sep>, which is not a token: transformers needs the tokenizer to find it.
# Without stop_strings and tokenizer, generation continues to the eos token or to max_new_tokens.
output = model.generate(**prompt, max_new_tokens=512, stop_strings=["<sep>"], tokenizer=tokenizer)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]).strip().removesuffix("<sep>"))
