"""A whole run of 50,000 steps against the reference's, evaluation by evaluation."""

import json
from pathlib import Path

import pytest

from mlp_fast import backends
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus
from mlp_fast.run.log import RunLog
from mlp_fast.run.trainer import Plan, Trainer

GOLDEN = json.loads((Path(__file__).parent / "golden" / "upstream_embedded_50000.json").read_text())
TOLERANCE = 2e-6  # nats, at every one of 251 evaluations: six printed digits, but for the last one's rounding


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "native" else [pytest.mark.long]) for name in backends.REGISTRY],
)
def test_a_whole_run_follows_the_reference(name: str, embedded_corpus: Corpus) -> None:
    config = Config(backend=name, quiet=True)
    reason = backends.unsupported(name, config)
    if reason:
        pytest.skip(f"{name}: {reason}")
    result = Trainer(Plan.of(config, embedded_corpus), RunLog(config)).run()
    reference = GOLDEN["MLPRaw" if name.endswith("raw") else "MLP"]
    assert [e.step for e in result.evaluations] == [step for step, *_ in reference["eval_step_trainloss_valloss"]]
    for kind, index in (("train_loss", 1), ("val_loss", 2)):
        wanted = [row[index] for row in reference["eval_step_trainloss_valloss"]]
        off = [getattr(e, kind) - loss for e, loss in zip(result.evaluations, wanted, strict=True)]
        assert max(map(abs, off)) < TOLERANCE, kind
        assert abs(sum(off) / len(off)) < TOLERANCE / 10, f"{kind} is off in one direction"
    assert abs(result.test_loss - reference["test_loss"]) < TOLERANCE
