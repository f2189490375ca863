"""What people and Prometheus look at: the page in a real browser, /metrics and /stats."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Server

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

PAGE = ["/", "/page/style.css", "/page/chat.js", "/page/plots.js", "/page/stream.js"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_metrics_are_what_prometheus_reads(http: httpx.Client) -> None:
    def sample(name: str, **labels: str) -> float:
        text = http.get("/metrics").text
        values = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(values)

    before = sample("vllm:generation_tokens_total")
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}
    http.post("/v1/completions", json=body).raise_for_status()
    assert http.get("/metrics").headers["content-type"].startswith("text/plain")
    assert sample("vllm:generation_tokens_total") == before + 5
    assert sample("vllm:request_success_total", finished_reason="length") >= 1
    assert sample("vllm:time_to_first_token_seconds_bucket", le="+Inf") >= 1
    assert sample("vllm:time_to_first_token_seconds_count", model_name="demo") >= 1
    assert sample("vllm:num_requests_running") == 0


def test_stats(http: httpx.Client) -> None:
    shown = http.get("/stats").json()
    assert shown["model"] == "demo"
    assert shown["engine"]["num_blocks"] == shown["engine"]["num_free_blocks"] > 0
    assert len(shown["clients"]) == 1


def test_the_page_needs_nothing_from_outside(http: httpx.Client) -> None:
    for path in PAGE:
        response = http.get(path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", response.text), path
    assert http.get("/page/../page.py").status_code == 404


def test_a_key_protects_the_page_and_a_browser_can_give_it(serve: Callable[..., Server]) -> None:
    server = serve(HEADRACE_API_KEY="sesame")
    with server.client() as http:
        for path in [*PAGE, "/metrics", "/stats"]:
            refused = http.get(path)
            assert refused.status_code == 401
            assert "Basic" in refused.headers["www-authenticate"]
            assert http.get(path, auth=("anyone", "sesame")).status_code == 200
            assert http.get(path, auth=("sesame", "")).status_code == 401
        for broken in ("Basic", "Basic %%%", "Basic c2VzYW1l"):
            assert http.get("/stats", headers={"authorization": broken}).status_code == 401


# --- in a browser ----------------------------------------------------------------------------------------


@pytest.fixture
def page(oracle: Server) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1100, "height": 800})
        complaints: list[str] = []
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(oracle.url)
        yield opened
        browser.close()
        assert not complaints


BUSY = "#messages[aria-busy=true]"
DONE = "#messages[aria-busy=false] .assistant:last-child .figures:not(:empty)"


def test_a_conversation_by_keyboard(page: Page) -> None:
    throttle(page, 3000)  # the whole answer would take a minute
    page.keyboard.type("Hello")  # the field has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{BUSY} .assistant .text:not(:empty)")
    page.keyboard.press("Escape")
    page.wait_for_selector("#messages[aria-busy=false]")
    assert page.text_content(".user .text") == "Hello\nthere"
    page.keyboard.type("again")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{BUSY} .assistant:last-child .text:not(:empty)")
    page.click("#stop")
    page.wait_for_selector("#messages[aria-busy=false]")
    assert page.locator(".message").count() == 4
    page.click("#clear")
    assert page.locator(".message").count() == 0


def throttle(page: Page, bytes_per_second: int) -> None:
    conditions = {
        "offline": False,
        "latency": 0,
        "downloadThroughput": bytes_per_second,
        "uploadThroughput": -1,
    }
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", conditions)


def test_sampling_controls_and_errors(page: Page) -> None:
    page.click("summary")
    page.fill("#max_tokens", "30")
    page.fill("#seed", "3")
    page.fill("#input", "Hi")
    page.click("#send")
    page.wait_for_selector(DONE)
    first = page.text_content(".assistant .text")
    assert "30 tokens" in (page.text_content(".figures") or "")
    page.click("#clear")
    page.fill("#input", "Hi")
    page.click("#send")
    page.wait_for_selector(DONE)
    assert page.text_content(".assistant .text") == first  # the seed's doing
    page.fill("#temperature", "7")
    page.fill("#input", "Hi")
    page.click("#send")
    page.wait_for_selector(".error")
    assert "temperature" in (page.text_content(".error .text") or "")


def test_token_probabilities_on_demand(page: Page) -> None:
    page.route("**/v1/chat/completions", answer_with_logprobs)
    page.check("#colour")
    page.fill("#input", "Hi")
    page.click("#send")
    page.wait_for_selector(DONE)
    tokens = page.locator(".token")
    assert tokens.all_text_contents() == ["The", " mill"]
    assert tokens.nth(0).get_attribute("class") == "token p0"
    assert tokens.nth(1).get_attribute("class") == "token p3"
    assert '5.0 % " wheel"' in (tokens.nth(1).get_attribute("title") or "")
    tokens.nth(0).focus()  # by keyboard, too


def answer_with_logprobs(route: Route) -> None:
    """What a model would say; the oracle has no probabilities."""
    asked = route.request.post_data_json
    assert asked is not None
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 5)
    tokens = [("The", -0.1, []), (" mill", -3.0, [(" mill", -3.0), (" wheel", math.log(0.05))])]
    content = [
        {"token": t, "logprob": p, "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}
        for t, p, top in tokens
    ]
    content.append({"token": "<end>", "logprob": -0.5, "top_logprobs": []})  # told, but not shown
    choice = {"index": 0, "delta": {"content": "The mill"}, "finish_reason": "stop"}
    chunk = {"choices": [choice | {"logprobs": {"content": content}}]}
    usage = {"choices": [], "usage": {"completion_tokens": 2}}
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in (chunk, usage)) + "data: [DONE]\n\n"
    route.fulfill(body=body, content_type="text/event-stream")


def test_the_engine_is_drawn(page: Page) -> None:
    page.wait_for_function("document.querySelector('#cache').textContent.includes('blocks')")
    assert page.locator("canvas").count() == 4
    page.wait_for_function(  # looks make a line, after some seconds
        """() => [...document.querySelectorAll('canvas')].every((c) =>
            c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((byte) => byte > 0))"""
    )
    assert page.text_content("#clients td") is not None


@pytest.mark.parametrize("width", [320, 390, 800, 1600])
def test_nothing_sticks_out(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    page.click("summary")
    fits = """(all) => {
        const right = (one) => one.getBoundingClientRect().right;
        return all.every((one) => right(one) <= right(one.parentNode) + 1);
    }"""
    assert page.eval_on_selector_all(".fields :is(input, textarea, select)", fits)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
