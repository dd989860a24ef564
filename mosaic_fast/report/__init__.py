"""The report of a run: one self-contained HTML page, `python -m mosaic_fast.report RUN [RUN2]`."""
