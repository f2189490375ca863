"""The grammar's rule on the next token: what it allows, how it ends, and where a replay finds it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import RequestError
from headrace.ipc.messages import Sampling
from headrace.worker.constraints import ConstraintBuilder
from headrace.worker.grammar import Grammar, Grammars

VOCAB = 300
END = 0
"""1 is another end."""
REGEX = r"start: /[ab]{1,3}(é|🎡)?/" + "\n"
SCHEMA = json.dumps(
    {
        "grammars": [
            {
                "json_schema": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                    "required": ["name", "age"],
                    "additionalProperties": False,
                }
            }
        ]
    }
)


@pytest.fixture
def config(make_config: Callable[..., EngineConfig], text_model: Path) -> EngineConfig:
    path = str(text_model / "tokenizer.json")
    return make_config(load_format="dummy", tokenizer_json=path, vocab_size=VOCAB, eos_token_ids=[END, 1])


@pytest.fixture
def grammars(config: EngineConfig) -> Grammars:
    return Grammars(config)


@pytest.fixture(scope="module")
def backend(text_model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(text_model / "tokenizer.json"))


def start(grammars: Grammars, grammar: str, **sampling: object) -> Grammar:
    return grammars.start(Sampling(grammar=grammar, **sampling))  # type: ignore[arg-type]


def allowed(rule: Grammar) -> list[int]:
    mask = np.full(-(-VOCAB // 32), -1, np.int32)
    rule.write(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def feed(rule: Grammar, tokens: list[int]) -> None:
    for token in tokens:
        rule.accept(token)


def test_random_walks_write_what_the_schema_says(grammars: Grammars, backend: tokenizers.Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(20):
        rule, written = start(grammars, SCHEMA), []
        while END not in (choices := allowed(rule)):
            quotes = [token for token in choices if '"' in (backend.id_to_token(token) or "")]
            # Now and then what ends a string, which would not end for long.
            written.append(rng.choice(quotes if quotes and rng.random() < 0.3 else choices))
            rule.accept(written[-1])
        value = json.loads(backend.decode(written, skip_special_tokens=False))
        assert set(value) == {"name", "age"}
        assert isinstance(value["age"], int)


def test_a_replay_finds_it_where_it_was(grammars: Grammars, backend: tokenizers.Tokenizer) -> None:
    tokens = backend.encode('{"name": "Müller 🎡", "age": 7}').ids
    walked = start(grammars, SCHEMA)
    for count in range(len(tokens) + 1):
        replayed = start(grammars, SCHEMA)
        feed(replayed, tokens[:count])
        assert allowed(replayed) == allowed(walked)
        feed(walked, tokens[count : count + 1])


def test_at_its_end_only_ends_may_come_again_and_again(
    grammars: Grammars, backend: tokenizers.Tokenizer
) -> None:
    rule = start(grammars, REGEX)
    feed(rule, backend.encode("abé").ids)
    for _ in range(3):
        assert allowed(rule) == [END, 1]
        rule.accept(END)


def test_where_it_may_end_the_model_decides(grammars: Grammars, backend: tokenizers.Tokenizer) -> None:
    rule = start(grammars, REGEX)
    assert END not in allowed(rule)
    feed(rule, backend.encode("ab").ids)
    choices = allowed(rule)
    assert END in choices
    assert len(choices) > 2


def test_what_no_text_has_is_never_allowed(grammars: Grammars) -> None:
    choices = allowed(start(grammars, "start: /(.|\\n)*/\n"))
    assert len(choices) > 200
    assert max(choices) < 290  # the rest has no text
    assert 1 in choices  # an end


def test_min_tokens_hold_ends_back_while_there_is_anything_else(
    grammars: Grammars, backend: tokenizers.Tokenizer
) -> None:
    letters = backend.encode("a").ids + backend.encode("b").ids
    rule = start(
        grammars, "start: /[ab]{1,3}/\n", min_tokens=9, eos_token_id=END, stop_token_ids=[1, letters[1]]
    )
    rule.accept(letters[0])
    choices = allowed(rule)
    assert not {END, 1, letters[1]} & set(choices)
    assert letters[0] in choices
    feed(rule, [letters[0]] * 2)
    assert allowed(rule) == [END, 1]  # the text is complete: what else could come?
    after = start(grammars, "start: /[ab]{1,3}/\n", min_tokens=1, eos_token_id=END)
    after.accept(letters[0])
    assert END in allowed(after)


def test_a_token_against_the_grammar_ends_the_request(
    grammars: Grammars, backend: tokenizers.Tokenizer
) -> None:
    rule = start(grammars, REGEX)
    rule.accept(backend.encode("x").ids[0])
    with pytest.raises(RequestError):
        allowed(rule)
    beyond = start(grammars, REGEX)
    feed(beyond, backend.encode("aéx").ids)
    with pytest.raises(RequestError):
        allowed(beyond)


@pytest.mark.parametrize("grammar", ["start: other\n", '{"grammars": []}', "{", "start: s\ns: s\n"])
def test_what_cannot_be_built_or_matched_is_refused(grammars: Grammars, grammar: str) -> None:
    rule = start(grammars, grammar)  # does not wait
    with pytest.raises(RequestError) as caught:
        allowed(rule)
    assert caught.value.parameter == "structured_outputs"


def test_rules_of_one_grammar_are_apart(grammars: Grammars, backend: tokenizers.Tokenizer) -> None:
    first, second = start(grammars, REGEX), start(grammars, REGEX)
    feed(first, backend.encode("aé").ids)
    assert allowed(first) == [END, 1]
    assert END not in allowed(second)


def test_what_was_in_the_mask_does_not_matter(grammars: Grammars) -> None:
    rule = start(grammars, REGEX)
    mask = np.zeros(-(-VOCAB // 32), np.int32)
    rule.write(mask)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == allowed(rule)


def test_the_grammars_that_are_kept_are_bounded(grammars: Grammars) -> None:
    for i in range(200):
        rule = start(grammars, f"start: /a{{{i + 1}}}/\n")
    allowed(rule)
    assert len(grammars._built) <= 64


def test_an_engine_without_a_tokenizer_refuses(make_config: Callable[..., EngineConfig]) -> None:
    build = ConstraintBuilder(make_config(load_format="dummy"))
    assert build(Sampling(), np.zeros(1, np.int32)) == []
    with pytest.raises(RequestError, match="no tokenizer"):
        build(Sampling(grammar=REGEX), np.zeros(1, np.int32))
    with pytest.raises(RequestError, match="oracle"):
        ConstraintBuilder(make_config())(Sampling(grammar=REGEX), np.zeros(1, np.int32))
