"""Numbers that README, RESULTS and the docstrings repeat must agree."""

import ast
import re
import statistics

import pytest
from conftest import ROOT, SCRIPTS

README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "RESULTS.md"))
FOOTNOTE = " [¹²³]$"
ACCURACY = r"\d\d\.\d\d(?: ± \d\.\d\d)? %"


def table(text: str, first_cells: str) -> list[dict[str, str]]:
    """Return one dict per row, keyed by header, of the table whose header begins with these."""
    lines = text[text.index(f"| {first_cells} |") :].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def by_script(rows: list[dict], column: str) -> dict[str, dict]:
    """Return the rows of the default settings, by script."""
    named = {
        row[column].strip("`").removeprefix("python ").removesuffix(".py"): row for row in rows
    }
    return {name: named[name] for name in SCRIPTS}


IN_README = by_script(table(README, "script"), "script")
ON_CPU = by_script(table(RESULTS, "on the Xeon | parameters"), "on the Xeon")
ON_GPU = by_script(table(RESULTS, "on the H200 | parameters"), "on the H200")


def accuracy(row: dict) -> str:
    """Return the mean over seeds as RESULTS gives it or, of a single seed, its accuracy."""
    return row["mean"] or row["each seed"]


def docstring(script: str) -> str:
    return " ".join(ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text())).split())


def test_readme_says_what_results_says(script):
    said, cpu, gpu = IN_README[script], ON_CPU[script], ON_GPU[script]
    assert said["parameters"] == cpu["parameters"] == gpu["parameters"]
    minutes = round(float(cpu["minutes"]))
    assert said["two CPU cores"] == f"{accuracy(cpu)}, {minutes} min"
    on_gpu = re.sub(FOOTNOTE, "", said["one GPU"])
    seconds = re.sub(FOOTNOTE, "", gpu["seconds ¹"])
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
    known = {accuracy(row) for rows in (ON_CPU, ON_GPU) for row in rows.values()}
    said = re.findall(ACCURACY, docstring(script))
    assert said and set(said) <= known
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
