"""What the service says about itself: counters, rates, alarms, the status made of them, metrics."""
