"""What tests look at a picture with."""

import io

import matplotlib.image


def pixels(figure, dpi=60):
    """The picture as an array [row, column, colour]."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    buffer.seek(0)
    return matplotlib.image.imread(buffer)
