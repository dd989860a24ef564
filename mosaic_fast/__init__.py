"""MOSAIC: trains tool-using agents that plan, check, then act or refuse."""
