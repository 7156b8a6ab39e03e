"""The page to draw on, in a real browser: Debian's chromium, driven by Playwright, on the real Flask server."""

import json
import math
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pillow_heif
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import flask_server, free_ports, require
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from mnist_preprocess import HOST, ROOT, SAMPLE_IMAGE

pillow_heif.register_heif_opener()

CHROMIUM = shutil.which("chromium")
# Strokes on a pad of 448x448, as the page sends it.
SEVEN = [[(130, 120), (330, 112), (300, 200), (230, 300), (205, 370)]]
ONE = [[(165, 370), (285, 80)]]  # Upwards: where a finger would move the page, were it not drawing.
ZERO = [[(224 + 95 * math.sin(turn * math.tau / 12), 224 - 140 * math.cos(turn * math.tau / 12)) for turn in range(13)]]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PHONE = {"viewport": NARROW, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def server(trained_repository, tmp_path_factory):
    with flask_server(tmp_path_factory.mktemp("page") / "server.log", trained_repository) as server:
        yield server


@pytest.fixture(scope="module")
def server_before_triton(trained_repository, triton, tmp_path_factory):
    log = tmp_path_factory.mktemp("page") / "server.log"
    with flask_server(log, trained_repository, f"--triton={triton.grpc_url}") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    require(CHROMIUM, "needs a browser: apt-get install chromium")
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=False, args=["--disable-gpu"], timeout=120_000
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Return what opens the page, as a new visitor with the options of a Playwright context."""
    contexts, complaints = [], []

    def note(message):
        if "/mnist_infer" not in message.location["url"]:  # The browser itself notes each answer that is an error.
            complaints.append(message.text)

    def open_page(port=server.port, script="", **options):
        context = browser.new_context(**{"viewport": WIDE} | options)
        contexts.append(context)
        context.set_default_timeout(60_000)
        context.add_init_script(script)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://{HOST}:{port}/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(open_page):
    return open_page()


def draw(page, strokes, pointer="mouse"):
    """Draw strokes with a mouse, a pen or a finger: the browser makes pointer events of its input, as of a person's."""
    pad = page.locator("#pad")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    devtools = page.context.new_cdp_session(page)
    names = ("touchStart", "touchMove", "touchEnd") if pointer == "touch" else ("Pressed", "Moved", "Released")

    def send(step, point):
        x, y = (box[side] + coordinate * box["width"] / 448 for side, coordinate in zip("xy", point, strict=True))
        if pointer == "touch":
            points = [] if step == 2 else [{"x": x, "y": y}]
            devtools.send("Input.dispatchTouchEvent", {"type": names[step], "touchPoints": points})
        else:
            event = {"type": f"mouse{names[step]}", "x": x, "y": y, "pointerType": pointer, "button": "left"}
            devtools.send("Input.dispatchMouseEvent", event | {"buttons": int(step != 2), "clickCount": 1})

    for stroke in strokes:
        send(0, stroke[0])
        for (x, y), (next_x, next_y) in pairwise(stroke):
            for part in (0.5, 1):
                send(1, (x + part * (next_x - x), y + part * (next_y - y)))
        send(2, stroke[-1])


def ask(server, picture: bytes):
    """Return the status and the server's answer to a picture, without the page."""
    connection = server.connect()
    try:
        connection.request("POST", "/mnist_infer", picture, {"Content-Type": "image/png"})
        response = connection.getresponse()
        return response.status, json.load(response)
    finally:
        connection.close()


def percentages(page):
    return [float(text.removesuffix(" %")) for text in page.locator("#bars .percent").all_inner_texts()]


def drawing(page):
    return page.locator("#pad").evaluate("pad => pad.toDataURL()")


def expect_digit(page, digit):
    expect(page.locator("#digit")).to_have_text(digit)
    expect(page.locator("body")).not_to_have_class("waiting")


def settle(page):
    """Wait until the bars have grown and the colours have changed."""
    page.evaluate("Promise.allSettled(document.getAnimations().map(animation => animation.finished)).then(() => null)")


def shifts(page):
    """Return how much of the page moved, for each time that something in it did."""
    return page.evaluate("""() => new Promise(done => {
        new PerformanceObserver(list => done(list.getEntries().map(entry => entry.value)))
            .observe({type: "layout-shift", buffered: true});
        setTimeout(() => done([]), 200);
    })""")


def expect_nothing(page):
    expect(page.locator("#digit")).to_be_empty()
    expect(page.locator("#status")).to_contain_text("Draw a digit")


@pytest.mark.parametrize(
    ("digit", "strokes", "pointer"), [("7", SEVEN, "mouse"), ("0", ZERO, "pen"), ("1", ONE, "touch")]
)
@pytest.mark.parametrize(("server_name", "engine"), [("server", "LiteRT"), ("server_before_triton", "Triton at")])
def test_reads_what_is_drawn(open_page, request, server_name, engine, digit, strokes, pointer):
    port = request.getfixturevalue(server_name).port
    page = open_page(port, **PHONE if pointer == "touch" else {})
    expect_nothing(page)
    draw(page, strokes, pointer)
    expect(page.locator("#status")).to_contain_text(re.compile(f"^({digit}|Perhaps {digit}),"))
    expect_digit(page, digit)
    assert page.evaluate("scrollY") == 0
    shown = percentages(page)
    assert shown.index(max(shown)) == int(digit)
    assert 99 <= sum(shown) <= 100  # Each of them is rounded down.
    settle(page)
    widths = page.eval_on_selector_all(".bar", "bars => bars.map(bar => getComputedStyle(bar, '::after').width)")
    assert widths.index(max(widths, key=lambda width: float(width.removesuffix("px")))) == int(digit)
    for side in ("naturalWidth", "naturalHeight"):
        expect(page.locator("#seen")).to_have_js_property(side, 28)
    assert page.locator("#engine").inner_text().startswith(engine)
    assert page.locator("#version").inner_text() == "1"
    assert re.fullmatch(r"\d+\.\d\d ms", page.locator("#time").inner_text())


def test_shows_answers_while_the_pen_moves(page):
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 285, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 165, box["y"] + 370, steps=20)
    expect_digit(page, "1")
    expect(page.locator("#status")).to_be_empty()  # A screen reader hears of it when the pen is up.
    page.mouse.up()
    expect(page.locator("#status")).to_contain_text("1")


def test_the_shell_line_asks_the_same(page, tmp_path):
    require(shutil.which("curl"), "needs curl")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    oddly_named = shutil.copy(SAMPLE_IMAGE, tmp_path / """it's; a "7", 50\\50.png""")
    for folder, question in (
        (tmp_path, lambda: draw(page, ZERO)),
        (tmp_path, lambda: upload(page, oddly_named)),
        (ROOT, lambda: page.locator(".samples button").first.click()),
    ):
        page.locator("#clear").click()
        expect_nothing(page)
        question()
        expect(page.locator("#status")).to_contain_text(re.compile("sure|Perhaps"))
        page.locator("#copy").click()
        expect(page.locator("#copy")).to_have_text("Copied")
        line = page.evaluate("navigator.clipboard.readText()")
        assert line == page.locator("#curl").text_content()
        run = subprocess.run(["sh", "-c", line], capture_output=True, text=True, cwd=folder)
        probabilities = json.loads(run.stdout)["Probabilities"]
        assert [math.floor(1000 * probability) / 10 for probability in probabilities] == percentages(page)


def upload(page, file):
    page.locator("input").first.set_input_files(file)


def photograph(page, file):
    """Take the file for what the camera gave: a browser without one asks for a file."""
    camera = page.locator("input[capture]")
    expect(page.locator("#camera")).to_be_visible()
    camera.set_input_files(file)


def paste(page, file):
    page.context.grant_permissions(["clipboard-write"])
    page.evaluate(
        """async bytes => navigator.clipboard.write(
            [new ClipboardItem({'image/png': new Blob([new Uint8Array(bytes)], {type: 'image/png'})})])""",
        list(Path(file).read_bytes()),
    )
    page.keyboard.press("Control+V")


def drop(page, file):
    devtools = page.context.new_cdp_session(page)
    where = {"x": 300, "y": 300, "data": {"items": [], "files": [str(file)], "dragOperationsMask": 1}}
    for step in ("dragEnter", "dragOver"):
        devtools.send("Input.dispatchDragEvent", {"type": step} | where)
    expect(page.locator("body")).to_have_class("target")
    devtools.send("Input.dispatchDragEvent", {"type": "drop"} | where)
    expect(page.locator("body")).not_to_have_class("target")


@pytest.mark.parametrize("bring", [upload, paste, drop, photograph])
def test_reads_a_picture(open_page, bring):
    page = open_page(**PHONE if bring is photograph else {})
    bring(page, SAMPLE_IMAGE)
    expect_digit(page, "7")
    expect(page.locator("#pad")).to_have_class("picture")


def test_shows_what_the_model_saw_of_a_picture_that_the_browser_cannot_show(page, tmp_path):
    Image.open(SAMPLE_IMAGE).convert("RGB").save(tmp_path / "digit.heic")
    upload(page, tmp_path / "digit.heic")
    expect_digit(page, "7")
    page.wait_for_function("""() => {
        const pixels = pad.getContext("2d").getImageData(0, 0, pad.width, pad.height).data;
        return pixels[0] === 0 && pixels.some((value, index) => index % 4 === 0 && value > 200);
    }""")


def test_holds_still_for_those_who_ask_for_it(open_page):
    page = open_page(reduced_motion="reduce")
    for selector, pseudo in ((".answer", ""), (".bar", "::after")):
        styles = f"getComputedStyle(document.querySelector('{selector}'), '{pseudo}')"
        assert page.evaluate(f"{styles}.transitionDuration") == "0s"


def test_a_paste_without_a_picture_says_so(page):
    page.context.grant_permissions(["clipboard-write"])
    page.evaluate("navigator.clipboard.writeText('7')")
    page.keyboard.press("Control+V")
    expect(page.locator("#status")).to_contain_text("no picture")


def test_samples_are_read_as_the_server_reads_them(page, server):
    for button in page.locator(".samples button").all():
        file = Path(button.locator("img").get_attribute("src")).name
        status, answer = ask(server, (ROOT / "flask" / "static" / "samples" / file).read_bytes())
        assert status == 200
        button.click()
        expect_digit(page, answer["Prediction"])


def test_undo_and_clear(page):
    empty = drawing(page)
    draw(page, ONE)
    expect_digit(page, "1")
    one = drawing(page)
    draw(page, ZERO)
    assert drawing(page) != one
    page.locator("#undo").click()
    expect_digit(page, "1")
    assert drawing(page) == one
    upload(page, SAMPLE_IMAGE)
    expect_digit(page, "7")
    draw(page, ZERO)  # A stroke over a picture begins a new drawing.
    expect_digit(page, "0")
    page.locator("#clear").click()
    expect_nothing(page)
    assert drawing(page) == empty
    for digit in ("0", "7", "1"):
        page.keyboard.press("Control+z")
        expect_digit(page, digit)
    assert drawing(page) == one
    for _ in range(2):  # Once more than there is something to undo.
        page.locator("#undo").click()
        expect_nothing(page)
    assert drawing(page) == empty


def test_works_by_keyboard_alone(page):
    page.on("filechooser", lambda chooser: chooser.set_files(SAMPLE_IMAGE))
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        focused = page.locator(":focus")
        ring = focused.evaluate("e => getComputedStyle(e).outlineStyle")
        assert ring == "solid", reached
    assert reached == ["undo", "clear", *["BUTTON"] * 7, "copy", "PRE", "A"]
    page.locator("#clear").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect_digit(page, "7")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    expect_nothing(page)


def test_says_what_is_wrong_in_the_servers_sentence(page, server, tmp_path):
    upload(page, SAMPLE_IMAGE)
    expect_digit(page, "7")
    (tmp_path / "note.txt").write_text("no picture")
    status, answer = ask(server, b"no picture")
    assert status == 400
    upload(page, tmp_path / "note.txt")
    expect(page.locator("#status")).to_have_text(answer["Error"])
    assert shifts(page) == []
    expect(page.locator("#digit")).to_be_empty()
    expect(page.locator("#seen")).to_be_hidden()
    assert set(page.locator("#bars .percent").all_inner_texts()) == {"\N{EN DASH}"}


def test_says_that_triton_is_away_and_keeps_the_drawing(open_page, trained_repository, tmp_path):
    (nowhere,) = free_ports(1)
    with flask_server(tmp_path / "server.log", trained_repository, f"--triton={HOST}:{nowhere}") as server:
        page = open_page(server.port)
        draw(page, SEVEN)
        expect(page.locator("#status")).to_contain_text("Your picture is kept")
        status, answer = ask(server, SAMPLE_IMAGE.read_bytes())
        assert status == 503
        assert answer["Error"] in page.locator("#status").inner_text()


def test_survives_a_server_that_goes_away_and_comes_back(open_page, trained_repository, tmp_path):
    with flask_server(tmp_path / "first.log", trained_repository) as server:
        page = open_page(server.port)
        draw(page, ONE)
        expect_digit(page, "1")
        page.locator("#clear").click()
        expect_nothing(page)
    draw(page, SEVEN)
    expect(page.locator("#status")).to_contain_text("the server does not answer")
    expect(page.locator("#digit")).to_be_empty()
    kept = drawing(page)
    with flask_server(tmp_path / "second.log", trained_repository, port=server.port):
        expect(page.locator("#digit")).to_have_text("7")  # By itself.
        assert drawing(page) == kept


# Questions wait until the test calls answer(), or until it puts null in the place of the gate that they come to.
SLOW_FETCH = """
  const fetchAtOnce = fetch;
  Object.assign(window, {gate: new Promise(done => window.answer = done), most: 0, now: 0, count: 0});
  window.fetch = async (url, options) => {
    most = Math.max(most, ++now);
    count++;
    try {
      const aborted = new Promise((_, fail) =>
        options?.signal.addEventListener("abort", () => fail(window.reason = options.signal.reason)));
      await Promise.race([gate, aborted]);
      return await fetchAtOnce(url, options);
    } finally {
      now--;
    }
  };
"""


def test_asks_a_slow_server_one_question_at_a_time(open_page):
    page = open_page(script=SLOW_FETCH)
    draw(page, ONE + ZERO)
    page.locator("#clear").click()
    draw(page, SEVEN)
    page.evaluate("answer()")
    expect(page.locator("#status")).to_contain_text("7")  # The last drawing wins.
    assert page.evaluate("most") == 1
    assert page.evaluate("count") <= 3  # One that was given up, one about a part of the last drawing, one about all.


def test_a_new_picture_does_not_wait_for_the_answer_about_the_last(open_page):
    page = open_page(script=SLOW_FETCH)
    draw(page, ONE)
    expect(page.locator("body")).to_have_class("waiting")
    page.evaluate("gate = null")
    upload(page, SAMPLE_IMAGE)
    expect_digit(page, "7")
    assert page.evaluate("reason.name") == "AbortError"  # And no TimeoutError.


def test_runs_no_script_that_is_not_a_file_of_the_server(browser, server):
    page = browser.new_page()
    page.goto(f"http://{HOST}:{server.port}/")
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["wide", "phone"])
def test_is_accessible_fits_and_holds_still(open_page, scheme, options):
    page = open_page(color_scheme=scheme, **options)
    red = page.evaluate(r"getComputedStyle(document.body).backgroundColor.match(/\d+/)[0]")
    assert (int(red) < 128) == (scheme == "dark")
    for strokes in ([], SEVEN):
        draw(page, strokes)
        expect_digit(page, "7" if strokes else "")
        settle(page)
        assert Axe().run(page).response["violations"] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator(".samples button").first.click()
    expect(page.locator("#pad")).to_have_class("picture")
    assert shifts(page) == []
