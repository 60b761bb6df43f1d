"""A model's makers advise how tokens are chosen: all of it is used, and nothing of it can fail a request."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG

from shoal.comm.messages import Done, Generate, Load, Sampling
from shoal.comm.sampling_limits import SAMPLING_LIMITS
from shoal.daemon.loading.advice import _FIELDS, _LACKING, advice_of
from shoal.daemon.node import Node
from shoal.daemon.request import DEFAULT_SAMPLING, sampling_of
from shoal.models.checkpoint.checkpoint import SamplingAdvice


def advised(tmp_path: Path, prefix: str = "", **values: Any) -> Any:
    given = SamplingAdvice("FILE", prefix, values)
    return advice_of(SimpleNamespace(advice=given, path=tmp_path, spec=SimpleNamespace(vocab=100)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stated", "meant"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": None}, {"temperature": 1.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": None}, {"top_k": 0}),
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"top_k": 10**30}, {"top_k": 0}),
        ({"top_p": 1}, {"top_p": 1}),
        ({"top_p": 0}, {"top_p": 1}),
        ({"top_p": 1.5}, {"top_p": 1}),
        ({"top_p": None}, {"top_p": 1}),
        ({"min_p": 0.0}, {"min_p": 0}),
        ({"min_p": -1}, {"min_p": 0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"repetition_penalty": 0}, {"repetition_penalty": 1}),
        ({"repetition_penalty": None}, {"repetition_penalty": 1}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": -0.5},
            {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        ),
        ({"presence_penalty": None}, {"presence_penalty": 0}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": None, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": False}, {"temperature": 0}),
        (
            {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.2},
            {"temperature": 0, "repetition_penalty": 1.2},
        ),
        ({"suppress_tokens": [3, 5, 100]}, {"logit_bias": {3: -10_000, 5: -10_000}}),  # there is no token 100
        ({"suppress_tokens": []}, {}),
        ({"temp": 0.5, "penalty_repeat": 1.1}, {"temperature": 0.5, "repetition_penalty": 1.1}),
        ({"penalty_repeat": 1.1, "penalty_last_n": 0}, {}),
        (
            {"typical_p": 1.0, "num_beams": 1, "epsilon_cutoff": 0.0, "stop_strings": None, "min_length": 0},
            {},
        ),
        ({"eos_token_id": [1, 2], "max_length": 4096, "transformers_version": "5", "cache": {}}, {}),
    ],
)
def test_advice_is_read_whole_and_what_means_off_elsewhere_is_off(
    tmp_path: Path, stated: dict[str, Any], meant: dict[str, Any]
) -> None:
    advice = advised(tmp_path, **stated)
    assert (advice.values, advice.warnings) == (meant, ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in _FIELDS for value in ("0.7", True, [1], {}, math.nan, math.inf)),
        ("temperature", -1.0),
        ("temperature", 101),
        ("top_k", 1.5),
        ("top_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", -2),
        ("repetition_penalty", 11),
        ("presence_penalty", 99),
        ("suppress_tokens", 7),
        ("suppress_tokens", ["a"]),
        ("suppress_tokens", list(range(5000))),
        ("do_sample", "yes"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_a_warning_that_names_the_file(
    tmp_path: Path, key: str, value: object
) -> None:
    advice = advised(tmp_path, "general.sampling.", **{key: value})
    assert advice.values == {}
    (warning,) = advice.warnings
    assert warning.startswith(f"FILE: general.sampling.{key}=")
    assert "is not used: must be" in warning
    assert len(warning) < 200


@pytest.mark.parametrize("key", _LACKING)
def test_what_shoal_lacks_is_named_once(tmp_path: Path, key: str) -> None:
    (warning,) = advised(tmp_path, **{key: 0.37}).warnings
    assert warning == f"FILE: {key}=0.37 is not used: Shoal does not have it"
    assert not advised(tmp_path, **dict.fromkeys(_LACKING)).warnings


def test_requests_obey_advice_where_they_say_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_path = tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    stated = {
        "top_k": -1,
        "top_p": "much",
        "repetition_penalty": 1.3,
        "typical_p": 0.5,
        "suppress_tokens": [7],
    }
    file = hf_path / "generation_config.json"
    file.write_text(json.dumps(stated))
    with Node(CONFIG) as node, caplog.at_level(logging.WARNING):
        node.load(Load(model=str(hf_path)))
        warned = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
        model = next(iter(node._models))
        chosen = sampling_of(model, Sampling())
        assert (chosen.top_k, chosen.top_p, chosen.repetition_penalty) == (0, DEFAULT_SAMPLING["top_p"], 1.3)
        assert chosen.logit_bias == {7: SAMPLING_LIMITS["logit_bias"].low}
        asked = sampling_of(model, Sampling(top_k=9, repetition_penalty=1.0, logit_bias={7: 0.0, 8: 1.0}))
        assert (asked.top_k, asked.repetition_penalty, asked.logit_bias) == (9, 1.0, {7: 0.0, 8: 1.0})
    assert [warning.removeprefix(f"{file}: ").split("=")[0] for warning in warned] == ["top_p", "typical_p"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b'{"top_k": 4', b"\xef\xbb\xbf{}", b'{"eos_token_id": "5"}']
)
def test_a_file_that_only_advises_is_never_in_the_way(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Its fault is told once, though two read it; transformers goes on without it, too."""
    path = tiny.save_hf(tiny.hf_model("llama"), tmp_path / "m")
    (path / "generation_config.json").write_bytes(content)
    with Node(CONFIG) as node, caplog.at_level(logging.WARNING):
        status = node.load(Load(model=str(path))).model
        (warning,) = status.warnings
        assert str(path) in warning
        assert "generation_config.json" in warning
        assert [warning] == [record.getMessage() for record in caplog.records]
        done = [*node.stream(Generate(prompt="hi", model=status.name, max_tokens=2))][-1]
        assert isinstance(done, Done)
