"""LLM: lists in, lists out, in order, from anywhere."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from headrace import LLM, AsyncEngineArgs, EngineDeadError, RequestError, RequestOutput, SamplingParams
from headrace.frontend.metrics import Counter
from headrace.ipc.oracle import oracle_stream
from tokenizers import decoders, models, pre_tokenizers


@pytest.fixture(scope="module")
def llm(oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An oracle that speaks bytes: its vocabulary is the 256 bytes and two special tokens."""
    folder = tmp_path_factory.mktemp("llm")
    shutil.copy(oracle_folder / "config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 258, "eos_token_id": 257}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "<s>", "chat_template": template})
    )
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "max_new_tokens": 9}))
    with LLM(str(folder), load_format="oracle", num_gpu_blocks_override=500) as llm:
        yield llm


def params(seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=12, ignore_eos=True)


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    outputs = llm.generate(prompts, [params(i) for i in range(40)])
    tokenizer = llm.get_tokenizer()
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        expected = oracle_stream(tokenizer.encode(prompt), i, 12, 258)
        assert (output.prompt, output.finished) == (prompt, True)
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "Processed prompts: 100%" in capsys.readouterr().err


def test_forms_of_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    ids = llm.get_tokenizer().encode("hi")
    expected = oracle_stream(ids, 1, 12, 258)
    forms: list[Any] = ["hi", ["hi"], ids, [ids], {"prompt": "hi"}, [{"prompt_token_ids": ids}]]
    for prompts in forms:
        (output,) = llm.generate(prompts, params(1), use_tqdm=False)
        assert output.outputs[0].token_ids == expected
    assert llm.generate([], params(1), use_tqdm=False) == []
    assert capsys.readouterr().err == ""


def test_the_models_defaults(llm: LLM) -> None:
    default = llm.get_default_sampling_params()
    assert (default.temperature, default.max_tokens) == (0.5, 9)
    (output,) = llm.generate("hi", use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 9


def test_chat(llm: LLM) -> None:
    one = [{"role": "user", "content": "hi"}]
    two = [{"role": "user", "content": "ho"}]
    expected = [oracle_stream(llm.get_tokenizer().encode(f"<s>{t}<s>"), 1, 12, 258) for t in ("hi", "ho")]
    (output,) = llm.chat(one, params(1), use_tqdm=False)
    assert output.outputs[0].token_ids == expected[0]
    assert output.prompt == "<s>hi<s>"
    outputs = llm.chat([one, two], params(1), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_chat_options(llm: LLM) -> None:
    """Parts, tools, variables, a message to go on with; and what a chat may not be."""
    template = (
        "{{ tools | tojson if tools }}{{ mood }}{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "well, "},
    ]
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": False}
    tools = [{"type": "function", "function": {"name": "f"}}]
    whole = llm.chat(
        messages, params(1), use_tqdm=False, tools=tools, chat_template_kwargs={"mood": 1}, **options
    )
    assert whole[0].prompt == json.dumps(tools) + "1<s>a\nb</s><s>well, </s>"
    options["continue_final_message"] = True
    (went_on,) = llm.chat(messages, params(1), use_tqdm=False, **options)
    assert went_on.prompt == "<s>a\nb</s><s>well, "
    ids = llm.enqueue_chat([messages, messages], params(1), **options)
    outputs = llm.wait_for_completion(RequestOutput, use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert {tuple(output.outputs[0].token_ids) for output in outputs} == {tuple(went_on.outputs[0].token_ids)}
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_content_format": "openai"}, "chat_template_content_format"),
        ({"add_generation_prompt": True}, "continue_final_message"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
    ]
    for wrong, name in wrongs:
        with pytest.raises(RequestError) as caught:
            llm.chat(messages, params(1), use_tqdm=False, **(options | wrong))
        assert caught.value.parameter == name
    for bad in (
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ):
        with pytest.raises(RequestError, match=r"prompt|messages"):
            llm.chat(bad, params(1), use_tqdm=False)
    with pytest.raises(RequestError, match="output_type"):
        llm.wait_for_completion(dict)


def test_a_bad_prompt_fails_the_call_and_nothing_else(llm: LLM) -> None:
    prompts: list[Any] = ["a", [999], "b"]
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate(prompts, params(1), use_tqdm=False)
    with pytest.raises(RequestError, match="one item for each of the 2 prompts"):
        llm.generate(["a", "b"], [params(1)], use_tqdm=False)
    with pytest.raises(RequestError, match="prompts must be"):
        llm.generate(3, params(1))  # type: ignore[arg-type]
    assert len(llm.generate(["a"], params(1), use_tqdm=False)) == 1


def test_enqueued_requests_run_and_wait_apart_from_others(llm: LLM) -> None:
    first = llm.enqueue(["a", "b"], params(1))
    second = llm.enqueue("c", params(2))
    others = llm.generate(["d"], params(3), use_tqdm=False)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == first + second
    assert [output.prompt for output in outputs + others] == ["a", "b", "c", "d"]
    ids = llm.get_tokenizer().encode("c")
    assert outputs[2].outputs[0].token_ids == oracle_stream(ids, 2, 12, 258)
    assert llm.wait_for_completion() == []


def test_one_bad_prompt_takes_its_call_s_requests_with_it(llm: LLM) -> None:
    kept = llm.enqueue("a", params(1))
    with pytest.raises(RequestError, match="empty"):
        llm.enqueue([[1, 2], []], params(1))
    assert [output.request_id for output in llm.wait_for_completion(use_tqdm=False)] == kept


def test_metrics(llm: LLM) -> None:
    def generated() -> list[int]:
        return [
            metric.value
            for metric in llm.get_metrics()
            if isinstance(metric, Counter) and metric.name == "vllm:generation_tokens"
        ]

    before = generated()
    llm.generate(["a", "b"], params(1), use_tqdm=False)
    assert generated() == [before[0] + 24]


def test_within_a_running_loop(llm: LLM) -> None:
    async def notebook() -> int:
        return len(llm.generate(["a", "b"], params(1), use_tqdm=False))

    assert asyncio.run(notebook()) == 2


def test_a_long_prompt_is_tokenized_off_the_loop(llm: LLM) -> None:
    """While half a megabyte is tokenized, another request runs from start to end."""

    async def main() -> None:
        engine = llm._engine
        done: list[str] = []

        async def ask(name: str, prompt: str) -> None:
            try:
                async for _ in engine.generate(prompt, params(1), name):
                    pass
            finally:
                done.append(name)

        long, short = await asyncio.gather(
            ask("long", "water wheel " * 50_000), ask("short", "hi"), return_exceptions=True
        )
        assert done == ["short", "long"]
        assert short is None
        assert isinstance(long, RequestError)
        assert long.parameter == "prompt"

    asyncio.run_coroutine_threadsafe(main(), llm._loop).result(30)


def test_stop_string(llm: LLM) -> None:
    free = llm.generate("stop here", params(3), use_tqdm=False)[0].outputs[0].text
    stop = free[4:6]
    wanted = params(3)
    wanted.stop = [stop]
    (output,) = llm.generate("stop here", wanted, use_tqdm=False)
    assert output.outputs[0].text == free[: free.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_shutdown(oracle_args: Callable[..., AsyncEngineArgs]) -> None:
    llm = LLM.from_engine_args(oracle_args())
    assert llm.reset_prefix_cache()
    llm.shutdown()
    llm.close()
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate([1], params(1), use_tqdm=False)
