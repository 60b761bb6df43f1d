"""Sampling as a model's makers advise it, unless a request with such values would be refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.asking import CONFIG

from shoal.comm.messages import Load, Sampling
from shoal.daemon.errors import DaemonError
from shoal.daemon.node import Node
from shoal.daemon.request import sampling_of


def test_advice_beyond_the_limits_is_refused_with_field_value_and_limit(path: Path) -> None:
    with Node(CONFIG) as node:
        node.load(Load(model=str(path)))
        model = next(iter(node._models))
        model.checkpoint.defaults = {"temperature": -1.0}
        with pytest.raises(
            DaemonError, match=r"temperature=-1\.0: must be a number from 0 to 100"
        ) as refused:
            sampling_of(model, Sampling())
        assert refused.value.code == "bad_request"
        assert sampling_of(model, Sampling(temperature=0.5)).temperature == 0.5
        model.checkpoint.defaults = {"temperature": 1.5, "top_k": 3}
        assert sampling_of(model, Sampling(top_k=9)).temperature == 1.5
