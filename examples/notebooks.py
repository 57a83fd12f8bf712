"""Runs the notebooks of docs, and keeps in them what each cell prints and draws: `make pictures`."""

import ast
import contextlib
import io
import json
import pathlib
from typing import Any

from paged.pictures import Picture

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def _shown(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Run a cell, and return its outputs as Jupyter would store them: what it prints, and the value at its end."""
    statements = ast.parse(source).body
    last = statements[-1] if statements and isinstance(statements[-1], ast.Expr) else None
    before = ast.Module(statements[:-1] if last else statements, type_ignores=[])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(before, f"cell {number}", "exec"), names)
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names) if last else None
    outputs = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        data = {"text/plain": str(value).splitlines(keepends=True)}
        if isinstance(value, Picture):
            data = {"image/svg+xml": value.svg.splitlines(keepends=True)} | data
        about = {"execution_count": number, "metadata": {}, "output_type": "execute_result"}
        outputs.append({"data": data} | about)
    return outputs


def ran(path: pathlib.Path) -> dict[str, Any]:
    """A notebook, run from top to bottom, with the outputs of its cells."""
    notebook, names = json.loads(path.read_text(encoding="utf-8")), {}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell |= {"execution_count": number, "outputs": _shown("".join(cell["source"]), names, number)}
    return notebook


def pictures_of(path: pathlib.Path) -> dict[str, str]:
    """The pictures that a notebook keeps, by their names on the site."""
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", ())]
    drawn = [output["data"]["image/svg+xml"] for output in outputs if "image/svg+xml" in output.get("data", ())]
    return {f"{path.stem}-{number}.svg": "".join(lines) for number, lines in enumerate(drawn)}


def page(path: pathlib.Path) -> str:
    """A notebook as a page: its words, its code in blocks, and below each what it prints and draws."""
    cells = [(cell["cell_type"], "".join(cell["source"]), cell) for cell in json.loads(path.read_text())["cells"]]
    note = f"This page is the notebook `docs/notebooks/{path.name}`, with what it prints and draws."
    names, parts = iter(pictures_of(path)), []
    for kind, text, cell in cells:
        parts.append(f"```python\n{text}\n```" if kind == "code" else text)
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text")})
            words = "".join(data["text/plain"]).rstrip()
            alt = words.partition("\n")[0].translate(str.maketrans("[]", "()"))
            parts.append(f"![{alt}]({next(names)})" if "image/svg+xml" in data else f"```text\n{words}\n```")
    return "\n\n".join([parts[0], note, *parts[1:]]) + "\n"


def main() -> None:
    """Run and write everything."""
    for path in PATHS:
        path.write_text(json.dumps(ran(path), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {len(pictures_of(path))} pictures")


if __name__ == "__main__":
    main()
