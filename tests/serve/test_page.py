"""The web page, in a browser: what a person sees of the application with the weights that are in the repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from longtake.model.camera import parse_actions

pytestmark = [pytest.mark.cpu, pytest.mark.ray, pytest.mark.timeout(600)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HEADERS = {"Authorization": "Bearer secret"}
PATIENCE = 120_000  # milliseconds

# The brightness of each column, of every picture that the video shows, by the second of the video that it is.
WATCH = """() => {
  const video = document.querySelector("#video");
  const canvas = Object.assign(document.createElement("canvas"), { width: 160, height: 96 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  window.seen = [];
  const look = (now, { mediaTime }) => {
    context.drawImage(video, 0, 0, 160, 96);
    const pixels = context.getImageData(0, 0, 160, 96).data;
    const column = (x) => Array.from({ length: 96 }, (_, y) => pixels[4 * (160 * y + x) + 1]).reduce((a, b) => a + b);
    window.seen.push([mediaTime, Array.from({ length: 160 }, (_, x) => column(x))]);
    video.requestVideoFrameCallback(look);
  };
  video.requestVideoFrameCallback(look);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found or subprocess.run([found[0], "--version"], capture_output=True).returncode:
        pytest.skip("no Chromium here to show the page with (apt install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(browser: Browser, start: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address, which is not the root of its host."""
    from ray import serve

    few = dict(max_running=1, max_sessions=1, stage1={"together": 2}, decoder={"together": 2}, refine=False)
    yield start(tmp_path_factory.mktemp("store"), "/world", **few)
    serve.delete("longtake")


@pytest.fixture
def opened(browser: Browser, server: str) -> Iterator[Callable[..., Page]]:
    """Opens the page; when the test ends, no request has left the server and the console has no errors."""
    wrong: list[str] = []
    pages: list[Page] = []

    def requested(address: str) -> None:
        if not address.startswith((f"{server}/", "blob:", "data:")):
            wrong.append(address)

    def open_page(path: str = "/", key: bool = True, **more: Any) -> Page:
        page = browser.new_context(viewport={"width": 1280, "height": 900}, **more).new_page()
        page.on("request", lambda request: requested(request.url))
        page.on("websocket", lambda socket: requested(socket.url.replace("ws", "http", 1)))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        if key:
            page.add_init_script("sessionStorage.setItem('key', 'secret')")
        page.goto(server + path)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert [each for each in wrong if "401" not in each] == []


def value(page: Page, expression: str) -> Any:
    return page.evaluate(f"() => {expression}")


def videos(server: str) -> list[dict[str, Any]]:
    return httpx.get(f"{server}/v1/videos", headers=HEADERS).json()["data"]


def test_a_video_is_seen_before_it_is_whole_then_saved_and_deleted(opened, server):
    page = opened(key=False)
    page.get_by_label("API key").fill("none")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_text("not one of its keys")).to_be_visible(timeout=PATIENCE)
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#images img")).to_have_count(4, timeout=PATIENCE)
    page.get_by_label("Keys and frames").fill("w-24,dw-24")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Seconds").fill("7.5")
    page.get_by_role("button", name="Make the video").click()
    while not value(page, "video.currentTime > 0.2"):
        page.wait_for_timeout(20)
    (made,) = videos(server)
    assert (made["status"], made["actions"], made["seconds"]) == ("in_progress", "w-24,dw-24", "7.5")
    expect(page.locator("#progress")).to_be_visible()
    expect(page.get_by_role("status")).to_have_text("It is whole.", timeout=PATIENCE)
    assert value(page, "video.buffered.end(0)") == pytest.approx(121 / 16, abs=0.01)
    with page.expect_download() as saved:
        page.locator("#save-video").click()
    content = httpx.get(f"{server}/v1/videos/{made['id']}/content", headers=HEADERS).content
    assert Path(saved.value.path()).read_bytes() == content
    expect(page.locator("#videos img")).to_have_js_property("naturalWidth", 320)
    page.locator("#videos").get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Really delete?").click()
    expect(page.get_by_text("What you make will be here.")).to_be_visible(timeout=PATIENCE)
    assert videos(server) == []


def test_an_image_that_was_chosen_while_others_come_stays_chosen(opened, server):
    page = opened("/docs")
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(route)
        if len(asked) != 3:
            route.continue_()

    page.route("**/v1/images/*", answer)
    page.goto(f"{server}/")
    expect(page.locator("#images img")).to_have_count(2, timeout=PATIENCE)
    page.locator("#images [value=courtyard]").check(force=True)
    asked[2].continue_()
    expect(page.locator("#images img")).to_have_count(4, timeout=PATIENCE)
    expect(page.locator("#images [value=courtyard]")).to_be_checked()


def test_a_session_turns_where_it_is_steered(opened, server):
    page = opened()
    chunks: list[dict[str, Any]] = []

    def hear(said: str | bytes) -> None:
        if isinstance(said, str) and (message := json.loads(said))["type"] == "frames":
            chunks.append(message)

    page.on("websocket", lambda socket: socket.on("framereceived", hear))
    expect(page.locator("#images img")).to_have_count(4, timeout=PATIENCE)  # a tile moves while others come
    page.locator("#images [value=courtyard]").check(force=True, timeout=PATIENCE)
    page.get_by_text("Live", exact=True).click()
    page.get_by_role("button", name="Begin the take").click()
    expect(page.get_by_role("status")).to_contain_text("The take begins", timeout=PATIENCE)
    page.evaluate(WATCH)

    def hold(actions: str) -> None:
        """Until two chunks of it were seen."""
        while len(found := [each for each in chunks if each["actions"] == actions]) < 2:
            page.wait_for_timeout(50)
        while not value(page, f"video.currentTime > {(found[1]['first'] + found[1]['frames'] - 4) / 16}"):
            page.wait_for_timeout(50)

    page.keyboard.down("ArrowRight")
    hold("d-24")
    page.keyboard.up("ArrowRight")
    left = page.get_by_role("button", name="Turn left").and_(page.locator("#pad button")).bounding_box()
    page.mouse.move(left["x"] + 5, left["y"] + 5)
    page.mouse.down()
    hold("a-24")
    page.mouse.up()
    seen = value(page, "window.seen")
    page.get_by_role("button", name="End the take").click()
    expect(page.locator("#save-video")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("status")).to_have_text("The take has ended.")
    right, left = (moved(seen, *[each for each in chunks if each["actions"] == keys][1:2]) for keys in ("d-24", "a-24"))
    assert right < -8 and left > 8, (right, left)  # of 160 columns; the picture goes the other way
    for video in videos(server):
        httpx.delete(f"{server}/v1/videos/{video['id']}", headers=HEADERS)


def moved(seen: list[tuple[float, list[float]]], chunk: dict[str, Any]) -> int:
    """Columns that the picture went to the right in a chunk, by the best match of each picture with the one before."""
    inside = [np.array(columns) for time, columns in seen if 0 <= round(time * 16) - chunk["first"] < chunk["frames"]]
    assert len(inside) > 4

    def match(before: np.ndarray, after: np.ndarray, shift: int) -> float:
        a, b = before[max(0, -shift) : 160 - max(0, shift)], after[max(0, shift) : 160 + min(0, shift)]
        return float(np.corrcoef(a, b)[0, 1])

    pairs = zip(inside, inside[1:], strict=False)
    return sum(max(range(-24, 25), key=lambda shift: match(*pair, shift)) for pair in pairs)


def test_everything_can_be_done_with_a_keyboard_on_a_small_screen(opened, server):
    page = opened(color_scheme="dark", reduced_motion="reduce")
    page.set_viewport_size({"width": 320, "height": 640})
    expect(page.locator("#images img")).to_have_count(4, timeout=PATIENCE)

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if value(page, f"document.activeElement.matches({json.dumps(selector)})"):
                style = "getComputedStyle(document.activeElement.closest('.tile, .modes label, *'))"
                assert selector.startswith("[name=") or value(page, f"{style}.outlineStyle") == "solid"
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("[name=start]")
    page.keyboard.press("ArrowRight")
    assert value(page, "document.activeElement.value") == "courtyard"
    assert re.match("a large bright", value(page, "document.querySelector('[name=prompt]').value"))
    tab_to("[name=mode]")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("button", name="Begin the take")).to_be_visible()
    assert value(page, "document.documentElement.scrollWidth") == 320
    page.keyboard.press("ArrowLeft")
    tab_to("[data-add=forward]")
    page.keyboard.press("Enter")
    tab_to("[name=actions]")
    assert value(page, "document.activeElement.value") == "w-48,dw-48,w-24"
    page.keyboard.press("Control+A")
    page.keyboard.type("d-24")
    tab_to("#go")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("It is whole.", timeout=PATIENCE)
    assert value(page, "document.documentElement.scrollWidth") == 320
    tab_to(".card .row button")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.get_by_text("What you make will be here.")).to_be_visible(timeout=PATIENCE)
    page.goto(f"{server}/docs")
    expect(page.locator("#requests section").first).to_be_visible()
    assert value(page, "document.documentElement.scrollWidth") == 320
    unnamed = "[...document.querySelectorAll('input, textarea')].filter((each) => !each.labels?.length)"
    assert value(page, f"{unnamed}.length") == 0


def test_keys_lead_on_the_map_as_in_the_model_and_along_a_drawn_line(opened, server):
    page = opened()
    expect(page.locator("#images img")).to_have_count(4, timeout=PATIENCE)
    actions = "w-20,dw-33,none-9,jk-12,aws-7,l-10"
    script = """async (text) => {
      const { parsed, rollOut } = await import("./web/path.js");
      const model = (await (await fetch("v1/models", { headers: { Authorization: "Bearer secret" } })).json()).data[0];
      return rollOut(parsed(text, model.steering), model).map(({ x, z, yaw }) => [x, z, Math.sin(yaw)]);
    }"""
    c2w = parse_actions(actions).c2w.numpy()
    expected = np.stack([c2w[:, 0, 3], c2w[:, 2, 3], -c2w[:, 2, 0]], 1)
    np.testing.assert_allclose(page.evaluate(script, actions), expected, atol=1e-5)

    ground = page.locator("#ground")
    ground.scroll_into_view_if_needed()
    box = ground.bounding_box()
    metre = box["width"] / 8  # as much as the first path needs
    begin = box["x"] + box["width"] / 2, box["y"] + 0.72 * box["height"]
    page.mouse.move(*begin)
    page.mouse.down()
    for x, z in ((0, 0.5), (0, 1), (0.5, 1.5), (1, 2), (1.5, 2), (2, 2)):
        page.mouse.move(begin[0] + x * metre, begin[1] - z * metre, steps=8)
    page.mouse.up()
    drawn = page.get_by_label("Keys and frames").input_value()
    path = parse_actions(drawn).c2w.numpy()[:, [0, 2], 3]
    assert np.linalg.norm(path[-1] - (2, 2)) < 0.3 and drawn != "w-48,dw-48"
    for point in ((0, 1), (0.5, 1.5), (1, 2)):
        assert np.linalg.norm(path - point, axis=1).min() < 0.25, drawn


def test_only_the_page_s_own_files_are_sent_and_a_policy_with_them(server):
    others = ("web/..%2fapi.py", "web/.%2e/api.py", "web/none", "web/", "v1/images/..%2fhall")
    assert [httpx.get(f"{server}/{name}", headers=HEADERS).status_code for name in others] == [404] * len(others)
    for name in ("", "docs", "web/app.js"):
        headers = httpx.get(f"{server}/{name}").headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
    assert httpx.get(f"{server}/web/app.js").headers["content-type"].startswith("text/javascript")
    assert httpx.get(f"{server}/v1/images").status_code == 401
    hall = httpx.get(f"{server}/v1/images/hall", headers=HEADERS)
    assert (hall.status_code, hall.headers["content-type"]) == (200, "image/png")


def test_candidates_of_a_search_are_shown_beside_each_other(opened, server):
    """What the page makes of the answers of /v1/searches, which here are given."""
    image = httpx.get(f"{server}/v1/images/hall", headers=HEADERS).content
    asked = [
        httpx.post(
            f"{server}/v1/videos", headers=HEADERS, data={"actions": keys}, files={"input_reference": image}
        ).json()["id"]
        for keys in ("w-24", "d-24")
    ]
    while {video["status"] for video in videos(server)} != {"completed"}:
        time.sleep(0.2)
    scores = [{"movement": 0.25, "sharpness": 0.5}, {"movement": 0.75, "sharpness": 0.875}]
    candidates = [
        dict(video=id, actions=keys, seed=0, status="completed", progress=100, scores=each, score=score, kept=score > 1)
        for id, keys, each, score in zip(asked, ("w-24", "d-24"), scores, (0.75, 1.625), strict=True)
    ]
    search = dict(id=f"search_{'0' * 32}", object="search", status="completed", progress=100, model="tiny-streaming")
    search |= dict(prompt="a hall", seconds="1.5", size="320x192", keep=1, candidates=candidates, error=None)
    sent: list[str] = []

    def answer(route: Any) -> None:
        if route.request.method == "POST":
            sent.append(route.request.post_data_buffer.decode("latin1"))
        route.fulfill(json=search)

    page = opened("/docs")
    api = httpx.get(f"{server}/openapi.json").json()
    api["paths"].setdefault("/v1/searches", {})
    page.route("**/openapi.json", lambda route: route.fulfill(json=api))
    page.route("**/v1/searches**", answer)
    page.goto(f"{server}/")
    page.get_by_text("Search", exact=True).first.click(timeout=PATIENCE)
    page.get_by_label("Candidates").fill("w-24\nd-24")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#candidates .card h3")).to_have_text(["d-24", "w-24"])
    expect(page.locator("#candidates .card").first).to_have_class(re.compile("kept"))
    assert 'name="candidates"\r\n\r\n["w-24","d-24"]' in sent[0] and 'name="actions"' not in sent[0]
    page.get_by_role("button", name="Play together").click()
    while not value(page, "[...document.querySelectorAll('.card video')].filter((each) => each.ended).length === 2"):
        page.wait_for_timeout(50)
    page.locator("#candidates .shot").first.click()
    expect(page.locator("#facts")).to_contain_text("d-24")
    expect(page.locator("#candidates .card")).to_have_count(2)
    assert page.url.endswith(f"#{search['id']}/{asked[1]}")
    for id in asked:
        httpx.delete(f"{server}/v1/videos/{id}", headers=HEADERS)
