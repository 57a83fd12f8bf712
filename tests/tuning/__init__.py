"""Tests of schedules from elsewhere than `lower`'s own argument: contexts, tuning files, and tuning itself."""
