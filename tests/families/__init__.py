"""Every family of the table of models (docs/method.md), a test a cell; `make test-families` runs them all."""
