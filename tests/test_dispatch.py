"""`explain` says what runs and why not the others; a log line says it once per kind of call."""

import logging

import jax
import jax.numpy as jnp
import pytest

from fgattn_jax import dispatch
from fgattn_jax.attention import attention, explain
from fgattn_jax.implementations.dense import cudnn_reasons
from fgattn_jax.implementations.spec import CallSpec
from fgattn_jax.masks import full

X = jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.float32)


def spec(**changes) -> CallSpec:
    facts = {"batch": 1, "num_queries": 4096, "num_keys": 4096, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    return CallSpec(**(facts | {"dtype": "bfloat16", "query_block": 64, "platform": "gpu"} | changes))


def test_explain_needs_shapes_only_and_names_every_reason():
    mask = jax.eval_shape(lambda: full(num_queries=64, num_keys=64, query_block=32))
    got = explain(X, X, X, mask)
    assert got.implementation == "xla"
    assert set(got.reasons) == {"cuda", "pallas"}
    text = str(got)
    assert text.startswith("runs: xla (kept keys gathered")
    assert "not cuda: " in text
    assert "it needs an NVIDIA GPU of the Hopper generation, and platform=" in text
    assert "not reference: it could run" in text
    assert "num_queries=64" in text


def test_explain_of_a_call_that_would_raise_names_nothing():
    got = explain(X, X, X, full(num_queries=64, num_keys=64, query_block=32), implementation="pallas")
    assert got.implementation is None
    assert str(got).startswith("runs: nothing")


def test_reference_is_never_taken_unless_it_is_asked_for():
    assert dispatch.explain_spec(spec(num_queries=32, num_keys=32), None).implementation == "xla"
    assert dispatch.explain_spec(spec(num_queries=32, num_keys=32), "reference").implementation == "reference"


def test_dense_calls_take_cudnn_only_where_it_can_run():
    assert "cuDNN" in dispatch.explain_spec(spec(query_block=None), None).kernel
    assert "chunks" in dispatch.explain_spec(spec(query_block=None, platform="cpu"), None).kernel
    assert cudnn_reasons(spec()) == ()
    assert cudnn_reasons(spec(dtype="float32")) == ("cuDNN takes bfloat16 and float16, dtype=float32",)
    assert "head_dim=80" not in "".join(cudnn_reasons(spec(head_dim=80)))
    assert "head_dim=200" in "".join(cudnn_reasons(spec(head_dim=200)))
    assert "head_dim=36" in "".join(cudnn_reasons(spec(head_dim=36)))


def test_what_runs_is_logged_once(caplog: pytest.LogCaptureFixture):
    dispatch._log_once.cache_clear()
    query = jnp.ones((1, 16, 1, 16))
    mask = full(num_queries=16, num_keys=16, query_block=16)
    with caplog.at_level(logging.INFO, logger="fgattn_jax"):
        attention(query, query, query, mask)
        attention(query, query, query, mask)
    assert [r.message.split(" for ")[0] for r in caplog.records] == [
        "attention runs as xla (kept keys gathered in chunks; work follows the kept slices)"
    ]
