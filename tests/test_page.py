"""page.py: the page that show.py --page makes, its packed vectors against distance(plan), and the page in a browser."""
import base64
import html
import json
import math
import random
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import torch

import page
import show
from geometry import METHODS
from model import load
from plan import distance
from positions import Method, parameters
from tracing import passkey_case, trace

SHIPPED = Path(__file__).resolve().parents[1] / "results" / "methods.html"
MOST_BYTES = 400_000
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"


def data_of(text):
    """The JSON of a page."""
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def data():
    return data_of(SHIPPED.read_text(encoding="utf-8"))


def unpack(text):
    """"0 3*1 2*0,1" -> 0 1 2 3 3 4 4 5, as float64."""
    values = [0.0]
    for run in text.split(" "):
        count, star, block = run.rpartition("*")
        for _ in range(int(count or 1)):
            for step in block.split(","):
                values.append(values[-1] + float(step))
    return torch.tensor(values[1:], dtype=torch.float64)


def first_settings(name, data):
    """{slider: its value at first} of a method, None being the default."""
    return {slider["name"]: slider["values"][slider["start"]] for slider in data["methods"][name]["sliders"]}


def packed_plan(name, settings, n, data):
    """What the page holds for these settings: a packed plan, or the sentence that refuses it."""
    entry = data["methods"][name]
    combination = 0
    for slider in entry["sliders"]:
        combination = combination * len(slider["values"]) + slider["values"].index(settings[slider["name"]])
    numbers = entry["plans"][combination]
    return data["plans"][numbers if isinstance(numbers, int) else numbers[data["lengths"].index(n)]]


def true_plan(name, settings, n):
    """The plan of n tokens and those decoded after them, made anew."""
    tokens = torch.arange(n + page.NEW)
    return page.method_of(name, settings).plan(page.CONFIG, n, tokens, tokens)


# ---- the file

@pytest.mark.parametrize("values, text", [
    ([0, 1, 2, 3, 3, 4, 4, 5, 5], "0 3*1 2*0,1 0"), ([7, 7, 7, 7], "7 3*0"), ([5], "5"), ([3, 1, 8], "3,-2,7"),
    ([0.5, 0.75, 1.0, 1.25], "0.5 3*0.25"), ([0, 1, 2, 0, 1, 2, 0, 1, 2], "0 2*1,1,-2 1,1")])
def test_pack(values, text):
    assert page.pack(values) == text
    assert unpack(text).tolist() == values


def test_a_page_is_made_and_replaces_a_file_by_force(monkeypatch, tmp_path):
    """By the command, here with three methods and one trace: one file that loads nothing."""
    monkeypatch.setattr(page, "METHODS", {name: METHODS[name] for name in ("nope", "pi", "streaming-llm")})
    monkeypatch.setattr(page, "TRACED", ("streaming-llm",))
    monkeypatch.setattr(page, "WINDOWS", (1,))
    path = tmp_path / "x.html"
    assert show.run(["--page", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert "{{DATA}}" not in text and not re.search(r"\ssrc=|https?://|@import", text)
    assert list(data_of(text)["methods"]) == ["nope", "pi", "streaming-llm"]
    with pytest.raises(ValueError, match="--force"):
        show.run(["--page", str(path)])
    with pytest.raises(ValueError, match="--page methods.html"):
        show.run(["--page", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="cannot write"):
        show.run(["--page", str(tmp_path / "no" / "x.html")])


def test_the_shipped_page_is_of_today(data):
    """Of every method, drawn by today's template; if not: python show.py --page results/methods.html --force."""
    text = SHIPPED.read_text(encoding="utf-8")
    assert len(text.encode()) <= MOST_BYTES
    assert list(data["methods"]) == list(METHODS)
    before, after = page.TEMPLATE.read_text(encoding="utf-8").split("{{DATA}}")
    assert text.startswith(before) and text.endswith(after)
    script = after.split("<script>")[1].split("</script>")[0]
    assert len(script.splitlines()) < 300


# ---- what it holds

@pytest.mark.parametrize("name", METHODS)
def test_the_vectors_are_those_of_the_plan(name, data):
    """Distances, keys seen and attention scale, of prompt and decoded tokens, at some lengths and settings."""
    rng = random.Random(name)
    sliders = data["methods"][name]["sliders"]
    cases = [(n, first_settings(name, data)) for n in (16, 128, 256)]
    cases += [(rng.choice(data["lengths"]), {s["name"]: rng.choice(s["values"]) for s in sliders}) for _ in range(5)]
    for n, settings in cases:
        packed = packed_plan(name, settings, n, data)
        if isinstance(packed, str):
            with pytest.raises(ValueError, match=re.escape(packed)):
                true_plan(name, settings, n)
            continue
        plan = true_plan(name, settings, n)
        T = n + page.NEW
        j = torch.arange(T)
        out = torch.full((T, T), math.nan, dtype=torch.float64)
        for region in packed[0]:
            q_pos, k_pos, start, end = [unpack(data["vectors"][number])[:T] for number in region]
            inside = (j >= start[:, None]) & (j < end[:, None])
            out[inside] = (q_pos[:, None] - k_pos)[inside]
        assert torch.allclose(out, distance(plan), rtol=0, atol=1e-6, equal_nan=True), (n, settings)
        if plan.q_scale is not None:
            assert (unpack(data["vectors"][packed[1]])[:T] / 1000 - plan.q_scale).abs().max() < 1e-3
        slowdown = show.slowdown(plan, page.CONFIG.rope_theta)
        assert data["speeds"][packed[2]][3:] == pytest.approx([slowdown, plan.mscale], 1e-4)


def test_every_parameter_but_those_named_has_a_slider(data):
    """And the reach beside it is show.py's."""
    for name, settings in [("mesa", {"first", "chunk", "width", "overlap"}), ("self-extend", {"window", "group"})]:
        assert {slider["name"] for slider in data["methods"][name]["sliders"]} == settings
    combinations = math.prod(len(slider["values"]) for slider in data["methods"]["self-extend"]["sliders"])
    assert len(data["methods"]["self-extend"]["reach"]) == len(data["methods"]["self-extend"]["plans"]) == combinations
    assert data["methods"]["rope"]["reach"] == [show.reach(page.CONFIG, Method("rope"))] == [page.L]
    assert "window" in parameters(METHODS["rerope"][0]) and data["methods"]["rerope"]["reach"][0] == page.FARTHEST


# ---- what the shipped model looks at

def pixels(uri):
    """The palette (256, 3) and the pixels (layers, BINS) of a picture made by strips_png."""
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks = {}
    at = 8
    while at < len(png):
        length = int.from_bytes(png[at:at + 4], "big")
        name, body = png[at + 4:at + 8], png[at + 8:at + 8 + length]
        assert zlib.crc32(name + body) == int.from_bytes(png[at + 8 + length:at + 12 + length], "big")
        chunks[name] = body
        at += 12 + length
    width, height = (int.from_bytes(chunks[b"IHDR"][side:side + 4], "big") for side in (0, 4))
    rows = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, 1 + width)
    assert not rows[:, 0].any()
    return torch.frombuffer(bytearray(chunks[b"PLTE"]), dtype=torch.uint8).view(-1, 3), rows[:, 1:].long()


def test_a_strip_is_the_root_of_shares_in_colours():
    """Half of a share of 1/4 is there; unseen stretches are white."""
    shares = torch.tensor([[0.0, 0.25, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    palette, levels = pixels(page.strips_png(shares, torch.tensor([True, True, True, False])))
    assert levels.tolist() == [[0, 127, 254, 255], [254, 0, 0, 255]]
    assert [tuple(palette[place].tolist()) for place in (0, 254, 255)] == [page.DARK[0], page.DARK[-1], (255, 255, 255)]


def test_the_traces_of_the_shipped_page_are_of_today(data):
    """Of every method and 1, 2, 4, 8 windows; two of them made anew are the same, but for rounding."""
    assert list(data["traces"]) == list(page.TRACED)
    assert all([each["windows"] for each in traces] == [1, 2, 4, 8] for traces in data["traces"].values())
    model, tokenizer = load("tiny")
    for name, place in (("rope", 1), ("streaming-llm", 1)):
        traced = trace(model, passkey_case(tokenizer, 2 ** place * 256), Method(name))
        fresh, shipped = page.trace_data(traced, 2 ** place, tokenizer), data["traces"][name][place]
        assert fresh["needle"] == shipped["needle"]
        without_fractions = [re.sub(r"\d+\.\d+", "", text) for text in (fresh["text"], shipped["text"])]
        assert without_fractions[0] == without_fractions[1]
        for kind in ("best", "mean"):
            assert (pixels(fresh[kind])[1] - pixels(shipped[kind])[1]).abs().max() <= 3


def test_what_the_page_says_of_the_traces(data):
    """The four answers below the squares lean on these."""
    texts = {name: [each["text"] for each in traces] for name, traces in data["traces"].items()}
    for name in ("rerope", "mesa"):
        assert all("most to a \u201c7\u201d" in text and text.endswith("rank 1.") for text in texts[name])
    assert all("gives the needle" in text and "most to a \u201c7\u201d" not in text for text in texts["rope"][1:])
    assert all("the likeliest is" in text for text in texts["rope"][1:])
    assert all("The needle is not seen." in text and "probability 0.1" in text for text in texts["streaming-llm"][1:])


# ---- the page in a browser

ERRORS = """<head><script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
console.error = (...words) => errors.push(words.join(" "));
</script>"""

DRIVER = """<script>
const find = selector => document.querySelector(selector);
const fire = (element, event) => element.dispatchEvent(event);
const text = field => find(`[data-field=${field}]`).textContent;

// a prompt length, a method, the places of its sliders; then what the page says of each cell
function ask([n, method, choice, cells]) {
  const [select, length, canvas] = [find("select"), find("#length"), find("canvas")];
  length.value = data.lengths.indexOf(n);
  fire(length, new Event("input"));
  select.value = method;
  fire(select, new Event("change"));
  document.querySelectorAll("section .sliders")[0].querySelectorAll("input").forEach((input, place) => {
    input.value = choice[place];
    fire(input, new Event("input"));
  });
  return cells.map(([i, j]) => {
    const box = canvas.getBoundingClientRect();
    const unit = canvas.clientWidth / (n + data.new);
    const at = {clientX: box.left + canvas.clientLeft + (j + 0.5) * unit,
                clientY: box.top + canvas.clientTop + (i + 0.5) * unit};
    fire(canvas, new PointerEvent("pointermove", at));
    return [text("cell"), text("distance")];
  });
}

function statuses(clicks) {
  find("#whole").click();
  return Array.from({length: clicks}, () => { find("#step").click(); return find("#status").textContent; });
}

function walk(keys) {
  return keys.map(key => { fire(find("canvas"), new KeyboardEvent("keydown", {key})); return text("cell"); });
}

// what stands below the square of a method: nothing, or a sentence, two pictures and the place of the needle
async function stripsOf([method, n]) {
  ask([n, method, [], []]);
  const traced = find(".traced");
  if (traced.hidden) return null;
  const images = [...traced.querySelectorAll("img")];
  await Promise.all(images.map(image => image.decode()));
  const square = find("canvas").getBoundingClientRect();
  const places = [...images, traced.querySelector(".needle")].map(part => {
    const box = part.getBoundingClientRect();
    return [(box.left - square.left) / square.width, box.width / square.width];
  });
  const shown = images.map(image => [image.className, image.src, image.naturalWidth, image.naturalHeight]);
  return {text: text("trace"), shown, places};
}

async function answer() {
  const answers = {cells: QUESTIONS.map(ask), statuses: statuses(18), keys: walk(["ArrowUp", "ArrowRight", "x"])};
  answers.strips = [];
  for (const question of STRIPS) answers.strips.push(await stripsOf(question));
  for (const button of document.querySelectorAll("button")) button.click();
  find("#play").click();
  const out = document.createElement("pre");
  out.id = "answers";
  out.textContent = JSON.stringify({...answers, errors});
  document.body.append(out);
}
answer();
</script></body>"""


def in_browser(questions, strips, folder):
    """The answers of the shipped page, driven in headless Chromium."""
    found = [shutil.which(name) for name in BROWSERS if shutil.which(name)]
    if not found:
        pytest.skip("Chromium is not installed")
    text = SHIPPED.read_text(encoding="utf-8").replace("<head>", ERRORS)
    driver = DRIVER.replace("QUESTIONS", json.dumps(questions)).replace("STRIPS", json.dumps(strips))
    path = folder / "driven.html"
    path.write_text(text.replace("</body>", driver), encoding="utf-8")
    done = subprocess.run([found[0], "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                           f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900", "--dump-dom",
                           "--virtual-time-budget=10000", path.as_uri()], capture_output=True, text=True, timeout=300)
    answers = re.search(r'<pre id="answers">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert answers, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(html.unescape(answers[1]))


def told(text):
    """The distance in what the page says of a cell: "41, never trained" -> 41; nan for "not seen"."""
    if text.startswith("not seen"):
        return math.nan
    return float(text.split(",")[0])


def test_the_page_in_a_browser(data, tmp_path):
    """Ten cells of every method, its first slider at the end, are those of distance(plan); step and keys work."""
    rng = random.Random(0)
    questions = []
    expected = []
    for name, entry in data["methods"].items():
        n = rng.choice(data["lengths"])
        settings = first_settings(name, data)
        choice = [slider["start"] for slider in entry["sliders"]]
        for slider in entry["sliders"][:1]:
            choice[0] = len(slider["values"]) - 1
            settings[slider["name"]] = slider["values"][-1]
        cells = [sorted(rng.choices(range(n + page.NEW), k=2), reverse=True) for _ in range(10)]
        matrix = torch.full((n + page.NEW, n + page.NEW), math.nan)
        if not isinstance(packed_plan(name, settings, n, data), str):
            matrix = distance(true_plan(name, settings, n))
        questions.append([n, name, choice, cells])
        expected.append([(f"query i = {i}, key j = {j}; truly {i - j} apart", float(matrix[i, j])) for i, j in cells])

    strips = [("rope", 16), ("mesa", 64), ("streaming-llm", 112), ("rerope", 256), ("dca", 128)]
    answers = in_browser(questions, strips, tmp_path)
    assert answers["errors"] == []
    for question, cells, true in zip(questions, answers["cells"], expected):
        assert [cell for cell, _ in cells] == [cell for cell, _ in true], question
        assert [told(text) for _, text in cells] == pytest.approx([d for _, d in true], abs=1e-3, nan_ok=True), question
    pieces = questions[-1][0] // 16
    assert answers["statuses"][0].startswith("Prefill: 16 of")
    assert [status.split(":")[0] for status in answers["statuses"]] == \
        (["Prefill"] * pieces + ["Decoding"] * 16 + ["Prefill"] * 16)[:18]
    i, j = questions[-1][3][-1]
    assert answers["keys"][0].startswith(f"query i = {max(i - 1, 0)}, key j = {j};")
    assert answers["keys"][1] == answers["keys"][2] != answers["keys"][0]
    check_strips(data, strips, answers["strips"])


def check_strips(data, asked, answers):
    """Of 1, 2, 2 and 8 windows; they end where the prompt ends in the square, and the needle is where it says."""
    assert answers[-1] is None  # of dca there are none
    for (name, n), place, answer in zip(asked, (0, 1, 1, 3), answers):
        trace = data["traces"][name][place]
        assert answer["text"] == trace["text"]
        assert answer["shown"] == [["best", trace["best"], 128, 5], ["mean", trace["mean"], 128, 5]]
        prompt = n / (n + data["new"])
        *strips, (left, width) = answer["places"]
        for begin, size in strips:
            assert begin == pytest.approx(0, abs=1e-3) and size == pytest.approx(prompt, abs=1e-3)
        left_share, width_share = (float(trace["needle"][side].rstrip("%")) / 100 for side in ("left", "width"))
        assert left == pytest.approx(left_share * prompt, abs=2e-3)
        assert width == pytest.approx(width_share * prompt, abs=0.01)  # with its two lines
