"""README's commands work; numbers that README, RESULTS and the docstrings repeat agree."""

import ast
import re
import shlex
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, TINY, torchrun
from PIL import Image

import look

README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "RESULTS.md"))
FOOTNOTE = " [¹²³⁴]$"
ACCURACY = r"\d\d\.\d\d(?: ± \d\.\d\d)? %"


def table(text: str, first_cells: str) -> list[dict[str, str]]:
    """Return one dict per row, keyed by header, of the table whose header begins with these."""
    lines = text[text.index(f"| {first_cells} |") :].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def by_script(rows: list[dict], column: str) -> dict[str, dict]:
    """Return the first row of each script."""
    named = {}
    for row in rows:
        named.setdefault(re.search(r"(\w+)\.py", row[column])[1], row)
    return {name: named[name] for name in SCRIPTS}


IN_README = by_script(table(README, "script"), "script")
ON_CPU = by_script(table(RESULTS, "on the Xeon | parameters"), "on the Xeon")
ON_GPU = by_script(table(RESULTS, "on the H200 | parameters"), "on the H200")


def accuracy(row: dict) -> str:
    """Return the mean over seeds as RESULTS gives it or, of one or two, each seed's accuracy."""
    seeds = re.sub(FOOTNOTE, "", row["each seed"])
    return row["mean"] if seeds.count(",") > 1 else seeds


def docstring(script: str) -> str:
    return " ".join(ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text())).split())


def test_readme_says_what_results_says(script):
    said, cpu, gpu = IN_README[script], ON_CPU[script], ON_GPU[script]
    assert said["parameters"] == cpu["parameters"] == gpu["parameters"]
    on_cpu = re.sub(FOOTNOTE, "", said["two CPU cores"])
    minutes = round(float(re.sub(FOOTNOTE, "", cpu["minutes"])))
    assert on_cpu == f"{accuracy(cpu)}, {minutes} min"
    on_gpu = re.sub(FOOTNOTE, "", said["one GPU"])
    seconds = re.sub(FOOTNOTE, "", gpu["seconds ¹"])
    if "$" in gpu["on the H200"]:  # with another recipe than the default
        assert on_gpu == "not measured"
        assert f"{accuracy(gpu)} in {seconds} s" in README
    else:
        assert on_gpu == f"{accuracy(gpu)}, {seconds} s"


def test_parameters_are_those_of_the_model(script, module):
    model = module.Transformer(module.Config(n_layers=1))
    one = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks.parameters())
    if script == "mini_vit_concat":
        block += sum(p.numel() for p in model.reduce.parameters())
    total = one + (module.Config().n_layers - 1) * block
    assert IN_README[script]["parameters"] == f"{total:,}"


def test_docstrings_say_what_results_says(script):
    measured = [accuracy(row) for rows in (ON_CPU, ON_GPU) for row in rows.values()]
    said = re.findall(ACCURACY, docstring(script))
    assert said and set(said) <= set(re.findall(ACCURACY, "; ".join(measured)))
    for number in re.findall(r"[\d,]{7,} parameters", docstring(script)):
        numbers = {row["parameters"] for row in ON_CPU.values()} | {"86,567,656"}
        assert number.split()[0] in numbers


@pytest.mark.parametrize("rows", [ON_CPU, ON_GPU], ids=["CPU", "GPU"])
def test_means_and_deviations_are_those_of_the_seeds(rows):
    for row in rows.values():
        seeds = [float(n) for n in re.findall(r"\d\d\.\d\d", row["each seed"])]
        if row["mean"]:
            mean, deviation = statistics.mean(seeds), statistics.stdev(seeds)
            assert row["mean"] == f"{mean:.2f} ± {deviation:.2f} %"


def test_every_accuracy_in_readme_is_in_results():
    assert set(re.findall(ACCURACY, README)) <= set(re.findall(ACCURACY, RESULTS))


# ---------------------------------------------------------------- commands
def commands(start: str) -> list[list[str]]:
    """Return the commands in README that begin with these words, without their comments."""
    found = []
    for line in README.splitlines():
        for command in line.split("&&"):
            if re.match(rf"\s*(\$ )?{start}", command):
                found.append(shlex.split(command.replace("$ ", "", 1), comments=True))
    return found


def with_small_settings(script: str, flags: list[str]) -> list[str]:
    """Return a README's flags, and some that make the run short, and the network small."""
    shape = [] if "--n_embd" in flags else TINY[script]
    short = "--subset 512 --batch_size 64 --max_iters 4 --device cpu".split()
    return [*shape, *flags, *short]


def draw_a_one(path: str) -> None:
    """Draw a stroke with ink on paper."""
    pixels = np.full((60, 60), 230, np.uint8)
    pixels[12:48, 28:32] = 20
    Image.fromarray(pixels).save(path)


def test_readme_s_commands_train_and_look(main, capfd):
    training = commands(r"python (mini_)?vit\w*\.py")
    looking = commands(r"python look\.py")
    assert training and looking
    for _, file, *flags in training:
        script = file.removesuffix(".py")
        assert "accuracy: " in main(script, *with_small_settings(script, flags)).stdout
    for _, _, *arguments in looking:
        for path in [word for word in arguments if not word.startswith("-")]:
            if Path(path).suffix:
                draw_a_one(path)
            elif not Path(path).exists():  # a run that README doesn't train
                shutil.copytree(next(Path("runs").glob("*/model.pt")).parent, path)
        assert look.main(["--device", "cpu", *arguments]) == 0
        assert "error" not in capfd.readouterr().err


@pytest.mark.slow
def test_readme_s_commands_train_with_torchrun(run):
    on_one_node = [
        command
        for command in commands("torchrun")
        if not re.search(r"HOST|nnodes=[^1]", str(command))
    ]
    assert on_one_node
    for command in on_one_node:
        place = next(n for n, word in enumerate(command) if word.endswith(".py"))
        script = command[place].removesuffix(".py")
        launch = [*torchrun(2)[:2], *command[1:place]]
        result = run(script, *with_small_settings(script, command[place + 1 :]), launch=launch)
        assert "accuracy: " in result.stdout
