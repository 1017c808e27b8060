"""Runs that tests share are those of the code as it is, and nobody changes them."""

import pytest

import train_cogvideox_lora as script
from tests.conftest import lora_of, same


def test_a_plain_run_is_trained_once_and_not_with_changed_code(plain_run, train, monkeypatch):
    folder = plain_run(max_train_steps=1)
    assert same(lora_of(folder), lora_of(train(max_train_steps=1)))
    monkeypatch.setattr(script, "main", None)
    assert plain_run(max_train_steps=1) == folder
    with pytest.raises(AssertionError, match="a run of changed code"):
        plain_run(max_train_steps=1, fps=3)


def test_a_plain_run_that_a_test_has_changed_is_told(plain_run, trained_runs):
    before = set(trained_runs)
    folder = plain_run(max_train_steps=1, fps=5)
    (folder / "status.json").unlink()
    with pytest.raises(AssertionError, match="a test has changed the shared run"):
        plain_run(max_train_steps=1, fps=5)
    for name in set(trained_runs) - before:
        del trained_runs[name]
