"""Draw a digit in the browser, and see after each stroke what each run makes of it.

python draw.py                         # the newest run below runs/, at http://127.0.0.1:8000
python draw.py runs/mini_vit runs/vit  # these two, side by side

draw.html is the page. It sends a drawing or a picture to /read, which finds the digits and asks
each run. Only this machine gets an answer, unless --host lets others in. Nothing is stored.
"""

import argparse
import errno
import io
import ipaddress
import json
import os
import re
import select
import socket
import socketserver
import sys
import threading
import webbrowser
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import EpsImagePlugin
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import look
from digits import Digit, read_digits

PAGE = Path(__file__).with_name("draw.html")
MAX_BYTES = 20_000_000  # of a picture
ANYWHERE = ("0.0.0.0", "::")  # a host that means all of this machine's addresses
EpsImagePlugin.gs_binary = False  # or Pillow would run Ghostscript on what a client sends
ATTENTION = "orange is where the class token looks (attention, rolled out over the blocks)"
GRADIENT = "orange supports the answer, blue opposes it (gradient of its logit times the pixels)"


class Refusal(Exception):
    """An error response: a status code, and one line that says why."""


# ---------------------------------------------------------------------------- what the runs see
def load_runs(folders: list[Path], device: str) -> dict[str, look.Run]:
    """Return the runs in these folders by name, ready to answer fast."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = {}
    for name, folder in zip(names, folders, strict=True):
        run = look.load_run(folder, None, device)
        run.model.requires_grad_(False)  # only pixels need a gradient
        # For a few images, casting all weights to bfloat16 takes longer than the matmuls.
        run.model.precision = "float32"
        runs[name] = run
    return runs


def has_patches(run: look.Run) -> bool:
    """Return whether a run's model is a vit."""
    return hasattr(run.model, "position")


def explain(run: look.Run, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities (N, 10) for images (N, 784), and a heat map that explains each.

    The heat maps (N, rows, columns) go from -1 to 1. A vit's shows its class token's attention.
    Another model's is, for each pixel, the gradient of the winning logit times the pixel: to first
    order, how much lower the logit would be if the pixel were black.
    """
    pixels = (images.to(run.device) / 255).requires_grad_()
    logits = run.model(pixels)
    if has_patches(run):
        with torch.no_grad():
            heat = look.rollout(run.model, pixels)
        heat = heat - heat.amin((1, 2), keepdim=True)
    else:
        (gradient,) = torch.autograd.grad(logits.amax(-1).sum(), pixels)
        heat = (gradient * pixels.detach()).unflatten(-1, (28, 28))
    heat = heat / heat.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
    return logits.detach().softmax(-1), heat


def find(picture: bytes) -> list[Digit]:
    """Return the digits of a picture, of which there may be none."""
    try:
        return read_digits(io.BytesIO(picture))
    except Exception as error:  # whatever Pillow raises
        if "nothing in it" in str(error):
            return []
        unknown = type(error).__name__ == "UnidentifiedImageError"
        reason = "save it as JPEG or PNG" if unknown else look.first_line(error)
        raise Refusal(400, f"can't read this picture: {reason}") from None


def ask(runs: dict[str, look.Run], digits: list[Digit]) -> list[dict]:
    """Return what the page shows for each digit."""
    shown = [{"box": d.box, "row": d.row, "pixels": d.pixels.tolist(), "runs": []} for d in digits]
    if not digits:
        return []
    images = torch.stack([digit.pixels for digit in digits])
    for run in runs.values():
        probabilities, heat = explain(run, images)
        heat = (1000 * heat).round().int()  # thousandths: short in JSON
        for digit, p, h in zip(shown, probabilities.tolist(), heat.tolist(), strict=True):
            digit["runs"].append({"probabilities": p, "heat": h})
    return shown


# ---------------------------------------------------------------------------- the server
class Server(ThreadingHTTPServer):
    """One thread per request, and a worker thread that does all the computing."""

    allow_reuse_port = False
    allow_reuse_address = sys.platform != "win32"  # there, two servers could have one port

    def __init__(self, host: str, port: int, runs: dict[str, look.Run]):
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        self.host = self.server_address[0]  # "0", too, means 0.0.0.0
        self.names = {"localhost", "127.0.0.1", "[::1]", host, self.host, f"[{self.host}]"}
        self.runs = runs
        # One core is enough. With more, torch would wait for cores that a training run is using.
        self.worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    def server_bind(self) -> None:
        """Bind as HTTPServer does, without asking for this machine's name, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def url(self, host: str) -> str:
        """Return where a browser finds the page."""
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def is_own_name(self, name: str) -> bool:
        """Return whether a Host header's name (IPv6 in brackets) can only mean this server.

        Another site can point its own name at this machine (DNS rebinding), but not an address.
        """
        if name in self.names:
            return True
        try:
            return self.host in ANYWHERE and bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False


class Handler(BaseHTTPRequestHandler):
    timeout = 20  # seconds that a client may be silent

    def do_GET(self) -> None:
        self.respond(self.get)

    def do_POST(self) -> None:
        self.respond(self.post)

    def respond(self, answer: Callable[[], tuple[str, bytes]]) -> None:
        """Send the answer's type and content, or say in one line why there is none."""
        try:
            self.check_sender()
            self.send(200, *answer())
        except Refusal as refusal:
            self.send_error(*refusal.args)
        except (ConnectionError, TimeoutError):
            pass  # the client has gone
        except Exception as error:
            self.send_error(500, f"draw.py failed: {look.first_line(error)}")
            raise  # the terminal gets the traceback, and the server goes on

    def check_sender(self) -> None:
        """Refuse requests from other sites' pages, whatever host name they use."""
        host = ", ".join(self.headers.get_all("Host", [])).lower()
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^][:/@\s]+)(:\d+)?", host)
        if not match or not self.server.is_own_name(match[1]):
            raise Refusal(403, f"this isn't {host!r}: use the address that draw.py has printed")
        if self.headers.get("Origin", f"http://{host}").lower() != f"http://{host}":
            raise Refusal(403, "requests from other sites' pages are refused")

    def get(self) -> tuple[str, bytes]:
        if self.path == "/":
            return "text/html; charset=utf-8", PAGE.read_bytes()
        if self.path != "/runs":
            raise Refusal(404, "there is nothing here but the page, at /")
        runs = []
        for name, run in self.server.runs.items():
            heat = ATTENTION if has_patches(run) else GRADIENT
            runs.append({"name": name, "script": run.state["script"], "heat": heat})
        return "application/json", json.dumps(runs).encode()

    def post(self) -> tuple[str, bytes]:
        if self.path != "/read":
            raise Refusal(404, "pictures go to /read")
        picture = self.body()
        digits = self.compute(find, picture)
        shown = self.compute(ask, self.server.runs, digits)
        return "application/json", json.dumps(shown).encode()

    def body(self) -> bytes:
        """Return what the client sends."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refusal(411, "a picture needs a valid Content-Length header")
        if int(length) > MAX_BYTES:
            raise Refusal(413, f"a picture may be at most {MAX_BYTES // 10**6} MB")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise ConnectionError("the client has gone")
        return content

    def compute(self, function: Callable, *arguments):
        """Run a function in the worker and return its result; skip it if the client has gone."""

        def unless_gone():
            if self.is_gone():
                raise ConnectionError("the client has gone")
            return function(*arguments)

        return self.server.worker.submit(unless_gone).result()

    def is_gone(self) -> bool:
        """Return whether the client has hung up, as the page does once there is a newer stroke."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain=None) -> None:
        """Send a status and one line; http.server calls this, too."""
        line = message or self.responses[code][0]
        try:
            self.send(code, "text/plain; charset=utf-8", f"{line}\n".encode())
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(1000):  # read what still comes, or a reset may discard the reply
                if not self.connection.recv(1 << 16):
                    break
        except OSError:
            pass  # the client has gone

    def log_message(self, *arguments) -> None:
        """Don't log requests."""


# ---------------------------------------------------------------------------- main
def open_server(host: str, port: int, runs: dict[str, look.Run]) -> Server:
    """Return a server at this port or, where that is taken, at the next free one."""
    for candidate in range(port, min(port + 100, 65536)):
        try:
            return Server(host, candidate, runs)
        except OSError as error:
            reason = error.strerror
            if error.errno != errno.EADDRINUSE:
                break
    raise SystemExit(f"draw.py: error: can't listen on {host}, port {port}: {reason}")


def own_address() -> str:
    """Return this machine's address in its network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, only asks for the route
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def open_browser(url: str) -> None:
    """Open the page in a browser if there is a display."""
    has_windows = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_windows or sys.platform in ("darwin", "win32"):
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def serve(server: Server, port: int, with_browser: bool) -> None:
    """Say where the page is, and serve it until Ctrl-C."""
    blank = Digit(torch.zeros(784, dtype=torch.uint8), (0, 0, 28, 28), 0)
    server.worker.submit(ask, server.runs, [blank]).result()  # the first time takes longer
    url = server.url("127.0.0.1" if server.host in ANYWHERE else server.host)
    is_other = port not in (0, server.server_port)
    print(f"{url} (port {port} is taken)" if is_other else url)
    if server.host in ANYWHERE:
        print(f"Anyone on your network can draw, too, at {server.url(own_address())}: no password,")
        print("no encryption. They see the runs' names and answers, but no files.")
    print("Press Ctrl-C to stop.", flush=True)
    if with_browser:
        open_browser(url)
    server.serve_forever()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs (default: the newest)")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets your network in (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="or the next that is free (default: 8000)")
    add("--no_browser", action="store_true", help="print the page's address, don't open it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error(f"--port must be from 0 to 65535, not {args.port}")
    folders = [Path(os.path.expanduser(folder)) for folder in args.runs] or [look.newest_run()]
    try:
        runs = load_runs(folders, args.device)
        serve(open_server(args.host, args.port, runs), args.port, not args.no_browser)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
