"""Tests of schedules that are not given to `lower`: contexts, tuning files, and tuning itself."""
