"""The workshop: what makes, draws and tries the product, and no user of it calls. Not in the wheel."""
