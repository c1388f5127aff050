"""draw.py reads what is drawn in a real browser, answers fast, and lets no one in.

python tests/test_draw.py runs/vit runs/mini_vit  # how long each takes to answer, in the browser
python tests/test_draw.py --picture draw.png runs/mini_vit runs/vit  # the page, as in README.md
"""

import argparse
import base64
import concurrent.futures
import contextlib
import functools
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_images, random_model
from pictures import draw as draw_picture
from PIL import Image
from skimage.morphology import skeletonize

import draw
import look
import mini_vit

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SMALL = "--device cpu --max_iters 300 --eval_interval 300 --dropout 0"
SMALL_MINI_VIT = f"{SMALL} --n_layers 1 --n_head 4 --d_head 32 --n_embd 128 --batch_size 256"
SMALL_MINI_VIT += " --learning_rate 2e-3 --adversarial 0"
SMALL_VIT = f"{SMALL} --n_layers 2 --n_head 2 --n_embd 64 --warmup_iters 50 --learning_rate 3e-3"
SMALL_VIT += " --rotation 0 --scaling 0 --shear 0 --translation 1 --elastic 0"
LIMIT = 400  # milliseconds from the end of a stroke to its answer, also where others use the cores


# ---------------------------------------------------------------------------- runs and servers
pytestmark = pytest.mark.slow  # the runs are trained, and a browser takes its time


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list[Path]:
    """Folders of two runs, mini_vit's and vit's, that know most digits."""
    runs = tmp_path_factory.mktemp("runs")
    for script, flags in {"mini_vit": SMALL_MINI_VIT, "vit": SMALL_VIT}.items():
        command = [sys.executable, ROOT / f"{script}.py", *flags.split()]
        subprocess.run([*command, "--out_dir", runs / script], check=True, capture_output=True)
    return [runs / "mini_vit", runs / "vit"]


@pytest.fixture(scope="session")
def runs(folders) -> dict:
    return draw.load_runs(folders, "cpu")


@pytest.fixture(scope="session")
def known(runs) -> tuple[torch.Tensor, list[int]]:
    """Test images that both runs get right with confidence, and their labels."""
    *_, images, labels = mini_vit.load_mnist(mini_vit.Config(data_dir=str(ROOT / "data")))
    images, labels = images[:400], labels[:400]
    right = torch.ones(400, dtype=torch.bool)
    for run in runs.values():
        probabilities, answers = draw.explain(run, images)[0].max(-1)
        right &= (answers == labels) & (probabilities > 0.95)
    return images[right], labels[right].tolist()


@contextlib.contextmanager
def serving(runs: dict, host: str = "127.0.0.1"):
    """Serve runs in this process, at any port."""
    server = draw.Server(host, 0, runs)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        server.worker.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(runs):
    with serving(runs) as server:
        yield server


def request(server, method: str, path: str, body=None, **headers) -> tuple[int, str]:
    """Return status and content of the answer to a request."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


def png(pixels: np.ndarray) -> bytes:
    """Return an image, (height, width) uint8, as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def on_sheet(images: torch.Tensor) -> bytes:
    """Return a picture of digits side by side, dark on white."""
    digits = [np.kron(image.view(28, 28).numpy(), np.ones((5, 5), np.uint8)) for image in images]
    return png(255 - np.pad(np.hstack(digits), 40))


def one_line_of(answer: tuple[int, str]) -> int:
    """See that an answer is one line of text, and return its status."""
    status, content = answer
    assert content.count("\n") == 1 and content.endswith("\n") and len(content) > 10, content
    assert "<" not in content and "Traceback" not in content
    return status


# ---------------------------------------------------------------------------- plain requests
def test_a_picture_is_read_by_each_run(server, known):
    images, labels = known
    status, content = request(server, "POST", "/read", on_sheet(images[:3]))
    digits = json.loads(content)
    assert status == 200 and len(digits) == 3
    for digit, label in zip(digits, labels, strict=False):
        assert len(digit["pixels"]) == 784 and max(digit["pixels"]) == 255
        for run, side in zip(digit["runs"], (28, 4), strict=True):
            probabilities, heat = run["probabilities"], np.array(run["heat"])
            assert np.argmax(probabilities) == label
            assert sum(probabilities) == pytest.approx(1, abs=1e-4)
            assert heat.shape == (side, side) and abs(heat).max() == 1000
    assert request(server, "POST", "/read", png(np.full((200, 300), 255, np.uint8))) == (200, "[]")


def test_a_heat_map_is_the_gradient_times_the_pixels(runs, known):
    """A pixel a little darker lowers the winning logit by what the map says."""
    run, image = runs["mini_vit"], known[0][:1]
    _, heat = draw.explain(run, image)
    heat = heat.flatten()
    pixels = image / 255
    logits = run.model(pixels)
    differences = torch.zeros(784)
    for i in image[0].nonzero().flatten().tolist():
        darker = pixels.clone()
        darker[0, i] *= 0.99
        differences[i] = logits[0].max() - run.model(darker)[0, logits.argmax()]
    differences = differences / differences.abs().max()
    assert heat.abs().max() == 1
    torch.testing.assert_close(heat, differences, rtol=0, atol=0.05)


def test_runs_of_all_scripts_are_explained(script, module):
    model = random_model(module)
    run = look.Run(module, None, torch.device("cpu"), model, {"script": script})
    images = random_images(3)[0]
    probabilities, heat = draw.explain(run, images)
    torch.testing.assert_close(probabilities, model(images).softmax(-1))
    assert heat.shape == ((3, 4, 4) if script == "vit" else (3, 28, 28))
    assert heat.abs().amax((1, 2)).tolist() == [1, 1, 1]
    assert len({tuple(part.flatten().tolist()) for part in heat}) == 3


def test_the_page_is_served(server):
    status, content = request(server, "GET", "/")
    assert status == 200 and content == (ROOT / "draw.html").read_text()
    assert "http://" not in content and "https://" not in content  # loads nothing from elsewhere
    status, content = request(server, "GET", "/runs")
    assert [run["name"] for run in json.loads(content)] == ["mini_vit", "vit"]
    assert ["gradient" in run["heat"] for run in json.loads(content)] == [True, False]


def test_names_of_others_are_refused(server):
    port = server.server_port
    for name in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"):
        assert request(server, "GET", "/runs", Host=f"{name}:{port}")[0] == 200
    others = ("evil.example", "192.168.1.2", "127.0.0.1.evil.example", "localhost.evil.example")
    for name in (*others, "evil.example@127.0.0.1", "127.0.0.1 ", "", "[::1].evil.example"):
        for method, path in (("GET", "/"), ("GET", "/runs"), ("POST", "/read")):
            answer = request(server, method, path, b"x", Host=f"{name}:{port}")
            assert one_line_of(answer) == 403, name


def test_other_origins_are_refused(server):
    own = f"http://127.0.0.1:{server.server_port}"
    picture = png(np.full((50, 50), 255, np.uint8))
    assert request(server, "POST", "/read", picture, Origin=own)[0] == 200
    others = ("http://evil.example", "null", "http://127.0.0.1:1", own.replace("http", "https"))
    for origin in (*others, own.replace("127.0.0.1", "localhost"), ""):
        assert one_line_of(request(server, "POST", "/read", picture, Origin=origin)) == 403, origin


def test_a_host_for_the_network_has_any_number_but_no_name(runs):
    with serving(runs, "0.0.0.0") as server:
        for name in ("192.168.1.2", "localhost", "[fe80::1]"):
            assert request(server, "GET", "/runs", Host=f"{name}:{server.server_port}")[0] == 200
        for name in ("evil.example", "1.2.3.4.evil.example", "[evil.example]"):
            answer = request(server, "GET", "/runs", Host=f"{name}:{server.server_port}")
            assert one_line_of(answer) == 403


def test_what_can_not_be_read_is_one_line(server, known):
    picture = on_sheet(known[0][:1])
    bomb = b"P5 30000 30000 255\n"
    bodies = {"text": b"no picture", "empty": b"", "bomb": bomb, "broken": picture[:30]}
    for kind, body in bodies.items():
        assert one_line_of(request(server, "POST", "/read", body)) == 400, kind
    assert one_line_of(request(server, "POST", "/read", b"\0" * 21_000_000)) == 413
    assert one_line_of(request(server, "POST", "/read", Content_Length="-1")) == 411
    assert one_line_of(request(server, "POST", "/read", iter([picture]))) == 411  # chunks
    assert one_line_of(request(server, "POST", "/", picture)) == 404
    for path in ("/draw.py", "/../draw.py", "//etc/passwd", "/runs/vit/model.pt"):
        assert one_line_of(request(server, "GET", path)) == 404
    for method in ("PUT", "DELETE", "OPTIONS", "BREW"):
        assert one_line_of(request(server, method, "/read", picture)) == 501
    assert request(server, "POST", "/read", picture)[0] == 200  # the server goes on


def test_no_other_program_sees_a_picture(server, tmp_path, monkeypatch):
    """Pillow would have Ghostscript, if installed, render PostScript."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    picture = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n"
    assert one_line_of(request(server, "POST", "/read", picture)) == 400
    assert not (tmp_path / "started").exists()


def test_a_client_that_hangs_up_does_no_harm(server, known):
    for start in (
        b"",
        b"POST /re",
        b"POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nP5",
    ):
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(start)
    assert request(server, "POST", "/read", on_sheet(known[0][:1]))[0] == 200


def test_clients_at_once_get_their_own_answers(server, known):
    images, _ = known
    ask = functools.partial(request, server, "POST", "/read")
    bodies = [on_sheet(images[i : i + 1 + i % 3]) for i in range(12)]
    alone = [ask(body) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        assert list(clients.map(ask, bodies)) == alone
    assert len(set(alone)) == 12 and {status for status, _ in alone} == {200}


def test_nothing_is_computed_for_a_client_that_has_gone(server, known, monkeypatch):
    seen, may_go_on = [], threading.Event()

    def slow(picture: bytes) -> list:
        seen.append(picture)
        assert may_go_on.wait(30)
        return []

    monkeypatch.setattr(draw, "find", slow)
    clients = []
    for body in (b"1", b"2", b"3"):
        client = http.client.HTTPConnection("127.0.0.1", server.server_port)
        client.request("POST", "/read", body)
        clients.append(client)
        time.sleep(0.2)
    clients[1].close()
    may_go_on.set()
    assert clients[0].getresponse().read() == clients[2].getresponse().read() == b"[]"
    assert seen == [b"1", b"3"]


def test_a_run_that_fails_is_one_line_and_a_traceback(server, known, monkeypatch, capfd):
    def fail(run, images):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(draw, "explain", fail)
    answer = request(server, "POST", "/read", on_sheet(known[0][:1]))
    assert one_line_of(answer) == 500 and "out of memory" in answer[1]
    monkeypatch.undo()
    assert request(server, "POST", "/read", on_sheet(known[0][:1]))[0] == 200
    assert "RuntimeError" in capfd.readouterr().err


# ---------------------------------------------------------------------------- the command
def hear_ctrl_c() -> None:
    """Restore Ctrl-C, which a shell disables for background commands."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start_draw():
    """Start draw.py as a user does: start_draw(*arguments, **environment)."""
    started = []

    def start_draw(*arguments, **environment) -> subprocess.Popen:
        command = [sys.executable, ROOT / "draw.py", "--device", "cpu", *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options |= {"env": os.environ | environment, "preexec_fn": hear_ctrl_c}
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start_draw
    for process in started:
        process.kill()
        process.wait()


def test_a_taken_port_means_the_next_one_and_ctrl_c_is_no_error(start_draw, folders, tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {"BROWSER": f"{browser} %s", "DISPLAY": ":99"}
        process = start_draw(*folders, "--port", f"{port}", **environment)
        line = process.stdout.readline().split()
        assert line[1:] == ["(port", f"{port}", "is", "taken)"]
        assert line[0].startswith("http://127.0.0.1:") and int(line[0].split(":")[-1]) > port
        for _ in range(100):
            if (tmp_path / "opened").exists() and (tmp_path / "opened").read_text():
                break
            time.sleep(0.1)
        assert (tmp_path / "opened").read_text().strip() == line[0]
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        assert (process.returncode, err) == (0, "")


def test_the_network_gets_in_only_by_a_flag_that_says_so(start_draw, folders):
    process = start_draw(*folders, "--port", "0", "--host", "0.0.0.0", "--no_browser")
    lines = [process.stdout.readline() for _ in range(4)]
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert lines[0].startswith("http://127.0.0.1:") and "(" not in lines[0]
    assert "Anyone on your network" in lines[1] and "no password" in lines[1]


def test_errors_are_one_line(tmp_path, folders, monkeypatch):
    def error(*arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            draw.main(["--no_browser", *map(str, arguments)])
        return stop.value.code

    monkeypatch.chdir(tmp_path)
    assert error().startswith("look.py: error: there is no run below runs/")
    assert error(tmp_path / "missing").startswith("look.py: error: can't read")
    line = error(*folders, "--host", "192.0.2.1")
    assert line.startswith("draw.py: error: can't listen on 192.0.2.1, port 8000")
    assert error(*folders, "--port", "70000") == 2


def test_every_way_to_say_anywhere_is_known(runs):
    for host in ("0.0.0.0", "0", ""):
        with draw.Server(host, 0, runs) as server:
            assert server.host in draw.ANYWHERE


# ---------------------------------------------------------------------------- the browser
class Page:
    """The page in a browser, and what people do with it."""

    def __init__(self, driver, server):
        self.driver = driver
        self.resize(1100)
        driver.get(f"http://127.0.0.1:{server.server_port}/")
        self.sheet = self.find("#drawing")
        for _ in range(200):
            if self.find("#runs").text:
                return
            time.sleep(0.05)
        raise TimeoutError("the page doesn't know its runs")

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def run(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def resize(self, width: int, dark: bool = False, touch: bool = False) -> None:
        """Emulate a screen this wide, in CSS pixels: light or dark mode, mouse or touch."""
        height = 640 if touch else 1000
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def draw(self, points: np.ndarray) -> None:
        """Draw a stroke through points (n, 2) of the sheet with the mouse; don't wait."""
        from selenium.webdriver.common.action_chains import ActionChains

        rect = self.run("return arguments[0].getBoundingClientRect()", self.sheet)
        scale = rect["width"] / self.run("return arguments[0].width", self.sheet)
        chain = ActionChains(self.driver, duration=0)
        pointer = chain.w3c_actions.pointer_action
        for i, (x, y) in enumerate(points):
            pointer.move_to_location(round(rect["x"] + scale * x), round(rect["y"] + scale * y))
            if i == 0:
                pointer.pointer_down()
        pointer.pointer_up()
        chain.perform()

    def wait(self) -> "Page":
        """Wait until the newest answer is there."""
        for _ in range(600):
            if self.find("#answer").get_attribute("aria-busy") == "false":
                return self
            time.sleep(0.05)
        raise TimeoutError(self.find("main").text)

    def latency(self) -> int:
        """Return how many milliseconds the newest answer took."""
        for _ in range(200):
            words = self.wait().find("#latency").text.split()
            if words:
                return int(words[2])
            time.sleep(0.05)
        raise TimeoutError(self.find("main").text)

    def numbers(self) -> list[str]:
        """Return what each run reads."""
        return [element.text for element in self.wait().all("#answer b")]

    def boxes(self) -> np.ndarray:
        """Return left, top, right and bottom of each box, (N, 4), in pixels of the sheet."""
        code = """
            const sheet = drawing.getBoundingClientRect();
            const scale = drawing.width / sheet.width;
            return [...document.querySelectorAll(".box")].map(box => {
              const {left, top, right, bottom} = box.getBoundingClientRect();
              const corners = [left - sheet.x, top - sheet.y, right - sheet.x, bottom - sheet.y];
              return corners.map(n => scale * n);
            });"""
        return np.array(self.wait().run(code))

    def press(self, *keys: str) -> "Page":
        from selenium.webdriver.common.action_chains import ActionChains

        chain = ActionChains(self.driver)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()
        return self.wait()

    def click(self, button: str) -> "Page":
        self.find(f"#{button}").click()
        return self.wait()

    def paste(self, picture: bytes) -> "Page":
        """Paste a picture, as after copying it in another program."""
        code = """
            const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "../../image.png", {type: "image/png"}));
            const before = items.length;
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
            return before"""
        return self.wait_for_more_than(self.run(code, base64.b64encode(picture).decode()))

    def drop(self, path: Path) -> "Page":
        """Drop a file on the sheet."""
        before = self.run("return items.length")
        for kind in ("dragEnter", "dragOver", "drop"):
            data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
            event = {"type": kind, "x": 300, "y": 200, "data": data}
            self.driver.execute_cdp_cmd("Input.dispatchDragEvent", event)
        return self.wait_for_more_than(before)

    def wait_for_more_than(self, n: int) -> "Page":
        """Wait until a picture is there and has been read."""
        for _ in range(200):
            if self.run("return items.length") > n:
                return self.wait()
            time.sleep(0.05)
        raise TimeoutError(self.find("main").text)


@contextlib.contextmanager
def a_browser():
    """Start headless Chromium; skip the test if it isn't installed."""
    selenium = pytest.importorskip("selenium.webdriver")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Chromium and chromedriver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = selenium.ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = selenium.Chrome(options, selenium.ChromeService(driver))
        try:
            yield driver
        finally:
            driver.quit()


@pytest.fixture(scope="module")
def browser():
    with a_browser() as driver:
        yield driver


@pytest.fixture
def page(browser, server):
    return Page(browser, server)


def strokes_of(image: torch.Tensor) -> list[np.ndarray]:
    """Return a digit (784,) as strokes of a pen, each (n, 2), x and y in its 28 x 28 pixels."""
    enlarged = Image.fromarray(image.view(28, 28).numpy()).resize((112, 112))
    left = {tuple(point) for point in np.argwhere(skeletonize(np.asarray(enlarged) > 110)).tolist()}

    def neighbours(point: tuple) -> list[tuple]:
        around = [(point[0] + i, point[1] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return sorted(
            set(around) & left - {point}, key=lambda p: abs(p[0] - point[0] + p[1] - point[1])
        )

    strokes = []
    while left:
        stroke = [min(left, key=lambda point: len(neighbours(point)))]  # an end
        while stroke[-1] is not None:
            left.remove(stroke[-1])
            stroke.append(next(iter(neighbours(stroke[-1])), None))
        stroke = np.array(stroke[:-1])[:, ::-1] / 4
        if len(stroke) > 5:
            strokes.append(np.concatenate([stroke[::4], stroke[-1:]]))
    return strokes


def draw_number(page: Page, images: torch.Tensor) -> tuple[np.ndarray, list[int]]:
    """Draw digits side by side; return their extents (N, 4), and how long each answer took."""
    extents, times = [], []
    for i, image in enumerate(images):
        left = 460 + 240 * i - 120 * len(images)
        points = [10 * stroke + [left, 60] for stroke in strokes_of(image)]
        for stroke in points:
            page.draw(stroke)
            times.append(page.latency())
        every = np.concatenate(points)
        extents.append([*(every.min(0) - 10), *(every.max(0) + 10)])  # a pen is 20 wide
    return np.array(extents), times


@pytest.mark.parametrize("kind", ["without the method", "with an empty list"])
def test_browsers_that_join_no_pointer_events_draw_lines_too(kind, page):
    """Firefox for Android returns an empty list; a page that isn't HTTPS may lack the method."""
    method = "undefined" if kind == "without the method" else "() => []"
    page.run(
        """window.joined = PointerEvent.prototype.getCoalescedEvents;
        PointerEvent.prototype.getCoalescedEvents = """
        + method
    )
    page.draw(np.array([[200, 60], [210, 150], [220, 300]]))
    (box,) = page.boxes()
    assert box[3] - box[1] > 200
    page.run("PointerEvent.prototype.getCoalescedEvents = window.joined")
    page.press("\ue00c")


def test_numbers_drawn_stroke_by_stroke_are_read_at_once(page, known):
    images, labels = known
    right, well_placed, times = [0, 0], 0, []
    for first in range(0, 20, 4):
        extents, more = draw_number(page, images[first : first + 4])
        times += more
        for run, number in enumerate(page.numbers()):
            if len(number) == 4:
                right[run] += sum(int(d) == n for d, n in zip(number, labels[first:], strict=False))
        if len(page.boxes()) == 4:
            well_placed += (abs(page.boxes() - extents).max(1) < 8).sum()
        page.press("\ue00c")  # Esc
    assert min(right) >= 18 and well_placed >= 18
    assert len(times) >= 20 and statistics.median(times) <= LIMIT


def test_pasted_digits_are_read(page, known):
    images, labels = known
    right = [0, 0]
    for image, label in zip(images[20:40], labels[20:40], strict=True):
        numbers = page.paste(on_sheet(image[None])).numbers()
        right = [n + (number == str(label)) for n, number in zip(right, numbers, strict=True)]
    assert min(right) >= 18
    assert page.find("#digits h2").text == "Digit 1" and len(page.all(".run")) == 2


def test_each_run_has_its_bars_and_says_what_its_heat_map_shows(page, known):
    page.paste(on_sheet(known[0][:3]))
    names = [element.text.split()[0] for element in page.all(".run h2")]
    assert names == 3 * ["mini_vit", "vit"]
    for i, run in enumerate(page.all(".run")):
        rows = [row.text.split() for row in run.find_elements("css selector", "li")]
        assert [row[0] for row in rows] == list("0123456789")
        shown = [float(row[1]) for row in rows]
        assert sum(shown) == pytest.approx(100, abs=0.5)
        code = "return [...arguments[0].querySelectorAll('.bar')].map(bar => [bar.offsetWidth, "
        code += "bar.firstChild.getBoundingClientRect().width])"
        widths = [100 * inner / outer for outer, inner in page.run(code, run)]
        assert sum(widths) == pytest.approx(100, abs=0.5)
        assert widths == pytest.approx(shown, abs=0.5)
        code = "return [...arguments[0].querySelectorAll('li')]"
        code += ".map(li => getComputedStyle(li).fontWeight)"
        bold = [n for n, weight in enumerate(page.run(code, run)) if int(weight) >= 600]
        assert bold == [int(np.argmax(shown))] == [int(page.numbers()[i % 2][i // 2])]
    legend = page.find("#legend").text
    assert "mini_vit: orange supports the answer" in legend and "gradient" in legend
    assert "vit: orange is where the class token looks" in legend
    code = "return new Set(arguments[0].getContext('2d').getImageData(0, 0, 224, 224).data).size"
    assert all(page.run(code, canvas) > 20 for canvas in page.all(".digit canvas"))


def test_undo_and_clear_by_button_and_by_key(page):
    empty = "Nothing to read yet."
    control, escape = "\ue009", "\ue00c"
    assert page.find("#answer").text == empty
    assert not page.find("#undo").is_enabled() and not page.find("#clear").is_enabled()
    for x in (100, 300, 500):
        page.draw(np.array([[x, 60], [x, 340]]))
        page.wait()
    assert len(page.boxes()) == 3 and len(page.numbers()[0]) == 3
    assert len(page.click("undo").boxes()) == 2
    assert len(page.press(control, "z").boxes()) == 1
    assert page.click("clear").find("#answer").text == empty and len(page.boxes()) == 0
    assert len(page.click("undo").boxes()) == 1  # what was cleared comes back
    assert page.press(escape).find("#answer").text == empty
    page.press(control, "z")
    assert page.press(control, "z").find("#answer").text == empty
    assert not page.find("#undo").is_enabled()


def test_a_photograph_is_dropped_or_opened(page, known, tmp_path):
    images, labels = known
    for way in ("drop", "open"):
        right = 0
        for i in range(5):
            picture = draw_picture(images[i].view(28, 28).numpy(), "photograph", random.Random(i))
            exif = Image.Exif()
            exif[0x112] = 6  # to be shown rotated by 90 degrees clockwise
            picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / f"{i}.jpg", exif=exif)
            if way == "drop":
                page.drop(tmp_path / f"{i}.jpg")
            else:
                before = page.run("return items.length")
                page.find("#file").send_keys(str(tmp_path / f"{i}.jpg"))
                page.wait_for_more_than(before)
            right += page.numbers() == 2 * [str(labels[i])]
            gray = np.asarray(picture.convert("L"), float)
            dark = np.argwhere(gray < 90)
            scale = min(960 / picture.width, 400 / picture.height)
            offset = [(960 - scale * picture.width) / 2, (400 - scale * picture.height) / 2]
            extent = np.concatenate([dark.min(0)[::-1], dark.max(0)[::-1]]) * scale + 2 * offset
            assert abs(page.boxes() - extent).max() < 25
        assert right >= 4


def test_a_stroke_on_a_picture_starts_a_new_drawing(page, known):
    images, labels = known
    page.paste(on_sheet(images[:2]))
    number = "".join(map(str, labels[:2]))
    assert page.numbers() == 2 * [number]
    page.draw(np.array([[500, 60], [500, 340]]))
    assert len(page.boxes()) == 1
    assert page.click("undo").numbers() == 2 * [number]


def test_two_rows_are_two_numbers(page, known):
    images, labels = known
    rows = [Image.open(io.BytesIO(on_sheet(images[i : i + 2]))) for i in (0, 2)]
    sheet = Image.new("L", (rows[0].width, 2 * rows[0].height), 255)
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * row.height))
    a, b, c, d = labels[:4]
    assert page.paste(png(np.asarray(sheet))).numbers() == 2 * [f"{a}{b}, {c}{d}"]


def test_what_can_not_be_read_is_said(page, tmp_path):
    (tmp_path / "letter.txt").write_text("no picture")
    (tmp_path / "large.png").write_bytes(b"\0" * 21_000_000)
    page.drop(tmp_path / "letter.txt")
    assert page.find("#answer .error").text == "can't read this picture: save it as JPEG or PNG"
    page.find("#file").send_keys(str(tmp_path / "large.png"))
    assert page.find("#answer .error").text == "A picture may be at most 20 MB."
    page.paste(png(np.full((200, 300), 255, np.uint8)))
    assert page.find("#answer").text == "No digit found in this picture."


def test_only_the_last_stroke_counts(page, server, monkeypatch):
    original, calls = draw.find, []

    def slow(picture: bytes) -> list:
        calls.append(picture)
        time.sleep(1)
        return original(picture)

    monkeypatch.setattr(draw, "find", slow)
    for x in (100, 250, 400, 550, 700, 850):
        page.draw(np.array([[x, 60], [x, 340]]))
    assert len(page.boxes()) == 6
    assert len(calls) < 6


def test_the_page_says_when_the_server_has_gone(browser, start_draw, folders):
    process = start_draw(*folders)
    port = int(re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
    page = Page(browser, SimpleNamespace(server_port=port))
    process.kill()
    process.wait()
    page.draw(np.array([[500, 60], [500, 340]]))
    assert page.wait().find("#answer .error").text == "No answer: is draw.py still running?"


def brightnesses(page: Page) -> list[float]:
    """Return how bright the page and the empty sheet are, from 0 to 255."""
    frames = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
    page.driver.execute_async_script(frames)  # the scheme has reached the sheet by then
    colour = page.run("return getComputedStyle(document.body).backgroundColor")
    pixel = page.run("return [...drawing.getContext('2d').getImageData(5, 5, 1, 1).data]")
    return [np.mean([int(n) for n in colour.strip("rgb()").split(",")]), np.mean(pixel[:3])]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_and_reads_what_a_finger_draws(page, dark, tmp_path):
    page.resize(360, dark, touch=True)
    page.driver.refresh()
    page.sheet = page.find("#drawing")
    rect = page.run("return arguments[0].getBoundingClientRect()", page.sheet)
    assert page.run("return drawing.width") == 720
    for x in (100, 230):  # upwards, which would scroll the page
        touches = [{"x": x, "y": rect["y"] + 170 - 10 * i} for i in range(15)]
        for kind, points in zip(["touchStart"] + 14 * ["touchMove"], touches, strict=True):
            event = {"type": kind, "touchPoints": [points]}
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", event)
        event = {"type": "touchEnd", "touchPoints": []}
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", event)
        page.latency()
    assert len(page.boxes()) == 2
    scale = 720 / rect["width"]
    corner = [scale * (100 - rect["x"]) - 10, scale * 30 - 10]  # of a stroke 20 wide
    assert abs(page.boxes()[0][:2] - corner).max() < 8
    assert page.run("return scrollY") == 0  # the finger has drawn, not scrolled
    assert page.run("return document.documentElement.scrollWidth") <= 360
    assert page.find("#photograph").is_displayed()
    for is_dark in (dark, not dark):
        page.resize(360, is_dark, touch=True)
        for brightness in brightnesses(page):
            assert brightness < 60 if is_dark else brightness > 200


def test_the_page_can_be_heard_and_used_by_keyboard(page):
    for button in page.all("button, canvas, section"):
        assert not button.is_displayed() or button.accessible_name
    assert page.find("#answer").aria_role == "status"
    page.draw(np.array([[500, 60], [500, 340]]))
    assert len(page.boxes()) == 1
    for image in page.all(".digit canvas"):
        assert image.aria_role in ("img", "image") and len(image.accessible_name) > 20
    names = []
    for _ in range(3):
        page.press("\ue004")  # Tab
        names.append(page.driver.switch_to.active_element.text)
    assert names == ["Undo", "Clear", "Open a picture"]
    page.find("#clear").send_keys("\ue007")  # Enter
    assert page.wait().find("#answer").text == "Nothing to read yet."


# ---------------------------------------------------------------------------- as a script
def measure(browser, folder: Path) -> str:
    """Return how long a run takes to answer twenty strokes of test digits, one digit at a time."""
    images = mini_vit.load_mnist(mini_vit.Config(data_dir=str(ROOT / "data")))[2]
    times = []
    with serving(draw.load_runs([folder], "auto")) as server:
        page = Page(browser, server)
        draw_number(page, images[:1])
        for image in images[1:]:
            page.press("\ue00c")  # Esc
            times += draw_number(page, image[None])[1]
            if len(times) >= 20:
                break
    times = sorted(times[:20])
    median = statistics.median(times)
    return (
        f"{folder}: {median:.0f} ms from stroke to answer (median of 20; {times[0]} to {times[-1]})"
    )


def photograph(browser, folders: list[Path], path: Path) -> None:
    """Draw a number and save what the page shows of it."""
    images = mini_vit.load_mnist(mini_vit.Config(data_dir=str(ROOT / "data")))[2]
    with serving(draw.load_runs(folders, "auto")) as server:
        page = Page(browser, server)
        draw_number(page, images[:3])
        page.resize(1000)
        page.run("latency.hidden = true")
        height = page.run("return legend.getBoundingClientRect().bottom + 12")
        clip = {"x": 0, "y": 0, "width": 1000, "height": height, "scale": 1}
        shot = {"clip": clip, "captureBeyondViewport": True}
        data = browser.execute_cdp_cmd("Page.captureScreenshot", shot)["data"]
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure in the browser how long runs take to answer."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--picture", type=Path, help="save the page with these runs instead")
    args = parser.parse_args()
    with a_browser() as browser:
        if args.picture:
            photograph(browser, args.runs, args.picture)
        else:
            for folder in args.runs:
                print(measure(browser, folder), flush=True)


if __name__ == "__main__":
    main()
