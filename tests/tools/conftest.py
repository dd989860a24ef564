"""What these tests share with those of faults: a finished run."""

from tests.faults.conftest import finished as finished
