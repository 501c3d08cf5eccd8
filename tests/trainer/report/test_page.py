"""The page of a report in a real browser: charts, filters, groups, and hostile text of a policy."""

import json
import re
from html import escape
from pathlib import Path

import pytest

from rekatrain.trainer.report.report import write_report
from tests.trainer.report.pages import browse, completion, needs_chromium, text_of, write_run

pytestmark = [needs_chromium, pytest.mark.slow]

RUN = "document.documentElement.dataset.ran=1"
HOSTILE = [
    f"</script><script>{RUN}</script>",
    f"<img src=x onerror='{RUN}'>",
    f"<!--<script>{RUN}</script>-->",
    f"]]><svg/onload={RUN}>",
    f'<iframe srcdoc="<script>parent.{RUN}</script>"></iframe>',
    f"{{{{constructor.constructor('{RUN}')()}}}} ${{{RUN}}}",
    f"\u2028\u2029{RUN}//\ud800 lone \udfff <a href='javascript:{RUN}'>a</a>",
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


def test_page_shows_hostile_text_literally_and_runs_nothing(tmp_path: Path, scratch: Path) -> None:
    members = [completion(1, 1, text, source=text, gold=text, prompt=text, row=text) for text in HOSTILE]
    members[0] |= {"rewards": {text: 1.0 for text in HOSTILE}, "reward_errors": {HOSTILE[1]: HOSTILE[1]}}
    metrics = [{"step": step, **{f"rewards/{text}/mean": 0.5 * step for text in HOSTILE}} for step in (1, 2)]
    run = write_run(tmp_path / "run", metrics=metrics, rollouts=members, recipe={"note": dict(enumerate(HOSTILE[:-1]))})
    page = tmp_path / "page.html"
    write_report([run], page)
    for address in ("curves", "rollouts", "rollouts?group=0", "recipe"):
        document = browse(page, address, scratch)
        assert 'data-ready="yes"' in document and "data-ran" not in text_of(document).split(">", 2)[1], address
        assert not re.search(r"<(img|iframe|svg/|a)[ >]", text_of(document)), address
        if address == "rollouts?group=0":
            for text in HOSTILE[:-1]:
                assert text_of(document).count(escape(text, quote=False)) >= 3, text
            assert "\ufffd lone \ufffd" in document
    # The same texts do run in a page that trusts them.
    naive = tmp_path / "naive.html"
    naive.write_text(f"<html><body>{HOSTILE[0]}{HOSTILE[1]}</body></html>")
    assert re.search(r"<html[^>]* data-ran=\"1\"", browse(naive, "", scratch))


def test_page_filters_sorts_and_searches(tmp_path: Path, scratch: Path) -> None:
    rollouts = [
        completion(step, prompt, f"step {step} answer {prompt} <b>needle{step}</b>", reward=step + prompt / 10,
                   source=("code", "math")[prompt], finish_reason=("stop", "length")[step % 2],
                   rewards={"math": float(-step)}, reward_errors={"math": "broken"} if step == 7 else {})
        for step in range(1, 41)
        for prompt in (0, 1)
    ]  # fmt: skip
    page = tmp_path / "page.html"
    write_report([write_run(tmp_path / "run", rollouts=rollouts)], page)
    for query, rows in [
        ("", 80),
        ("from=3&to=5", 6),
        ("source=code", 40),
        ("finish=length", 40),
        ("failed=yes", 2),
        ("low=39.5", 2),
        ("by=rewards/math&low=-2&high=-2", 2),
        ("q=NEEDLE3%3C", 2),
        ("q=needle3&source=math&finish=stop", 5),
    ]:
        assert f'data-rows="{rows}"' in browse(page, f"rollouts?{query}", scratch), query
    document = text_of(browse(page, "rollouts?sort=rewards/math&source=math&dir=up", scratch))
    assert re.findall(r"step (\d+) answer 1 ", document)[:3] == ["40", "39", "38"]
    document = text_of(browse(page, "rollouts?sort=reward&at=25", scratch))
    assert "26–50 of 80 completions" in document and "step 28 answer 0" in document


def test_page_draws_runs_over_each_other_and_evaluations(tmp_path: Path, scratch: Path) -> None:
    metrics = [{"step": step, "time": 60.0 * step, "reward": step / 4} for step in range(1, 5)]
    for record in metrics:
        rate = 0.1 * record["step"]
        record |= {"eval/accuracy": rate, "eval/accuracy_low": rate - 0.1, "eval/accuracy_high": rate + 0.1}
    one = write_run(
        tmp_path / "one", metrics=metrics, rollouts=[completion(1, 1, " <reasoning>\nhm\n</reasoning>\n\n2")]
    )
    two = write_run(tmp_path / "two", metrics=metrics[:2], recipe={"seed": 9})
    sft = write_run(
        tmp_path / "sft", metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], recipe={"stage": "sft"}
    )
    answer = {"row": "a:1", "prompt": "human: 1+1 <sep>", "completion": "2", "finish_reason": "stop"}
    evaluation = {"evaluate": {"reward": "math"}, "accuracy": 0.5, "low": 0.2, "high": 0.8, "num_graded": 4}
    evaluation["answers"] = [{**answer, "rewards": {"math": 1.0}, "reward_errors": {}}]
    (tmp_path / "rloo.json").write_text(json.dumps(evaluation))
    page = tmp_path / "page.html"
    write_report([one, two, sft, tmp_path / "rloo.json"], page)
    curves = browse(page, "curves", scratch, width=400, height=3000)
    lines = [len(re.findall(r'class="trace scatter', card)) for card in curves.split('<section class="chart"')[1:]]
    assert lines == [2, 1, 6]  # reward; loss; accuracy with the two edges of each band
    assert "20.0 % to 80.0 %" in curves and "rloo, step 4 of 4" in curves
    recipe = text_of(browse(page, "recipe", scratch))
    assert "Differences" in recipe and "<code>9</code>" in recipe
    group = text_of(browse(page, "rollouts?group=0", scratch))
    assert "<summary>Reasoning</summary>" in group and "<details>" in group and "advantage +0.5" in group
    assert "Gold answer" in group and "50.0 %" in browse(page, "evaluations", scratch)
