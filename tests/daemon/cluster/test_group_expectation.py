"""What is predicted of a group stands beside what was measured, as it does of one machine."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from fakes.asking import CONFIG, prompt, text_of
from fakes.group.clusters import Cluster, everybody, prompts_by_everybody

from shoal.comm.messages import Load
from shoal.daemon.cluster.forming import Choosing


@pytest.mark.parametrize("choosing", [everybody, prompts_by_everybody])
def test_a_group_is_predicted_by_what_it_was_chosen_by(
    choosing: Choosing, tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Cluster(tmp_path, CONFIG, 1, choosing) as cluster:
        node = cluster.node
        node.load(Load(model=str(path)))
        (model,) = node._models
        assert len(text_of(node, prompt(0))[1]) == 24
        for look in node._looks():
            look()
        (found,) = node.status().models
        assert found.ranks == 2
        assert found.predicted_band[0] < found.predicted_tokens_per_s < found.predicted_band[1]
        assert re.search(r"loaded tiny\.gguf in .* predicted .* tokens/s", caplog.text)
        said = (
            r"tiny\.gguf: 40 tokens read in .* \(predicted .*\), 24 tokens written at .*/s \(predicted .*/s\)"
        )
        assert re.search(said, caplog.text)
        together = model.main.expectation._together
        assert together is not None
        assert (found.predicted_tokens_per_s == together.usual.tokens_per_s) is (choosing is everybody)
        if choosing is everybody:
            learnt = node._machine.device.corrections.learnt
            assert learnt == {}, "other machines' times are not this one's"


def test_a_step_of_a_group_takes_longer_with_more_rows_and_longer_texts(tmp_path: Path, path: Path) -> None:
    with Cluster(tmp_path, CONFIG, 1) as cluster:
        cluster.node.load(Load(model=str(path)))
        (model,) = cluster.node._models
        together = model.main.expectation._together
        assert together is not None
        steps = together.steps
        assert 0 < steps.answer_s(1, 8) < steps.answer_s(8, 8) < steps.answer_s(8, 80)
        assert 0 < steps.prompt_s(16) < steps.prompt_s(64)
        expected = model.main.expectation.step_curve()
        assert expected is not None
        assert expected(1) == pytest.approx(steps.answer_s(1, 48))
