"""Draw a digit in the browser, and see while you draw what each run makes of it.

python draw.py                         # the newest run below runs/, at http://127.0.0.1:8000
python draw.py runs/mini_vit runs/vit  # these two, side by side

draw.html is the page. It sends a drawing or a picture to /read, which finds the digits and asks
each run. Only this machine gets an answer, unless --host lets others in. Nothing is kept.
"""

import argparse
import base64
import errno
import hashlib
import io
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import AF_INET, AF_INET6
from urllib.parse import urlsplit

import psutil
import torch
import torch.nn.functional as F
import waitress
from flask import Flask, abort, request, send_file
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from werkzeug.exceptions import HTTPException

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import look
from digits import Digit, NothingThere, digits_of, doubt, open_picture

PAGE = Path(__file__).with_name("draw.html")
MAX_BYTES = 20_000_000  # of a picture
MOST_DIGITS = 100  # of a picture
PREVIEW = (960, 640)  # the most pixels that the page shows of a picture
ATTENTION = "orange is where the class token looks"  # attention, rolled out over the blocks
GRADIENT = "orange supports the answer, blue opposes it"  # gradient of its logit times the pixels


# ---------------------------------------------------------------------------- what the runs see
def load_runs(folders: list[Path], device: str) -> dict[str, look.Run]:
    """Return the runs in these folders by name, ready to answer fast."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = {}
    for name, folder in zip(names, folders, strict=True):
        if not folder.is_dir():
            look.fail(f"there is no folder {folder}")
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


@torch.no_grad()
def probabilities_of(run: look.Run, images: Tensor) -> Tensor:
    """Return what a run makes of images (N, 784): probabilities (N, 10)."""
    return run.model(images.to(run.device) / 255).softmax(-1)


def fool(run: look.Run, images: Tensor, distance: float) -> Tensor:
    """Return images (N, 784), each pixel moved by `distance` (white is 1) against the run's answer.

    This is the fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572). What would be
    darker than black or brighter than white is cut off: in training it is not.
    """
    pixels = (images.to(run.device) / 255).requires_grad_()
    logits = run.model(pixels)
    loss = F.cross_entropy(logits, logits.argmax(-1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, pixels)
    moved = (pixels.detach() + distance * gradient.sign()).clamp(0, 1)
    return (255 * moved).round()


def ask(runs: dict[str, look.Run], digits: list[Digit], distance: float | None) -> list[dict]:
    """Return what the page shows for each digit; with a distance, also an image that fools."""
    if not digits:
        return []
    shown = [{"box": d.box, "row": d.row, "pixels": d.pixels.tolist(), "runs": []} for d in digits]
    images = torch.stack([digit.pixels for digit in digits])
    for run in runs.values():
        probabilities, heat = explain(run, images)
        heat = (1000 * heat).round().int()  # thousandths: short in JSON
        for digit, place, p, h in zip(digits, shown, probabilities.cpu(), heat, strict=True):
            answer = {"probabilities": p.tolist(), "heat": h.tolist(), "doubt": doubt(digit, p)}
            place["runs"].append(answer)
        if distance is not None:
            moved = fool(run, images, distance)
            seen = torch.stack([probabilities_of(other, moved).cpu() for other in runs.values()], 1)
            for place, pixels, of_runs in zip(shown, moved.int(), seen, strict=True):
                fooled = {"pixels": pixels.tolist(), "runs": of_runs.tolist()}
                place["runs"][-1]["fooled"] = fooled
    return shown


def find(file: io.BytesIO) -> tuple[Image.Image | None, list[Digit]]:
    """Return a picture as it is read, None if it has hardly any pixels, and the digits in it."""
    image = None
    digits = []
    try:
        image = open_picture(file)
        digits = digits_of(image)
    except NothingThere:
        pass  # the page says so
    except UnidentifiedImageError:
        abort(400, "can't read this picture: save it as JPEG or PNG")
    except Exception as error:  # whatever else Pillow raises
        abort(400, f"can't read this picture: {look.first_line(error)}")
    if len(digits) > MOST_DIGITS:
        abort(400, f"there are {len(digits)} digits in it, and {MOST_DIGITS} are the most: crop it")
    return image, digits


def preview(image: Image.Image) -> dict:
    """Return a picture that was read, for the page: browsers don't know all formats."""
    width = image.width * image.info["scale"]  # boxes are in pixels of the file
    note = image.info["note"]
    image.thumbnail(PREVIEW)
    file = io.BytesIO()
    image.save(file, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"url": url, "width": width, "note": note}


def answer(
    runs: dict[str, look.Run], file: io.BytesIO, distance: float | None, with_preview: bool
) -> dict:
    """Return what the page shows of a picture, and whose answers these are."""
    legends = [ATTENTION if has_patches(run) else GRADIENT for run in runs.values()]
    names = [{"name": n, "legend": legend} for n, legend in zip(runs, legends, strict=True)]
    image, digits = find(file)
    shown = preview(image) if image and with_preview else None
    return {"runs": names, "digits": ask(runs, digits, distance), "preview": shown}


# ---------------------------------------------------------------------------- the server
def make_app(runs: dict[str, look.Run], names: set[str]) -> Flask:
    """Return the page and what it asks for. It answers only to these names of this machine."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    # One thread computes, so that what a large picture has taken is used again for the next one,
    # and on one core: with more, torch would wait for cores that a training run is using.
    worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    @app.before_request
    def refuse_other_sites() -> None:
        # Another site can point its own name at this machine (DNS rebinding). Flask's own
        # TRUSTED_HOSTS can't do this: it knows no IPv6 addresses.
        if urlsplit(f"//{request.host}").hostname not in names:
            abort(403, "draw.py doesn't know this address: use the one that it printed")
        if request.origin not in (None, request.host_url.rstrip("/")):
            abort(403, "requests from other sites' pages are refused")

    @app.get("/")
    def page():
        return send_file(PAGE)

    @app.post("/read")
    def read():
        distance = request.args.get("distance", type=float)
        if distance is not None and not 0 <= distance <= 1:
            abort(400, "a distance is from 0 to 1")
        is_gone = request.environ["waitress.client_disconnected"]
        stream = request.stream
        with_preview = "preview" in request.args

        def compute():
            if is_gone():  # the page does so once something else is on the sheet
                return ""
            return answer(runs, io.BytesIO(stream.read()), distance, with_preview)

        return worker.submit(compute).result()

    @app.post("/save")
    def save():
        """Return the labelled digits that the page sends as PNGs in folders 0 to 9."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for label, pixels in request.get_json():
                name = hashlib.sha256(bytes(pixels)).hexdigest()[:12]  # the same one saved again
                with archive.open(f"{label:d}/{name}.png", "w") as png:
                    Image.frombytes("L", (28, 28), bytes(pixels)).save(png, "PNG")
        file.seek(0)
        return send_file(file, as_attachment=True, download_name="digits.zip")

    @app.errorhandler(HTTPException)
    def in_one_line(error: HTTPException):
        cause = getattr(error, "original_exception", None)  # the terminal gets its traceback
        line = f"draw.py failed: {look.first_line(cause)}" if cause else error.description
        return f"{line}\n", error.code, {"Content-Type": "text/plain; charset=utf-8"}

    return app


def make_server(app: Flask, listener: socket.socket):
    """Return waitress, set so that no client takes much memory or shuts out the others."""
    logging.getLogger("waitress").setLevel(logging.ERROR)  # a queue is nothing to report
    return waitress.create_server(
        app,
        sockets=[listener],
        threads=32,  # which wait for the one that computes, or send the page
        connection_limit=connection_limit(),
        asyncore_use_poll=True,  # select() fails above 1023 descriptors
        channel_timeout=10,  # seconds that a client may be silent
        cleanup_interval=1,
        channel_request_lookahead=1,  # or waitress won't notice that a client has hung up
        inbuf_overflow=2**16,  # bytes of a picture; what is more goes to a temporary file
        recv_bytes=2**16,  # at once: for each read, waitress looks at all clients
        max_request_body_size=2 * MAX_BYTES,  # so that Flask says what is wrong
    )


def connection_limit() -> int:
    """Return how many clients fit: each may need a descriptor, and one for a temporary file."""
    if sys.platform == "win32":
        return 400  # its select() takes 512
    import resource

    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(10, min(4000, descriptors - 50) // 2)


# ---------------------------------------------------------------------------- addresses
def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at this port or, where that is taken, at the next free one."""
    family = AF_INET6 if ":" in host else AF_INET
    both = family == AF_INET6 and socket.has_dualstack_ipv6()
    for candidate in range(port, min(port + 100, 65536)):
        try:
            return socket.create_server((host, candidate), family=family, dualstack_ipv6=both)
        except OSError as error:
            reason = error.strerror
            if error.errno != errno.EADDRINUSE:
                break
    look.fail(f"can't listen on {host}, port {port}: {reason}")


def own_addresses() -> list[str]:
    """Return this machine's addresses, IPv4 first, and first of all that of its default route."""
    cards = psutil.net_if_addrs().values()
    addresses = [a.address for card in cards for a in card if a.family in (AF_INET, AF_INET6)]
    with socket.socket(AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, only asks for the route
            first = probe.getsockname()[0]
        except OSError:
            first = ""
    return sorted(addresses, key=lambda address: (address != first, ":" in address))


def own_names(host: str) -> set[str]:
    """Return all names and addresses that mean this machine, as in a Host header."""
    name = socket.gethostname().lower()
    return {host.lower(), "localhost", name, f"{name}.local", "127.0.0.1", "::1", *own_addresses()}


def in_network(address: str) -> bool:
    """Return whether other machines may reach this one at an address."""
    ip = ipaddress.ip_address(address)
    return not (ip.is_loopback or ip.is_link_local or ip.is_unspecified)


def url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def welcome(listener: socket.socket, wanted: int) -> str:
    """Say where the page is, and who else can see it; return its address for this machine."""
    address, port = listener.getsockname()[:2]
    ip = ipaddress.ip_address(address)
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    print(url(here, port) + (f" (port {wanted} is taken)" if wanted not in (0, port) else ""))
    if not ip.is_loopback:
        there = list(filter(in_network, own_addresses())) if ip.is_unspecified else [address]
        at = f" at {url(there[0], port)}" if there else ""
        print(f"Anyone on your network can draw, too,{at}: no password, no encryption.")
        print("They see the runs' names and answers, but no files.")
    print("Press Ctrl-C to stop.", flush=True)
    return url(here, port)


# ---------------------------------------------------------------------------- main
def open_browser(address: str) -> None:
    """Open the page in a browser if there is a display."""
    has_windows = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_windows or sys.platform in ("darwin", "win32"):
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    look.PROGRAM = "draw.py"  # errors begin with it
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
    runs = load_runs(folders, args.device)
    listener = listen(args.host, args.port)
    blank = Digit(torch.zeros(784, dtype=torch.uint8), (0, 0, 28, 28), 0)
    ask(runs, [blank], 0.1)  # the first time takes longer
    server = make_server(make_app(runs, own_names(args.host)), listener)
    address = welcome(listener, args.port)
    if not args.no_browser:
        open_browser(address)
    server.run()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing needs saving
    sys.exit(main())
