"""draw.py's server stands its ground, and its page shows what each run makes of the sheet.

python tests/test_draw.py runs/vit runs/mini_vit  # how long each takes to answer, in the browser
python tests/test_draw.py --picture docs/draw.png runs/mini_vit runs/vit  # the page, for README.md
"""

import argparse
import base64
import contextlib
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
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, random_images, random_model
from pictures import draw as draw_picture
from PIL import Image

import draw
import look
import mini_vit
import vit

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SMALL = "--device cpu --max_iters 300 --eval_interval 300 --dropout 0"
SMALL_MINI_VIT = f"{SMALL} --n_layers 1 --n_head 4 --d_head 32 --n_embd 128 --batch_size 256"
SMALL_MINI_VIT += " --learning_rate 2e-3 --adversarial 0"
SMALL_VIT = f"{SMALL} --n_layers 2 --n_head 2 --n_embd 64 --warmup_iters 50 --learning_rate 3e-3"
SMALL_VIT += " --adversarial 0 --rotation 0 --scaling 0 --shear 0 --translation 1 --elastic 0"


# ---------------------------------------------------------------------------- runs and servers
@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list[Path]:
    """Folders of two runs, mini_vit's and vit's, that know most digits."""
    runs = tmp_path_factory.mktemp("runs")
    mini_vit.main([*SMALL_MINI_VIT.split(), "--out_dir", str(runs / "mini_vit")])
    vit.main([*SMALL_VIT.split(), "--out_dir", str(runs / "vit")])
    return [runs / "mini_vit", runs / "vit"]


@pytest.fixture(scope="session")
def runs(folders) -> dict:
    torch.set_num_threads(1)
    return draw.load_runs(folders, "cpu")


@pytest.fixture(scope="session")
def known(runs) -> tuple[torch.Tensor, list[int]]:
    """Test images that both runs get right with confidence, and their labels."""
    *_, images, labels = mini_vit.load_mnist(mini_vit.Config(data_dir=str(ROOT / "data")))
    images, labels = images[:400], labels[:400]
    right = torch.ones(400, dtype=torch.bool)
    for run in runs.values():
        probabilities, answers = draw.probabilities_of(run, images).max(-1)
        right &= (answers == labels) & (probabilities > 0.95)
    return images[right], labels[right].tolist()


@contextlib.contextmanager
def serving(runs: dict, port: int = 0, host: str = "127.0.0.1"):
    """Serve runs in this process; yield the port."""
    listener = draw.listen(host, port)
    server = draw.make_server(draw.make_app(runs, draw.own_names(host)), listener)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        everything = list(server._map.values())  # of waitress, whose loop ends when all is closed
        server.trigger.pull_trigger(lambda: [part.close() for part in everything])
        thread.join()


@pytest.fixture(scope="module")
def port(runs):
    with serving(runs) as port:
        yield port


def send(port: int, method: str, path: str, body=None, **headers) -> tuple[int, bytes]:
    """Return status and content of the answer to a request."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def read(port: int, picture: bytes, path: str = "/read") -> dict:
    """Return what the server makes of a picture."""
    status, content = send(port, "POST", path, picture)
    assert status == 200, content
    return json.loads(content)


def png(pixels: np.ndarray) -> bytes:
    """Return an image, (height, width) uint8, as the content of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def on_sheet(images: torch.Tensor) -> bytes:
    """Return a picture of digits side by side, dark on white."""
    digits = [np.kron(image.view(28, 28).numpy(), np.ones((5, 5), np.uint8)) for image in images]
    return png(255 - np.pad(np.hstack(digits), 40))


def one_line_of(answer: tuple[int, bytes]) -> int:
    """See that an answer is one line of text, and return its status."""
    status, content = answer
    assert content.count(b"\n") == 1 and content.endswith(b"\n") and len(content) > 10, content
    assert b"<" not in content and b"Traceback" not in content
    return status


# ---------------------------------------------------------------------------- answers
def test_a_picture_is_read_by_each_run(port, known):
    images, labels = known
    answer = read(port, on_sheet(images[:3]))
    assert [run["name"] for run in answer["runs"]] == ["mini_vit", "vit"]
    assert ["opposes" in run["legend"] for run in answer["runs"]] == [True, False]
    assert len(answer["digits"]) == 3
    for digit, label in zip(answer["digits"], labels, strict=False):
        assert len(digit["pixels"]) == 784 and max(digit["pixels"]) == 255
        for run, side in zip(digit["runs"], (28, 4), strict=True):
            probabilities, heat = run["probabilities"], np.array(run["heat"])
            assert np.argmax(probabilities) == label
            assert sum(probabilities) == pytest.approx(1, abs=1e-4)
            assert heat.shape == (side, side) and abs(heat).max() == 1000
    assert read(port, png(np.full((200, 300), 255, np.uint8)))["digits"] == []


def test_a_heat_map_is_the_gradient_times_the_pixels(runs, known):
    """A pixel a little darker lowers the winning logit by what the map says."""
    model, image = runs["mini_vit"].model, known[0][:1] / 255
    darker = image * (1 - 0.01 * torch.eye(784))  # each row one pixel
    with torch.no_grad():
        differences = model(image).max() - model(darker)[:, known[1][0]]
    heat = draw.explain(runs["mini_vit"], known[0][:1])[1].flatten()
    torch.testing.assert_close(heat, differences / differences.abs().max(), rtol=0, atol=0.05)


def test_runs_of_all_scripts_are_explained_and_fooled(script, module):
    model = random_model(module)
    run = look.Run(module, None, torch.device("cpu"), model, {"script": script})
    images = random_images(3)[0]
    probabilities, heat = draw.explain(run, images)
    torch.testing.assert_close(probabilities, model(images).softmax(-1))
    assert heat.shape == ((3, 4, 4) if script == "vit" else (3, 28, 28))
    assert heat.abs().amax((1, 2)).tolist() == [1, 1, 1]
    assert len({tuple(part.flatten().tolist()) for part in heat}) == 3
    moved = draw.fool(run, images, 0.02)
    assert (moved - images).abs().max() <= 6 and moved.min() >= 0 and moved.max() <= 255
    best = probabilities.argmax(-1, keepdim=True)
    after = draw.probabilities_of(run, moved).gather(1, best)
    assert (after < probabilities.gather(1, best)).all()


def test_who_is_fooled_is_asked_of_all_runs(port, known):
    (digit,) = read(port, on_sheet(known[0][:1]), "/read?distance=0.3")["digits"]
    for i, run in enumerate(digit["runs"]):
        moved = np.subtract(run["fooled"]["pixels"], digit["pixels"])
        assert abs(moved).max() in (76, 77)  # 0.3 of 255
        answer = np.argmax(run["probabilities"])
        assert run["fooled"]["runs"][i][answer] < 0.5 < run["probabilities"][answer]
        assert run["fooled"]["runs"][0] != run["fooled"]["runs"][1]


def test_labelled_digits_are_saved_and_measured(port, known, folders, tmp_path, capsys):
    images, labels = known
    wrong = (labels[0] + 1) % 10
    digits = [[wrong, images[0].tolist()]]
    digits += [
        [label, image.tolist()] for label, image in zip(labels[1:9], images[1:], strict=False)
    ]
    json_type = {"Content_Type": "application/json"}
    status, content = send(port, "POST", "/save", json.dumps(digits), **json_type)
    assert status == 200
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path / "mine")
    files = sorted((tmp_path / "mine").glob("[0-9]/*.png"))
    assert sorted(int(file.parent.name) for file in files) == sorted([wrong, *labels[1:9]])
    saved = {Image.open(file).tobytes() for file in files}
    assert saved == {bytes(pixels) for _, pixels in digits}
    assert look.main([*map(str, folders), str(tmp_path / "mine"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for folder, line in zip(folders, lines[::2], strict=True):
        assert line == f"{folder} on {tmp_path / 'mine'}: 88.89% (8 of 9)"
    assert all(re.search(rf"/{wrong}/.*\.png: {labels[0]}$", line) for line in lines[1::2])
    Image.new("L", (30, 30)).save(files[0])
    with pytest.raises(SystemExit, match=r"\.png is not 28 x 28 pixels"):
        look.main([str(folders[0]), str(tmp_path / "mine"), "--device", "cpu"])


# ---------------------------------------------------------------------------- who is refused
def test_other_names_and_other_sites_pages_are_refused(port):
    picture = png(np.full((50, 50), 255, np.uint8))
    for name in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"):
        assert send(port, "GET", "/", Host=f"{name}:{port}")[0] == 200, name
    own = f"http://127.0.0.1:{port}"
    assert send(port, "POST", "/read", picture, Origin=own)[0] == 200
    others = ("evil.example", "198.51.100.7", "127.0.0.1.evil.example", "localhost.evil.example")
    for name in (*others, "evil.example@127.0.0.1", "", "[::1].evil.example", "[2001:db8::1]"):
        for method, path in (("GET", "/"), ("POST", "/read"), ("POST", "/save")):
            answer = send(port, method, path, picture, Host=f"{name}:{port}")
            assert one_line_of(answer) == 403, name
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", own.replace("p:", "ps:")):
        assert one_line_of(send(port, "POST", "/read", picture, Origin=origin)) == 403, origin


def jpeg_of_many_scans(n: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    file = io.BytesIO()
    Image.new("L", (4000, 4000), 255).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + n * scan + content[-2:]


def test_what_can_not_be_read_is_one_line_at_once(port, known):
    picture = on_sheet(known[0][:1])
    bodies = {
        "text": b"no picture",
        "empty": b"",
        "broken": picture[:30],
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "P5": b"P5 13400 13400 65535\n".ljust(37, b"\0"),
        "P6": b"P6 13400 13400 65535\n".ljust(37, b"\0"),
        "Pf": b"Pf 13400 13400 -1.0\n".ljust(37, b"\0"),
        "scans": jpeg_of_many_scans(1000),
    }
    before = psutil.Process().memory_info().rss
    for kind, body in bodies.items():
        start = time.perf_counter()
        assert one_line_of(send(port, "POST", "/read?preview", body)) == 400, kind
        assert time.perf_counter() - start < 2, kind
    assert psutil.Process().memory_info().rss - before < 100e6
    assert one_line_of(send(port, "POST", "/read", b"\0" * 21_000_000)) == 413
    assert one_line_of(send(port, "POST", "/", picture)) == 405
    assert one_line_of(send(port, "POST", "/read?distance=nan", picture)) == 400
    for path in ("/draw.py", "/../draw.py", "/runs/vit/model.pt", "/static/draw.py"):
        assert one_line_of(send(port, "GET", path)) == 404
    read(port, picture)  # the server goes on


# ---------------------------------------------------------------------------- many clients
def test_nothing_is_computed_for_a_client_that_has_gone(port, monkeypatch):
    seen, may_go_on = [], threading.Event()

    def slow(picture: io.BytesIO) -> tuple:
        seen.append(picture.getvalue())
        assert may_go_on.wait(30)
        return None, []

    monkeypatch.setattr(draw, "find", slow)
    clients = []
    for body in (b"1", b"2", b"3"):
        client = http.client.HTTPConnection("127.0.0.1", port)
        client.request("POST", "/read", body)
        clients.append(client)
        time.sleep(0.2)
    clients[1].close()
    time.sleep(0.2)
    may_go_on.set()
    assert clients[0].getresponse().status == clients[2].getresponse().status == 200
    assert seen == [b"1", b"3"]


# ---------------------------------------------------------------------------- the command
@pytest.fixture
def start_draw():
    """Start draw.py as a user does: start_draw(*arguments, descriptors=None, **environment)."""
    started = []

    def start_draw(*arguments, descriptors=None, **environment) -> subprocess.Popen:
        def prepare() -> None:
            import resource

            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell disables it in the background
            if descriptors:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        command = [sys.executable, ROOT / "draw.py", "--device", "cpu", *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options |= {"env": os.environ | environment, "preexec_fn": prepare}
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield start_draw
    for process in started:
        process.kill()
        process.wait()


def port_of(process: subprocess.Popen) -> int:
    """Return the port that draw.py names in its first line."""
    line = process.stdout.readline()
    assert re.match(r"http://\S+:\d+", line), (line, process.stderr.read())
    return int(line.split()[0].split(":")[-1])


def test_a_taken_port_means_the_next_one_and_ctrl_c_ends_it_at_once(start_draw, folders, tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {"BROWSER": f"{browser} %s", "DISPLAY": ":99"}
        process = start_draw(folders[0], "--port", f"{port}", **environment)
        line = process.stdout.readline().split()
        assert line[1:] == ["(port", f"{port}", "is", "taken)"]
        assert line[0].startswith("http://127.0.0.1:") and int(line[0].split(":")[-1]) > port
        for _ in range(100):
            if (tmp_path / "opened").exists() and (tmp_path / "opened").read_text():
                break
            time.sleep(0.1)
        assert (tmp_path / "opened").read_text().strip() == line[0]
    picture = png(np.random.default_rng(0).integers(0, 255, (2000, 2000), np.uint8))
    clients = []
    for _ in range(20):  # a queue of many seconds
        client = http.client.HTTPConnection("127.0.0.1", int(line[0].split(":")[-1]))
        client.request("POST", "/read?preview", picture)
        clients.append(client)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    err = process.communicate(timeout=60)[1]
    assert time.perf_counter() - start < 1 and err == ""


def test_who_listens_beyond_this_machine_says_so(capsys, monkeypatch):
    def no_route(*arguments):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", no_route)
    addresses = [address for address in draw.own_addresses() if draw.in_network(address)]
    monkeypatch.undo()
    hosts = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "0": "127.0.0.1"}
    hosts |= {"::": "[::1]"} if socket.has_dualstack_ipv6() else {}
    hosts |= {address: address for address in addresses if ":" not in address}
    for host, here in hosts.items():
        with draw.listen(host, 0) as listener:
            port = listener.getsockname()[1]
            monkeypatch.setattr(socket.socket, "connect", no_route)
            assert draw.welcome(listener, 0) == f"http://{here}:{port}"
            monkeypatch.undo()
            first, warning, *_ = capsys.readouterr().out.splitlines()
            assert first == f"http://{here}:{port}"
            socket.create_connection((here.strip("[]"), port)).close()
            assert "Anyone on your network can draw" in warning and "no password" in warning
            if addresses:
                there, port = re.search(r"http://(\S+):(\d+):", warning).groups()
                assert there != "127.0.0.1"
                socket.create_connection((there.strip("[]"), int(port))).close()
    with draw.listen("localhost", 0) as listener:
        draw.welcome(listener, 0)
    assert "network" not in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, folders, monkeypatch):
    def error(*arguments) -> str:
        with pytest.raises(SystemExit) as stop:
            draw.main(["--no_browser", *map(str, arguments)])
        return stop.value.code

    monkeypatch.setattr(look, "PROGRAM", "look.py")  # draw.main changes it
    monkeypatch.chdir(tmp_path)
    assert error().startswith("draw.py: error: there is no run below runs/")
    assert error("missing") == "draw.py: error: there is no folder missing"
    (tmp_path / "empty").mkdir()
    assert error("empty").startswith("draw.py: error: can't read")
    line = error(*folders, "--host", "192.0.2.99")
    assert line.startswith("draw.py: error: can't listen on 192.0.2.99, port 8000")
    assert error(*folders, "--port", "70000") == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["20 MB", "a byte every 12 s"])
def test_slow_clients_take_no_memory_and_nobodys_turn(kind, start_draw, folders, known):
    process = start_draw(folders[0], "--port", "0", "--no_browser")
    port = port_of(process)
    memory = psutil.Process(process.pid).memory_info
    picture = on_sheet(known[0][:1])
    read(port, picture)
    before, most = memory().rss, 0
    head = b"POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        for client in clients:
            stack.enter_context(client)
            client.sendall(head)
        for _ in range(19 if kind == "20 MB" else 2):
            for client in clients:
                with contextlib.suppress(ConnectionError):  # who drips is hung up on
                    client.sendall(b"\0" * (10**6 if kind == "20 MB" else 1))
            start = time.perf_counter()
            read(port, picture)
            assert time.perf_counter() - start < 5
            most = max(most, memory().rss - before)
            time.sleep(0 if kind == "20 MB" else 12)
    assert most < 100e6


@pytest.mark.slow
@pytest.mark.parametrize(("n_clients", "descriptors"), [(1150, 4096), (120, 100)])
def test_many_clients_that_say_nothing_shut_nobody_out(
    n_clients, descriptors, start_draw, folders, known
):
    """1150 clients are more than select() takes, 120 more than 100 descriptors."""
    process = start_draw(folders[0], "--port", "0", "--no_browser", descriptors=descriptors)
    port = port_of(process)
    with contextlib.ExitStack() as stack:
        for _ in range(n_clients):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        times = psutil.Process(process.pid).cpu_times
        before = times()
        time.sleep(3)
        assert sum(times()[:2]) - sum(before[:2]) < 1  # second of computing, in three
        if n_clients < descriptors:
            start = time.perf_counter()
            read(port, on_sheet(known[0][:1]))
            assert time.perf_counter() - start < 5
    read(port, on_sheet(known[0][:1]))


# ---------------------------------------------------------------------------- the browser
CONTROL, SHIFT, ESCAPE, ENTER = "\ue009", "\ue008", "\ue00c", "\ue007"
LAPTOP, PHONE, LANDSCAPE = (1280, 633), (390, 844), (844, 390)


def arc(x: float, y: float, radius: float, first: float, last: float) -> list[tuple]:
    """Return points of a circle's part, clockwise between two angles in degrees."""
    angles = np.radians(np.linspace(first, last, 12))
    return list(zip(x + radius * np.cos(angles), y + radius * np.sin(angles), strict=True))


STROKES = {  # of a pen: x and y in pixels of the sheet
    "3": [arc(60, 60, 60, -150, 80) + arc(60, 185, 66, -80, 150)],
    "4": [[(60, 0), (0, 150), (130, 150)], [(100, 0), (95, 280)]],
    "7": [[(0, 0), (120, 0), (50, 130), (30, 250)]],
}


def seven(x: float = 0) -> np.ndarray:
    """Return a stroke that is a seven, in the middle of the sheet or beside it."""
    return np.add(STROKES["7"][0], [400 + x, 90])


class Page:
    """The page in a browser, and what people do with it."""

    def __init__(self, driver, port: int, size=LAPTOP, **screen):
        self.driver = driver
        self.resize(*size, **screen)
        driver.get(f"http://127.0.0.1:{port}/")

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def run(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def send(self, command: str, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def resize(self, width: int, height: int, dark: bool = False, touch: bool = False) -> None:
        """Emulate a screen, in CSS pixels: light or dark mode, mouse or touch."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setDeviceMetricsOverride", **screen)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def at(self, x: float, y: float) -> dict:
        """Return where a point of the sheet is in the window."""
        code = "const {x, y, width} = drawing.getBoundingClientRect(); return [x, y, width]"
        left, top, width = self.run(code)
        scale = width / self.run("return drawing.width")
        return {"x": left + scale * x, "y": top + scale * y}

    def pointer(self, kind: str, x: float, y: float, buttons: int = 1, by: str = "mouse") -> None:
        """Move a mouse or a pen to a point of the sheet, press it there or release it."""
        what = {"type": kind, "buttons": buttons, "pointerType": by}
        if kind != "mouseMoved":
            what |= {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", **what, **self.at(x, y))

    def touch(self, kind: str, *points: tuple) -> None:
        points = [self.at(x, y) | {"id": i} for i, (x, y) in enumerate(points)]
        self.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    def begin(self, points: np.ndarray, by: str = "mouse") -> None:
        """Draw through points (n, 2) of the sheet, and stay there, pressed."""
        self.pointer("mouseMoved", *points[0].tolist(), buttons=0, by=by)
        self.pointer("mousePressed", *points[0].tolist(), by=by)
        for x, y in points[1:].tolist():
            self.pointer("mouseMoved", x, y, by=by)

    def draw(self, points: np.ndarray, by: str = "mouse") -> "Page":
        """Draw a stroke; don't wait for an answer."""
        self.begin(points, by)
        self.pointer("mouseReleased", *points[-1].tolist(), buttons=0, by=by)
        return self

    def wait_until(self, condition: str) -> "Page":
        """Wait until JavaScript says that something is so."""
        for _ in range(400):
            if self.run(f"return Boolean({condition})"):
                return self
            time.sleep(0.05)
        raise TimeoutError(condition + self.find("main").text)

    def wait(self) -> "Page":
        """Wait until the answer is that of what is on the sheet."""
        return self.wait_until('document.getElementById("answer").ariaBusy === "false"')

    def latency(self) -> int:
        """Return how many milliseconds the newest answer took."""
        self.wait_until("latency.textContent")
        return int(self.wait().find("#latency").text.split()[2])

    def numbers(self) -> list[str]:
        """Return what each run reads."""
        return [element.text for element in self.wait().all("#answer b")]

    def answer(self) -> str:
        return self.wait().find("#answer").text

    def boxes(self) -> np.ndarray:
        """Return left, top, right and bottom of each box, (N, 4), in pixels of the sheet."""
        code = """
            const {x, y, width} = drawing.getBoundingClientRect();
            return [...document.querySelectorAll(".box")].map(box => {
              const {left, top, right, bottom} = box.getBoundingClientRect();
              return [left - x, top - y, right - x, bottom - y].map(n => n * drawing.width / width);
            });"""
        return np.array(self.wait().run(code)).reshape(-1, 4)

    def ink(self, x: float, y: float) -> float:
        """Return how bright the sheet is at a point, from 0 to 255."""
        code = f"return drawing.getContext('2d').getImageData({x}, {y}, 1, 1).data[0]"
        return self.run(code)

    def press(self, *keys: str) -> "Page":
        self.driver.switch_to.active_element.send_keys(*keys)
        return self.wait()

    def click(self, selector: str) -> "Page":
        self.find(selector).click()
        return self.wait()

    def paste(self, picture: bytes) -> "Page":
        """Paste a picture, as after copying it in another program."""
        code = """
            const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "../../image.png", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));"""
        self.run(code, base64.b64encode(picture).decode())
        return self.wait()

    def drop(self, *paths: Path, text: str = "") -> "Page":
        """Drop files, or a link, on the sheet."""
        items = [{"mimeType": "text/uri-list", "data": text}] if text else []
        for kind in ("dragEnter", "dragOver", "drop"):
            data = {"items": items, "files": list(map(str, paths)), "dragOperationsMask": 1}
            self.send("Input.dispatchDragEvent", type=kind, x=300, y=200, data=data)
        return self


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
def page(browser, port):
    return Page(browser, port)


@pytest.fixture
def slow_find(monkeypatch):
    """Have the server take its time: slow_find(seconds)."""
    original = draw.find

    def slow_find(seconds: float) -> None:
        def find(picture: io.BytesIO) -> tuple:
            time.sleep(seconds)
            return original(picture)

        monkeypatch.setattr(draw, "find", find)

    return slow_find


def draw_number(page: Page, number: str) -> tuple[np.ndarray, list[int]]:
    """Draw digits side by side; return their extents (N, 4), and how long each answer took."""
    extents, times = [], []
    for i, digit in enumerate(number):
        strokes = [np.add(stroke, [120 + 220 * i, 60]) for stroke in STROKES[digit]]
        for stroke in strokes:
            page.draw(stroke)
            times.append(page.latency())
        every = np.concatenate(strokes)
        extents.append([*(every.min(0) - 10), *(every.max(0) + 10)])  # a pen is 20 wide
    return np.array(extents), times


# ---------------------------------------------------------------------------- drawing
def test_a_number_is_read_stroke_by_stroke(page):
    extents, _ = draw_number(page, "373")
    assert page.numbers() == ["373", "373"]
    assert (abs(page.boxes() - extents) < 8).all()


def test_digits_at_the_edge_of_the_sheet_are_read(page):
    for x, y in ((4, 4), (956, 4), (4, 416), (956, 416)):  # in each corner
        page.draw(np.array([[x, y], [x, y + (150 if y < 200 else -150)]])).wait()
        assert len(page.boxes()) == 1, (x, y)
        page.press(ESCAPE)
    ((_, top, _, bottom),) = page.draw((seven() - [0, 90]) * [1, 420 / 250]).boxes()
    assert top <= 0 and bottom >= 420  # as high as the sheet


def test_the_answer_changes_while_one_draws_with_one_request_at_a_time(page, slow_find):
    page.run("""
        window.under_way = window.most = window.all = 0;
        const original = window.fetch;
        window.fetch = async (...what) => {
          window.most = Math.max(window.most, ++window.under_way);
          window.all++;
          try { return await original(...what); } finally { window.under_way--; }
        };""")
    page.begin(seven())
    assert page.numbers() == ["7", "7"]  # before the stroke has ended
    slow_find(0.2)
    for i in range(40):
        page.pointer("mouseMoved", 430 + i, 340)
    page.pointer("mouseReleased", 470, 340, buttons=0)
    assert len(page.boxes()) == 1
    assert page.run("return window.most") == 1
    assert 2 < page.run("return window.all") < 40


def test_an_answer_that_takes_long_is_marked_as_old(page, slow_find):
    page.draw(seven(-300)).wait()
    slow_find(1.5)
    page.draw(seven(100))
    time.sleep(0.6)
    assert page.find("#answer").get_attribute("aria-busy") == "true"
    assert page.find("#sign").is_displayed()
    assert float(page.find("#right").value_of_css_property("opacity")) < 0.5
    assert page.numbers() == ["77", "77"] and not page.find("#sign").is_displayed()
    page.draw(seven(300))
    page.find("#clear").click()  # what is under way is of no interest any more
    assert page.answer() == "Draw on the sheet." and len(page.boxes()) == 0
    time.sleep(2)
    assert page.answer() == "Draw on the sheet."


def test_a_server_that_comes_back_is_asked_by_itself_and_tells_its_own_names(browser, runs):
    with serving({"narrow": runs["mini_vit"]}) as port:
        page = Page(browser, port)
        assert page.draw(seven()).answer().startswith("narrow reads")
    page.draw(seven(200))
    page.wait_until('document.querySelector("#answer .error")')
    assert "is draw.py still running?" in page.find("#answer").text and not page.all(".box")
    with serving({"other": runs["vit"], "third": runs["mini_vit"]}, port) as same:
        assert same == port
        page.wait_until('document.querySelector("#answer b")')
        assert re.findall(r"(\w+) reads", page.answer()) == ["other", "third"]
        assert page.numbers() == ["77", "77"]


# ---------------------------------------------------------------------------- the answer
def test_each_run_has_its_bars_and_says_what_its_heat_map_shows(page, known):
    page.paste(on_sheet(known[0][:2]))
    assert [element.text for element in page.all(".run h3")] == 2 * ["mini_vit", "vit"]
    for i, run in enumerate(page.all(".run")):
        rows = [row.text.split() for row in run.find_elements("css selector", "li")]
        assert len(rows) == 3 and rows[0][0] == page.numbers()[i % 2][i // 2]
        legend = run.find_element("css selector", ".faint").text
        assert ("class token" if i % 2 else "blue opposes it") in legend
    page.click("#all")
    assert page.driver.switch_to.active_element.text == "Show the three likeliest"
    for run in page.all(".run"):
        rows = [row.text.split() for row in run.find_elements("css selector", "li")]
        assert [row[0] for row in rows] == list("0123456789")
        assert sum(float(row[1]) for row in rows) == pytest.approx(100, abs=0.5)
    code = "return new Set(arguments[0].getContext('2d').getImageData(0, 0, 224, 224).data).size"
    assert all(page.run(code, canvas) > 20 for canvas in page.all(".digit canvas"))


def test_what_is_unsure_is_said(page, known, monkeypatch):
    monkeypatch.setattr(draw, "doubt", lambda digit, probabilities: "may be a line")
    page.paste(on_sheet(known[0][:1]))
    assert "mini_vit: this may be a line." in page.answer() and "disagree" not in page.answer()
    page.run("answer.digits[0].runs[1].probabilities.reverse(); show()")
    assert "The runs disagree." in page.answer()
    page.paste(png(np.full((200, 300), 255, np.uint8)))
    assert page.answer() == "I see no digit in this." and not page.find("#latency").text


def test_fool_it(page, known):
    page.paste(on_sheet(known[0][:1]))
    assert not page.all(".fooled") and not page.find("#distance").is_displayed()
    page.click("#fool")
    assert "changed to fool mini_vit" in page.all(".fooled")[0].text
    assert len(re.findall(r"vit reads \d, \d+\.\d %", page.all(".fooled")[1].text)) == 2
    page.run("distance.value = 0; distance.oninput()")
    assert f"mini_vit reads {page.numbers()[0]}" in page.all(".fooled")[0].text
    page.run("distance.value = 0.3; distance.oninput()")
    page.wait()
    assert page.find("#by").text == "0.30"
    answer = page.numbers()[0]
    assert f"mini_vit reads {answer}" not in page.all(".fooled")[0].text
    page.click("#fool")
    assert not page.all(".fooled")


def test_what_is_it_counts_and_saves(page, known, tmp_path):
    page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    images, labels = known
    page.paste(on_sheet(images[:2]))
    right, wrong = labels[0], (labels[1] + 1) % 10
    assert not page.find("#score").is_displayed()
    page.click(f'[data-key="0-{right}"]').click(f'[data-key="1-{wrong}"]')
    assert page.find("#counts").text == "mini_vit: 1 right, 1 wrong; vit: 1 right, 1 wrong"
    page.click(f'[data-key="1-{wrong}"]').click(f'[data-key="1-{labels[1]}"]')  # corrected
    assert page.find("#counts").text == "mini_vit: 2 right, 0 wrong; vit: 2 right, 0 wrong"
    page.click("#save")
    for _ in range(100):
        archives = list(tmp_path.glob("*.zip"))
        if archives:
            break
        time.sleep(0.05)
    names = zipfile.ZipFile(archives[0]).namelist()
    assert sorted(int(name[0]) for name in names) == sorted(labels[:2])


def test_a_label_belongs_to_its_digit_alone(page):
    pressed = "return [...document.querySelectorAll('.labels [aria-pressed=true]')].length"
    page.draw(seven()).wait().click('[data-key="0-7"]')
    page.click("#undo")
    assert page.draw(seven()).wait().run(pressed) == 0  # another seven, in the same place
    page.click("#all")
    page.click('[data-key="0-7"]')
    assert page.run(pressed) == 1
    assert page.find("#counts").text.startswith("mini_vit: 2 right")


# ---------------------------------------------------------------------------- keys and pointers
def test_undo_redo_and_clear_by_button_and_by_key(page):
    for x in (-300, -100, 100):
        page.draw(seven(x))
    assert len(page.boxes()) == 3
    assert len(page.click("#undo").boxes()) == 2
    assert len(page.press(CONTROL, "z").boxes()) == 1
    assert len(page.press(CONTROL, "y").boxes()) == 2
    assert len(page.press(CONTROL, SHIFT, "z").boxes()) == 3
    assert len(page.press(ESCAPE).boxes()) == 0
    for kind in ("rawKeyDown", "keyUp"):  # Ctrl-Z on a Cyrillic keyboard
        key = {"modifiers": 2, "code": "KeyZ", "key": "я", "windowsVirtualKeyCode": 90}
        page.send("Input.dispatchKeyEvent", type=kind, **key)
    assert len(page.boxes()) == 3  # what was cleared is back
    for _ in range(3):
        page.find("#undo").send_keys(ENTER)
    assert page.answer() == "Draw on the sheet."
    assert page.find("#undo").get_attribute("aria-disabled") == "true"
    assert page.driver.switch_to.active_element.text == "Undo"  # focus has stayed
    page.find("#redo").send_keys(ENTER)
    assert len(page.boxes()) == 1


def test_palms_pinches_and_lost_releases_draw_nothing(page):
    page.resize(*LAPTOP, touch=True)
    strokes = "items.filter(item => item.points).length"
    page.touch("touchStart", (200, 300))  # a palm, and then the pen
    page.draw(seven(), by="pen")
    page.touch("touchEnd")
    page.touch("touchStart", (250, 300))  # the palm once more
    page.touch("touchEnd")
    assert page.numbers() == ["7", "7"] and page.run(f"return {strokes}") == 1
    page.run("lastPen = -1e9")  # some time passes
    page.touch("touchStart", (200, 100))
    page.touch("touchStart", (200, 100), (300, 300))
    page.touch("touchMove", (190, 90), (310, 310))
    page.touch("touchEnd")
    assert page.wait().run(f"return {strokes}") == 1
    page.resize(*LAPTOP)
    page.press(ESCAPE)
    page.pointer("mouseMoved", 480, -15, buttons=0)  # begins outside
    page.pointer("mousePressed", 480, -15)
    page.pointer("mouseMoved", 480, 100)
    page.pointer("mouseMoved", 470, 300)
    page.pointer("mouseMoved", 300, 300, buttons=0)  # its release is lost
    page.pointer("mouseMoved", 200, 200, buttons=0)
    ((left, top, _, bottom),) = page.boxes()
    assert left > 440 and top < 10 and bottom > 290
    page.press(ESCAPE)
    page.pointer("mousePressed", 480, 15)
    page.pointer("mouseReleased", 480, 15, buttons=0)
    assert page.run("return items.at(-1).points.length") == 1  # hovering has not drawn


# ---------------------------------------------------------------------------- pictures
def test_pictures_are_shown_as_they_are_read(page, known, tmp_path):
    (image, *_), (label, *_) = known
    photograph = draw_picture(image.view(28, 28).numpy(), "photograph", random.Random(1))
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown rotated by 90 degrees clockwise
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.jpg", exif=exif)
    scan = Image.open(io.BytesIO(on_sheet(image[None])))
    scan.save(tmp_path / "scan.tiff")  # which browsers can't show
    clear = Image.new("RGBA", scan.size)  # black on transparent
    clear.putalpha(Image.eval(scan, lambda v: 255 - v))
    clear.save(tmp_path / "clear.png")
    page.resize(*LAPTOP, dark=True)
    page.wait_until("drawing.getContext('2d').getImageData(5, 5, 1, 1).data[0] < 60")
    for i, name in enumerate(["rotated.jpg", "scan.tiff", "clear.png"]):
        if i == 0:
            page.drop(tmp_path / name)
        else:
            page.find("#file").send_keys(str(tmp_path / name))
        page.wait_until(f"items.length === {i + 1} && items[{i}].image")
        assert page.numbers() == 2 * [str(label)] and page.ink(480, 5) > 90  # paper, or a desk
        picture = scan if i else photograph
        dark = np.argwhere(np.asarray(picture.convert("L"), float) < 90)
        scale = min(960 / picture.width, 420 / picture.height)
        offset = [(960 - scale * picture.width) / 2, (420 - scale * picture.height) / 2]
        extent = np.concatenate([dark.min(0)[::-1], dark.max(0)[::-1]]) * scale + 2 * offset
        assert abs(page.boxes() - extent).max() < 25
    whole = (tmp_path / "rotated.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    page.drop(tmp_path / "broken.jpg")
    assert "missing" in page.wait_until("items.length === 4 && items[3].image").answer()
    page.draw(seven())  # starts a new drawing
    assert page.numbers() == ["7", "7"]


def test_what_was_dropped_last_wins_and_strokes_are_not_hidden(page, known, slow_find, tmp_path):
    images, labels = known
    (tmp_path / "slow.png").write_bytes(on_sheet(images[:1]))
    (tmp_path / "fast.png").write_bytes(on_sheet(images[1:2]))
    slow_find(1)
    page.drop(tmp_path / "slow.png")
    time.sleep(0.4)
    assert page.find("#sign").is_displayed()  # something is going on
    slow_find(0)
    page.drop(tmp_path / "fast.png")
    assert page.numbers() == 2 * [str(labels[1])]
    time.sleep(1)
    assert page.numbers() == 2 * [str(labels[1])]
    slow_find(0.5)
    page.drop(tmp_path / "slow.png")
    page.draw(seven())
    assert page.numbers() == ["7", "7"] and page.ink(460, 90) < 60


def test_what_is_no_picture_is_said_and_changes_nothing(page, tmp_path):
    page.draw(seven()).wait()
    (tmp_path / "letter.txt").write_text("no picture")
    (tmp_path / "large.png").write_bytes(b"\0" * 25_000_000)
    cases = {"letter.txt": "save it as JPEG or PNG", "large.png": "This picture has 25"}
    for name, words in cases.items():
        page.drop(tmp_path / name).wait_until("notice.textContent")
        assert words in page.find("#notice").text
        assert page.numbers() == ["7", "7"]
        page.draw(seven(100)).wait()
        assert not page.find("#notice").text
        page.click("#undo")
    page.drop(text="https://example.com/seven.png").wait_until("notice.textContent")
    assert "There is no picture in that" in page.find("#notice").text
    assert page.numbers() == ["7", "7"]


# ---------------------------------------------------------------------------- screens
@pytest.mark.parametrize("size", [LAPTOP, PHONE, LANDSCAPE], ids=str)
def test_sheet_buttons_and_answer_fit_the_screen(size, browser, runs):
    name = "a_run_with_a_very_long_name_that_has_no_place_to_break_anywhere"
    with serving({name: runs["mini_vit"]}) as port:
        page = Page(browser, port, size, touch=size != LAPTOP)
        width, height = page.run("return [drawing.width, drawing.height]")
        stroke = seven() * [width / 960, height / 420]
        page.touch("touchStart", tuple(stroke[0]))
        for point in stroke[1:]:
            page.touch("touchMove", tuple(point))
        page.touch("touchEnd")
        assert page.numbers() == ["7"]
        assert page.run("return scrollY") == 0  # the finger has drawn, not scrolled
        assert page.run("return document.documentElement.scrollWidth") <= size[0]
        seen = ["#sheet", "#undo", "#open", "#fool", "#answer b", ".run li"]
        code = "const r = arguments[0].getBoundingClientRect()"
        code += "; return [r.right, r.bottom, r.height]"
        extents = np.array([page.run(code, page.find(part)) for part in seen])
        assert (extents[:, :2] <= size).all(), extents
        assert extents[0, 2] <= 0.56 * size[1]


# ---------------------------------------------------------------------------- as a script
def measure(browser, folder: Path) -> str:
    """Return how long a run takes to answer a stroke: from its end to the answer on the screen."""
    times = []
    with serving(draw.load_runs([folder], "auto")) as port:
        page = Page(browser, port)
        draw_number(page, "7")
        while len(times) < 20:
            page.press(ESCAPE)
            times += draw_number(page, "374")[1]
    times = sorted(times)
    return f"{folder}: {statistics.median(times):.0f} ms ({times[0]} to {times[-1]})"


def photograph(browser, folders: list[Path], path: Path) -> None:
    """Draw a number and save what the page shows of it."""
    with serving(draw.load_runs(folders, "auto")) as port:
        page = Page(browser, port)
        page.resize(1280, 720)
        draw_number(page, "37")
        page.click("#fool")
        page.run("latency.hidden = true")
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure in the browser how long runs take to answer."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--picture", type=Path, help="save the page with these runs instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with a_browser() as browser:
        if args.picture:
            photograph(browser, args.runs, args.picture)
        else:
            for folder in args.runs:
                print(measure(browser, folder), flush=True)


if __name__ == "__main__":
    main()
