"""Run the notebooks and keep small outputs: `uv run python notebooks/refresh.py`.

Pictures are stored with few colours, so that a notebook can be read as a page and still be a small file.
"""

import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


def small(picture: str) -> str:
    """A PNG of 96 colours, base64 like the one given."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(96, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=300).execute()
        for cell in notebook.cells:
            cell.metadata.clear()
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output.data = {"image/png": small(output.data["image/png"])}
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
