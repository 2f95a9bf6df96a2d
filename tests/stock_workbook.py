"""The workbook of the data set stock_portfolio with made-up cells, for tests."""

import io

import openpyxl

from moejax.fitting.datasets import STOCK_PERIODS

STOCK = "stock portfolio performance data set.xlsx"


def stock_file(cells):
    """A workbook like UCI's; `cells` maps a period to rows of 6 weights, 6 indicators, 6 normalised indicators."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for period in reversed(STOCK_PERIODS):
        sheet = book.create_sheet(period)
        sheet.append(
            [None, "the weight of the stock-picking concept", *[None] * 5, "the original", *[None] * 11]
        )
        sheet.append(["ID", *(f"weight {i}" for i in range(6)), *(f"indicator {i % 6}" for i in range(12))])
        for i, row in enumerate(cells[period]):
            sheet.append([i + 1, *map(float, row)])
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()
