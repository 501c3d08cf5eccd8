"""RLOO in one file: the algorithm of rekatrain without its options, to be read in ten minutes and run on a CPU.

    python recipes/smollm2/fetch_model.py runs/quickstart/smollm2-135m
    python recipes/one_file/rloo.py runs/quickstart/smollm2-135m

One step (Ahmadian et al., "Back to Basics", arXiv 2402.14740). Sample k completions y_1 ... y_k of a prompt x from the
policy pi, and score each with a reward r_i. Then

    R_i  = r_i - beta * KL_i                   KL_i = log pi(y_i|x) - log ref(y_i|x), without gradient
    A_i  = R_i - mean of R_j over j != i       "leave one out": the baseline of y_i does not depend on y_i
    loss = - mean over i of A_i * log pi(y_i|x)

where log pi(y|x) is the SUM of the log-probabilities of the tokens of y. Its gradient is an unbiased estimate of minus
the gradient of the expected reward minus beta * KL(pi || ref). That is all of RLOO: no critic, no clipping, no division
by the standard deviation or by the length.

The engine (trainer/rloo/) does the same, and tests/recipes/test_one_file.py holds their gradients equal. What it adds:
padding-free batches, a prompt computed once for its group, many GPUs, LoRA, resuming, reward workers, and options.
"""

import argparse
import copy
import json
import random
import re
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PROMPTS_PER_STEP = 4
NUM_GENERATIONS = 8  # k. The baseline of a completion is the mean of the k - 1 others, so k is at least 2.
MAX_NEW_TOKENS = 16
TEMPERATURE = 1.0
BETA = 0.01  # price of one nat of distance from the reference, in units of reward
LEARNING_RATE = 1e-5
STOP = "<sep>"  # Reka Flash 3 ends a turn with this text. It is not a token: several tokens spell it.


# ---- Task: prompts with answers, and a reward


def sums(number: int) -> list[dict[str, str]]:
    """Make up `number` questions with their answers, in place of a file."""
    pairs = [(random.randint(1, 20), random.randint(1, 20)) for _ in range(number)]
    return [{"prompt": f"What is {a} + {b}? Answer with the number alone.", "answer": str(a + b)} for a, b in pairs]


def reward(completion: str, answer: str) -> float:
    """Score a completion from its text. Replace this function: nothing else knows what the task is.

    1 if the last number is the answer, minus 0.2 for each number more or less than one. RLOO learns from differences
    within a group: if all k rewards are equal, all advantages are 0.
    """
    numbers = re.findall(r"\d+", completion)
    is_right = bool(numbers) and numbers[-1] == answer
    return float(is_right) - 0.2 * min(abs(len(numbers) - 1), 3)


def encode_prompt(question: str, tokenizer) -> list[int]:
    """Return the ids of a question as the model expects it; the text as it is where the model has no chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(question, add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


# ---- Sampling


@torch.no_grad()
def sample(model, tokenizer, prompt: list[int]) -> list[list[int]]:
    """Draw NUM_GENERATIONS completions of a prompt -> their ids, each up to and including the end of its turn.

    These ids are what is trained. Text is decoded for the reward only and never tokenized again, because other tokens
    may spell the same text, and their probability is not that of what was drawn.
    """
    completions: list[list[int]] = [[] for _ in range(NUM_GENERATIONS)]
    is_open = [True] * NUM_GENERATIONS
    cache = DynamicCache(config=model.config)
    inputs_GT = torch.tensor([prompt] * NUM_GENERATIONS, device=model.device)
    for _ in range(MAX_NEW_TOKENS):
        logits_GV = model(inputs_GT, past_key_values=cache, use_cache=True).logits[:, -1]
        # Drawn from the whole softmax: top-k or top-p would draw from another policy than the one in the loss.
        inputs_GT = torch.multinomial(token_logprobs(logits_GV, tokenizer).exp(), num_samples=1)
        for index, token in enumerate(inputs_GT[:, 0].tolist()):
            if is_open[index]:  # a completion that has ended stays in the batch, and its further tokens are dropped
                completions[index].append(token)  # the token that ends the turn too: ending is learned
                is_open[index] = not is_end(completions[index], tokenizer)
        if not any(is_open):
            break
    return completions


def is_end(ids: list[int], tokenizer) -> bool:
    """Return True if the last token is the end-of-sequence token or completes the stop text."""
    return ids[-1] == tokenizer.eos_token_id or STOP in tokenizer.decode(ids[-len(STOP) :])


# ---- Log-probabilities


def token_logprobs(logits_V: Tensor, tokenizer) -> Tensor:
    """Return log-probabilities at TEMPERATURE, in float32, of the ids that the tokenizer has.

    Used for drawing and for scoring, so that both have the same distribution. A model may have more logits than the
    tokenizer has ids: the rest spells nothing and is never drawn.
    """
    return torch.log_softmax(logits_V[..., : len(tokenizer)].float() / TEMPERATURE, dim=-1)


def sequence_logprobs(model, tokenizer, prompt: list[int], completions: list[list[int]]) -> Tensor:
    """Return log pi(y_i|x), the sum over the tokens of each completion of one prompt -> [G]."""
    length = max(map(len, completions))
    # Padded at the end, with any id: attention is causal, so no token before sees it, and the mask drops its logprob.
    targets_GT = torch.tensor([ids + [0] * (length - len(ids)) for ids in completions], device=model.device)
    is_token_GT = torch.tensor([[t < len(ids) for t in range(length)] for ids in completions], device=model.device)
    prompt_GT = torch.tensor([prompt] * len(completions), device=model.device)
    logits_GTV = model(torch.cat([prompt_GT, targets_GT], dim=1), use_cache=False).logits
    # The logits at a position predict the next token: from the last of the prompt to the last but one of all.
    logprobs_GTV = token_logprobs(logits_GTV[:, len(prompt) - 1 : -1], tokenizer)
    logprobs_GT = logprobs_GTV.gather(2, targets_GT[:, :, None])[:, :, 0]
    return (logprobs_GT * is_token_GT).sum(dim=1)


# ---- RLOO


def leave_one_out_advantages(rewards_G: Tensor) -> Tensor:
    """Return each reward minus the mean of the others -> [G].

    >>> leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    others_G = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    return rewards_G - others_G


def take_step(model, reference, tokenizer, optimizer, rows: list[dict[str, str]]) -> dict[str, float]:
    """Sample, score and train on the prompts of one step -> its metrics."""
    totals = dict.fromkeys(("reward", "kl", "length", "ended"), 0.0)
    num_completions = len(rows) * NUM_GENERATIONS
    optimizer.zero_grad()
    for row in rows:
        # 1. Sample a group of completions. All groups come before the update, so the policy that is trained is the
        #    policy that sampled, and no importance ratio is needed.
        prompt = encode_prompt(row["prompt"], tokenizer)
        completions = sample(model, tokenizer, prompt)

        # 2. Score the text of each.
        texts = [tokenizer.decode(ids, skip_special_tokens=True).removesuffix(STOP) for ids in completions]
        rewards_G = torch.tensor([reward(text, str(row["answer"])) for text in texts], device=model.device)

        # 3. Log-probabilities of the policy, with gradient, and of the reference, without.
        logprobs_G = sequence_logprobs(model, tokenizer, prompt, completions)
        with torch.no_grad():
            reference_logprobs_G = sequence_logprobs(reference, tokenizer, prompt, completions)

        # 4. The KL goes into the reward, and so into the baseline. It is detached: as a part of the reward it only says
        #    how good a completion is. As a separate loss, beta * KL_i would hold nothing back: its gradient is
        #    beta * grad log pi(y_i|x), which is 0 on average.
        kl_G = logprobs_G.detach() - reference_logprobs_G
        advantages_G = leave_one_out_advantages(rewards_G - BETA * kl_G)

        # 5. The mean over all completions of the step. Gradients of its groups add up in `backward`. A completion with
        #    a positive advantage becomes more likely, one with a negative advantage less likely. No division by the
        #    length: that would weigh the tokens of short completions more, and the estimate would be biased.
        loss = -(advantages_G * logprobs_G).sum() / num_completions
        loss.backward()

        totals["reward"] += rewards_G.sum().item()
        totals["kl"] += kl_G.sum().item()
        totals["length"] += sum(map(len, completions))
        totals["ended"] += sum(is_end(ids, tokenizer) for ids in completions)

    # 6. One update per batch: the next step samples from the new policy.
    optimizer.step()
    return {name: total / num_completions for name, total in totals.items()}


def main() -> None:
    """Train the model of a folder and print a line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model and its tokenizer")
    parser.add_argument("--prompts", type=Path, help="JSONL with a `prompt` and an `answer` per line (default: sums)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", help="folder for the trained model (default: it is not saved)")
    options = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # float32: at this learning rate an update of a bfloat16 weight is mostly rounded away. eval: dropout would make
    # the trained policy another one than the policy that sampled.
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device).eval()
    reference = copy.deepcopy(model).requires_grad_(False)  # the policy at the start, which the KL is measured from
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rows = [json.loads(line) for line in options.prompts.read_text().splitlines()] if options.prompts else sums(256)

    for step in range(1, options.steps + 1):
        started = time.perf_counter()
        metrics = take_step(model, reference, tokenizer, optimizer, random.sample(rows, PROMPTS_PER_STEP))
        line = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"step {step}/{options.steps}  {line}  seconds {time.perf_counter() - started:.1f}", flush=True)
    if options.out:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
