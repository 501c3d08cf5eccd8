"""Which prompts a step samples: a function of the seed and the step alone."""

from hypothesis import given
from hypothesis import strategies as st

from rekatrain.trainer.rloo.rollouts import step_prompts


@given(num_prompts=st.integers(1, 20), prompts_per_step=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_each_pass_samples_every_prompt_once(num_prompts: int, prompts_per_step: int, seed: int) -> None:
    num_steps = -(-3 * num_prompts // prompts_per_step)
    steps = [
        step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step) for step in range(num_steps)
    ]
    assert all(len(chosen) == prompts_per_step for chosen in steps)
    stream = [prompt for chosen in steps for prompt in chosen]
    for first in range(0, 3 * num_prompts, num_prompts):
        assert sorted(stream[first : first + num_prompts]) == list(range(num_prompts))
    # A resumed run asks for later steps only, and for any of them again.
    for step in reversed(range(num_steps)):
        assert step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step) == steps[step]


def test_the_stream_of_prompts_does_not_depend_on_the_size_of_a_step() -> None:
    def stream(prompts_per_step: int) -> list[int]:
        return [
            prompt
            for step in range(60 // prompts_per_step)
            for prompt in step_prompts(7, seed=3, step=step, prompts_per_step=prompts_per_step)
        ]

    assert stream(1) == stream(4) == stream(10) == stream(60)


def test_each_pass_and_each_seed_has_its_own_order() -> None:
    passes = [step_prompts(50, seed=seed, step=step, prompts_per_step=50) for seed in (0, 1) for step in range(3)]
    assert len({tuple(order) for order in passes}) == 6
    assert list(range(50)) not in passes
