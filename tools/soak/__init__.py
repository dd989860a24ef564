"""Kill a run at random moments, resume it each time, and compare it with one that nothing disturbed."""
